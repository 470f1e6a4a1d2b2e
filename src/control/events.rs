//! What an operator reads: the JSON form of a report, one object a line.
//!
//! Invariants:
//! - The members the two events have always had come first, in their documented order; what was
//!   added since follows them, so a consumer that knows only the old ones reads every line.
//! - A line holds exactly one `\n`, its last byte: JSON escapes those within names.
//! - The timestamp is that of the report, however late the line is sent.

use std::fmt::Write as _;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use log::Level;
use serde::Serialize;

use super::json::to_ascii;
use crate::common::operation::OperationType;
use crate::common::report::{Cause, Digest, Evidence, Report};
use crate::common::{ReplicaIndex, SectorRange};
use crate::jobs::{JobChange, JobEvent, JobKind};

/// What the voted disk and its replicas are called in events.
#[derive(Clone, Debug)]
pub struct Names {
    /// `reference` of QUORUM_FAILURE.
    pub reference: String,
    /// `node-name` of each replica.
    pub nodes: NodeNames,
}

/// The `node-name` of each replica by its index; it may change while the disk is served. Clones are
/// handles to the same list.
#[derive(Clone, Debug, Default)]
pub struct NodeNames(Arc<RwLock<Vec<Arc<str>>>>);

impl NodeNames {
    /// The name, empty if there is no such replica.
    pub fn get(&self, replica: ReplicaIndex) -> Arc<str> {
        let names = self.0.read().unwrap_or_else(PoisonError::into_inner);
        names.get(replica.as_usize()).cloned().unwrap_or_default()
    }

    /// Gives the replica this name.
    pub fn set(&self, replica: ReplicaIndex, name: &str) {
        let mut names = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if names.len() <= replica.as_usize() {
            names.resize(replica.as_usize() + 1, Arc::default());
        }
        names[replica.as_usize()] = name.into();
    }
}

impl<S: AsRef<str>> FromIterator<S> for NodeNames {
    fn from_iter<I: IntoIterator<Item = S>>(names: I) -> Self {
        let names = names.into_iter().map(|name| Arc::from(name.as_ref()));
        Self(Arc::new(RwLock::new(names.collect())))
    }
}

/// What there is to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Of a replica or a request.
    Report(Report),
    /// Of a job.
    Job(JobEvent),
}

impl News {
    /// How urgent they are for who reads the log: the steps of a job that does what it is to do are
    /// not.
    pub fn level(&self) -> Level {
        match self {
            Self::Job(event) if event.what == JobChange::Status || event.job.error.is_none() => {
                Level::Info
            }
            Self::Job(_) | Self::Report(_) => Level::Warn,
        }
    }
}

impl From<Report> for News {
    fn from(report: Report) -> Self {
        Self::Report(report)
    }
}

impl From<JobEvent> for News {
    fn from(event: JobEvent) -> Self {
        Self::Job(event)
    }
}

/// News on their way to the readers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What is told.
    pub news: News,
    /// When it was reported.
    pub made_at: SystemTime,
    /// How many earlier reports of the same kind were folded into this one.
    pub suppressed: u64,
}

impl Event {
    /// How many reports this event stands for.
    pub fn stands_for(&self) -> u64 {
        self.suppressed + 1
    }

    /// The event as it is sent: a JSON object and the newline that ends it.
    pub fn to_line(&self, names: &Names) -> Vec<u8> {
        let suppressed = self.suppressed;
        let report = match &self.news {
            News::Report(report) => report,
            News::Job(event) => return job_line(event, names, self.made_at),
        };
        match report {
            Report::Failure { operation, range } => {
                let data = Failure {
                    reference: &names.reference,
                    sector_num: range.start,
                    sector_count: range.count,
                    sectors_count: range.count,
                    r#type: type_name(*operation),
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
        }
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
    let replica = match job.kind {
        JobKind::Resync(replica) => Some(names.nodes.get(replica)),
        JobKind::Scrub { .. } | JobKind::NeighbourhoodScrub => None,
    };
    let data = JobEnd {
        r#type: job.kind.name(),
        device: &id,
        len: job.total_bytes,
        offset: job.current_bytes,
        speed: job.speed_bytes,
        error: job.error.map(|error| error.to_string()),
        node_name: replica.as_deref(),
        corrupt_sectors_found: job.corrupt_sectors_found,
        sectors_written: job.sectors_written,
    };
    line(name, data, made_at)
}

/// The line that tells a reader how many events it did not get, those folded into them included.
pub(super) fn missed_line(missed: u64, at: SystemTime) -> Vec<u8> {
    line("QUORUM_EVENTS_MISSED", Missed { missed }, at)
}

#[derive(Serialize)]
struct Line<D> {
    event: &'static str,
    data: D,
    timestamp: Timestamp,
}

#[derive(Serialize)]
struct Timestamp {
    seconds: u64,
    microseconds: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Failure<'a> {
    reference: &'a str,
    sector_num: u64,
    sector_count: u64,
    sectors_count: u64,
    r#type: &'static str,
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
struct Proof {
    bad_sectors: Vec<Run>,
    #[serde(skip_serializing_if = "is_false")]
    bad_sectors_truncated: bool,
    digest: String,
    winner_digest: String,
}

impl From<&Evidence> for Proof {
    fn from(evidence: &Evidence) -> Self {
        Self {
            bad_sectors: evidence.bad_sectors.iter().map(Run::from).collect(),
            bad_sectors_truncated: evidence.bad_sectors_cut,
            digest: hex(&evidence.digest),
            winner_digest: hex(&evidence.winner_digest),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Run {
    sector_num: u64,
    sector_count: u64,
}

impl From<&SectorRange> for Run {
    fn from(range: &SectorRange) -> Self {
        Self {
            sector_num: range.start,
            sector_count: range.count,
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
    corrupt_sectors_found: u64,
    sectors_written: u64,
}

#[derive(Serialize)]
struct Missed {
    missed: u64,
}

fn line<D: Serialize>(event: &'static str, data: D, at: SystemTime) -> Vec<u8> {
    // A real time clock set before 1970 is no reason to hold back an event.
    let since_epoch = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let object = Line {
        event,
        data,
        timestamp: Timestamp {
            seconds: since_epoch.as_secs(),
            microseconds: since_epoch.subsec_micros(),
        },
    };
    let mut bytes = to_ascii(&object);
    bytes.push(b'\n');
    bytes
}

fn type_name(operation: OperationType) -> &'static str {
    match operation {
        OperationType::Read => "read",
        OperationType::Write => "write",
        OperationType::Flush => "flush",
    }
}

fn hex(digest: &Digest) -> String {
    digest.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

// Both by reference: serde calls them so.
fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn is_false(flag: &bool) -> bool {
    !*flag
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::Errno;
    use std::time::Duration;

    fn names() -> Names {
        Names {
            reference: "usr1".into(),
            nodes: ["0.raw", "1.raw"].into_iter().collect(),
        }
    }

    fn text(report: Report, suppressed: u64) -> String {
        let event = Event {
            news: report.into(),
            made_at: UNIX_EPOCH + Duration::from_micros(1_344_522_075_745_528),
            suppressed,
        };
        String::from_utf8(event.to_line(&names())).unwrap()
    }

    fn wrong_version(evidence: Evidence) -> Report {
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
        };
        assert_eq!(
            text(report, 0),
            concat!(
                r#"{"event":"QUORUM_FAILURE","data":{"reference":"usr1","sector-num":345435,"sector-count":5,"#,
                r#""sectors-count":5,"type":"read"},"timestamp":{"seconds":1344522075,"microseconds":745528}}"#,
                "\n"
            )
        );
    }

    #[test]
    fn wrong_version_is_the_documented_event_and_additions() {
        assert_eq!(
            text(wrong_version(evidence()), 0),
            concat!(
                r#"{"event":"QUORUM_REPORT_BAD","data":{"ret":0,"node-name":"1.raw","sector-num":345435,"sector-count":5,"#,
                r#""sectors-count":5,"type":"read","#,
                r#""bad-sectors":[{"sector-num":345436,"sector-count":2},{"sector-num":345439,"sector-count":1}],"#,
                r#""digest":"abababababababababababababababababababababababababababababababab","#,
                r#""winner-digest":"0101010101010101010101010101010101010101010101010101010101010101"},"#,
                r#""timestamp":{"seconds":1344522075,"microseconds":745528}}"#,
                "\n"
            )
        );
    }

    #[test]
    fn cut_evidence_and_folding_are_told() {
        let line = text(
            wrong_version(Evidence {
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
                r#"{"event":"QUORUM_REPORT_BAD","data":{"ret":-5,"node-name":"0.raw","sector-num":0,"sector-count":0,"#,
                r#""sectors-count":0,"type":"flush","error":"Input/output error","suppressed":3},"#,
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
        };
        let event = Event {
            news: report.into(),
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
        let manual = include_str!("../../docs/events.md");
        let evidence = Evidence {
            bad_sectors: vec![SectorRange::new(345_436, 1)],
            bad_sectors_cut: false,
            sectors: 1,
            digest: Sha256::digest([0; 512]).into(),
            winner_digest: Sha256::digest([0xff; 512]).into(),
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
        };
        for line in [
            text(wrong_version(evidence), 0),
            text(error, 41),
            text(failure, 0),
        ] {
            assert!(manual.contains(&line), "not in docs/events.md: {line}");
        }
    }
}
