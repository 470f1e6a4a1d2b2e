//! Drives the engine in place of virtqueues and files: keeps the operations that it submits, and
//! counts the requests that it answers.

use quorum_blk::common::operation::{Operation, RequestId};
use quorum_blk::common::report::{Fact, Report};
use quorum_blk::common::{ReplicaIndex, SectorRange};
use quorum_blk::engine::{Effects, Failed, FragmentId, Mark, Tag, WorkerIndex};
use quorum_blk::jobs::JobEvent;

/// The tag of the request with this number.
pub(crate) fn tag(number: u64) -> Tag {
    Tag::Guest {
        connection: 0,
        fragment: FragmentId {
            chain: u32::try_from(number).expect("few requests"),
            offset_sectors: 0,
        },
    }
}

/// Keeps operations, and counts answers.
#[derive(Default)]
pub(crate) struct Driver {
    /// Operations submitted and not taken out yet.
    pub operations: Vec<Operation>,
    /// Requests answered.
    pub completed: u64,
    /// Whether the engine may report: some replica fails its operations.
    pub expects_reports: bool,
}

impl Effects for Driver {
    fn submit(&mut self, operation: Operation) {
        self.operations.push(operation);
    }

    fn complete(&mut self, _tag: Tag, result: Result<&[u8], Failed>) {
        assert!(result.is_ok());
        self.completed += 1;
    }

    fn written(&mut self, _tag: Tag) -> Mark {
        Mark::default()
    }

    fn flushed(&mut self, tag: Tag, _mark: Mark) {
        self.complete(tag, Ok(&[]));
    }

    fn report(&mut self, report: Report) {
        assert!(self.expects_reports, "a report without a fault: {report:?}");
    }

    fn count(&mut self, fact: Fact) {
        panic!("a fact without a fault: {fact:?}");
    }

    fn repaired(&mut self, replica: ReplicaIndex, _range: SectorRange) {
        panic!("a repair of replica {} without a fault", replica.0);
    }

    fn wake(&mut self, _worker: WorkerIndex, _request: RequestId) {
        panic!("ranges are disjoint: no request waits for another worker");
    }

    fn health_changed(&mut self) {}

    fn job_changed(&mut self, event: JobEvent) {
        assert!(self.expects_reports, "a job without an order: {event:?}");
    }

    fn released(&mut self, replica: ReplicaIndex) {
        panic!("replica {} was released without a removal", replica.0);
    }

    fn contents_differ(&mut self, _range: SectorRange) {}
}
