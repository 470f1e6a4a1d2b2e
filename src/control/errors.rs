//! The errors that an operator has not cleared (O1): how many, and the last one. Pure.
//!
//! They stay until the operator clears them, with one exception: the failed reads of a replica are
//! over when a scrub has read the whole disk and none has failed meanwhile. A scrub proves nothing
//! about writes and flushes, and does not know what the guest has lost by an I/O error.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};

use super::events::{Notice, type_name};
use super::scrub_watch::{ScrubStep, ScrubWatch};
use super::state::ByOperation;
use crate::common::operation::OperationType;
use crate::common::report::{Cause, Report, Requester};
use crate::common::{Errno, ReplicaIndex, SectorRange};
use crate::limits::REPLICAS_MAX;

/// Errors since the last ones were cleared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Errors {
    /// How many.
    #[serde(flatten)]
    pub counts: ByOperation<u64>,
    /// The last one. Left out if there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<LastError>,
}

/// An error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LastError {
    /// What failed.
    #[serde(serialize_with = "operation_name")]
    pub r#type: OperationType,
    /// Why, below 0. Left out if a request failed although no replica returned an error.
    #[serde(flatten)]
    pub reason: Option<ErrorReason>,
    /// The first sector of the operation.
    pub sector_num: u64,
    /// Its length; 0 for a flush.
    pub sector_count: u64,
    /// When.
    pub timestamp: Timestamp,
}

/// An error number and its text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ErrorReason {
    /// A negative errno.
    pub ret: i32,
    /// The text.
    pub error: String,
}

/// A time, by the host's real-time clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Timestamp {
    /// Since 1970.
    pub seconds: u64,
    /// Of the second.
    pub microseconds: u32,
}

impl Errors {
    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.last.is_none()
    }
}

impl LastError {
    fn ret(&self) -> Option<i32> {
        self.reason.as_ref().map(|reason| reason.ret)
    }
}

impl From<Errno> for ErrorReason {
    fn from(errno: Errno) -> Self {
        Self {
            ret: errno.0.saturating_neg(),
            error: errno.to_string(),
        }
    }
}

impl From<SystemTime> for Timestamp {
    /// A host whose clock is before 1970 gets 0.
    fn from(at: SystemTime) -> Self {
        let since_epoch = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            seconds: since_epoch.as_secs(),
            microseconds: since_epoch.subsec_micros(),
        }
    }
}

fn operation_name<S: Serializer>(
    operation: &OperationType,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(type_name(*operation))
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct ErrorLog {
    replicas: [OfReplica; REPLICAS_MAX],
    guest: ByOperation<Kept>,
    scrub: ScrubWatch,
}

/// The errors of one type of operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kept {
    count: u64,
    last: Option<LastError>,
}

#[derive(Debug, Default)]
struct OfReplica {
    kept: ByOperation<Kept>,
    /// A read has failed since the running scrub started.
    read_failed_since_scrub: bool,
    /// Its last error was ETIMEDOUT, and this is what it was before.
    before_timeout: Option<Box<Self>>,
}

impl Kept {
    fn add(&mut self, error: LastError) {
        self.count = self.count.saturating_add(1);
        self.last = Some(error);
    }
}

impl OfReplica {
    fn add(&mut self, error: LastError) {
        let before = Self {
            kept: self.kept.clone(),
            read_failed_since_scrub: self.read_failed_since_scrub,
            before_timeout: None,
        };
        let is_timeout = error.ret() == Some(-libc::ETIMEDOUT);
        self.before_timeout = is_timeout.then(|| Box::new(before));
        self.read_failed_since_scrub |= error.r#type == OperationType::Read;
        self.kept.of(error.r#type).add(error);
    }

    /// It is evicted. That was reported as an error ETIMEDOUT just now, which the replica has not
    /// returned: it has not answered.
    fn evicted(&mut self) {
        if let Some(before) = self.before_timeout.take() {
            *self = *before;
        }
    }
}

fn errors(kept: &ByOperation<Kept>) -> Errors {
    let ByOperation { read, write, flush } = kept;
    let lasts = [read, write, flush].map(|kept| kept.last.as_ref());
    Errors {
        counts: ByOperation {
            read: read.count,
            write: write.count,
            flush: flush.count,
        },
        last: lasts
            .into_iter()
            .flatten()
            .max_by_key(|last| last.timestamp)
            .cloned(),
    }
}

impl ErrorLog {
    /// Records an event.
    pub(super) fn record(&mut self, notice: &Notice, at: SystemTime) {
        let last = |operation, range: &SectorRange, errno: Option<Errno>| LastError {
            r#type: operation,
            reason: errno.map(ErrorReason::from),
            sector_num: range.start,
            sector_count: range.count,
            timestamp: at.into(),
        };
        match notice {
            Notice::Job(event) => match self.scrub.see(event) {
                Some(ScrubStep::Started) => {
                    for replica in &mut self.replicas {
                        replica.read_failed_since_scrub = false;
                    }
                }
                Some(ScrubStep::ReadAll) => {
                    let is_over = |replica: &&mut OfReplica| !replica.read_failed_since_scrub;
                    for replica in self.replicas.iter_mut().filter(is_over) {
                        replica.kept.read = Kept::default();
                    }
                }
                None => {}
            },
            Notice::Report(Report::Bad {
                replica,
                operation,
                range,
                cause: Cause::Error(errno),
            }) => {
                self.replicas[replica.as_usize()].add(last(*operation, range, Some(*errno)));
            }
            Notice::Report(Report::Evicted(replica)) => {
                self.replicas[replica.as_usize()].evicted();
            }
            Notice::Report(Report::Failure {
                operation,
                range,
                requester: Requester::Guest,
                error,
                ..
            }) => {
                let kept = self.guest.of(*operation);
                kept.add(last(*operation, range, *error));
            }
            Notice::Report(_) | Notice::Image(..) | Notice::Missing { .. } => {}
        }
    }

    /// The errors of a replica.
    pub(super) fn of(&self, replica: ReplicaIndex) -> Errors {
        errors(&self.replicas[replica.as_usize()].kept)
    }

    /// The I/O errors that the guest got.
    pub(super) fn of_guest(&self) -> Errors {
        errors(&self.guest)
    }

    /// Clears the errors of a replica.
    pub(super) fn clear(&mut self, replica: ReplicaIndex) {
        self.replicas[replica.as_usize()] = OfReplica::default();
    }

    /// Clears the errors of the guest.
    pub(super) fn clear_guest(&mut self) {
        self.guest = ByOperation::default();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::control::map::tests::scrub;
    use crate::jobs::{JobChange, JobFailure, JobStatus};

    const REPLICA: ReplicaIndex = ReplicaIndex(1);

    fn at(second: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(second)
    }

    fn error(replica: ReplicaIndex, errno: i32) -> Notice {
        failed(replica, OperationType::Write, errno)
    }

    fn failed(replica: ReplicaIndex, operation: OperationType, errno: i32) -> Notice {
        Notice::Report(Report::Bad {
            replica,
            operation,
            range: SectorRange::new(8, 16),
            cause: Cause::Error(Errno(errno)),
        })
    }

    fn failure(requester: Requester, error: Option<Errno>) -> Notice {
        Notice::Report(Report::Failure {
            operation: OperationType::Flush,
            range: SectorRange::new(0, 0),
            requester,
            error,
            no_space: false,
        })
    }

    #[test]
    fn errors_are_counted_and_the_last_one_is_kept() {
        let mut log = ErrorLog::default();
        log.record(&error(REPLICA, libc::EIO), at(1));
        log.record(&error(REPLICA, libc::ENOSPC), at(2));
        assert_eq!(
            serde_json::to_value(log.of(REPLICA)).unwrap(),
            serde_json::json!({
                "read": 0, "write": 2, "flush": 0,
                "last": {
                    "type": "write", "ret": -28, "error": "No space left on device",
                    "sector-num": 8, "sector-count": 16,
                    "timestamp": { "seconds": 2, "microseconds": 0 },
                },
            })
        );
        assert!(log.of(ReplicaIndex(0)).is_empty() && log.of_guest().is_empty());
        log.clear(REPLICA);
        assert_eq!(
            serde_json::to_value(log.of(REPLICA)).unwrap(),
            serde_json::json!({ "read": 0, "write": 0, "flush": 0 })
        );
    }

    #[test]
    fn an_eviction_is_no_error_and_a_timeout_of_the_device_is_one() {
        let mut log = ErrorLog::default();
        log.record(&error(REPLICA, libc::EIO), at(1));
        let before = log.of(REPLICA);
        log.record(&error(REPLICA, libc::ETIMEDOUT), at(2));
        log.record(&Notice::Report(Report::Evicted(REPLICA)), at(2));
        assert_eq!(log.of(REPLICA), before);
        log.record(&error(REPLICA, libc::ETIMEDOUT), at(3));
        assert_eq!(log.of(REPLICA).counts.write, 2);
    }

    #[test]
    fn only_requests_of_the_guest_are_errors_of_the_guest() {
        let mut log = ErrorLog::default();
        log.record(&failure(Requester::Job, Some(Errno(5))), at(1));
        assert!(log.of_guest().is_empty());
        log.record(&failure(Requester::Guest, None), at(2));
        let last = log.of_guest().last.unwrap();
        assert_eq!((last.r#type, last.reason), (OperationType::Flush, None));
        for what in [JobChange::Status, JobChange::Completed] {
            log.record(&scrub("job1", what, JobStatus::Created, None), at(3));
        }
        assert!(!log.of_guest().is_empty(), "a scrub does not clear them");
        log.clear_guest();
        assert!(log.of_guest().is_empty());
    }

    #[test]
    fn a_scrub_clears_the_failed_reads_of_replicas_that_fail_none() {
        let failing = ReplicaIndex(2);
        let replicas = std::iter::once(failing).collect();
        let not_read = Some(JobFailure::NotRead { replicas });
        for (end, cleared) in [
            (
                scrub("job1", JobChange::Completed, JobStatus::Concluded, None),
                true,
            ),
            (
                scrub("job1", JobChange::Completed, JobStatus::Aborting, not_read),
                false,
            ),
            (
                scrub("job1", JobChange::Cancelled, JobStatus::Concluded, None),
                false,
            ),
        ] {
            let mut log = ErrorLog::default();
            let read = |replica| failed(replica, OperationType::Read, 5);
            for replica in [REPLICA, failing] {
                log.record(&error(replica, 28), at(1));
                log.record(&read(replica), at(2));
            }
            log.record(
                &scrub("job1", JobChange::Status, JobStatus::Created, None),
                at(3),
            );
            log.record(&read(failing), at(4));
            log.record(&end, at(5));
            assert_eq!(log.of(REPLICA).counts.read == 0, cleared, "{end:?}");
            assert_eq!(log.of(failing).counts.read, 2, "{end:?}");
            // It has not written.
            let Errors { counts, last } = log.of(REPLICA);
            let last = last.unwrap().r#type;
            assert_eq!((counts.write, last == OperationType::Write), (1, cleared));
        }
    }
}
