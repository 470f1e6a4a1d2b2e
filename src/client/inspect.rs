//! `inspect`: what the records of images say, and what a start would make of them. It needs no
//! daemon.

use std::io::Write;
use std::path::PathBuf;

use super::format::{printable, printable_json, size, timestamp};
use super::table::Table;
use super::terminal::{Style, Terminal};
use super::{Error, Outcome};
use crate::common::SECTOR_BYTES;
use crate::common::message::counted;
use crate::inspect::{Image, KeptRecord, Outcome as Decided, ReplicaSource, inspect, sectors};
use crate::jobs::JobKind;
use crate::record::format::SlotFault;
use crate::record::start::{Start, Verdict, Why};
use crate::record::{Member, MemberState, Record, Stale};

pub(super) fn run(
    images: &[ReplicaSource],
    state_directory: Option<PathBuf>,
    json: bool,
    out: &mut dyn Write,
) -> Result<Outcome, Error> {
    let found = inspect(images, state_directory);
    let terminal = Terminal::of_stdout();
    if json {
        let text = serde_json::to_string(&found).expect("plain values become JSON");
        writeln!(out, "{}", printable_json(text))?;
    } else {
        for image in &found.images {
            show(image, terminal, out)?;
            writeln!(out)?;
        }
    }
    match &found.start {
        Decided::Refuse { reason } => {
            // As the daemon would say it, and where it would.
            return Err(Error::Failed(format!("a start would be refused: {reason}")));
        }
        _ if json => {}
        Decided::Create => writeln!(
            out,
            "None of these has a record: a start would make a new disk of them."
        )?,
        Decided::Serve(start) => show_start(start, found.start.is_good(), terminal, out)?,
    }
    Ok(Outcome::of(found.start.is_good()))
}

/// What is known of an image.
fn show(image: &Image, terminal: Terminal, out: &mut dyn Write) -> Result<(), Error> {
    let path = printable(&image.path);
    writeln!(out, "{}", terminal.paint(Style::Heading, path))?;
    let mut line = |name: &str, style: Style, text: &str| -> Result<(), Error> {
        let lines = terminal.wrapped(0, 11, &format!("  {name:7}  {text}"));
        for line in lines {
            writeln!(out, "{}", terminal.paint(style, line))?;
        }
        Ok(())
    };
    if image.in_use {
        let text = "in use: another process writes to it; what is shown may change";
        line("image", Style::Warning, text)?;
    }
    if let Some(error) = &image.error {
        line("image", Style::Bad, &printable(error))?;
    } else if let Some(unusable) = &image.unusable {
        line("record", Style::Bad, &printable(unusable))?;
    } else if image.kept.is_none() {
        line("record", Style::Plain, "none: it is part of no disk yet")?;
    }
    let Some(kept) = &image.kept else {
        return Ok(());
    };
    let record = &kept.record;
    line("record", Style::Plain, &printable(&kept.file))?;
    for (place, fault) in ["first", "second"].iter().zip(&kept.slots) {
        if let Some(fault) = fault
            && *fault != SlotFault::Blank
        {
            line("", Style::Plain, &format!("its {place} slot: {fault}"))?;
        }
    }
    if !kept.unverified_pages.is_empty() {
        let pages = counted(kept.unverified_pages.len() as u64, "page");
        let text = format!("{pages} of its marks cannot be used: all is marked there");
        line("", Style::Warning, &text)?;
    }
    line("disk", Style::Plain, &disk(record))?;
    let own = record.member(record.replica);
    let name = own.map_or_else(String::new, |own| printable(&own.node_name));
    line(
        "replica",
        Style::Plain,
        &format!("{}, {name}", record.replica),
    )?;
    line("table", Style::Plain, &table(kept))?;
    let (style, ended) = match record.clean {
        true => (Style::Plain, "cleanly".to_owned()),
        false => (Style::Warning, "not cleanly, or not yet".to_owned()),
    };
    line("ended", style, &ended)?;
    line("marked", Style::Plain, &marked(kept))?;
    if let Some(scrubbed) = scrubbed(record) {
        line("scrub", Style::Plain, &scrubbed)?;
    }
    show_members(record, terminal, out)
}

fn disk(record: &Record) -> String {
    let bytes = size(record.capacity.saturating_mul(SECTOR_BYTES));
    let (votes, members) = (record.threshold.votes, record.members.len());
    format!("{}, {bytes}, {votes} of {members} must agree", record.disk)
}

fn table(kept: &KeptRecord) -> String {
    let record = &kept.record;
    let epoch = record.epoch.number;
    let mut text = match kept.agreed_epoch {
        agreed if agreed == epoch => format!("epoch {epoch}"),
        0 => format!("epoch {epoch}, proposed: the disk was never served"),
        agreed => format!("epoch {epoch}, proposed; the last one agreed upon is {agreed}"),
    };
    if record.lineage.len() > 1 {
        let forced = counted(record.lineage.len() as u64 - 1, "forced start");
        text += &format!("; after {forced}");
    }
    if let Some(adopted) = record.adopted.and_then(|id| record.member(id)) {
        text += &format!("; {} is taken as the truth", printable(&adopted.node_name));
    }
    text
}

fn marked(kept: &KeptRecord) -> String {
    if kept.marked_extents == 0 {
        return "nowhere".to_owned();
    }
    let bytes = bytes_of(&kept.marked, kept.record.capacity);
    let extents = counted(kept.marked_extents, "extent");
    let each = size(kept.extent_sectors.saturating_mul(SECTOR_BYTES));
    format!("{bytes} in {extents} of {each}")
}

/// When the last scrub of the whole disk ended, and what it found.
fn scrubbed(record: &Record) -> Option<String> {
    let mut jobs = record.jobs.iter().rev();
    let job = jobs.find(|job| job.r#type == JobKind::SCRUB && !job.cancelled)?;
    let at = timestamp(job.ended, 0)?;
    let at = at.split('.').next().unwrap_or_default().replace('T', " ");
    let found = format!(
        "{} corrupt, {} unreadable, {} written",
        counted(job.corrupt_sectors, "sector"),
        job.unreadable_sectors,
        job.sectors_written
    );
    Some(match &job.error {
        None => format!("{at} UTC; {found}"),
        Some(error) => format!("{at} UTC, failed: {}; {found}", printable(error)),
    })
}

fn show_members(record: &Record, terminal: Terminal, out: &mut dyn Write) -> Result<(), Error> {
    let mut table = Table::new(&["  member", "state", "stale", "doubtful"]);
    for member in &record.members {
        let (state, style) = match member.state {
            MemberState::Active => ("active".to_owned(), Style::Plain),
            MemberState::Inactive { .. } => ("inactive".to_owned(), Style::Warning),
        };
        let (stale, is_stale) = stale(member, record.capacity);
        let doubtful = set(&member.doubtful, record.capacity);
        let warns = |warns: bool| if warns { Style::Warning } else { Style::Plain };
        table.row(vec![
            (format!("  {}", printable(&member.node_name)), Style::Plain),
            (state, style),
            (stale, warns(is_stale)),
            (
                doubtful.clone().unwrap_or_else(|| "-".to_owned()),
                warns(doubtful.is_some()),
            ),
        ]);
    }
    table.write(out, terminal)?;
    Ok(())
}

fn stale(member: &Member, capacity: u64) -> (String, bool) {
    let where_marked = member.stale_where_changed;
    match set(&member.stale, capacity) {
        None if where_marked => ("where marked".to_owned(), true),
        None => ("-".to_owned(), false),
        Some(text) if where_marked && !member.stale.is_all() => {
            (format!("{text}, and where marked"), true)
        }
        Some(text) => (text, true),
    }
}

/// How much a set has, in words.
fn set(set: &Stale, capacity: u64) -> Option<String> {
    let bytes = bytes_of(set, capacity);
    match set {
        Stale::None => None,
        Stale::All => Some("everywhere".to_owned()),
        Stale::Runs(_) => {
            let sectors = counted(sectors(set, capacity), "sector");
            Some(format!("{bytes} ({sectors})"))
        }
        Stale::Extents(extents) => {
            let extents = counted(extents.count(), "extent");
            Some(format!("{bytes} ({extents})"))
        }
    }
}

fn bytes_of(set: &Stale, capacity: u64) -> String {
    size(sectors(set, capacity).saturating_mul(SECTOR_BYTES))
}

/// What a start that is not refused would do.
fn show_start(
    start: &Start,
    is_good: bool,
    terminal: Terminal,
    out: &mut dyn Write,
) -> Result<(), Error> {
    let capacity = start.record.capacity;
    let members = start.record.members.len();
    let there = start
        .images
        .iter()
        .filter(|image| image.why != Why::Missing);
    let (there, style) = (
        there.count(),
        if is_good { Style::Good } else { Style::Warning },
    );
    let text = format!("A start would serve the disk with {there} of {members} replicas:");
    writeln!(out, "{}", terminal.paint(style, text))?;
    let name = |id| {
        let member = start.record.member(id);
        member.map_or_else(String::new, |member| printable(&member.node_name))
    };
    let mut table = Table::new(&["  replica", "it would be"]);
    for image in &start.images {
        let style = match image.why {
            Why::Fresh => Style::Good,
            _ => Style::Warning,
        };
        table.row(vec![
            (format!("  {}", name(image.member)), Style::Plain),
            (verdict(image, capacity), style),
        ]);
    }
    for id in &start.absent {
        let text = "missing: no image was given".to_owned();
        table.row(vec![
            (format!("  {}", name(*id)), Style::Plain),
            (text, Style::Warning),
        ]);
    }
    table.write(out, terminal)?;
    let unsettled = Stale::of_extents(&start.unsettled, start.record.layout());
    if !start.was_clean && unsettled.is_none() {
        writeln!(
            out,
            "It was not ended cleanly; nothing has to be recovered."
        )?;
    } else if !start.was_clean {
        let bytes = bytes_of(&unsettled, capacity);
        writeln!(
            out,
            "It was not ended cleanly; {bytes} would be recovered while it is served."
        )?;
    }
    Ok(())
}

fn verdict(image: &Verdict, capacity: u64) -> String {
    let mut text = image.why.to_string();
    if image.votes() {
        for (what, of) in [("stale", &image.stale), ("doubtful", &image.doubtful)] {
            if !of.is_none() {
                text += &format!("; {what} in {}", bytes_of(of, capacity));
            }
        }
    } else if image.why != Why::Missing && image.why != Why::Incomplete {
        text += "; copied as a whole";
    }
    text
}
