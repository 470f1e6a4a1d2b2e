//! Waits for the end of a job. Ctrl-C ends the program, not the job.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::register_signal_handler;

use super::connection::Connection;
use super::format::{printable, size};
use super::progress::{Progress, describe};
use super::replies::{Disk, EndedJob, Job, JobEnd};
use super::terminal::Terminal;
use super::{Context, Error, Outcome};
use crate::common::message::counted;

/// Time between two queries of a job's progress.
const QUERY_EVERY: Duration = Duration::from_millis(200);

/// Time within which the end of a job that is no longer listed must have been reported.
const END_WITHIN: Duration = Duration::from_secs(2);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The job to wait for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Awaited<'a> {
    /// The job with this name.
    Job(&'a str),
    /// The resync of this replica, which may not have started yet.
    ResyncOf(&'a str),
}

/// The end of a job.
#[derive(Debug)]
pub(super) enum Ended {
    /// The daemon reported it.
    Reported {
        /// The data of the event.
        end: Box<JobEnd>,
        /// Whether the job was cancelled.
        cancelled: bool,
    },
    /// The replica is up to date; its resync was not seen.
    UpToDate,
}

impl Ended {
    /// Whether the job completed.
    pub(super) fn is_success(&self) -> bool {
        match self {
            Self::Reported { end, cancelled } => end.error.is_none() && !cancelled,
            Self::UpToDate => true,
        }
    }

    /// Good if the job completed and repaired what it found.
    pub(super) fn outcome(&self) -> Outcome {
        let is_repaired = match self {
            Self::Reported { end, .. } => end.found() == 0 || end.sectors_written > 0,
            Self::UpToDate => true,
        };
        Outcome::of(self.is_success() && is_repaired)
    }

    /// Writes the end.
    pub(super) fn write(&self, out: &mut dyn Write, terminal: Terminal) -> Result<(), Error> {
        for line in self.to_lines() {
            let before = line.len() - line.trim_start().len();
            for line in terminal.wrapped(before, 2, line.trim_start()) {
                writeln!(out, "{line}")?;
            }
        }
        Ok(())
    }

    /// The end in one line, and one for each replica that was bad.
    fn to_lines(&self) -> Vec<String> {
        let mut lines = vec![self.summary()];
        if let Self::Reported { end, .. } = self {
            let undecided = end.undecided.iter();
            lines.extend(undecided.map(|places| format!("  undecided: {}", places.to_text())));
            let replicas = end.replicas.iter();
            lines.extend(replicas.map(|found| format!("  {}", found.to_line())));
        }
        lines
    }

    fn summary(&self) -> String {
        match self {
            Self::Reported { end, .. } => {
                let job = describe(&end.device, &end.r#type, end.node_name.as_deref());
                format!("{job} {}", self.result())
            }
            Self::UpToDate => self.result(),
        }
    }

    /// The end in one line, without the name of the job.
    pub(super) fn result(&self) -> String {
        let Self::Reported { end, cancelled } = self else {
            return "the replica is up to date".into();
        };
        let is_scrub = end.r#type != "quorum-resync";
        let is_preferred = end.r#type == "quorum-prefer";
        let result = match (&end.error, cancelled) {
            (_, true) => format!(
                "was cancelled after {} of {}",
                size(end.offset),
                size(end.len)
            ),
            (Some(error), false) => format!("failed: {}", printable(error)),
            (None, false) => format!("completed, {}", size(end.len)),
        };
        let found = match (end.found(), end.sectors_written) {
            _ if !is_scrub => String::new(),
            (0, written) if is_preferred => {
                format!("; {} written", counted(written, "sector"))
            }
            (0, 0) => "; no corrupt sectors found".into(),
            (0, written) => format!(
                "; no corrupt sectors found; {} written that a failed write or flush had left \
                 undecided",
                counted(written, "sector")
            ),
            (_, 0) => format!("; {} found, not repaired", end.findings()),
            (_, written) => {
                let written = counted(written, "sector");
                format!("; {} found, {written} written", end.findings())
            }
        };
        format!("{result}{found}")
    }
}

/// Waits until the job has ended and shows its progress. `interrupted` makes the text for Ctrl-C
/// from the name of the job.
pub(super) fn wait(
    context: &mut Context<'_>,
    awaited: Awaited<'_>,
    interrupted: impl FnOnce(&str) -> String,
) -> Result<Ended, Error> {
    catch_interrupts();
    let mut progress = Progress::new(context.terminal);
    let result = follow(context, awaited, &mut progress, interrupted);
    progress.clear(context.out)?;
    result
}

fn follow(
    context: &mut Context<'_>,
    awaited: Awaited<'_>,
    progress: &mut Progress,
    interrupted: impl FnOnce(&str) -> String,
) -> Result<Ended, Error> {
    let mut name = match awaited {
        Awaited::Job(id) => printable(id),
        Awaited::ResyncOf(node) => format!("the resync of {}", printable(node)),
    };
    let mut gone_since = None;
    loop {
        if let Some(end) = take_end(&mut context.connection, awaited)? {
            return Ok(end);
        }
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err(Error::Interrupted(interrupted(&name)));
        }
        let jobs: Vec<Job> = context.connection.query("query-jobs")?;
        let is_it = |job: &&Job| match awaited {
            Awaited::Job(id) => job.id == id,
            Awaited::ResyncOf(node) => {
                job.r#type == "quorum-resync" && job.node_name.as_deref() == Some(node)
            }
        };
        let now = Instant::now();
        if let Some(job) = jobs.iter().find(is_it) {
            gone_since = None;
            name = printable(&job.id);
            progress.show(context.out, job, now)?;
        } else if *gone_since.get_or_insert(now) + END_WITHIN < now
            && let Some(ended) = ended_unreported(&mut context.connection, awaited)?
        {
            return Ok(ended);
        }
        context.connection.wait_for_job_end(now + QUERY_EVERY)?;
    }
}

/// The reported end of the job, if any.
fn take_end(connection: &mut Connection, awaited: Awaited<'_>) -> Result<Option<Ended>, Error> {
    let is_it = |event: &serde_json::Value| {
        let data = &event["data"];
        match awaited {
            Awaited::Job(id) => data["device"] == id,
            Awaited::ResyncOf(node) => data["type"] == "quorum-resync" && data["node-name"] == node,
        }
    };
    let Some(mut event) = connection.take_job_end(is_it) else {
        return Ok(None);
    };
    let end = serde_json::from_value(event["data"].take())
        .map_err(|error| Error::invalid("the event about the end of a job", error))?;
    let cancelled = event["event"] == "BLOCK_JOB_CANCELLED";
    Ok(Some(Ended::Reported { end, cancelled }))
}

/// The end of a job that is no longer listed and whose end was not reported. None if the job may
/// still start.
fn ended_unreported(
    connection: &mut Connection,
    awaited: Awaited<'_>,
) -> Result<Option<Ended>, Error> {
    let node = match awaited {
        Awaited::Job(id) => return has_ended(connection, id).map(Some),
        Awaited::ResyncOf(node) => node,
    };
    let disk: Disk = connection.query("query-quorum")?;
    match disk
        .replicas
        .iter()
        .find(|replica| replica.node_name == node)
    {
        Some(replica) if replica.stale_bytes == 0 => Ok(Some(Ended::UpToDate)),
        // The daemon starts it when one of the other jobs has ended.
        Some(_) => Ok(None),
        None => Err(Error::Failed(format!(
            "{} is not a replica any more",
            printable(node)
        ))),
    }
}

/// The end of a job that is no longer listed.
pub(super) fn has_ended(connection: &mut Connection, id: &str) -> Result<Ended, Error> {
    let ended: Vec<EndedJob> = connection.query("query-quorum-jobs")?;
    let mut last = ended.iter().rev();
    let last = last.find(|ended| ended.job.id == id && !ended.before_start);
    last.map(EndedJob::end).ok_or_else(|| {
        Error::Failed(format!(
            "there is no job {}; to list the last ones that have ended: quorum-blkctl jobs --all",
            printable(id)
        ))
    })
}

/// Whether there is a job with this name.
pub(super) fn job_exists(connection: &mut Connection, id: &str) -> Result<bool, Error> {
    let jobs: Vec<Job> = connection.query("query-jobs")?;
    Ok(jobs.iter().any(|job| job.id == id))
}

fn catch_interrupts() {
    extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    // If this fails, Ctrl-C ends the program without a text; the job continues all the same.
    let _ = register_signal_handler(libc::SIGINT, interrupted);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reported(found: u64, written: u64, error: Option<&str>, cancelled: bool) -> Ended {
        Ended::Reported {
            end: Box::new(JobEnd {
                r#type: "quorum-scrub".into(),
                device: "job1".into(),
                len: 1 << 30,
                offset: 1 << 20,
                error: error.map(str::to_owned),
                node_name: None,
                corrupt_sectors_found: found,
                unreadable_sectors_found: 0,
                sectors_written: written,
                replicas: Vec::new(),
                undecided: None,
            }),
            cancelled,
        }
    }

    #[test]
    fn an_end_is_good_if_the_job_completed_and_repaired() {
        let cases = [
            (
                reported(0, 0, None, false),
                Outcome::Good,
                "job1 (scrub) completed, 1 GiB; no corrupt sectors found",
            ),
            (
                reported(1, 8, None, false),
                Outcome::Good,
                "job1 (scrub) completed, 1 GiB; 1 corrupt sector found, 8 sectors written",
            ),
            (
                reported(2, 0, None, false),
                Outcome::NeedsAttention,
                "job1 (scrub) completed, 1 GiB; 2 corrupt sectors found, not repaired",
            ),
            (
                reported(2, 2, Some("2 sectors have no\x07 quorum"), false),
                Outcome::NeedsAttention,
                "job1 (scrub) failed: 2 sectors have no\\u{7} quorum; 2 corrupt sectors found, \
                 2 sectors written",
            ),
            (
                reported(0, 0, None, true),
                Outcome::NeedsAttention,
                "job1 (scrub) was cancelled after 1 MiB of 1 GiB; no corrupt sectors found",
            ),
        ];
        for (ended, outcome, line) in cases {
            assert_eq!(
                (ended.outcome(), ended.to_lines()),
                (outcome, vec![line.into()])
            );
        }
    }

    #[test]
    fn an_end_says_what_was_found_where_and_why_it_is_not_repaired() {
        let end = serde_json::from_value(serde_json::json!({
            "type": "quorum-scrub", "device": "job1", "len": 1 << 30, "offset": 1 << 30,
            "corrupt-sectors-found": 40, "unreadable-sectors-found": 8, "sectors-written": 40,
            "error": "8 sectors could not be written; c: write: No space left on device",
            "undecided": { "sectors": 1, "ranges": [{ "sector-num": 9, "sector-count": 1 }] },
            "replicas": [
                {
                    "node-name": "b", "sectors-written": 40, "sectors-not-written": 0,
                    "corrupt": {
                        "sectors": 40, "ranges-truncated": true,
                        "ranges": [
                            { "sector-num": 8, "sector-count": 8 },
                            { "sector-num": 20, "sector-count": 1 },
                        ],
                    },
                },
                {
                    "node-name": "c", "sectors-written": 0, "sectors-not-written": 8,
                    "unreadable": {
                        "sectors": 8, "ranges": [{ "sector-num": 40, "sector-count": 8 }],
                    },
                    "read-error": { "ret": -5, "error": "Input/output error" },
                    "write-error": { "ret": -28, "error": "No space left on device" },
                },
            ],
        }));
        let cancelled = false;
        let ended = Ended::Reported {
            end: end.unwrap(),
            cancelled,
        };
        assert_eq!(
            ended.to_lines(),
            [
                "job1 (scrub) failed: 8 sectors could not be written; c: write: No space left on \
                 device; 40 corrupt sectors and 8 unreadable found, 40 sectors written",
                "  undecided: sector 9",
                "  b: 40 corrupt, sectors 8-15, 20, ...; 40 written",
                "  c: 8 unreadable, sectors 40-47 (Input/output error); \
                 8 not written (No space left on device)",
            ]
        );
        let settled = reported(0, 4096, None, false);
        assert_eq!(
            settled.to_lines(),
            [
                "job1 (scrub) completed, 1 GiB; no corrupt sectors found; 4096 sectors written \
                 that a failed write or flush had left undecided"
            ]
        );
    }
}
