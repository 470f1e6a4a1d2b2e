//! The log record of an event: a message, and the values of the event as fields.

use log::{Level, Record};

use super::line::hex;
use super::{Event, Names, Notice, type_name};
use crate::common::image::ImageChanges;
use crate::common::report::{Cause, Report, Requester};
use crate::common::{SECTOR_BYTES, SectorRange};
use crate::control::job_state;
use crate::jobs::{JobChange, JobEvent, JobStatus};

/// A field of a record.
type Field = (&'static str, String);

impl Event {
    /// Writes the event to the log.
    pub(in crate::control) fn log(&self, names: &Names) {
        let (level, message) = self.summary();
        if log::log_enabled!(level) {
            let fields = self.fields(names);
            log::logger().log(
                &Record::builder()
                    .level(level)
                    .target(module_path!())
                    .args(format_args!("{message}"))
                    .key_values(&fields)
                    .build(),
            );
        }
    }

    fn summary(&self) -> (Level, &'static str) {
        match &self.notice {
            Notice::Report(Report::Failure { requester, .. }) => match requester {
                Requester::Guest => (Level::Error, "no quorum: the guest got an I/O error"),
                Requester::Held => (
                    Level::Error,
                    "no quorum: a request of the guest is held until the command cont",
                ),
                Requester::Job => (Level::Error, "no quorum: a scrub found undecided sectors"),
            },
            Notice::Report(Report::Bad { cause, .. }) => match cause {
                Cause::Error(_) => (Level::Warn, "replica returned an error"),
                Cause::Corrupt(_) => (Level::Warn, "replica is corrupt"),
            },
            Notice::Report(Report::Evicted(_)) => {
                (Level::Warn, "replica evicted: it did not answer in time")
            }
            Notice::Report(Report::KeptOut { .. }) => (
                Level::Warn,
                "replica was evicted too often: it is not asked for some time",
            ),
            Notice::Report(Report::RepairLimit { .. }) => (
                Level::Error,
                "repairs have stopped: more is corrupt than is repaired unasked",
            ),
            Notice::Report(Report::Rejoined(_)) => (Level::Info, "replica rejoined"),
            Notice::Image(_, changes) if *changes == ImageChanges::default() => {
                (Level::Info, "image has its name and size again")
            }
            Notice::Image(..) => (Level::Warn, "image was changed by another program"),
            Notice::Missing { .. } => (
                Level::Warn,
                "replica is missing: its image cannot be opened",
            ),
            Notice::Job(JobEvent { job, what }) => match what {
                JobChange::Status if job.status == JobStatus::Created => {
                    (Level::Info, "job started")
                }
                JobChange::Status => (Level::Debug, "job changed its status"),
                JobChange::Completed if job.error.is_some() => (Level::Warn, "job failed"),
                JobChange::Completed => (Level::Info, "job completed"),
                JobChange::Cancelled => (Level::Info, "job cancelled"),
            },
        }
    }

    fn fields(&self, names: &Names) -> Vec<Field> {
        let mut fields = match &self.notice {
            Notice::Report(report) => report_fields(report, names),
            Notice::Job(event) => job_fields(event, names),
            Notice::Image(replica, changes) => {
                let words: Vec<_> = changes.words().collect();
                vec![
                    ("replica", names.nodes.get(*replica).to_string()),
                    ("conditions", words.join(",")),
                ]
            }
            Notice::Missing {
                replica, reason, ..
            } => vec![
                ("replica", names.nodes.get(*replica).to_string()),
                ("reason", reason.clone()),
            ],
        };
        if self.suppressed > 0 {
            fields.push(("suppressed", self.suppressed.to_string()));
        }
        fields
    }
}

fn report_fields(report: &Report, names: &Names) -> Vec<Field> {
    let (replica, operation) = match report {
        Report::Failure {
            operation, range, ..
        } => (None, Some((*operation, range))),
        Report::Bad {
            replica,
            operation,
            range,
            ..
        } => (Some(*replica), Some((*operation, range))),
        Report::Evicted(replica) | Report::KeptOut { replica, .. } | Report::Rejoined(replica) => {
            (Some(*replica), None)
        }
        Report::RepairLimit { .. } => (None, None),
    };
    let mut fields = Vec::new();
    if let Some(replica) = replica {
        fields.push(("replica", names.nodes.get(replica).to_string()));
    }
    if let Some((operation, range)) = operation {
        fields.push(("type", type_name(operation).to_owned()));
        fields.push(("sector-num", range.start.to_string()));
        fields.push(("sector-count", range.count.to_string()));
    }
    match report {
        Report::Bad {
            cause: Cause::Error(errno),
            ..
        }
        | Report::Failure {
            error: Some(errno), ..
        } => fields.push(("error", errno.to_string())),
        Report::Bad {
            cause: Cause::Corrupt(evidence),
            ..
        } => {
            fields.push(("corrupt-sectors", evidence.sectors.to_string()));
            fields.push(("bad-sectors", runs(&evidence.bad_sectors)));
            fields.push(("digest", hex(&evidence.digest)));
            fields.push(("winner-digest", hex(&evidence.winner_digest)));
        }
        Report::KeptOut { time, .. } => fields.push(("milliseconds", time.as_millis().to_string())),
        Report::RepairLimit { limit_sectors } => {
            let bytes = limit_sectors.saturating_mul(SECTOR_BYTES);
            fields.push(("limit", bytes.to_string()));
        }
        Report::Failure { .. } | Report::Evicted(_) | Report::Rejoined(_) => {}
    }
    fields
}

fn job_fields(event: &JobEvent, names: &Names) -> Vec<Field> {
    let job = &event.job;
    let mut fields = vec![
        ("job", job.id.to_string()),
        ("type", job.kind.name().to_owned()),
    ];
    if let Some(replica) = job.kind.replica() {
        fields.push(("replica", names.nodes.get(replica).to_string()));
    }
    match event.what {
        JobChange::Status if job.status == JobStatus::Created => {}
        JobChange::Status => fields.push(("status", job.status.name().to_owned())),
        JobChange::Completed | JobChange::Cancelled => {
            fields.push(("offset", job.current_bytes.to_string()));
            fields.push(("len", job.total_bytes.to_string()));
            let found = job.corrupt_sectors_found.to_string();
            fields.push(("corrupt-sectors-found", found));
            let unreadable = job.unreadable_sectors_found.to_string();
            fields.push(("unreadable-sectors-found", unreadable));
            fields.push(("sectors-written", job.sectors_written.to_string()));
            for (replica, found) in &job.findings {
                let places = [
                    ("corrupt", &found.corrupt),
                    ("unreadable", &found.unreadable),
                ];
                for (what, places) in places {
                    if places.sectors > 0 {
                        let name = names.nodes.get(*replica);
                        let more = if places.is_cut { ",…" } else { "" };
                        let runs = runs(&places.runs);
                        fields.push((what, format!("{name}:{runs}{more}")));
                    }
                }
            }
            if job.undecided.sectors > 0 {
                fields.push(("undecided", runs(&job.undecided.runs)));
            }
            if let Some(error) = job_state::error(job, &names.nodes) {
                fields.push(("error", error));
            }
        }
    }
    fields
}

/// `FIRST+COUNT` of each run, with commas between.
fn runs(runs: &[SectorRange]) -> String {
    let run = |run: &SectorRange| format!("{}+{}", run.start, run.count);
    runs.iter().map(run).collect::<Vec<_>>().join(",")
}
