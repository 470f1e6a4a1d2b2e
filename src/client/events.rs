//! `events`: prints the daemon's events, one line each, as they arrive.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use super::format::{duration, printable, printable_json, sectors, size, timestamp};
use super::progress::describe;
use super::replies::{JobEnd, Range, Timestamp};
use super::terminal::Style;
use super::{Context, Error, Outcome};
use crate::common::message::counted;

/// The data of QUORUM_REPORT_BAD and QUORUM_FAILURE.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    ret: Option<i64>,
    node_name: Option<String>,
    reference: Option<String>,
    #[serde(default)]
    sector_num: u64,
    #[serde(default)]
    sectors_count: u64,
    r#type: Option<String>,
    error: Option<String>,
    requester: Option<String>,
    milliseconds: Option<u64>,
    #[serde(default)]
    bad_sectors: Vec<Range>,
    #[serde(default)]
    bad_sectors_truncated: bool,
    #[serde(default)]
    suppressed: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ImageChange {
    node_name: String,
    conditions: Vec<String>,
}

/// The data of BLOCK_IO_ERROR.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct HeldRequest {
    node_name: String,
    operation: String,
    reason: String,
}

/// The data of QUORUM_REPAIR_LIMIT.
#[derive(Debug, Deserialize)]
struct RepairLimit {
    limit: u64,
}

#[derive(Debug, Deserialize)]
struct StatusChange {
    id: String,
    status: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Missing {
    node_name: String,
    reason: String,
}

#[derive(Debug, Deserialize)]
struct Missed {
    missed: u64,
}

/// Prints events until the connection ends.
pub(super) fn run(context: &mut Context<'_>, json: bool) -> Result<Outcome, Error> {
    loop {
        let far = Instant::now() + Duration::from_secs(3600);
        let Some(message) = context.connection.receive(far)? else {
            continue;
        };
        let Some(name) = message.event() else {
            continue;
        };
        if json {
            writeln!(context.out, "{}", printable_json(&message.line))?;
        } else {
            let time = read::<Timestamp>(&message.value["timestamp"]);
            let time = time.and_then(|time| timestamp(time.seconds, time.microseconds));
            let (style, text) = sentence(name, &message.value["data"]);
            writeln!(
                context.out,
                "{}  {}",
                time.as_deref().unwrap_or("-"),
                context.terminal.paint(style, text)
            )?;
        }
        context.out.flush()?;
    }
}

/// The event as a sentence; an event of an unknown kind or shape as it was received.
fn sentence(name: &str, data: &Value) -> (Style, String) {
    let known = match name {
        "QUORUM_REPORT_BAD" => read(data).and_then(|report| replica_fault(&report)),
        "QUORUM_FAILURE" => read(data).map(|report| request_failure(&report)),
        "BLOCK_IO_ERROR" => read(data).map(|error: HeldRequest| held_request(&error)),
        "QUORUM_REPLICA_EVICTED" => read(data).and_then(|report| {
            let text = "evicted: it does not answer";
            membership(&report, Style::Bad, text)
        }),
        "QUORUM_REPLICA_MISSING" => read(data).map(|missing: Missing| {
            let [node, reason] = [&missing.node_name, &missing.reason].map(|text| printable(text));
            (Style::Bad, format!("{node}: missing: {reason}"))
        }),
        "QUORUM_REPLICA_REJOINED" => read(data).and_then(|report| {
            let text = "rejoined: it answers again";
            membership(&report, Style::Good, text)
        }),
        "QUORUM_REPLICA_KEPT_OUT" => read(data).and_then(|report: Report| {
            let time = duration(report.milliseconds.unwrap_or(0).div_ceil(1000));
            let text = format!("evicted too often: it is kept out for {time}");
            membership(&report, Style::Bad, &text)
        }),
        "QUORUM_REPAIR_LIMIT" => read(data).map(|RepairLimit { limit }| {
            let limit = size(limit);
            let text = format!("repairs have stopped: they reached {limit} (--repair-limit)");
            (Style::Bad, text)
        }),
        "QUORUM_REPLICA_IMAGE_CHANGED" => read(data).map(|image| image_change(&image)),
        "JOB_STATUS_CHANGE" => read(data).map(|StatusChange { id, status }| {
            let text = format!("{}: {}", printable(&id), printable(&status));
            (Style::Plain, text)
        }),
        "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" => {
            read(data).map(|end: JobEnd| job_end(&end, name == "BLOCK_JOB_CANCELLED"))
        }
        "QUORUM_EVENTS_MISSED" => read(data).map(|Missed { missed }| {
            let text = format!(
                "{} missed: they arrived faster than this program read them",
                counted(missed, "event")
            );
            (Style::Warning, text)
        }),
        _ => None,
    };
    known.unwrap_or_else(|| (Style::Plain, printable(&format!("{name} {data}"))))
}

fn replica_fault(report: &Report) -> Option<(Style, String)> {
    let node = printable(report.node_name.as_deref()?);
    let operation = printable(report.r#type.as_deref().unwrap_or("operation"));
    let place = place(report);
    if report.ret? < 0 {
        let error = printable(report.error.as_deref().unwrap_or("an error"));
        let text = format!("{node}: {operation} failed{place}: {error}");
        return Some((Style::Bad, text + &folded(report)));
    }
    let mut places: Vec<String> = report
        .bad_sectors
        .iter()
        .map(|run| sectors(run.sector_num, run.sector_count))
        .collect();
    if report.bad_sectors_truncated {
        places.push("more".into());
    }
    let at = report.bad_sectors.first().map_or(0, |run| run.sector_num);
    let text = format!(
        "{node}: corrupt data in {}, from byte {}, found by a {operation} of {}",
        places.join(", "),
        at.saturating_mul(512),
        sectors(report.sector_num, report.sectors_count)
    );
    Some((Style::Warning, text + &folded(report)))
}

fn request_failure(report: &Report) -> (Style, String) {
    let disk = printable(report.reference.as_deref().unwrap_or("the disk"));
    let operation = printable(report.r#type.as_deref().unwrap_or("request"));
    let mut text = format!("{disk}: NO QUORUM for a {operation}{}", place(report));
    if let Some(error) = &report.error {
        text += &format!(": {}", printable(error));
    }
    if report.requester.as_deref() == Some("job") {
        text += " (found by a scrub)";
    }
    (Style::Bad, text + &folded(report))
}

fn held_request(error: &HeldRequest) -> (Style, String) {
    let [disk, operation, reason] =
        [&error.node_name, &error.operation, &error.reason].map(|text| printable(text));
    let text = format!("{disk}: a {operation} of the guest is held: {reason}");
    (Style::Bad, text)
}

/// A replica was evicted or rejoined.
fn membership(report: &Report, style: Style, text: &str) -> Option<(Style, String)> {
    let node = printable(report.node_name.as_deref()?);
    Some((style, format!("{node}: {text}{}", folded(report))))
}

fn image_change(image: &ImageChange) -> (Style, String) {
    let node = printable(&image.node_name);
    if image.conditions.is_empty() {
        let text = format!("{node}: its image has its name and size again");
        return (Style::Good, text);
    }
    let conditions = printable(&image.conditions.join(" and "));
    let text = format!("{node}: its image was changed by another program: {conditions}");
    (Style::Bad, text)
}

fn job_end(end: &JobEnd, is_cancelled: bool) -> (Style, String) {
    let job = describe(&end.device, &end.r#type, end.node_name.as_deref());
    let (style, result) = match &end.error {
        _ if is_cancelled => (Style::Warning, "cancelled".into()),
        Some(error) => (Style::Bad, format!("failed: {}", printable(error))),
        None => (Style::Good, "completed".to_owned()),
    };
    let mut text = format!("{job} {result}, {} of {}", size(end.offset), size(end.len));
    if end.r#type != "quorum-resync" {
        text += &format!(
            "; {} found, {} written",
            end.findings(),
            end.sectors_written
        );
        for found in &end.replicas {
            text += &format!("; {}", found.to_line());
        }
    }
    (style, text)
}

/// The place of an operation; a flush has none.
fn place(report: &Report) -> String {
    match report.sectors_count {
        0 => String::new(),
        count => format!(
            " at {}, byte {}",
            sectors(report.sector_num, count),
            report.sector_num.saturating_mul(512)
        ),
    }
}

fn folded(report: &Report) -> String {
    match report.suppressed {
        0 => String::new(),
        count => format!(" (and {count} more like this before it)"),
    }
}

fn read<'a, T: Deserialize<'a>>(value: &'a Value) -> Option<T> {
    T::deserialize(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of docs/events.md as sentences.
    #[test]
    fn the_documented_events_are_readable() {
        let manual = include_str!("../../docs/events.md");
        let examples = manual.lines().filter(|line| line.starts_with("{\"event\""));
        let sentences: Vec<String> = examples
            .map(|line| {
                let event: Value = serde_json::from_str(line).unwrap();
                sentence(event["event"].as_str().unwrap(), &event["data"]).1
            })
            .collect();
        assert_eq!(
            sentences,
            [
                "1.raw: corrupt data in sector 345436, from byte 176863232, found by a read of \
                 sectors 345435-345439",
                "1.raw: write failed at sectors 345435-345439, byte 176862720: Input/output error \
                 (and 41 more like this before it)",
                "usr1: NO QUORUM for a read at sectors 345435-345439, byte 176862720",
                "quorum0: a write of the guest is held: No space left on device",
                "1.raw: evicted: it does not answer",
                "1.raw: evicted too often: it is kept out for 16 s",
                "2.raw: missing: cannot open '/images/2.raw': No such file or directory",
                "repairs have stopped: they reached 16 MiB (--repair-limit)",
                "1.raw: its image was changed by another program: unlinked",
                "1742 events missed: they arrived faster than this program read them",
            ]
        );
    }

    #[test]
    fn unknown_events_are_printed_as_received() {
        let unknown = serde_json::json!({ "ret": "\x1b[2J" });
        for name in [
            "QUORUM_REPORT_BAD",
            "QUORUM_FAILURE",
            "JOB_STATUS_CHANGE",
            "NEW\x1b",
        ] {
            let text = sentence(name, &unknown).1;
            assert!(
                text.starts_with(&printable(name)) && !text.contains('\x1b'),
                "{text:?}"
            );
        }
    }
}
