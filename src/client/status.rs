//! `status`: the health of the disk, its replicas and its jobs, once or repeatedly.

use std::io::Write;
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::connection::parse_reply;
use super::format::{latency, printable, size};
use super::jobs::write_table;
use super::replies::{Disk, Job, Operations, Replica};
use super::table::Table;
use super::terminal::{Style, Terminal};
use super::{Context, Error, Outcome};
use crate::common::message::counted;

/// The health of the disk in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    /// No replica is known to be evicted, stale or corrupt.
    Healthy,
    /// Some replica is; the guest does not notice.
    Degraded,
    /// Some sectors are undecided: the guest cannot read them.
    Failing,
}

impl Health {
    fn of(disk: &Disk) -> Self {
        if disk.undecided_sectors > 0 {
            Self::Failing
        } else if disk.replicas.iter().all(is_good) {
            Self::Healthy
        } else {
            Self::Degraded
        }
    }

    fn word(self) -> (&'static str, Style) {
        match self {
            Self::Healthy => ("healthy", Style::Good),
            Self::Degraded => ("degraded", Style::Warning),
            Self::Failing => ("failing", Style::Bad),
        }
    }
}

fn is_good(replica: &Replica) -> bool {
    replica.state == "in-service" && replica.stale_bytes == 0 && replica.corrupt_sectors == 0
}

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
    let both = json.then(|| json!({ "query-quorum": state, "query-jobs": jobs }));
    let disk: Disk = parse_reply("query-quorum", state)?;
    let jobs: Vec<Job> = parse_reply("query-jobs", jobs)?;
    match both {
        Some(both) => writeln!(out, "{both}")?,
        None => write_status(out, &disk, &jobs, context.terminal)?,
    }
    Ok(Outcome::of(Health::of(&disk) == Health::Healthy))
}

fn write_status(
    out: &mut dyn Write,
    disk: &Disk,
    jobs: &[Job],
    terminal: Terminal,
) -> Result<(), Error> {
    let (word, style) = Health::of(disk).word();
    write!(
        out,
        "{}  {}  {}, {} of {} must agree, read-pattern {}",
        terminal.paint(Style::Heading, printable(&disk.node_name)),
        terminal.paint(style, word),
        size(disk.size),
        disk.vote_threshold,
        disk.replicas.len(),
        printable(&disk.read_pattern),
    )?;
    let options = [
        (disk.rewrite_corrupted, "rewrite-corrupted"),
        (disk.read_only, "read-only"),
    ];
    for (_, name) in options.into_iter().filter(|(is_on, _)| *is_on) {
        write!(out, ", {name}")?;
    }
    writeln!(out)?;
    for (style, reason) in reasons(disk) {
        writeln!(out, "  {}", terminal.paint(style, reason))?;
    }
    writeln!(out)?;
    write_replicas(out, disk, terminal)?;
    if !jobs.is_empty() {
        writeln!(out)?;
        write_table(out, jobs, terminal)?;
    }
    Ok(())
}

/// What needs the attention of an operator, one line each.
fn reasons(disk: &Disk) -> Vec<(Style, String)> {
    let mut reasons = Vec::new();
    if disk.undecided_sectors > 0 {
        let read = counted(disk.undecided_sectors, "sector");
        let text = format!("no quorum in reads of {read}: some or all of them are undecided");
        reasons.push((Style::Bad, text));
    }
    for replica in disk.replicas.iter().filter(|replica| !is_good(replica)) {
        let name = printable(&replica.node_name);
        if replica.state == "evicted" {
            let text = format!("{name} is evicted: it does not answer; it rejoins when it does");
            reasons.push((Style::Bad, text));
        }
        if replica.stale_bytes > 0 {
            let stale = size(replica.stale_bytes);
            reasons.push((Style::Warning, format!("{name} is stale in {stale}")));
        }
        if replica.corrupt_sectors > 0 {
            let corrupt = counted(replica.corrupt_sectors, "sector");
            let text =
                format!("{name} is corrupt in {corrupt}; to repair: quorum-blkctl scrub --repair");
            reasons.push((Style::Bad, text));
        }
    }
    let requests = [
        &disk.requests.read,
        &disk.requests.write,
        &disk.requests.zero,
        &disk.requests.flush,
    ];
    let failed: u64 = requests
        .iter()
        .fold(0, |sum, kind| sum.saturating_add(kind.failed));
    if failed > 0 {
        let by_kind = by_kind(
            &disk.failures.read,
            &disk.failures.write,
            &disk.failures.flush,
        );
        let errors = counted(failed, "I/O error");
        let text = format!("the guest got {errors}; requests without a quorum: {by_kind}");
        reasons.push((Style::Bad, text));
    }
    reasons
}

fn write_replicas(out: &mut dyn Write, disk: &Disk, terminal: Terminal) -> Result<(), Error> {
    let mut table = Table::new(&[
        "replica",
        "state",
        ">stale",
        ">corrupt",
        ">found",
        ">repaired",
        "errors",
        ">p99 read",
        ">p99 write",
        ">in flight",
        "file",
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
    let errors = by_kind(
        &operations.read.failed,
        &operations.write.failed,
        &operations.flush.failed,
    );
    let has_errors = errors != "-";
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
        (errors, if has_errors { Style::Bad } else { Style::Plain }),
        p99(&operations.read),
        p99(&operations.write),
        plain(in_flight.to_string()),
        plain(printable(&replica.file)),
    ]
}

/// `2 read, 1 write`, or `-`.
fn by_kind(read: &u64, write: &u64, flush: &u64) -> String {
    let kinds = [(read, "read"), (write, "write"), (flush, "flush")];
    let some = kinds.into_iter().filter(|(count, _)| **count > 0);
    let texts: Vec<_> = some
        .map(|(count, name)| format!("{count} {name}"))
        .collect();
    if texts.is_empty() {
        "-".into()
    } else {
        texts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn operations(failed: u64) -> Value {
        json!({ "completed": 1, "failed": failed, "in-flight": 2, "bytes": 0 })
    }

    fn disk(state: &str, stale: u64, corrupt: u64, undecided: u64) -> Disk {
        let replica = |name: &str, state: &str, stale: u64, corrupt: u64| {
            let (read, write, flush) = (operations(corrupt), operations(0), operations(0));
            json!({
                "node-name": name, "file": format!("/images/{name}"), "state": state,
                "stale-bytes": stale, "corrupt-sectors": corrupt, "corrupt-sectors-found": corrupt,
                "repaired-sectors": 0, "new-member": [],
                "operations": { "read": read, "write": write, "flush": flush },
            })
        };
        let requests = |kind: &str| {
            (
                kind.to_owned(),
                operations(u64::from(kind == "read" && undecided > 0)),
            )
        };
        let requests = ["read", "write", "zero", "flush"].map(requests);
        serde_json::from_value(json!({
            "node-name": "disk\x1b[2J", "size": 10_737_418_240_u64, "vote-threshold": 2,
            "read-pattern": "quorum", "rewrite-corrupted": true, "read-only": false,
            "undecided-sectors": undecided,
            "requests": Value::Object(requests.into_iter().collect()),
            "failures": { "read": undecided, "write": 0, "flush": 0 },
            "replicas": [
                replica("a", "in-service", 0, 0),
                replica("b", state, stale, corrupt),
                replica("c", "in-service", 0, 0),
            ],
        }))
        .unwrap()
    }

    fn text(disk: &Disk) -> String {
        let terminal = Terminal {
            is_terminal: false,
            columns: 80,
            colour: false,
            unicode: false,
        };
        let mut out = Vec::new();
        write_status(&mut out, disk, &[], terminal).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn health_is_one_word() {
        for (disk, health) in [
            (disk("in-service", 0, 0, 0), Health::Healthy),
            (disk("evicted", 0, 0, 0), Health::Degraded),
            (disk("syncing", 512, 0, 0), Health::Degraded),
            (disk("in-service", 0, 1, 0), Health::Degraded),
            (disk("in-service", 0, 0, 8), Health::Failing),
        ] {
            assert_eq!(Health::of(&disk), health, "{disk:?}");
            assert!(text(&disk).contains(health.word().0));
        }
    }

    #[test]
    fn an_unhealthy_disk_has_its_reasons() {
        assert_eq!(
            text(&disk("evicted", 4096, 3, 8)),
            "disk\\u{1b}[2J  failing  10 GiB, 2 of 3 must agree, read-pattern quorum, \
             rewrite-corrupted\n  \
               no quorum in reads of 8 sectors: some or all of them are undecided\n  \
               b is evicted: it does not answer; it rejoins when it does\n  \
               b is stale in 4 KiB\n  \
               b is corrupt in 3 sectors; to repair: quorum-blkctl scrub --repair\n  \
               the guest got 1 I/O error; requests without a quorum: 8 read\n\
             \n\
             replica  state       stale  corrupt  found  repaired  errors  p99 read  \
             p99 write  in flight  file\n\
             a        in-service      -        -      -         -  -              -  \
             \x20       -          6  /images/a\n\
             b        evicted     4 KiB        3      3         -  3 read         -  \
             \x20       -          6  /images/b\n\
             c        in-service      -        -      -         -  -              -  \
             \x20       -          6  /images/c\n"
        );
    }
}
