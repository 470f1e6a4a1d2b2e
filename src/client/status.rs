//! `status`: a table that one understands at a glance, once or over and over.

use std::io::Write;
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::connection::understand;
use super::format::{clean, counted, latency, size};
use super::jobs::write_table;
use super::shapes::{Disk, Job, Operations, Replica};
use super::table::Table;
use super::terminal::{Style, Terminal};
use super::{Context, Error, Outcome};

/// How a disk is, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    /// Every replica is good everywhere, as far as anybody knows.
    Healthy,
    /// Some replica is not; the guest sees nothing of it.
    Degraded,
    /// There is data that no vote can give.
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
        let outcome = tell(context, &mut frame, json)?;
        let is_drawn_over = watch.is_some() && context.terminal.is_terminal && !json;
        if is_drawn_over {
            draw_over(context.out, &frame, is_first)?;
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

/// Writes a frame over the one before: what is left of that is cleared line by line, so that
/// nothing flickers.
fn draw_over(out: &mut dyn Write, frame: &[u8], is_first: bool) -> Result<(), Error> {
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

fn tell(context: &mut Context<'_>, out: &mut dyn Write, json: bool) -> Result<Outcome, Error> {
    let state = context.connection.execute("query-quorum", json!({}))?;
    let jobs = context.connection.execute("query-jobs", json!({}))?;
    let both = json.then(|| json!({ "query-quorum": state, "query-jobs": jobs }));
    let disk: Disk = understand("query-quorum", state)?;
    let jobs: Vec<Job> = understand("query-jobs", jobs)?;
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
        terminal.paint(Style::Heading, clean(&disk.node_name)),
        terminal.paint(style, word),
        size(disk.size),
        disk.vote_threshold,
        disk.replicas.len(),
        clean(&disk.read_pattern),
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

/// What is to be said beyond the word.
fn reasons(disk: &Disk) -> Vec<(Style, String)> {
    let mut reasons = Vec::new();
    if disk.undecided_sectors > 0 {
        let what = counted(disk.undecided_sectors, "sector");
        reasons.push((Style::Bad, format!("no quorum: {what} could not be read")));
    }
    for replica in disk.replicas.iter().filter(|replica| !is_good(replica)) {
        let name = clean(&replica.node_name);
        if replica.state == "evicted" {
            reasons.push((
                Style::Bad,
                format!("{name} does not answer, and is done without"),
            ));
        }
        if replica.stale_bytes > 0 {
            let what = size(replica.stale_bytes);
            reasons.push((Style::Warning, format!("{name} is behind by {what}")));
        }
        if replica.corrupt_sectors > 0 {
            let what = counted(replica.corrupt_sectors, "sector");
            reasons.push((
                Style::Bad,
                format!("{name} is wrong in {what} that nobody has mended"),
            ));
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
        let what = counted(failed, "I/O error");
        reasons.push((
            Style::Bad,
            format!("the guest has had {what}; without a quorum: {by_kind}"),
        ));
    }
    reasons
}

fn write_replicas(out: &mut dyn Write, disk: &Disk, terminal: Terminal) -> Result<(), Error> {
    let mut table = Table::new(&[
        "replica",
        "state",
        ">stale",
        ">wrong",
        ">mended",
        ">damaged",
        "errors",
        ">p99 read",
        ">p99 write",
        ">in flight",
        "file",
    ]);
    let plain = |text: String| (text, Style::Plain);
    // What is not nothing catches the eye.
    let count = |count: u64, style| match count {
        0 => plain("-".into()),
        _ => (count.to_string(), style),
    };
    for replica in &disk.replicas {
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
        table.row(vec![
            plain(clean(&replica.node_name)),
            (clean(&replica.state), state),
            stale,
            count(replica.corrupt_sectors_found, Style::Warning),
            count(replica.repaired_sectors, Style::Good),
            count(replica.corrupt_sectors, Style::Bad),
            (errors, if has_errors { Style::Bad } else { Style::Plain }),
            p99(&operations.read),
            p99(&operations.write),
            plain(in_flight.to_string()),
            plain(clean(&replica.file)),
        ]);
    }
    Ok(table.write(out, terminal)?)
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

    fn disk(state: &str, stale: u64, damaged: u64, undecided: u64) -> Disk {
        let replica = |name: &str, state: &str, stale: u64, damaged: u64| {
            json!({
                "node-name": name, "file": format!("/images/{name}"), "state": state, "stale-bytes": stale,
                "corrupt-sectors-found": damaged, "repaired-sectors": 0, "corrupt-sectors": damaged, "new-member": [],
                "operations": { "read": operations(damaged), "write": operations(0), "flush": operations(0) },
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
            "node-name": "disk\x1b[2J", "size": 10_737_418_240_u64, "vote-threshold": 2, "read-pattern": "quorum",
            "rewrite-corrupted": true, "read-only": false, "undecided-sectors": undecided,
            "requests": Value::Object(requests.into_iter().collect()),
            "failures": { "read": undecided, "write": 0, "flush": 0 },
            "replicas": [
                replica("a", "in-service", 0, 0), replica("b", state, stale, damaged), replica("c", "in-service", 0, 0)
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
    fn what_is_not_good_has_its_reason() {
        assert_eq!(
            text(&disk("evicted", 4096, 3, 8)),
            "disk\\u{1b}[2J  failing  10 GiB, 2 of 3 must agree, read-pattern quorum, rewrite-corrupted\n  \
               no quorum: 8 sectors could not be read\n  \
               b does not answer, and is done without\n  \
               b is behind by 4 KiB\n  \
               b is wrong in 3 sectors that nobody has mended\n  \
               the guest has had 1 I/O error; without a quorum: 8 read\n\
             \n\
             replica  state       stale  wrong  mended  damaged  errors  p99 read  p99 write  in flight  file\n\
             a        in-service      -      -       -        -  -              -          -          6  /images/a\n\
             b        evicted     4 KiB      3       -        3  3 read         -          -          6  /images/b\n\
             c        in-service      -      -       -        -  -              -          -          6  /images/c\n"
        );
    }
}
