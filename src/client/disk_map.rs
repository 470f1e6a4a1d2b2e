//! `map`: where on the disk replicas are corrupt, stale or had errors.
//!
//! One line per replica, one character per part of the disk; below, the worst places in bytes.

use std::io::Write;

use serde_json::json;

use super::connection::parse_reply;
use super::format::{printable, printable_json, sectors, size};
use super::replies::{Bucket, DiskMap, Failures, Range};
use super::status::HEALTHY;
use super::terminal::{Style, Terminal};
use super::{Context, Error, Outcome};
use crate::common::message::counted;

/// Places of one kind that are listed for a replica.
const LISTED_MAX: usize = 8;

/// The resolution of `--json`, which has no width.
const BUCKETS_IN_JSON: usize = 1024;

/// The daemon rejects more.
const BUCKETS_MAX: usize = 1024;

/// Width of the names beside the map.
const NAME_COLUMNS: usize = 20;

/// The state of a part of the disk, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    Nothing,
    WasCorrupt,
    Errors,
    Stale,
    Corrupt,
}

impl Mark {
    const LEGEND: [(Self, &str); 5] = [
        (Self::Corrupt, "corrupt"),
        (Self::Stale, "stale"),
        (Self::Errors, "errors"),
        (Self::WasCorrupt, "was corrupt"),
        (Self::Nothing, "nothing found"),
    ];

    fn of(bucket: &Bucket) -> Self {
        if bucket.corrupt_sectors > 0 {
            Self::Corrupt
        } else if bucket.stale_sectors > 0 {
            Self::Stale
        } else if bucket.errors > 0 {
            Self::Errors
        } else if bucket.corrupt_sectors_found > 0 {
            Self::WasCorrupt
        } else {
            Self::Nothing
        }
    }

    fn character(self, terminal: Terminal) -> (char, Style) {
        let (ascii, unicode, style) = match self {
            Self::Nothing => ('.', '·', Style::Plain),
            Self::WasCorrupt => ('+', '+', Style::Good),
            Self::Errors => ('!', '!', Style::Warning),
            Self::Stale => ('~', '▒', Style::Warning),
            Self::Corrupt => ('#', '█', Style::Bad),
        };
        (if terminal.unicode { unicode } else { ascii }, style)
    }
}

pub(super) fn run(context: &mut Context<'_>, json: bool) -> Result<Outcome, Error> {
    // Beside the map: the name, a space and the two ends of the line.
    let columns = context.terminal.columns.saturating_sub(NAME_COLUMNS + 4);
    let buckets = if json {
        BUCKETS_IN_JSON
    } else {
        columns.clamp(1, BUCKETS_MAX)
    };
    let reply = context
        .connection
        .execute("query-quorum-map", json!({ "buckets": buckets }))?;
    if json {
        writeln!(context.out, "{}", printable_json(&reply))?;
    }
    let map: DiskMap = parse_reply("query-quorum-map", reply)?;
    if !json {
        let cells = cells_of(&map, buckets)?;
        draw(context.out, &map, cells, context.terminal)?;
        list(context.out, &map)?;
    }
    Ok(Outcome::of(map.health == HEALTHY))
}

/// The number of buckets that cover the disk; an error if there are more than requested.
fn cells_of(map: &DiskMap, requested: usize) -> Result<usize, Error> {
    let cells = map.size.checked_div(map.bucket_bytes).unwrap_or(u64::MAX);
    let cells = usize::try_from(cells).unwrap_or(usize::MAX);
    let rest = map.size.checked_rem(map.bucket_bytes).unwrap_or(0);
    let cells = cells.saturating_add(usize::from(rest > 0));
    if cells > requested {
        let reason = "it has more buckets than requested";
        return Err(Error::invalid("the reply to query-quorum-map", reason));
    }
    Ok(cells)
}

fn draw(out: &mut dyn Write, map: &DiskMap, cells: usize, terminal: Terminal) -> Result<(), Error> {
    writeln!(
        out,
        "{}: {}, {} per character",
        terminal.paint(Style::Heading, printable(&map.node_name)),
        size(map.size),
        size(map.bucket_bytes)
    )?;
    let cell_of = |offset: u64| usize::try_from(offset.checked_div(map.bucket_bytes)?).ok();
    for replica in &map.replicas {
        let mut marks = vec![Mark::Nothing; cells];
        for bucket in &replica.buckets {
            if let Some(mark) = cell_of(bucket.offset).and_then(|cell| marks.get_mut(cell)) {
                *mark = Mark::of(bucket).max(*mark);
            }
        }
        draw_line(out, &replica.node_name, &marks, terminal)?;
    }
    if !map.failures.buckets.is_empty() {
        let marks = failure_marks(&map.failures, cells, cell_of);
        draw_line(out, "no quorum", &marks, terminal)?;
    }
    let legend = Mark::LEGEND.map(|(mark, text)| {
        let (character, style) = mark.character(terminal);
        format!("{} {text}", terminal.paint(style, character))
    });
    writeln!(out, "{:NAME_COLUMNS$}  {}", "", legend.join("   "))?;
    Ok(())
}

/// The marks of the disk itself: where requests failed, and where sectors are undecided.
fn failure_marks(
    failures: &Failures,
    cells: usize,
    cell_of: impl Fn(u64) -> Option<usize>,
) -> Vec<Mark> {
    let mut marks = vec![Mark::Nothing; cells];
    for bucket in failures.buckets.iter().filter(|bucket| bucket.failed > 0) {
        if let Some(mark) = cell_of(bucket.offset).and_then(|cell| marks.get_mut(cell)) {
            *mark = Mark::Errors;
        }
    }
    for range in &failures.undecided {
        let (first, last) = byte_range(range);
        let (Some(first), Some(last)) = (cell_of(first), cell_of(last)) else {
            continue;
        };
        let undecided = marks.iter_mut().take(last.saturating_add(1)).skip(first);
        undecided.for_each(|mark| *mark = Mark::Corrupt);
    }
    marks
}

fn draw_line(
    out: &mut dyn Write,
    name: &str,
    marks: &[Mark],
    terminal: Terminal,
) -> Result<(), Error> {
    let name: String = printable(name).chars().take(NAME_COLUMNS).collect();
    write!(out, "{name:NAME_COLUMNS$} |")?;
    // Equal neighbours share one colour sequence.
    for run in marks.chunk_by(|left, right| left == right) {
        let (character, style) = run[0].character(terminal);
        let text: String = std::iter::repeat_n(character, run.len()).collect();
        write!(out, "{}", terminal.paint(style, text))?;
    }
    writeln!(out, "|")?;
    Ok(())
}

/// Lists the worst places.
fn list(out: &mut dyn Write, map: &DiskMap) -> Result<(), Error> {
    let Failures {
        undecided,
        undecided_truncated,
        ..
    } = &map.failures;
    list_ranges(
        out,
        "no quorum",
        "undecided",
        undecided,
        *undecided_truncated,
    )?;
    for replica in &map.replicas {
        let name = printable(&replica.node_name);
        let (corrupt, stale) = (&replica.corrupt, &replica.stale);
        list_ranges(out, &name, "corrupt", corrupt, replica.corrupt_truncated)?;
        list_ranges(out, &name, "stale", stale, replica.stale_truncated)?;
        list_counts(out, &name, &replica.buckets, map.bucket_bytes)?;
    }
    Ok(())
}

/// Lists the longest ranges in the order of the disk.
fn list_ranges(
    out: &mut dyn Write,
    name: &str,
    state: &str,
    ranges: &[Range],
    truncated: bool,
) -> Result<(), Error> {
    let mut worst = ranges.to_vec();
    worst.sort_by_key(|range| std::cmp::Reverse(range.sector_count));
    worst.truncate(LISTED_MAX);
    worst.sort_by_key(|range| range.sector_num);
    for range in &worst {
        let (first, last) = byte_range(range);
        writeln!(
            out,
            "{name}: {state}: bytes {first}-{last} ({}, {})",
            size(range.sector_count.saturating_mul(512)),
            sectors(range.sector_num, range.sector_count)
        )?;
    }
    if worst.len() < ranges.len() || truncated {
        writeln!(out, "{name}: {state}: and more, smaller ranges")?;
    }
    Ok(())
}

/// The first and the last byte.
fn byte_range(range: &Range) -> (u64, u64) {
    let first = range.sector_num.saturating_mul(512);
    let bytes = range.sector_count.saturating_mul(512);
    (first, first.saturating_add(bytes).saturating_sub(1))
}

/// Lists the buckets with the highest counts in the order of the disk.
fn list_counts(
    out: &mut dyn Write,
    name: &str,
    buckets: &[Bucket],
    bucket_bytes: u64,
) -> Result<(), Error> {
    let weight = |bucket: &Bucket| bucket.errors.saturating_add(bucket.corrupt_sectors_found);
    let mut worst: Vec<&Bucket> = buckets.iter().filter(|bucket| weight(bucket) > 0).collect();
    let found = worst.len();
    worst.sort_by_key(|bucket| std::cmp::Reverse(weight(bucket)));
    worst.truncate(LISTED_MAX);
    worst.sort_by_key(|bucket| bucket.offset);
    for bucket in &worst {
        let mut parts = Vec::new();
        if bucket.errors > 0 {
            parts.push(counted(bucket.errors, "error"));
        }
        if bucket.corrupt_sectors_found > 0 {
            let corrupt = counted(bucket.corrupt_sectors_ever, "corrupt sector");
            let again = match bucket.corrupt_sectors_found {
                found if found > bucket.corrupt_sectors_ever => {
                    format!(" ({found} when counted each time)")
                }
                _ => String::new(),
            };
            let repaired = bucket.repaired_sectors;
            parts.push(format!("{corrupt} found{again}, {repaired} repaired"));
        }
        writeln!(
            out,
            "{name}: since it was added, in bytes {}-{}: {}",
            bucket.offset,
            bucket.offset.saturating_add(bucket_bytes).saturating_sub(1),
            parts.join(", ")
        )?;
    }
    if worst.len() < found {
        let more = counted((found - worst.len()) as u64, "more part");
        writeln!(
            out,
            "{name}: since it was added, less in {more} of the disk"
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn bucket(offset: u64, figures: [u64; 5]) -> serde_json::Value {
        let [found, repaired, errors, corrupt, stale] = figures;
        json!({
            "offset": offset, "corrupt-sectors-ever": found.min(2), "corrupt-sectors-found": found,
            "repaired-sectors": repaired,
            "errors": errors, "corrupt-sectors": corrupt, "stale-sectors": stale,
        })
    }

    fn map() -> DiskMap {
        serde_json::from_value(json!({
            "node-name": "quorum0", "size": 10 * MIB, "health": "failing", "bucket-bytes": MIB,
            "failures": {
                "buckets": [{ "offset": 8 * MIB, "failed": 1 }],
                "undecided": [{ "sector-num": 8 * 2048, "sector-count": 2 }],
            },
            "replicas": [
                { "node-name": "a", "buckets": [], "corrupt": [], "stale": [] },
                {
                    "node-name": "b\x1b",
                    "buckets": [
                        bucket(0, [3, 1, 0, 2, 0]),
                        bucket(MIB, [2, 2, 0, 0, 0]),
                        bucket(4 * MIB, [0, 0, 7, 0, 0]),
                        bucket(9 * MIB, [0, 0, 0, 0, 2048]),
                        bucket(99 * MIB, [1, 0, 0, 1, 0]),
                    ],
                    "corrupt": [{ "sector-num": 7, "sector-count": 2 }], "corrupt-truncated": true,
                    "stale": [{ "sector-num": 9 * 2048, "sector-count": 2048 }],
                },
            ],
        }))
        .unwrap()
    }

    fn terminal(unicode: bool) -> Terminal {
        Terminal {
            is_terminal: false,
            columns: 80,
            colour: false,
            unicode,
        }
    }

    #[test]
    fn each_part_of_the_disk_has_its_mark() {
        let mut out = Vec::new();
        draw(
            &mut out,
            &map(),
            cells_of(&map(), 10).unwrap(),
            terminal(false),
        )
        .unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "quorum0: 10 MiB, 1 MiB per character\n\
             a                    |..........|\n\
             b\\u{1b}              |#+..!....~|\n\
             no quorum            |........#.|\n\
             \x20                     # corrupt   ~ stale   ! errors   + was corrupt   \
             . nothing found\n"
        );
        let mut out = Vec::new();
        draw(&mut out, &map(), 10, terminal(true)).unwrap();
        assert!(String::from_utf8(out).unwrap().contains("|█+··!····▒|"));
    }

    #[test]
    fn the_worst_places_are_listed() {
        let mut out = Vec::new();
        list(&mut out, &map()).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "no quorum: undecided: bytes 8388608-8389631 (1 KiB, sectors 16384-16385)\n\
             b\\u{1b}: corrupt: bytes 3584-4607 (1 KiB, sectors 7-8)\n\
             b\\u{1b}: corrupt: and more, smaller ranges\n\
             b\\u{1b}: stale: bytes 9437184-10485759 (1 MiB, sectors 18432-20479)\n\
             b\\u{1b}: since it was added, in bytes 0-1048575: 2 corrupt sectors found \
             (3 when counted each time), 1 repaired\n\
             b\\u{1b}: since it was added, in bytes 1048576-2097151: 2 corrupt sectors \
             found, 2 repaired\n\
             b\\u{1b}: since it was added, in bytes 4194304-5242879: 7 errors\n\
             b\\u{1b}: since it was added, in bytes 103809024-104857599: 1 corrupt sector \
             found, 0 repaired\n"
        );
    }

    #[test]
    fn a_map_with_too_many_buckets_is_rejected() {
        let mut map = map();
        map.bucket_bytes = 0;
        assert!(cells_of(&map, 1024).is_err());
        map.bucket_bytes = 1;
        assert!(cells_of(&map, 1024).is_err());
    }
}
