//! What the engines ask for, kept in order: an effect must not call back into an engine.

use std::cell::Cell;
use std::rc::Rc;

use super::model::Value;
use crate::common::operation::{Action, Operation, RequestId};
use crate::common::report::{Fact, Report};
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::engine::{Effects, Failed, FragmentId, Mark, Tag, WorkerIndex};
use crate::jobs::JobEvent;

/// Bytes of a sector.
pub const SECTOR_LEN: usize = 512;

/// The tag of the request with this number: the simulator's guest has no chains.
pub fn tag(number: u64) -> Tag {
    Tag::Guest {
        connection: 0,
        fragment: FragmentId {
            chain: u32::try_from(number).expect("few requests"),
            offset_sectors: 0,
        },
    }
}

/// The number of the request with this tag.
pub fn number_of(tag: Tag) -> u64 {
    match tag {
        Tag::Guest { fragment, .. } => u64::from(fragment.chain),
        Tag::OwnFlush => unreachable!("the simulator has no worker"),
    }
}

/// One effect.
#[derive(Debug)]
pub enum Effect {
    /// An operation for a replica.
    Submit(Operation),
    /// An answer for the guest; how many of [`Collected::values`] it brings, or that it failed.
    Complete(Tag, Result<usize, Failed>),
    /// A durable write has a quorum.
    Written(Tag),
    /// A report.
    Report(Report),
    /// A grant for another worker.
    Wake(WorkerIndex, RequestId),
    /// All engines are to be ticked.
    HealthChanged,
    /// An event of a job.
    JobChanged(JobEvent),
    /// A removed replica's place is free.
    Released(ReplicaIndex),
    /// A resync takes the copy of a replica for fresh, without having written to it.
    Equal(ReplicaIndex, SectorRange),
    /// A preferred replica decides (W12): in which blocks, and where there is no winner.
    PreferenceBegins(ReplicaIndex, SectorRange, SectorRange),
    /// Its copy is written, and these replicas hold it; whether they are enough.
    PreferenceEnds(SectorRange, ReplicaSet, bool),
    /// A `--blkverify` disk differs.
    ContentsDiffer(SectorRange),
}

/// The effects of one input.
#[derive(Debug, Default)]
pub struct Collected {
    /// In order.
    pub effects: Vec<Effect>,
    /// The sectors that answers brought, in order; `None` for one whose bytes are of no single
    /// version.
    pub values: Vec<Option<Value>>,
    /// The number of effects so far, for an input that runs in the middle of this one.
    pub count: Rc<Cell<usize>>,
}

impl Collected {
    fn push(&mut self, effect: Effect) {
        self.effects.push(effect);
        self.count.set(self.effects.len());
    }
}

impl Effects for Collected {
    fn submit(&mut self, operation: Operation) {
        self.push(Effect::Submit(operation));
    }

    fn complete(&mut self, tag: Tag, result: Result<&[u8], Failed>) {
        let result = result.map(|data| {
            self.values.extend(data.chunks_exact(SECTOR_LEN).map(parse));
            data.len() / SECTOR_LEN
        });
        self.push(Effect::Complete(tag, result));
    }

    fn written(&mut self, tag: Tag) -> Mark {
        self.push(Effect::Written(tag));
        Mark(number_of(tag))
    }

    fn flushed(&mut self, tag: Tag, mark: Mark) {
        assert_eq!(mark, Mark(number_of(tag)), "the mark of another write");
        self.complete(tag, Ok(&[]));
    }

    fn report(&mut self, report: Report) {
        self.push(Effect::Report(report));
    }

    fn count(&mut self, fact: Fact) {
        match fact {
            Fact::Equal(replica, range) => self.push(Effect::Equal(replica, range)),
            Fact::PreferenceBegins(replica, blocks, run) => {
                self.push(Effect::PreferenceBegins(replica, blocks, run));
            }
            Fact::PreferenceEnds(blocks, holders, success) => {
                self.push(Effect::PreferenceEnds(blocks, holders, success));
            }
            _ => {}
        }
    }

    fn repaired(&mut self, _replica: ReplicaIndex, _range: SectorRange) {}

    fn wake(&mut self, worker: WorkerIndex, request: RequestId) {
        self.push(Effect::Wake(worker, request));
    }

    fn health_changed(&mut self) {
        self.push(Effect::HealthChanged);
    }

    fn job_changed(&mut self, event: JobEvent) {
        self.push(Effect::JobChanged(event));
    }

    fn released(&mut self, replica: ReplicaIndex) {
        self.push(Effect::Released(replica));
    }

    fn contents_differ(&mut self, range: SectorRange) {
        self.push(Effect::ContentsDiffer(range));
    }
}

/// Fills a sector with a value.
pub fn fill(sector: &mut [u8], value: Value) {
    for word in sector.chunks_exact_mut(8) {
        word.copy_from_slice(&value.0.to_le_bytes());
    }
}

/// The value that a sector was filled with.
pub fn parse(sector: &[u8]) -> Option<Value> {
    let (first, _) = sector.split_first_chunk::<8>()?;
    let periodic = sector[8..] == sector[..sector.len() - 8];
    periodic.then(|| Value(u64::from_le_bytes(*first)))
}

/// What a write of data, or a zeroing, puts into a sector of its range.
pub fn written(action: &Action, sector: usize) -> Option<Value> {
    let (_, range) = action.describe();
    let Action::Write {
        data, offset_bytes, ..
    } = action
    else {
        return Some(Value::written(0, sector));
    };
    let first = usize::try_from(range.start).expect("few");
    let start = offset_bytes + (sector - first) * SECTOR_LEN;
    parse(&data[start..start + SECTOR_LEN])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_of_two_versions_is_neither() {
        let mut sector = [0; SECTOR_LEN];
        fill(&mut sector, Value(77));
        assert_eq!(parse(&sector), Some(Value(77)));
        sector[256..].fill(1);
        assert_eq!(parse(&sector), None);
    }
}
