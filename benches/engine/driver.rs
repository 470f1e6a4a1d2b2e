//! What drives the engine in place of rings and files: keeps what it asks for, and counts what it
//! has answered.

use quorum_blk::common::operation::{Operation, RequestId};
use quorum_blk::common::report::Report;
use quorum_blk::common::{ReplicaIndex, SectorRange};
use quorum_blk::engine::{Effects, Failed, Tag, WorkerIndex};
use quorum_blk::jobs::JobEvent;

/// Keeps operations, and counts answers.
#[derive(Default)]
pub(crate) struct Driver {
    /// What was asked for since this was last emptied.
    pub operations: Vec<Operation>,
    /// Requests answered.
    pub completed: u64,
    /// A replica is made to fail.
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
            "nobody asked for a job, and yet: {event:?}"
        );
    }

    fn released(&mut self, replica: ReplicaIndex) {
        panic!("nobody removed replica {}", replica.0);
    }

    fn contents_differ(&mut self, _range: SectorRange) {}
}
