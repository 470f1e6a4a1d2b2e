//! Waiting for the end of a job. Ctrl-C ends the waiting, not the job.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use vmm_sys_util::signal::register_signal_handler;

use super::connection::{Connection, understand};
use super::format::{clean, counted, size};
use super::progress::{Progress, describe};
use super::shapes::{Disk, Job, JobEnd};
use super::{Context, Error, Outcome};

/// Time between two looks at a job.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Time in which the end of a job that is gone must have been told.
const END_IS_TOLD_WITHIN: Duration = Duration::from_secs(2);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Awaited<'a> {
    /// The job of this name.
    Job(&'a str),
    /// The resync of this replica, which may not have begun yet.
    ResyncOf(&'a str),
}

/// How a job has ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// It was told.
    Told {
        /// What was told.
        end: JobEnd,
        /// It was cancelled.
        cancelled: bool,
    },
    /// The replica is up to date, whatever made it so.
    UpToDate,
}

impl Ended {
    /// It did what it was to do.
    pub(super) fn is_success(&self) -> bool {
        match self {
            Self::Told { end, cancelled } => end.error.is_none() && !cancelled,
            Self::UpToDate => true,
        }
    }

    /// All is well: it did that, and what it found is mended.
    pub(super) fn outcome(&self) -> Outcome {
        let is_mended = match self {
            Self::Told { end, .. } => end.corrupt_sectors_found == 0 || end.sectors_written > 0,
            Self::UpToDate => true,
        };
        Outcome::of(self.is_success() && is_mended)
    }

    /// In a line.
    pub(super) fn to_line(&self) -> String {
        let Self::Told { end, cancelled } = self else {
            return "the replica is up to date".into();
        };
        let what = describe(&end.device, &end.r#type, end.node_name.as_deref());
        let is_scrub = end.r#type != "quorum-resync";
        let how = match (&end.error, cancelled) {
            (_, true) => format!(
                "was cancelled after {} of {}",
                size(end.offset),
                size(end.len)
            ),
            (Some(error), false) => format!("has failed: {}", clean(error)),
            (None, false) => format!("is done, {}", size(end.len)),
        };
        let found = match (end.corrupt_sectors_found, end.sectors_written) {
            _ if !is_scrub => String::new(),
            (0, _) => "; nothing bad was found".into(),
            (found, 0) => format!("; {} found and not mended", counted(found, "bad sector")),
            (found, written) => format!(
                "; {} found, {} written",
                counted(found, "bad sector"),
                counted(written, "sector")
            ),
        };
        format!("{what} {how}{found}")
    }
}

/// Waits until the job has ended, and tells how far it is meanwhile. `interrupted` is what there is
/// to be said on Ctrl-C.
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
        Awaited::Job(id) => clean(id),
        Awaited::ResyncOf(node) => format!("the resync of {}", clean(node)),
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
            name = clean(&job.id);
            progress.show(context.out, job, now)?;
        } else if *gone_since.get_or_insert(now) + END_IS_TOLD_WITHIN < now
            && let Some(ended) = ended_untold(&mut context.connection, awaited)?
        {
            return Ok(ended);
        }
        context.connection.linger(now + LOOK_EVERY)?;
    }
}

/// The end that was told of the job, if it was.
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
    let end = understand("the event of a job's end", event["data"].take())?;
    let cancelled = event["event"] == "BLOCK_JOB_CANCELLED";
    Ok(Some(Ended::Told { end, cancelled }))
}

/// What is to be thought of a job that is gone, and whose end was not told. Nothing if it may come
/// yet.
fn ended_untold(connection: &mut Connection, awaited: Awaited<'_>) -> Result<Option<Ended>, Error> {
    let node = match awaited {
        Awaited::Job(id) => {
            let what = format!(
                "there is no job {}; if it has ended, how is in the daemon's log",
                clean(id)
            );
            return Err(Error::Not(what));
        }
        Awaited::ResyncOf(node) => node,
    };
    let disk: Disk = connection.query("query-quorum")?;
    match disk
        .replicas
        .iter()
        .find(|replica| replica.node_name == node)
    {
        Some(replica) if replica.stale_bytes == 0 => Ok(Some(Ended::UpToDate)),
        // There are as many jobs as there can be; it comes when one has ended.
        Some(_) => Ok(None),
        None => Err(Error::Not(format!(
            "{} is no replica any more",
            clean(node)
        ))),
    }
}

/// Whether there is a job of this name.
pub(super) fn is_there(connection: &mut Connection, id: &str) -> Result<bool, Error> {
    let jobs: Vec<Job> = understand("query-jobs", connection.execute("query-jobs", json!({}))?)?;
    Ok(jobs.iter().any(|job| job.id == id))
}

fn catch_interrupts() {
    extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    // If that fails Ctrl-C ends the program without a word; the job goes on all the same.
    let _ = register_signal_handler(libc::SIGINT, interrupted);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(found: u64, written: u64, error: Option<&str>, cancelled: bool) -> Ended {
        Ended::Told {
            end: JobEnd {
                r#type: "quorum-scrub".into(),
                device: "job1".into(),
                len: 1 << 30,
                offset: 1 << 20,
                error: error.map(str::to_owned),
                node_name: None,
                corrupt_sectors_found: found,
                sectors_written: written,
            },
            cancelled,
        }
    }

    #[test]
    fn all_is_well_only_if_what_was_found_is_mended() {
        let cases = [
            (
                told(0, 0, None, false),
                Outcome::Well,
                "job1 (scrub) is done, 1 GiB; nothing bad was found",
            ),
            (
                told(1, 8, None, false),
                Outcome::Well,
                "job1 (scrub) is done, 1 GiB; 1 bad sector found, 8 sectors written",
            ),
            (
                told(2, 0, None, false),
                Outcome::NotWell,
                "job1 (scrub) is done, 1 GiB; 2 bad sectors found and not mended",
            ),
            (
                told(2, 2, Some("2 sectors have no\x07 quorum"), false),
                Outcome::NotWell,
                "job1 (scrub) has failed: 2 sectors have no\\u{7} quorum; 2 bad sectors found, 2 sectors written",
            ),
            (
                told(0, 0, None, true),
                Outcome::NotWell,
                "job1 (scrub) was cancelled after 1 MiB of 1 GiB; nothing bad was found",
            ),
        ];
        for (ended, outcome, line) in cases {
            assert_eq!((ended.outcome(), ended.to_line().as_str()), (outcome, line));
        }
    }
}
