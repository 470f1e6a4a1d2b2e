//! The JSON line of an event, as readers of `--events` and clients of the monitor get it.
//!
//! Invariants:
//! - The members of the two original events come first, in their documented order; later additions
//!   follow them, so a consumer that knows only the original members reads every line.
//! - A line holds exactly one `\n`, its last byte: JSON escapes those within names.
//! - The timestamp is that of the report, however late the line is sent.

use std::fmt::Write as _;
use std::time::SystemTime;

use serde::Serialize;

use super::{Event, Names, Notice, type_name};
use crate::common::SECTOR_BYTES;
use crate::common::operation::OperationType;
use crate::common::report::{Cause, Digest, Evidence, Report, Requester};
use crate::control::errors::{ErrorReason, Timestamp};
use crate::control::job_state::{self, JobResult};
use crate::control::json::to_ascii;
use crate::control::map_state::RangeState;
use crate::jobs::{JobChange, JobEvent};

impl Event {
    /// The event as it is sent: a JSON object and the newline that ends it.
    pub fn to_line(&self, names: &Names) -> Vec<u8> {
        let suppressed = self.suppressed;
        let report = match &self.notice {
            Notice::Report(report) => report,
            Notice::Job(event) => return job_line(event, names, self.made_at),
            Notice::Image(replica, changes) => {
                let data = Image {
                    node_name: &names.nodes.get(*replica),
                    conditions: changes.words().collect(),
                    suppressed,
                };
                return line("QUORUM_REPLICA_IMAGE_CHANGED", data, self.made_at);
            }
            Notice::Missing {
                replica,
                file,
                reason,
            } => {
                let data = Missing {
                    node_name: &names.nodes.get(*replica),
                    file,
                    reason,
                    suppressed,
                };
                return line("QUORUM_REPLICA_MISSING", data, self.made_at);
            }
        };
        match report {
            Report::Failure {
                operation,
                range,
                requester,
                error,
                ..
            } => {
                let data = Failure {
                    reference: &names.reference,
                    sector_num: range.start,
                    sector_count: range.count,
                    sectors_count: range.count,
                    r#type: type_name(*operation),
                    requester: match requester {
                        Requester::Guest | Requester::Held => "guest",
                        Requester::Job => "job",
                    },
                    reason: error.map(ErrorReason::from),
                    suppressed,
                };
                line("QUORUM_FAILURE", data, self.made_at)
            }
            Report::Bad {
                replica,
                operation,
                range,
                cause,
            } => {
                let (errno, evidence) = match cause {
                    Cause::Error(errno) => (Some(*errno), None),
                    Cause::Corrupt(evidence) => (None, Some(evidence)),
                };
                let data = ReportBad {
                    ret: errno.map_or(0, |errno| errno.0.saturating_neg()),
                    node_name: &names.nodes.get(*replica),
                    sector_num: range.start,
                    sector_count: range.count,
                    sectors_count: range.count,
                    r#type: type_name(*operation),
                    error: errno.map(|errno| errno.to_string()),
                    evidence: evidence.map(Proof::from),
                    suppressed,
                };
                line("QUORUM_REPORT_BAD", data, self.made_at)
            }
            Report::Evicted(replica) => {
                let node_name = &names.nodes.get(*replica);
                let data = OfReplica {
                    node_name,
                    suppressed,
                };
                line("QUORUM_REPLICA_EVICTED", data, self.made_at)
            }
            Report::KeptOut { replica, time } => {
                let data = KeptOut {
                    node_name: &names.nodes.get(*replica),
                    milliseconds: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
                    suppressed,
                };
                line("QUORUM_REPLICA_KEPT_OUT", data, self.made_at)
            }
            Report::RepairLimit { limit_sectors } => {
                let data = RepairLimit {
                    reference: &names.reference,
                    limit: limit_sectors.saturating_mul(SECTOR_BYTES),
                    suppressed,
                };
                line("QUORUM_REPAIR_LIMIT", data, self.made_at)
            }
            Report::Rejoined(replica) => {
                let node_name = &names.nodes.get(*replica);
                let data = OfReplica {
                    node_name,
                    suppressed,
                };
                line("QUORUM_REPLICA_REJOINED", data, self.made_at)
            }
        }
    }

    /// BLOCK_IO_ERROR, which follows the event if the request is held.
    pub(in crate::control) fn to_io_error_line(&self, names: &Names) -> Option<Vec<u8>> {
        let Notice::Report(Report::Failure {
            operation,
            range,
            requester: Requester::Held,
            error,
            no_space,
        }) = &self.notice
        else {
            return None;
        };
        let data = IoError {
            device: &names.reference,
            node_name: &names.reference,
            operation: match operation {
                OperationType::Read => "read",
                OperationType::Write | OperationType::Flush => "write",
            },
            action: "stop",
            nospace: *no_space,
            reason: error.map_or_else(|| "no quorum".to_owned(), |errno| errno.to_string()),
            sector_num: range.start,
            sector_count: range.count,
            r#type: type_name(*operation),
            suppressed: self.suppressed,
        };
        Some(line("BLOCK_IO_ERROR", data, self.made_at))
    }
}

fn job_line(event: &JobEvent, names: &Names, made_at: SystemTime) -> Vec<u8> {
    let job = &event.job;
    let id = job.id.to_string();
    let name = match event.what {
        JobChange::Status => {
            let status = job.status.name();
            return line(
                "JOB_STATUS_CHANGE",
                JobStatusChange { id: &id, status },
                made_at,
            );
        }
        JobChange::Completed => "BLOCK_JOB_COMPLETED",
        JobChange::Cancelled => "BLOCK_JOB_CANCELLED",
    };
    let replica = job.kind.replica().map(|replica| names.nodes.get(replica));
    let data = JobEnd {
        r#type: job.kind.name(),
        device: &id,
        len: job.total_bytes,
        offset: job.current_bytes,
        speed: job.speed_bytes,
        error: job_state::error(job, &names.nodes),
        node_name: replica.as_deref(),
        result: JobResult::new(job, &names.nodes),
    };
    line(name, data, made_at)
}

/// The line for a reader that missed events: how many, with those that were folded into them.
pub(in crate::control) fn missed_line(missed: u64, at: SystemTime) -> Vec<u8> {
    line("QUORUM_EVENTS_MISSED", Missed { missed }, at)
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Missing<'a> {
    node_name: &'a str,
    file: &'a str,
    reason: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    suppressed: u64,
}

/// The members of QEMU's event, then ours.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct IoError<'a> {
    device: &'a str,
    node_name: &'a str,
    operation: &'static str,
    action: &'static str,
    nospace: bool,
    reason: String,
    sector_num: u64,
    sector_count: u64,
    r#type: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    suppressed: u64,
}

#[derive(Serialize)]
struct Line<D> {
    event: &'static str,
    data: D,
    timestamp: Timestamp,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Failure<'a> {
    reference: &'a str,
    sector_num: u64,
    sector_count: u64,
    sectors_count: u64,
    r#type: &'static str,
    requester: &'static str,
    #[serde(flatten)]
    reason: Option<ErrorReason>,
    #[serde(skip_serializing_if = "is_zero")]
    suppressed: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ReportBad<'a> {
    ret: i32,
    node_name: &'a str,
    sector_num: u64,
    sector_count: u64,
    sectors_count: u64,
    r#type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(flatten)]
    evidence: Option<Proof>,
    #[serde(skip_serializing_if = "is_zero")]
    suppressed: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct OfReplica<'a> {
    node_name: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    suppressed: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct KeptOut<'a> {
    node_name: &'a str,
    milliseconds: u64,
    #[serde(skip_serializing_if = "is_zero")]
    suppressed: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct RepairLimit<'a> {
    reference: &'a str,
    limit: u64,
    #[serde(skip_serializing_if = "is_zero")]
    suppressed: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Image<'a> {
    node_name: &'a str,
    conditions: Vec<&'static str>,
    #[serde(skip_serializing_if = "is_zero")]
    suppressed: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Proof {
    bad_sectors: Vec<RangeState>,
    #[serde(skip_serializing_if = "is_false")]
    bad_sectors_truncated: bool,
    digest: String,
    winner_digest: String,
}

impl From<&Evidence> for Proof {
    fn from(evidence: &Evidence) -> Self {
        Self {
            bad_sectors: evidence.bad_sectors.iter().map(RangeState::from).collect(),
            bad_sectors_truncated: evidence.bad_sectors_cut,
            digest: hex(&evidence.digest),
            winner_digest: hex(&evidence.winner_digest),
        }
    }
}

#[derive(Serialize)]
struct JobStatusChange<'a> {
    id: &'a str,
    status: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct JobEnd<'a> {
    r#type: &'static str,
    device: &'a str,
    len: u64,
    offset: u64,
    speed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_name: Option<&'a str>,
    #[serde(flatten)]
    result: JobResult,
}

#[derive(Serialize)]
struct Missed {
    missed: u64,
}

fn line<D: Serialize>(event: &'static str, data: D, at: SystemTime) -> Vec<u8> {
    let object = Line {
        event,
        data,
        timestamp: at.into(),
    };
    let mut bytes = to_ascii(&object);
    bytes.push(b'\n');
    bytes
}

pub(super) fn hex(digest: &Digest) -> String {
    digest.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

// Both by reference, as serde calls them.
fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn is_false(flag: &bool) -> bool {
    !*flag
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::image::ImageChanges;
    use crate::common::operation::OperationType;
    use crate::common::{Errno, ReplicaIndex, SectorRange};
    use crate::control::events::NodeNames;
    use std::time::{Duration, UNIX_EPOCH};

    fn names() -> Names {
        Names {
            reference: "usr1".into(),
            nodes: ["0.raw", "1.raw"].into_iter().collect(),
        }
    }

    fn text(notice: impl Into<Notice>, suppressed: u64) -> String {
        let event = Event {
            notice: notice.into(),
            made_at: UNIX_EPOCH + Duration::from_micros(1_344_522_075_745_528),
            suppressed,
        };
        String::from_utf8(event.to_line(&names())).unwrap()
    }

    fn corrupt(evidence: Evidence) -> Report {
        Report::Bad {
            replica: ReplicaIndex(1),
            operation: OperationType::Read,
            range: SectorRange::new(345_435, 5),
            cause: Cause::Corrupt(evidence),
        }
    }

    fn evidence() -> Evidence {
        Evidence {
            bad_sectors: vec![SectorRange::new(345_436, 2), SectorRange::new(345_439, 1)],
            bad_sectors_cut: false,
            unlisted: Vec::new(),
            sectors: 3,
            digest: [0xab; 32],
            winner_digest: [0x01; 32],
        }
    }

    #[test]
    fn failure_is_the_documented_event_and_additions() {
        let report = Report::Failure {
            operation: OperationType::Read,
            range: SectorRange::new(345_435, 5),
            requester: Requester::Guest,
            error: None,
            no_space: false,
        };
        assert_eq!(
            text(report, 0),
            concat!(
                r#"{"event":"QUORUM_FAILURE","data":{"reference":"usr1","sector-num":345435,"#,
                r#""sector-count":5,"sectors-count":5,"type":"read","requester":"guest"},"#,
                r#""timestamp":{"seconds":1344522075,"microseconds":745528}}"#,
                "\n"
            )
        );
    }

    #[test]
    fn corrupt_bytes_are_the_documented_event_and_additions() {
        assert_eq!(
            text(corrupt(evidence()), 0),
            concat!(
                r#"{"event":"QUORUM_REPORT_BAD","data":{"ret":0,"node-name":"1.raw","#,
                r#""sector-num":345435,"sector-count":5,"sectors-count":5,"type":"read","#,
                r#""bad-sectors":[{"sector-num":345436,"sector-count":2},"#,
                r#"{"sector-num":345439,"sector-count":1}],"#,
                r#""digest":"abababababababababababababababababababababababababababababababab","#,
                r#""winner-digest":"#,
                r#""0101010101010101010101010101010101010101010101010101010101010101"},"#,
                r#""timestamp":{"seconds":1344522075,"microseconds":745528}}"#,
                "\n"
            )
        );
    }

    #[test]
    fn cut_evidence_and_folding_are_marked() {
        let line = text(
            corrupt(Evidence {
                bad_sectors_cut: true,
                ..evidence()
            }),
            41,
        );
        assert!(line.contains(r#"}],"bad-sectors-truncated":true,"digest":"#));
        assert!(line.contains(r#"01","suppressed":41},"timestamp""#));
    }

    #[test]
    fn error_is_negative_with_its_text() {
        let report = Report::Bad {
            replica: ReplicaIndex(0),
            operation: OperationType::Flush,
            range: SectorRange::new(0, 0),
            cause: Cause::Error(Errno(libc::EIO)),
        };
        assert_eq!(
            text(report, 3),
            concat!(
                r#"{"event":"QUORUM_REPORT_BAD","data":{"ret":-5,"node-name":"0.raw","#,
                r#""sector-num":0,"sector-count":0,"sectors-count":0,"type":"flush","#,
                r#""error":"Input/output error","suppressed":3},"#,
                r#""timestamp":{"seconds":1344522075,"microseconds":745528}}"#,
                "\n"
            )
        );
    }

    #[test]
    fn a_name_cannot_break_the_line() {
        let report = Report::Failure {
            operation: OperationType::Write,
            range: SectorRange::new(1, 1),
            requester: Requester::Guest,
            error: None,
            no_space: false,
        };
        let event = Event {
            notice: report.into(),
            made_at: UNIX_EPOCH,
            suppressed: 0,
        };
        let names = Names {
            reference: "a\n\"b".into(),
            nodes: NodeNames::default(),
        };
        let line = event.to_line(&names);
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(value["data"]["reference"], "a\n\"b");
    }

    #[test]
    fn a_missing_replica() {
        let missing = Notice::Missing {
            replica: ReplicaIndex(1),
            file: "/images/1.raw".to_owned(),
            reason: "cannot open '/images/1.raw': No such file or directory".to_owned(),
        };
        let line = text(missing, 0);
        let data = "{\"node-name\":\"1.raw\",\"file\":\"/images/1.raw\",\"reason\":\"cannot open \
                    '/images/1.raw': No such file or directory\"}";
        let begin = format!("{{\"event\":\"QUORUM_REPLICA_MISSING\",\"data\":{data},");
        assert!(line.starts_with(&begin), "{line}");
    }

    #[test]
    fn missed_notice() {
        assert_eq!(
            String::from_utf8(missed_line(7, UNIX_EPOCH + Duration::new(2, 3_000))).unwrap(),
            "{\"event\":\"QUORUM_EVENTS_MISSED\",\"data\":{\"missed\":7},\
             \"timestamp\":{\"seconds\":2,\"microseconds\":3}}\n"
        );
    }

    #[test]
    fn the_documented_examples_are_what_is_sent() {
        use sha2::{Digest as _, Sha256};
        let manual = include_str!("../../../docs/events.md");
        let evidence = Evidence {
            bad_sectors: vec![SectorRange::new(345_436, 1)],
            bad_sectors_cut: false,
            unlisted: Vec::new(),
            sectors: 1,
            digest: Sha256::digest([0; 512]).into(),
            winner_digest: Sha256::digest([0xff; 512]).into(),
        };
        let unlinked = ImageChanges {
            unlinked: true,
            ..ImageChanges::default()
        };
        let range = SectorRange::new(345_435, 5);
        let error = Report::Bad {
            replica: ReplicaIndex(1),
            operation: OperationType::Write,
            range,
            cause: Cause::Error(Errno(libc::EIO)),
        };
        let failure = Report::Failure {
            operation: OperationType::Read,
            range,
            requester: Requester::Guest,
            error: None,
            no_space: false,
        };
        for line in [
            text(corrupt(evidence), 0),
            text(error, 41),
            text(failure, 0),
            text(Report::Evicted(ReplicaIndex(1)), 0),
            text(
                Report::KeptOut {
                    replica: ReplicaIndex(1),
                    time: Duration::from_secs(16),
                },
                0,
            ),
            text(Notice::Image(ReplicaIndex(1), unlinked), 0),
        ] {
            assert!(manual.contains(&line), "not in docs/events.md: {line}");
        }
    }
}
