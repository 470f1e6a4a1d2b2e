//! A node of the tree: which sectors of a region are in the set.
//!
//! A bitmap has the size of the longest list of runs. It is used if there are more runs than that
//! and all consist of whole granules, as they always do in the smallest regions. With blocks of
//! 4 KiB they do in the next larger ones.
//!
//! Invariants: the runs of a list are not empty, in order, within the region, and do not touch; a
//! region with no or with all sectors is `Empty` or `Full`; the counts of bitmaps and branches are
//! right.

use std::sync::Arc;

use super::RangeSet;
use super::bitmap::{BITS, Bitmap};
use super::region::{BRANCHES, Region, Run};
use crate::common::SectorRange;

/// The runs of a list: as many as take the memory of a bitmap.
const RUNS_MAX: usize = BITS / 8 / size_of::<Run>();

/// See the [module](self).
#[derive(Clone, Debug, Default)]
pub(super) enum Node {
    #[default]
    Empty,
    Full,
    Runs(Arc<Vec<Run>>),
    Bitmap(Arc<Bitmap>),
    Branch(Arc<Branch>),
}

/// A region in eight parts.
#[derive(Clone, Debug)]
pub(super) struct Branch {
    sectors: u64,
    pub(super) children: [Node; BRANCHES],
}

impl Node {
    /// How many sectors are in the set.
    pub(super) fn sectors(&self, region: Region) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Full => region.sectors(),
            Self::Runs(runs) => runs.iter().map(|run| run.sectors()).sum(),
            Self::Bitmap(bitmap) => bitmap.ones() << region.granule_bits(),
            Self::Branch(branch) => branch.sectors,
        }
    }

    /// Inserts `run`, a part of the region. Returns how many of its sectors are new.
    pub(super) fn insert(&mut self, region: Region, run: Run) -> u64 {
        if region.is(run) {
            let new = region.sectors() - self.sectors(region);
            *self = Self::Full;
            return new;
        }
        match self {
            Self::Full => 0,
            Self::Empty => {
                let mut runs = Vec::with_capacity(4);
                runs.push(run);
                *self = Self::Runs(Arc::new(runs));
                run.sectors()
            }
            Self::Runs(shared) => {
                let runs = Arc::make_mut(shared);
                let new = insert_into(runs, run);
                self.settle(region);
                new
            }
            Self::Bitmap(bitmap) => {
                let Some(bits) = region.bits_of(run) else {
                    self.divide(region);
                    return self.insert(region, run);
                };
                let bitmap = Arc::make_mut(bitmap);
                let new = bitmap.set(bits) << region.granule_bits();
                if bitmap.is_full() {
                    *self = Self::Full;
                }
                new
            }
            Self::Branch(branch) => {
                let branch = Arc::make_mut(branch);
                let new = match region.only_child(run) {
                    Some((index, child)) => branch.children[index].insert(child, run),
                    None => region
                        .children(run)
                        .map(|(index, child, run)| branch.children[index].insert(child, run))
                        .sum(),
                };
                branch.sectors += new;
                if branch.sectors == region.sectors() {
                    *self = Self::Full;
                }
                new
            }
        }
    }

    /// Removes `run`, a part of the region. Returns how many of its sectors were in the set.
    pub(super) fn remove(&mut self, region: Region, run: Run) -> u64 {
        if region.is(run) {
            let removed = self.sectors(region);
            *self = Self::Empty;
            return removed;
        }
        match self {
            Self::Empty => 0,
            Self::Full => {
                let (start, end) = (region.start, region.end());
                let mut rest = vec![Run { start, end }];
                remove_from(&mut rest, run);
                *self = Self::Runs(Arc::new(rest));
                run.sectors()
            }
            Self::Runs(shared) => {
                let runs = Arc::make_mut(shared);
                let removed = remove_from(runs, run);
                self.settle(region);
                removed
            }
            Self::Bitmap(bitmap) => {
                let Some(bits) = region.bits_of(run) else {
                    self.divide(region);
                    return self.remove(region, run);
                };
                let bitmap = Arc::make_mut(bitmap);
                let removed = bitmap.clear(bits) << region.granule_bits();
                if bitmap.ones() == 0 {
                    *self = Self::Empty;
                }
                removed
            }
            Self::Branch(branch) => {
                let branch = Arc::make_mut(branch);
                let removed = match region.only_child(run) {
                    Some((index, child)) => branch.children[index].remove(child, run),
                    None => region
                        .children(run)
                        .map(|(index, child, run)| branch.children[index].remove(child, run))
                        .sum(),
                };
                branch.sectors -= removed;
                if branch.sectors == 0 {
                    *self = Self::Empty;
                }
                removed
            }
        }
    }

    /// Inserts all of `other`, of the same region. Returns how many of its sectors are new.
    pub(super) fn insert_all(&mut self, region: Region, other: &Self) -> u64 {
        let before = self.sectors(region);
        match (&mut *self, other) {
            (_, Self::Empty) | (Self::Full, _) => return 0,
            (Self::Empty, _) | (_, Self::Full) => *self = other.clone(),
            (Self::Branch(branch), Self::Branch(others)) => {
                if Arc::ptr_eq(branch, others) {
                    return 0;
                }
                let branch = Arc::make_mut(branch);
                for (index, other) in others.children.iter().enumerate() {
                    branch.sectors += branch.children[index].insert_all(region.child(index), other);
                }
                if branch.sectors == region.sectors() {
                    *self = Self::Full;
                }
            }
            (Self::Runs(runs), Self::Runs(others)) => {
                *self = Self::Runs(Arc::new(merged(runs, others)));
                self.settle(region);
            }
            (Self::Bitmap(bitmap), Self::Bitmap(others)) => {
                let bitmap = Arc::make_mut(bitmap);
                bitmap.set_all(others);
                if bitmap.is_full() {
                    *self = Self::Full;
                }
            }
            (_, Self::Branch(_)) => {
                let few = std::mem::replace(self, other.clone());
                few.for_each_run(region, |run| {
                    self.insert(region, run);
                });
            }
            (_, Self::Runs(_) | Self::Bitmap(_)) => other.for_each_run(region, |run| {
                self.insert(region, run);
            }),
        }
        self.sectors(region) - before
    }

    /// Whether a sector of `run`, a part of the region, is in the set.
    pub(super) fn overlaps(&self, region: Region, run: Run) -> bool {
        match self {
            Self::Empty => false,
            Self::Full => true,
            Self::Runs(runs) => {
                let next = runs.get(runs.partition_point(|other| other.end <= run.start));
                next.is_some_and(|next| next.start < run.end)
            }
            Self::Bitmap(bitmap) => {
                let next = bitmap.next(region.bit(run.start), true);
                next.is_some_and(|next| next <= region.bit(run.end - 1))
            }
            Self::Branch(branch) => match region.only_child(run) {
                Some((index, child)) => branch.children[index].overlaps(child, run),
                None => region
                    .children(run)
                    .any(|(index, child, run)| branch.children[index].overlaps(child, run)),
            },
        }
    }

    /// The first sector of `part`, a part of the region, that is in the set, or with `inside` false
    /// is not in the set. Sectors behind the part may be returned instead of nothing.
    pub(super) fn next(&self, region: Region, part: Run, inside: bool) -> Option<u64> {
        let from = part.start;
        match self {
            Self::Empty => (!inside).then_some(from),
            Self::Full => inside.then_some(from),
            Self::Runs(runs) => {
                let run = runs.get(runs.partition_point(|run| run.end <= from));
                match run {
                    Some(run) if inside => Some(run.start.max(from)),
                    Some(run) if run.start <= from => (run.end < region.end()).then_some(run.end),
                    _ => (!inside).then_some(from),
                }
            }
            Self::Bitmap(bitmap) => {
                let bit = bitmap.next(region.bit(from), inside)?;
                Some(region.first_sector(bit).max(from))
            }
            Self::Branch(branch) => {
                let mut children = region.children(part);
                children.find_map(|(index, child, part)| {
                    branch.children[index].next(child, part, inside)
                })
            }
        }
    }

    /// Inserts into `changed` where the set differs from `earlier`, the node of the same region of
    /// an earlier copy. What the copies share is not looked at. `false` if that takes more than
    /// `steps`, from which those taken are subtracted.
    pub(super) fn changes_since(
        &self,
        region: Region,
        earlier: &Self,
        steps: &mut usize,
        changed: &mut RangeSet,
    ) -> bool {
        match (self, earlier) {
            (Self::Empty, Self::Empty) | (Self::Full, Self::Full) => return true,
            (Self::Runs(now), Self::Runs(earlier)) if Arc::ptr_eq(now, earlier) => return true,
            (Self::Bitmap(now), Self::Bitmap(earlier)) if Arc::ptr_eq(now, earlier) => return true,
            (Self::Branch(now), Self::Branch(earlier)) => {
                return Arc::ptr_eq(now, earlier)
                    || (0..BRANCHES).all(|index| {
                        let (now, earlier) = (&now.children[index], &earlier.children[index]);
                        now.changes_since(region.child(index), earlier, steps, changed)
                    });
            }
            _ => {}
        }
        if *steps == 0 {
            return false;
        }
        *steps -= 1;
        let unlike = self.unlike(region, earlier);
        let (mut from, end) = (unlike.start, unlike.end);
        while from < end {
            if *steps == 0 {
                return false;
            }
            *steps -= 1;
            let rest = Run { start: from, end };
            let nodes = [self, earlier];
            let has = nodes.map(|node| node.next(region, rest, true) == Some(from));
            let until = [0, 1].map(|n| nodes[n].next(region, rest, !has[n]).unwrap_or(end));
            let until = until[0].min(until[1]).min(end);
            if has[0] != has[1] {
                changed.insert(SectorRange::new(from, until - from));
            }
            from = until;
        }
        true
    }

    /// The part of the region outside of which `earlier`, another node of it, is the same, as far
    /// as that shows at once.
    fn unlike(&self, region: Region, earlier: &Self) -> Run {
        let (start, end) = (region.start, region.end());
        match (self, earlier) {
            (Self::Runs(now), Self::Runs(earlier)) => {
                let first = alike(now.iter(), earlier.iter());
                let (rest, earlier) = (&now[first..], &earlier[first..]);
                let last = alike(rest.iter().rev(), earlier.iter().rev());
                Run {
                    start: now[..first].last().map_or(start, |run| run.end),
                    end: rest[rest.len() - last..]
                        .first()
                        .map_or(end, |run| run.start),
                }
            }
            (Self::Bitmap(now), Self::Bitmap(earlier)) => {
                let bits = now.unlike(earlier);
                Run {
                    start: region.first_sector(bits.start),
                    end: region.first_sector(bits.end),
                }
            }
            _ => Run { start, end },
        }
    }

    /// Turns the node of `region` into that of its parent, which is returned.
    pub(super) fn raise(&mut self, region: Region) -> Region {
        match self {
            Self::Empty | Self::Runs(_) => {}
            Self::Full => {
                let (start, end) = (region.start, region.end());
                *self = Self::Runs(Arc::new(vec![Run { start, end }]));
            }
            Self::Bitmap(_) | Self::Branch(_) => {
                let sectors = self.sectors(region);
                let mut children = [const { Self::Empty }; BRANCHES];
                children[0] = std::mem::take(self);
                *self = Self::Branch(Arc::new(Branch { sectors, children }));
            }
        }
        region.parent()
    }

    /// Calls `with` for each run, in order. Runs of neighbouring children are not joined.
    fn for_each_run(&self, region: Region, mut with: impl FnMut(Run)) {
        let mut rest = Run {
            start: region.start,
            end: region.end(),
        };
        while rest.start < rest.end
            && let Some(start) = self.next(region, rest, true)
        {
            rest.start = start;
            let end = self.next(region, rest, false).unwrap_or(rest.end);
            with(Run { start, end });
            rest.start = end;
        }
    }

    /// Keeps the invariants after the list of runs has changed.
    fn settle(&mut self, region: Region) {
        let Self::Runs(runs) = self else { return };
        match runs.as_slice() {
            [] => *self = Self::Empty,
            [run] if region.is(*run) => *self = Self::Full,
            runs if runs.len() > RUNS_MAX => *self = Self::of_runs(region, runs),
            _ => {}
        }
    }

    /// Divides a bitmap.
    fn divide(&mut self, region: Region) {
        let mut runs = Vec::new();
        self.for_each_run(region, |run| runs.push(run));
        *self = Self::branch_of_runs(region, &runs);
    }

    /// The node for `runs`, all of which overlap the region. Those at its ends may reach beyond it.
    fn of_runs(region: Region, runs: &[Run]) -> Self {
        let within = runs.iter().map(|run| run.within(region));
        match runs {
            [] => Self::Empty,
            [run] if region.is(run.within(region)) => Self::Full,
            _ if runs.len() <= RUNS_MAX => {
                // Room for those that will follow.
                let mut list = Vec::with_capacity((2 * runs.len()).min(RUNS_MAX + 1));
                list.extend(within);
                Self::Runs(Arc::new(list))
            }
            _ => {
                let mut bitmap = Bitmap::default();
                for run in within {
                    let Some(bits) = region.bits_of(run) else {
                        return Self::branch_of_runs(region, runs);
                    };
                    bitmap.set(bits);
                }
                Self::Bitmap(Arc::new(bitmap))
            }
        }
    }

    fn branch_of_runs(region: Region, runs: &[Run]) -> Self {
        let mut rest = runs;
        let children = std::array::from_fn(|index| {
            let child = region.child(index);
            let end = child.end();
            let count = rest.iter().take_while(|run| run.start < end).count();
            let (ours, others) = rest.split_at(count);
            // The last one may reach into the next child too.
            let shared = ours.last().is_some_and(|run| run.end > end);
            rest = if shared { &rest[count - 1..] } else { others };
            Self::of_runs(child, ours)
        });
        let sectors = runs.iter().map(|run| run.within(region).sectors()).sum();
        Self::Branch(Arc::new(Branch { sectors, children }))
    }

    /// Asserts the invariants of the [module](self).
    pub(super) fn self_check(&self, region: Region) {
        let sectors = self.sectors(region);
        match self {
            Self::Empty | Self::Full => return,
            Self::Runs(runs) => {
                assert!(runs.len() <= RUNS_MAX, "too many runs");
                let mut last_end = None;
                for run in runs.iter() {
                    assert!(run.start < run.end, "an empty run");
                    assert!(last_end < Some(run.start), "two runs touch or overlap");
                    assert_eq!(*run, run.within(region));
                    last_end = Some(run.end);
                }
            }
            Self::Bitmap(bitmap) => bitmap.self_check(),
            Self::Branch(branch) => {
                let mut sum = 0;
                for (index, node) in branch.children.iter().enumerate() {
                    node.self_check(region.child(index));
                    sum += node.sectors(region.child(index));
                }
                assert_eq!(branch.sectors, sum);
            }
        }
        assert!(sectors > 0 && sectors < region.sectors());
    }
}

/// How many runs at the beginning are the same.
fn alike<'a>(runs: impl Iterator<Item = &'a Run>, others: impl Iterator<Item = &'a Run>) -> usize {
    runs.zip(others)
        .take_while(|(run, other)| run == other)
        .count()
}

/// Inserts `run` into an ordered list. Returns how many of its sectors are new.
fn insert_into(runs: &mut Vec<Run>, mut run: Run) -> u64 {
    let first = runs.partition_point(|other| other.end < run.start);
    if runs.get(first).is_none_or(|next| next.start > run.end) {
        runs.insert(first, run);
        return run.sectors();
    }
    let end = first + runs[first..].partition_point(|other| other.start <= run.end);
    let before: u64 = runs[first..end].iter().map(|run| run.sectors()).sum();
    run.start = run.start.min(runs[first].start);
    run.end = run.end.max(runs[end - 1].end);
    runs[first] = run;
    runs.drain(first + 1..end);
    run.sectors() - before
}

/// The runs of two ordered lists, in order.
fn merged(ours: &[Run], others: &[Run]) -> Vec<Run> {
    let mut all: Vec<Run> = Vec::with_capacity(ours.len() + others.len());
    let (mut ours, mut others) = (ours.iter().peekable(), others.iter().peekable());
    while let Some(run) = match (ours.peek(), others.peek()) {
        (Some(our), Some(other)) if our.start <= other.start => ours.next(),
        (Some(_), None) => ours.next(),
        _ => others.next(),
    } {
        match all.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => all.push(*run),
        }
    }
    all
}

/// Removes `run` from an ordered list. Returns how many of its sectors were in it.
fn remove_from(runs: &mut Vec<Run>, run: Run) -> u64 {
    let first = runs.partition_point(|other| other.end <= run.start);
    let end = first + runs[first..].partition_point(|other| other.start < run.end);
    if first == end {
        return 0;
    }
    let before: u64 = runs[first..end].iter().map(|run| run.sectors()).sum();
    let left = Run {
        start: runs[first].start,
        end: run.start,
    };
    let right = Run {
        start: run.end,
        end: runs[end - 1].end,
    };
    let rest = [left, right];
    let rest = rest.into_iter().filter(|run| run.start < run.end);
    let after: u64 = rest.clone().map(Run::sectors).sum();
    runs.splice(first..end, rest);
    before - after
}
