//! A look at all sets of several replicas at once.

use super::RangeSet;
use super::node::Node;
use super::region::{Region, Run};
use crate::common::{ReplicaIndex, ReplicaSet};

/// Whether `holds` for the replicas that have a sector in one of their sets, for every sector below
/// `end_sector`. No set reaches beyond it. If `is_certain` of some replicas, then `holds` for them
/// and for any subset of them: there the sets are not looked at.
pub fn every_sector<'a>(
    sets: impl Iterator<Item = (ReplicaIndex, &'a RangeSet)>,
    end_sector: u64,
    is_certain: impl Fn(ReplicaSet) -> bool,
    holds: impl Fn(ReplicaSet) -> bool,
) -> bool {
    let mut sets: Vec<(ReplicaIndex, RangeSet)> = sets
        .filter(|(_, set)| !set.is_empty())
        .map(|(replica, set)| (replica, set.clone()))
        .collect();
    let end = sets.iter().map(|(_, set)| set.region.end()).max();
    for (_, set) in &mut sets {
        set.reach(end.unwrap_or(0));
    }
    let first = sets.first();
    let region = first.map_or(Region::SMALLEST, |(_, set)| set.region);
    let nodes = sets.iter().map(|(replica, set)| (*replica, &set.root));
    let sweep = Sweep {
        end_sector,
        is_certain,
        holds,
    };
    sweep.region(region, nodes.collect(), ReplicaSet::EMPTY)
        && (end_sector <= region.end() || (sweep.holds)(ReplicaSet::EMPTY))
}

struct Sweep<C, H> {
    end_sector: u64,
    is_certain: C,
    holds: H,
}

impl<C: Fn(ReplicaSet) -> bool, H: Fn(ReplicaSet) -> bool> Sweep<C, H> {
    /// The same for a region. `with`: the replicas that have all of it in one of their sets.
    fn region(
        &self,
        region: Region,
        mut nodes: Vec<(ReplicaIndex, &Node)>,
        mut with: ReplicaSet,
    ) -> bool {
        if region.start >= self.end_sector {
            return true;
        }
        for (replica, node) in &nodes {
            if matches!(node, Node::Full) {
                with.insert(*replica);
            }
        }
        nodes.retain(|(replica, node)| !matches!(node, Node::Empty) && !with.contains(*replica));
        let some = nodes.iter().map(|(replica, _)| *replica).collect();
        if (self.is_certain)(with.or(some)) {
            return true;
        }
        if nodes.is_empty() {
            return (self.holds)(with);
        }
        let branches: Option<Vec<_>> = nodes
            .iter()
            .map(|(replica, node)| match node {
                Node::Branch(branch) => Some((*replica, &branch.children)),
                _ => None,
            })
            .collect();
        let Some(branches) = branches else {
            return self.runs(region, &nodes, with);
        };
        (0..branches[0].1.len()).all(|index| {
            let children = branches
                .iter()
                .map(|(replica, children)| (*replica, &children[index]));
            self.region(region.child(index), children.collect(), with)
        })
    }

    /// The same from one end of a run to the next: between two of them the sets do not change.
    fn runs(&self, region: Region, nodes: &[(ReplicaIndex, &Node)], with: ReplicaSet) -> bool {
        let end = region.end().min(self.end_sector);
        let mut from = region.start;
        // For each node whether it has the sector `from`, and where that changes.
        let mut places = vec![(false, from); nodes.len()];
        while from < end {
            let mut now = with;
            let mut next = end;
            for ((replica, node), (inside, until)) in nodes.iter().zip(&mut places) {
                if *until <= from {
                    let rest = Run { start: from, end };
                    *inside = node.next(region, rest, true) == Some(from);
                    let change = node.next(region, rest, !*inside);
                    *until = change.unwrap_or(end);
                }
                if *inside {
                    now.insert(*replica);
                }
                next = next.min(*until);
            }
            if !(self.holds)(now) {
                return false;
            }
            from = next;
        }
        true
    }
}
