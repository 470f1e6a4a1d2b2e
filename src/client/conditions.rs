//! The conditions of a disk and its replicas, as an operator reads them: what is not as it should
//! be, and what to do about it.

use std::time::SystemTime;

use super::format::{age, duration, printable, size};
use super::replies::{Disk, Errors, Job, Replica};
use super::terminal::Style;
use crate::common::message::counted;

/// What one condition is, and what to do about it, one line each.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Advice {
    pub(super) style: Style,
    pub(super) what: String,
    pub(super) to_do: Option<String>,
}

impl Advice {
    fn new(style: Style, what: String, to_do: impl Into<Option<String>>) -> Self {
        let to_do = to_do.into();
        Self { style, what, to_do }
    }
}

/// Everything that needs the attention of an operator, the disk's conditions first.
pub(super) fn advice(disk: &Disk, jobs: &[Job], now: SystemTime) -> Vec<Advice> {
    let conditions = disk.conditions.iter();
    let mut all: Vec<_> = conditions.map(|word| of_disk(word, disk, now)).collect();
    for replica in &disk.replicas {
        let conditions = replica.conditions.iter();
        all.extend(conditions.map(|word| of_replica(word, disk, replica, jobs, now)));
    }
    // No condition: the disk is good, its guest is not.
    if disk.requests.rejected > 0 {
        let requests = counted(disk.requests.rejected, "request");
        let what = format!("the guest sent {requests} that are invalid or unsupported");
        all.push(Advice::new(Style::Warning, what, None));
    }
    all
}

fn of_disk(condition: &str, disk: &Disk, now: SystemTime) -> Advice {
    match condition {
        "undecided" => {
            let sectors = counted(disk.undecided_sectors, "sector");
            Advice::new(
                Style::Bad,
                format!("no quorum for {sectors}"),
                "let one replica decide (quorum-blkctl prefer NODE), or restore them from a \
                 backup, then quorum-blkctl scrub"
                    .to_owned(),
            )
        }
        "io-error" => {
            let requests = counted(disk.held_requests, "request");
            Advice::new(
                Style::Bad,
                format!("the disk has stopped: it holds {requests} that failed; the guest waits"),
                "remove the cause, for example make room for the images, then quorum-blkctl cont"
                    .to_owned(),
            )
        }
        "guest-errors" => {
            let errors = counted(disk.errors.sum(), "I/O error");
            let cause = match disk.errors.is_out_of_space() {
                true => "make room for the images",
                false => "remove the cause",
            };
            Advice::new(
                Style::Bad,
                format!("the guest got {errors}; {}", last(&disk.errors, now)),
                format!("{cause}, check the guest's files, then quorum-blkctl clear"),
            )
        }
        "repair-limit" => Advice::new(
            Style::Bad,
            format!(
                "repairs have stopped: they reached {} (--repair-limit)",
                size(disk.repair_limit)
            ),
            "if the corrupt images are the wrong ones, quorum-blkctl scrub --repair".to_owned(),
        ),
        "fewer-replicas" => {
            let now = counted(disk.replicas.len() as u64, "replica");
            let before = disk.intended_replicas;
            Advice::new(
                Style::Warning,
                format!("the disk has {now}, and had {before} at its start"),
                "quorum-blkctl add FILE; if it is to have no more: quorum-blkctl clear".to_owned(),
            )
        }
        unknown => of_unknown(&disk.node_name, unknown),
    }
}

fn of_replica(
    condition: &str,
    disk: &Disk,
    replica: &Replica,
    jobs: &[Job],
    now: SystemTime,
) -> Advice {
    let name = printable(&replica.node_name);
    match condition {
        "evicted" => {
            let what = match replica.kept_out_ms {
                Some(ms) => {
                    let time = duration(ms.div_ceil(1000));
                    format!("{name} was evicted too often and is kept out for {time} more")
                }
                None => format!("{name} is evicted: it does not answer; it rejoins when it does"),
            };
            let to_do = format!("if it never does: quorum-blkctl replace {name} FILE");
            let is_kept_out = replica.kept_out_ms.is_some();
            Advice::new(Style::Bad, what, (!is_kept_out).then_some(to_do))
        }
        "missing" => {
            let reason = replica
                .missing_reason
                .as_deref()
                .unwrap_or("it cannot be opened");
            let what = format!("{name} is missing: {}", printable(reason));
            let (what, to_do) = match replica.missing_retried {
                Some(false) if disk.read_only => (what, None),
                Some(false) => {
                    let to_do = format!(
                        "start with its image, or quorum-blkctl replace {name} FILE, or remove \
                         {name}"
                    );
                    (what, Some(to_do))
                }
                _ => (
                    format!("{what}; it is taken in when it can be used"),
                    Some(format!(
                        "if it never can: quorum-blkctl replace {name} FILE"
                    )),
                ),
            };
            Advice::new(Style::Bad, what, to_do)
        }
        "flapping" => Advice::new(
            Style::Warning,
            format!("{name} is flapping: it was evicted again and again of late"),
            format!("check its disk and the way to it, or replace {name} FILE"),
        ),
        "stale" => {
            let is_its_resync = |job: &&Job| {
                job.r#type == "quorum-resync"
                    && job.node_name.as_deref() == Some(replica.node_name.as_str())
            };
            let to_do = match jobs.iter().find(is_its_resync) {
                Some(job) => format!("{} copies what it lacks", printable(&job.id)),
                None => format!("to copy what it lacks: quorum-blkctl resync {name}"),
            };
            let is_away = matches!(replica.state.as_str(), "evicted" | "missing");
            let what = format!("{name} is stale in {}", size(replica.stale_bytes));
            Advice::new(Style::Warning, what, (!is_away).then_some(to_do))
        }
        "corrupt" => Advice::new(
            Style::Bad,
            format!(
                "{name} is corrupt in {}",
                counted(replica.corrupt_sectors, "sector")
            ),
            "to overwrite it there by what wins the vote: quorum-blkctl scrub --repair".to_owned(),
        ),
        "errors" => {
            let errors = counted(replica.errors.sum(), "error");
            let what = format!("{name} returned {errors}; {}", last(&replica.errors, now));
            let to_do = match replica.errors.is_out_of_space() {
                true => {
                    let file = printable(&replica.file);
                    format!("make room for {file}, then quorum-blkctl clear {name}")
                }
                false => format!(
                    "check its disk; then quorum-blkctl clear {name}, or replace {name} FILE"
                ),
            };
            Advice::new(Style::Bad, what, to_do)
        }
        "truncated" => Advice::new(
            Style::Bad,
            format!("{name} was truncated by another program: its data at the end is lost"),
            format!("quorum-blkctl replace {name} FILE"),
        ),
        "unlinked" => Advice::new(
            Style::Bad,
            format!("{name} was deleted by another program, and is lost when the daemon ends"),
            format!("quorum-blkctl replace {name} FILE"),
        ),
        "moved" => Advice::new(
            Style::Bad,
            format!("{name} was moved by another program, or its path names another file"),
            format!(
                "move it back to {}, overwriting nothing, or replace {name} FILE",
                printable(&replica.file)
            ),
        ),
        unknown => of_unknown(&replica.node_name, unknown),
    }
}

/// The daemon is newer than this program.
fn of_unknown(name: &str, condition: &str) -> Advice {
    let (name, condition) = (printable(name), printable(condition));
    Advice::new(Style::Bad, format!("{name}: {condition}"), None)
}

/// `the last 5 s ago: write: No space left on device`.
fn last(errors: &Errors, now: SystemTime) -> String {
    let Some(last) = &errors.last else {
        return "the last: unknown".into();
    };
    let ago = match errors.seconds_before(now) {
        Some(seconds) => format!(" {} ago", age(seconds)),
        None => String::new(),
    };
    let operation = printable(&last.r#type);
    let error = match (&last.error, operation.as_str()) {
        (Some(error), _) => printable(error),
        (None, "read") => "no quorum".into(),
        (None, _) => "too few replicas".into(),
    };
    format!("the last{ago}: {operation}: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::status::tests::disk;
    use serde_json::json;
    use std::time::{Duration, UNIX_EPOCH};

    fn job(node: &str) -> Job {
        serde_json::from_value(json!({
            "id": "job3", "type": "quorum-resync", "status": "running", "current-progress": 0,
            "total-progress": 4096, "node-name": node,
        }))
        .unwrap()
    }

    #[test]
    fn a_stale_replica_is_copied_by_its_job() {
        let disk = disk("syncing", 512, 0, 0);
        let to_do = |jobs: &[Job]| advice(&disk, jobs, UNIX_EPOCH)[0].to_do.clone();
        assert_eq!(
            to_do(&[job("c"), job("b")]).as_deref(),
            Some("job3 copies what it lacks")
        );
        assert_eq!(
            to_do(&[job("c")]).as_deref(),
            Some("to copy what it lacks: quorum-blkctl resync b")
        );
    }

    #[test]
    fn a_replica_that_is_kept_out_says_for_how_long() {
        let mut disk = disk("evicted", 0, 0, 0);
        disk.replicas[1].kept_out_ms = Some(63_001);
        let what = &advice(&disk, &[], UNIX_EPOCH)[0].what;
        assert_eq!(
            what,
            "b was evicted too often and is kept out for 1 min 4 s more"
        );
    }

    #[test]
    fn a_replica_that_is_missing_says_why() {
        let mut disk = disk("missing", 512, 0, 0);
        disk.replicas[1].conditions = vec!["missing".into(), "stale".into()];
        disk.replicas[1].missing_reason = Some("cannot open '/b': no such file".to_owned());
        let tried = "; it is taken in when it can be used";
        let replace = "if it never can: quorum-blkctl replace b FILE";
        let start = "start with its image, or quorum-blkctl replace b FILE, or remove b";
        for (retried, read_only, more, to_do) in [
            (true, false, tried, Some(replace)),
            (false, false, "", Some(start)),
            (false, true, "", None),
        ] {
            disk.replicas[1].missing_retried = Some(retried);
            disk.read_only = read_only;
            let advice = advice(&disk, &[], UNIX_EPOCH);
            let what = format!("b is missing: cannot open '/b': no such file{more}");
            assert_eq!(advice[0].what, what);
            let given = advice.iter().map(|advice| advice.to_do.as_deref());
            assert!(given.eq([to_do, None]), "{advice:?}");
        }
    }

    #[test]
    fn repairs_that_have_stopped_are_the_decision_of_the_operator() {
        let mut disk = disk("in-service", 0, 0, 0);
        disk.conditions = vec!["repair-limit".into()];
        disk.repair_limit = 16 << 20;
        let advice = &advice(&disk, &[], UNIX_EPOCH)[0];
        assert_eq!(
            advice.what,
            "repairs have stopped: they reached 16 MiB (--repair-limit)"
        );
        assert!(advice.to_do.as_ref().unwrap().ends_with("scrub --repair"));
    }

    #[test]
    fn errors_say_why_and_what_to_do() {
        let mut disk = disk("in-service", 0, 0, 0);
        let errors = |ret: i64, error: &str| {
            let last = json!({
                "type": "write", "ret": ret, "error": error, "sector-num": 0, "sector-count": 8,
                "timestamp": { "seconds": 1000, "microseconds": 0 },
            });
            serde_json::from_value(json!({ "read": 1, "write": 2, "flush": 0, "last": last }))
                .unwrap()
        };
        disk.replicas[1].conditions = vec!["errors".into()];
        disk.replicas[1].errors = errors(-28, "No space left on device");
        disk.replicas[2].conditions = vec!["errors".into(), "new\x1b".into()];
        disk.replicas[2].errors = errors(-5, "Input/output error");
        disk.conditions = vec!["guest-errors".into()];
        disk.errors = errors(-28, "No space left on device");
        let advice = advice(&disk, &[], UNIX_EPOCH + Duration::from_secs(1200));
        let lines = advice
            .iter()
            .flat_map(|advice| [Some(&advice.what), advice.to_do.as_ref()]);
        let lines: Vec<_> = lines.flatten().map(String::as_str).collect();
        assert_eq!(
            lines,
            [
                "the guest got 3 I/O errors; the last 3 min ago: write: No space left on device",
                "make room for the images, check the guest's files, then quorum-blkctl clear",
                "b returned 3 errors; the last 3 min ago: write: No space left on device",
                "make room for /images/b, then quorum-blkctl clear b",
                "c returned 3 errors; the last 3 min ago: write: Input/output error",
                "check its disk; then quorum-blkctl clear c, or replace c FILE",
                "c: new\\u{1b}",
            ]
        );
    }
}
