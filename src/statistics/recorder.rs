//! What a worker counts with.

use std::sync::Arc;
use std::time::Duration;

use super::counter::Counter;
use super::{Operations, ReplicaTotals, RequestKind, WorkerStatistics};
use crate::common::clock::TurnClock;
use crate::common::operation::{Action, Operation, Reply};
use crate::common::report::{Cause, Fact, Report};
use crate::common::{ReplicaIndex, SectorRange};

/// The writer of a worker's counters. Times have the resolution of a turn.
#[derive(Clone, Debug)]
pub struct Recorder {
    statistics: Arc<WorkerStatistics>,
    clock: TurnClock,
}

/// When a request or operation started.
#[derive(Clone, Copy, Debug)]
pub struct Since(Duration);

impl Recorder {
    /// Counts in `statistics`, by the time of `clock`.
    pub fn new(statistics: Arc<WorkerStatistics>, clock: TurnClock) -> Self {
        Self { statistics, clock }
    }

    /// A recorder whose counters nothing reads.
    pub fn detached() -> Self {
        Self::new(Arc::new(WorkerStatistics::new(0)), TurnClock::default())
    }

    /// The start of what starts now.
    pub fn now(&self) -> Since {
        Since(self.clock.now())
    }

    /// A guest request starts.
    pub fn request_begun(&self, kind: RequestKind) -> Since {
        self.statistics.requests[kind as usize].begun.add(1);
        self.now()
    }

    /// A guest request is answered.
    pub fn request_ended(
        &self,
        kind: RequestKind,
        range: SectorRange,
        since: Since,
        success: bool,
    ) {
        let bytes = range.bytes();
        self.ended(
            &self.statistics.requests[kind as usize],
            bytes,
            since,
            success,
        );
        if kind == RequestKind::Write && success {
            self.statistics.written_to_sector.raise_to(range.end());
        }
    }

    /// This process will not answer a guest request.
    pub fn request_abandoned(&self, kind: RequestKind) {
        self.statistics.requests[kind as usize].abandoned.add(1);
    }

    /// A guest request was invalid or unsupported.
    pub fn request_rejected(&self) {
        self.statistics.rejected.add(1);
    }

    /// An operation on a replica starts. Questions for holes are not counted, nor are writes to its
    /// record.
    pub fn operation_begun(&self, operation: &Operation) {
        if !is_counted(&operation.action) {
            return;
        }
        let (kind, _) = operation.action.describe();
        self.statistics.replicas[operation.replica.as_usize()][kind as usize]
            .begun
            .add(1);
    }

    /// An operation on a replica has ended.
    pub fn operation_ended(&self, reply: &Reply, since: Since) {
        if !is_counted(&reply.action) {
            return;
        }
        let (kind, range) = reply.action.describe();
        let operations = &self.statistics.replicas[reply.replica.as_usize()][kind as usize];
        self.ended(operations, range.bytes(), since, reply.result.is_ok());
    }

    /// The engine reports to the operator.
    pub fn reported(&self, report: &Report) {
        match report {
            Report::Failure { operation, .. } => {
                self.statistics.failures[*operation as usize].add(1);
            }
            Report::Bad { replica, cause, .. } => match cause {
                Cause::Corrupt(evidence) => {
                    self.totals(*replica).sectors_corrupt.add(evidence.sectors);
                }
                Cause::Error(_) => {}
            },
            Report::Evicted(replica) => self.totals(*replica).evictions.add(1),
            Report::KeptOut { .. } | Report::RepairLimit { .. } => {}
            Report::Rejoined(replica) => self.totals(*replica).rejoins.add(1),
        }
    }

    /// The engine has repaired sectors of a replica.
    pub fn repaired(&self, replica: ReplicaIndex, range: SectorRange) {
        self.totals(replica).sectors_repaired.add(range.count);
    }

    /// The engine states a fact that no event reports.
    pub fn count(&self, fact: Fact) {
        match fact {
            Fact::Confirmation => self.statistics.confirmations.add(1),
            Fact::ConfirmationWithoutFault => self.statistics.confirmations_without_fault.add(1),
            Fact::SectorsResynced(replica, sectors) => {
                self.totals(replica).sectors_resynced.add(sectors);
            }
            Fact::Equal(replica, range) => {
                self.totals(replica).sectors_resynced.add(range.count);
            }
            Fact::PreferenceBegins(..) | Fact::PreferenceEnds(..) => {}
            Fact::SectorsNotRepaired(replica, sectors) => {
                self.totals(replica).sectors_not_repaired.add(sectors);
            }
        }
    }

    fn totals(&self, replica: ReplicaIndex) -> &ReplicaTotals<Counter> {
        &self.statistics.totals[replica.as_usize()]
    }

    fn ended(&self, operations: &Operations, bytes: u64, since: Since, success: bool) {
        if success {
            operations.bytes.add(bytes);
            operations
                .latency
                .record(self.clock.now().saturating_sub(since.0));
        } else {
            operations.failed.add(1);
        }
    }
}

/// Whether an operation is one of the reads, writes and flushes of a replica that are counted.
fn is_counted(action: &Action) -> bool {
    !matches!(action, Action::FindData { .. } | Action::Record { .. })
}
