//! `status`: the health of the disk, its replicas and its jobs, once or repeatedly.

use std::io::Write;
use std::thread;
use std::time::{Duration, SystemTime};

use serde_json::json;
use unicode_width::UnicodeWidthStr as _;

use super::conditions::{Advice, advice};
use super::connection::parse_reply;
use super::format::{age, latency, printable, printable_json, size};
use super::jobs::write_table;
use super::replies::{Disk, EndedJob, Job, Operations, Replica};
use super::table::Table;
use super::terminal::{Style, Terminal};
use super::{Context, Error, Outcome};

/// The type of a scrub of the whole disk.
const SCRUB: &str = "quorum-scrub";

/// The health of a disk without conditions.
pub(super) const HEALTHY: &str = "healthy";

pub(super) fn run(
    context: &mut Context<'_>,
    watch: Option<Duration>,
    json: bool,
) -> Result<Outcome, Error> {
    let mut is_first = true;
    loop {
        let mut frame = Vec::new();
        let outcome = show(context, &mut frame, json)?;
        let is_redrawn = watch.is_some() && context.terminal.is_terminal && !json;
        if is_redrawn {
            redraw(context.out, &frame, is_first)?;
        } else {
            if !is_first && !json {
                writeln!(context.out)?;
            }
            context.out.write_all(&frame)?;
        }
        let Some(interval) = watch else {
            return Ok(outcome);
        };
        context.out.flush()?;
        is_first = false;
        thread::sleep(interval);
    }
}

/// Writes a frame over the previous one. It clears the rest of each line instead of the screen, so
/// that nothing flickers.
fn redraw(out: &mut dyn Write, frame: &[u8], is_first: bool) -> Result<(), Error> {
    out.write_all(if is_first {
        b"\x1b[2J\x1b[H"
    } else {
        b"\x1b[H"
    })?;
    for line in frame.split_inclusive(|byte| *byte == b'\n') {
        let text = line.strip_suffix(b"\n").unwrap_or(line);
        out.write_all(text)?;
        out.write_all(b"\x1b[K\n")?;
    }
    Ok(out.write_all(b"\x1b[J")?)
}

fn show(context: &mut Context<'_>, out: &mut dyn Write, json: bool) -> Result<Outcome, Error> {
    let state = context.connection.execute("query-quorum", json!({}))?;
    let jobs = context.connection.execute("query-jobs", json!({}))?;
    let ended = context.connection.execute("query-quorum-jobs", json!({}))?;
    let all = json
        .then(|| json!({ "query-quorum": state, "query-jobs": jobs, "query-quorum-jobs": ended }));
    let disk: Disk = parse_reply("query-quorum", state)?;
    let jobs: Vec<Job> = parse_reply("query-jobs", jobs)?;
    let ended: Vec<EndedJob> = parse_reply("query-quorum-jobs", ended)?;
    match all {
        Some(all) => writeln!(out, "{}", printable_json(all))?,
        None => {
            let now = SystemTime::now();
            write_status(out, &disk, &jobs, context.terminal)?;
            write_last_scrub(out, disk.records, &ended, now, context.terminal)?;
        }
    }
    Ok(Outcome::of(disk.health == HEALTHY))
}

fn write_status(
    out: &mut dyn Write,
    disk: &Disk,
    jobs: &[Job],
    terminal: Terminal,
) -> Result<(), Error> {
    let style = match disk.health.as_str() {
        HEALTHY => Style::Good,
        "degraded" => Style::Warning,
        _ => Style::Bad,
    };
    let (name, health) = (printable(&disk.node_name), printable(&disk.health));
    let (threshold, wanted) = (disk.vote_threshold, disk.wanted_vote_threshold);
    let soon = match wanted > threshold {
        true => format!(" ({wanted} when enough replicas are up to date)"),
        false => String::new(),
    };
    let mut policy = format!(
        "{}, {threshold} of {} must agree{soon}, read-pattern {}",
        size(disk.size),
        disk.replicas.len(),
        printable(&disk.read_pattern),
    );
    let options = [
        (disk.rewrite_corrupted, "rewrite-corrupted"),
        (disk.read_only, "read-only"),
        (disk.aio == "threads", "aio threads"),
        (disk.records, "with records"),
    ];
    for (_, name) in options.into_iter().filter(|(is_on, _)| *is_on) {
        policy += ", ";
        policy += name;
    }
    let before = name.width() + health.width() + 4;
    let name = terminal.paint(Style::Heading, name);
    write!(out, "{name}  {}", terminal.paint(style, health))?;
    if before + policy.width() <= terminal.columns || !terminal.is_terminal {
        writeln!(out, "  {policy}")?;
    } else {
        writeln!(out)?;
        for line in terminal.wrapped(2, 0, &policy) {
            writeln!(out, "{line}")?;
        }
    }
    for Advice { style, what, to_do } in advice(disk, jobs, SystemTime::now()) {
        for line in terminal.wrapped(2, 2, &what) {
            writeln!(out, "{}", terminal.paint(style, line))?;
        }
        for line in to_do.iter().flat_map(|text| terminal.wrapped(4, 2, text)) {
            writeln!(out, "{line}")?;
        }
    }
    writeln!(out)?;
    write_replicas(out, disk, terminal)?;
    if !jobs.is_empty() {
        writeln!(out)?;
        write_table(out, jobs, terminal)?;
    }
    Ok(())
}

/// When the last scrub of the whole disk ended, and what it found.
fn write_last_scrub(
    out: &mut dyn Write,
    has_records: bool,
    ended: &[EndedJob],
    now: SystemTime,
    terminal: Terminal,
) -> Result<(), Error> {
    let is_scrub = |ended: &&EndedJob| ended.job.r#type == SCRUB && !ended.cancelled;
    let text = match ended.iter().rev().find(is_scrub) {
        Some(scrub) => {
            let seconds = scrub.timestamp.seconds_before(now);
            let ago = seconds.map_or_else(String::new, |seconds| format!(", {} ago", age(seconds)));
            let job = printable(&scrub.job.id);
            let before = match scrub.before_start {
                true => " (before the daemon started)",
                false => "",
            };
            format!("last scrub: {job}{ago}{before}: {}", scrub.end().result())
        }
        None if has_records => "last scrub: none recorded".to_owned(),
        None => "last scrub: none since the daemon started".to_owned(),
    };
    writeln!(out)?;
    for line in terminal.wrapped(0, 2, &text) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn write_replicas(out: &mut dyn Write, disk: &Disk, terminal: Terminal) -> Result<(), Error> {
    let mut table = Table::new(&[
        "replica",
        "state",
        ">stale",
        ">corrupt",
        ">detections",
        ">repaired",
        ">errors",
        ">p99 read",
        ">p99 write",
        ">in flight",
        "file",
    ]);
    table.may_leave_out(&[
        "in flight",
        "detections",
        "repaired",
        "p99 write",
        "p99 read",
    ]);
    for replica in &disk.replicas {
        table.row(replica_row(replica, terminal));
    }
    Ok(table.write(out, terminal)?)
}

fn replica_row(replica: &Replica, terminal: Terminal) -> Vec<(String, Style)> {
    let plain = |text: String| (text, Style::Plain);
    // Only a count above zero gets a colour.
    let count = |count: u64, style| match count {
        0 => plain("-".into()),
        _ => (count.to_string(), style),
    };
    let operations = &replica.operations;
    let p99 = |kind: &Operations| match &kind.latency {
        Some(found) => plain(latency(found.p99_ns, terminal.unicode)),
        None => plain("-".into()),
    };
    let state = match replica.state.as_str() {
        "in-service" => Style::Good,
        "syncing" => Style::Warning,
        _ => Style::Bad,
    };
    let stale = match replica.stale_bytes {
        0 => plain("-".into()),
        bytes => (size(bytes), Style::Warning),
    };
    let in_flight = [&operations.read, &operations.write, &operations.flush]
        .into_iter()
        .fold(0, |sum: u64, kind| sum.saturating_add(kind.in_flight));
    vec![
        plain(printable(&replica.node_name)),
        (printable(&replica.state), state),
        stale,
        count(replica.corrupt_sectors, Style::Bad),
        count(replica.corrupt_sectors_found, Style::Warning),
        count(replica.repaired_sectors, Style::Good),
        count(replica.errors.sum(), Style::Bad),
        p99(&operations.read),
        p99(&operations.write),
        plain(in_flight.to_string()),
        plain(printable(&replica.file)),
    ]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::Value;

    fn operations() -> Value {
        json!({ "completed": 1, "failed": 0, "in-flight": 2, "bytes": 0 })
    }

    /// A disk whose replica `b` is in this state. If sectors are undecided, the guest has read
    /// them.
    pub(in crate::client) fn disk(state: &str, stale: u64, corrupt: u64, undecided: u64) -> Disk {
        let conditions = |all: &[(bool, &str)]| {
            let words = all.iter().filter(|(holds, _)| *holds);
            words.map(|(_, word)| json!(word)).collect::<Vec<_>>()
        };
        let errors = |count: u64, error: Option<&str>| {
            let last = json!({
                "type": "read", "ret": error.map(|_| -5), "error": error,
                "sector-num": 0, "sector-count": 8,
                // After any test, so that no age is printed.
                "timestamp": { "seconds": 1_u64 << 40, "microseconds": 0 },
            });
            let last = (count > 0).then_some(last);
            json!({ "read": count, "write": 0, "flush": 0, "last": last })
        };
        let replica = |name: &str, state: &str, stale: u64, corrupt: u64| {
            let (read, write, flush) = (operations(), operations(), operations());
            json!({
                "node-name": name, "file": format!("/images/{name}"), "state": state,
                "conditions": conditions(&[
                    (state == "evicted", "evicted"),
                    (stale > 0, "stale"),
                    (corrupt > 0, "corrupt"),
                    (corrupt > 0, "errors"),
                ]),
                "errors": errors(corrupt, Some("Input/output error")),
                "stale-bytes": stale, "corrupt-sectors": corrupt, "corrupt-sectors-found": corrupt,
                "repaired-sectors": 0, "new-member": [],
                "operations": { "read": read, "write": write, "flush": flush },
            })
        };
        let health = match (undecided, state, stale + corrupt) {
            (1.., ..) => "failing",
            (0, "in-service", 0) => "healthy",
            _ => "degraded",
        };
        serde_json::from_value(json!({
            "node-name": "disk\x1b[2J", "size": 10_737_418_240_u64, "vote-threshold": 2,
            "read-pattern": "quorum", "rewrite-corrupted": true, "read-only": false,
            "aio": "threads",
            "health": health,
            "conditions": conditions(&[
                (undecided > 0, "undecided"),
                (undecided > 0, "guest-errors"),
            ]),
            "errors": errors(u64::from(undecided > 0), None),
            "undecided-sectors": undecided, "requests": { "rejected": 0 },
            "replicas": [
                replica("a", "in-service", 0, 0),
                replica("b", state, stale, corrupt),
                replica("c", "in-service", 0, 0),
            ],
        }))
        .unwrap()
    }

    fn text(disk: &Disk, columns: usize) -> String {
        let terminal = Terminal {
            is_terminal: false,
            columns,
            colour: false,
            unicode: false,
        };
        let mut out = Vec::new();
        write_status(&mut out, disk, &[], terminal).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_unhealthy_disk_has_its_reasons() {
        assert_eq!(
            text(&disk("evicted", 4096, 3, 8), 80),
            "disk\\u{1b}[2J  failing  10 GiB, 2 of 3 must agree, read-pattern quorum, \
             rewrite-corrupted, aio threads\n  \
               no quorum for 8 sectors\n    \
                 let one replica decide (quorum-blkctl prefer NODE), or restore them from a \
                 backup, then quorum-blkctl scrub\n  \
               the guest got 1 I/O error; the last: read: no quorum\n    \
                 remove the cause, check the guest's files, then quorum-blkctl clear\n  \
               b is evicted: it does not answer; it rejoins when it does\n    \
                 if it never does: quorum-blkctl replace b FILE\n  \
               b is stale in 4 KiB\n  \
               b is corrupt in 3 sectors\n    \
                 to overwrite it there by what wins the vote: quorum-blkctl scrub --repair\n  \
               b returned 3 errors; the last: read: Input/output error\n    \
                 check its disk; then quorum-blkctl clear b, or replace b FILE\n\
             \n\
             replica  state       stale  corrupt  errors  p99 read  p99 write  file\n\
             a        in-service      -        -       -         -          -  /images/a\n\
             b        evicted     4 KiB        3       3         -          -  /images/b\n\
             c        in-service      -        -       -         -          -  /images/c\n"
        );
    }

    #[test]
    fn everything_fits_the_terminal() {
        let mut disk = disk("evicted", 4096, 3, 8);
        disk.node_name = "a-disk-with-a-rather-long-name".into();
        let long = "/images/of/a/virtual/machine/on/a/long/path/second-replica.raw";
        disk.replicas[1].file = long.into();
        disk.replicas[1].node_name = "a-replica-with-quite-a-long-name-of-its-own.raw".into();
        let mut job: Job = serde_json::from_value(json!({
            "id": "job3", "type": "quorum-neighbourhood-scrub", "status": "running",
            "current-progress": 0, "total-progress": 4096, "speed": 1 << 20,
        }))
        .unwrap();
        job.error = Some("8 sectors could not be written; c: write: No space left ".repeat(3));
        for columns in [80, 120, 200] {
            let terminal = Terminal {
                is_terminal: true,
                columns,
                colour: false,
                unicode: true,
            };
            let mut out = Vec::new();
            write_status(&mut out, &disk, std::slice::from_ref(&job), terminal).unwrap();
            let text = String::from_utf8(out).unwrap();
            for line in text.lines() {
                assert!(line.width() <= columns, "{columns}: {line}");
            }
            assert_eq!(text.contains("in flight"), columns == 200, "{text}");
        }
    }

    #[test]
    fn a_wide_terminal_shows_more_columns_than_a_narrow_one() {
        let headings = |columns| {
            let text = text(&disk("in-service", 0, 0, 0), columns);
            let line = text.lines().find(|line| line.starts_with("replica"));
            let line = line.unwrap().to_owned();
            assert!(columns < 60 || line.len() <= columns, "{line}");
            line
        };
        assert!(headings(200).contains("detections  repaired  errors"));
        assert!(headings(200).contains("in flight"));
        assert!(!headings(80).contains("detections") && headings(80).contains("p99 write"));
        assert!(!headings(40).contains("p99") && headings(40).contains("errors"));
    }
}
