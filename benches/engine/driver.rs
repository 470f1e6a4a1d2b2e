//! Drives the engine in place of virtqueues and files: keeps the operations that it submits, and
//! counts the requests that it answers.

use quorum_blk::common::operation::{Operation, RequestId};
use quorum_blk::common::report::{Fact, Report};
use quorum_blk::common::{ReplicaIndex, SectorRange};
use quorum_blk::engine::{Effects, Failed, FragmentId, Tag, WorkerIndex};
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
    /// Operations submitted since this was last emptied.
    pub operations: Vec<Operation>,
    /// Requests answered.
    pub completed: u64,
    /// A replica that fails every operation.
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

    fn report(&mut self, report: Report) {
        assert!(
            self.expects_reports,
            "nothing is wrong with the replicas, and yet: {report:?}"
        );
    }

    fn count(&mut self, fact: Fact) {
        panic!("nothing is wrong with the replicas, and yet: {fact:?}");
    }

    fn repaired(&mut self, replica: ReplicaIndex, _range: SectorRange) {
        panic!("nothing is wrong on replica {}", replica.0);
    }

    fn wake(&mut self, _worker: WorkerIndex, _request: RequestId) {
        panic!("no request waits for the range of another worker's");
    }

    fn health_changed(&mut self) {}

    fn job_changed(&mut self, event: JobEvent) {
        assert!(
            self.expects_reports,
            "a job that was not asked for: {event:?}"
        );
    }

    fn released(&mut self, replica: ReplicaIndex) {
        panic!("replica {} is released, but was not removed", replica.0);
    }

    fn contents_differ(&mut self, _range: SectorRange) {}
}
