//! `map`: where on the disk which replica was bad.
//!
//! A line for each replica, a character for each part of the disk. Below it, the worst places by
//! their bytes.

use std::io::Write;

use serde_json::json;

use super::connection::understand;
use super::format::{clean, counted, sectors, size};
use super::shapes::{Bucket, DiskMap, Range, ReplicaMap};
use super::terminal::{Style, Terminal};
use super::{Context, Error, Outcome};

/// Places of a kind that are listed for a replica.
const LISTED_MAX: usize = 8;

/// What is asked for in JSON, which has no width.
const BUCKETS_IN_JSON: usize = 1024;

/// As many as a daemon gives.
const BUCKETS_MAX: usize = 1024;

/// What the name of a replica is cut to beside the map.
const NAME_COLUMNS_MAX: usize = 20;

/// What a part of the disk is like, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    Nothing,
    WasWrong,
    Errors,
    Stale,
    Damaged,
}

impl Mark {
    fn of(bucket: &Bucket) -> Self {
        if bucket.corrupt_sectors > 0 {
            Self::Damaged
        } else if bucket.stale_sectors > 0 {
            Self::Stale
        } else if bucket.errors > 0 {
            Self::Errors
        } else if bucket.corrupt_sectors_found > 0 {
            Self::WasWrong
        } else {
            Self::Nothing
        }
    }

    fn character(self, terminal: Terminal) -> (char, Style) {
        let (ascii, unicode, style) = match self {
            Self::Nothing => ('.', '·', Style::Plain),
            Self::WasWrong => ('+', '+', Style::Good),
            Self::Errors => ('!', '!', Style::Warning),
            Self::Stale => ('~', '▒', Style::Warning),
            Self::Damaged => ('#', '█', Style::Bad),
        };
        (if terminal.unicode { unicode } else { ascii }, style)
    }
}

pub(super) fn run(context: &mut Context<'_>, json: bool) -> Result<Outcome, Error> {
    // The name, a gap and the two ends of the line.
    let columns = context
        .terminal
        .columns
        .saturating_sub(NAME_COLUMNS_MAX + 4);
    let buckets = if json {
        BUCKETS_IN_JSON
    } else {
        columns.clamp(1, BUCKETS_MAX)
    };
    let reply = context
        .connection
        .execute("query-quorum-map", json!({ "buckets": buckets }))?;
    if json {
        writeln!(context.out, "{reply}")?;
    }
    let map: DiskMap = understand("query-quorum-map", reply)?;
    if !json {
        let cells = cells_of(&map, buckets)?;
        draw(context.out, &map, cells, context.terminal)?;
        list(context.out, &map)?;
    }
    let is_good = |replica: &ReplicaMap| replica.corrupt.is_empty() && replica.stale.is_empty();
    Ok(Outcome::of(
        map.failures.undecided.is_empty() && map.replicas.iter().all(is_good),
    ))
}

/// How many buckets the disk has, if that is as many as were asked for at most.
fn cells_of(map: &DiskMap, asked: usize) -> Result<usize, Error> {
    let cells = map.size.checked_div(map.bucket_bytes).unwrap_or(u64::MAX);
    let cells = usize::try_from(cells).unwrap_or(usize::MAX);
    let rest = map.size.checked_rem(map.bucket_bytes).unwrap_or(0);
    let cells = cells.saturating_add(usize::from(rest > 0));
    if cells > asked {
        let why = "it has more buckets than were asked for";
        return Err(Error::nonsense("the reply to query-quorum-map", why));
    }
    Ok(cells)
}

fn draw(out: &mut dyn Write, map: &DiskMap, cells: usize, terminal: Terminal) -> Result<(), Error> {
    writeln!(
        out,
        "{}: {}, {} a character",
        terminal.paint(Style::Heading, clean(&map.node_name)),
        size(map.size),
        size(map.bucket_bytes)
    )?;
    let place = |offset: u64| usize::try_from(offset.checked_div(map.bucket_bytes)?).ok();
    for replica in &map.replicas {
        let mut marks = vec![Mark::Nothing; cells];
        for bucket in &replica.buckets {
            if let Some(mark) = place(bucket.offset).and_then(|place| marks.get_mut(place)) {
                *mark = Mark::of(bucket).max(*mark);
            }
        }
        draw_line(out, &replica.node_name, &marks, terminal)?;
    }
    let failures = &map.failures;
    if !failures.buckets.is_empty() {
        let mut marks = vec![Mark::Nothing; cells];
        for bucket in failures.buckets.iter().filter(|bucket| bucket.failed > 0) {
            if let Some(mark) = place(bucket.offset).and_then(|place| marks.get_mut(place)) {
                *mark = Mark::Errors;
            }
        }
        for range in &failures.undecided {
            let first = range.sector_num.saturating_mul(512);
            let last = first
                .saturating_add(range.sector_count.saturating_mul(512))
                .saturating_sub(1);
            let (Some(first), Some(last)) = (place(first), place(last)) else {
                continue;
            };
            marks
                .iter_mut()
                .take(last.saturating_add(1))
                .skip(first)
                .for_each(|mark| *mark = Mark::Damaged);
        }
        draw_line(out, "no quorum", &marks, terminal)?;
    }
    let legend = [
        (Mark::Damaged, "wrong when last read"),
        (Mark::Stale, "stale"),
        (Mark::Errors, "errors"),
        (Mark::WasWrong, "was wrong"),
        (Mark::Nothing, "nothing"),
    ];
    let texts = legend.map(|(mark, text)| {
        let (character, style) = mark.character(terminal);
        format!("{} {text}", terminal.paint(style, character))
    });
    writeln!(out, "{:NAME_COLUMNS_MAX$}  {}", "", texts.join("   "))?;
    Ok(())
}

fn draw_line(
    out: &mut dyn Write,
    name: &str,
    marks: &[Mark],
    terminal: Terminal,
) -> Result<(), Error> {
    let name: String = clean(name).chars().take(NAME_COLUMNS_MAX).collect();
    write!(out, "{name:NAME_COLUMNS_MAX$} |")?;
    // One colour for a run of the same.
    for run in marks.chunk_by(|left, right| left == right) {
        let (character, style) = run[0].character(terminal);
        let text: String = std::iter::repeat_n(character, run.len()).collect();
        write!(out, "{}", terminal.paint(style, text))?;
    }
    writeln!(out, "|")?;
    Ok(())
}

/// The worst places.
fn list(out: &mut dyn Write, map: &DiskMap) -> Result<(), Error> {
    let failures = &map.failures;
    list_ranges(
        out,
        "no quorum",
        "could not be read",
        &failures.undecided,
        failures.undecided_truncated,
    )?;
    for replica in &map.replicas {
        let name = clean(&replica.node_name);
        let what = "wrong when last read";
        list_ranges(
            out,
            &name,
            what,
            &replica.corrupt,
            replica.corrupt_truncated,
        )?;
        list_ranges(out, &name, "stale", &replica.stale, replica.stale_truncated)?;
        list_counts(out, &name, &replica.buckets, map.bucket_bytes)?;
    }
    Ok(())
}

/// The longest ranges, in order.
fn list_ranges(
    out: &mut dyn Write,
    name: &str,
    what: &str,
    ranges: &[Range],
    truncated: bool,
) -> Result<(), Error> {
    let mut worst = ranges.to_vec();
    worst.sort_by_key(|range| std::cmp::Reverse(range.sector_count));
    worst.truncate(LISTED_MAX);
    worst.sort_by_key(|range| range.sector_num);
    for range in &worst {
        let (first, bytes) = (
            range.sector_num.saturating_mul(512),
            range.sector_count.saturating_mul(512),
        );
        writeln!(
            out,
            "{name}: {what}: bytes {first}-{} ({}, {})",
            first.saturating_add(bytes).saturating_sub(1),
            size(bytes),
            sectors(range.sector_num, range.sector_count)
        )?;
    }
    if worst.len() < ranges.len() || truncated {
        writeln!(out, "{name}: {what}: and in smaller ranges")?;
    }
    Ok(())
}

/// The parts of the disk in which most was found, in order.
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
            let wrong = counted(bucket.corrupt_sectors_found, "wrong sector");
            parts.push(format!(
                "{wrong} found and {} mended",
                bucket.repaired_sectors
            ));
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
        let more = counted((found - worst.len()) as u64, "other part");
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
        let [wrong, mended, errors, damaged, stale] = figures;
        json!({ "offset": offset, "corrupt-sectors-found": wrong, "repaired-sectors": mended, "errors": errors,
                "corrupt-sectors": damaged, "stale-sectors": stale })
    }

    fn map() -> DiskMap {
        serde_json::from_value(json!({
            "node-name": "quorum0", "size": 10 * MIB, "bucket-bytes": MIB,
            "failures": {
                "buckets": [{ "offset": 8 * MIB, "failed": 1 }],
                "undecided": [{ "sector-num": 8 * 2048, "sector-count": 2 }],
            },
            "replicas": [
                { "node-name": "a", "buckets": [], "corrupt": [], "stale": [] },
                {
                    "node-name": "b\x1b",
                    "buckets": [
                        bucket(0, [3, 1, 0, 2, 0]), bucket(MIB, [2, 2, 0, 0, 0]), bucket(4 * MIB, [0, 0, 7, 0, 0]),
                        bucket(9 * MIB, [0, 0, 0, 0, 2048]), bucket(99 * MIB, [1, 0, 0, 1, 0]),
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
    fn each_place_has_its_mark() {
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
            "quorum0: 10 MiB, 1 MiB a character\n\
             a                    |..........|\n\
             b\\u{1b}              |#+..!....~|\n\
             no quorum            |........#.|\n\
             \x20                     # wrong when last read   ~ stale   ! errors   + was wrong   . nothing\n"
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
            "no quorum: could not be read: bytes 8388608-8389631 (1 KiB, sectors 16384-16385)\n\
             b\\u{1b}: wrong when last read: bytes 3584-4607 (1 KiB, sectors 7-8)\n\
             b\\u{1b}: wrong when last read: and in smaller ranges\n\
             b\\u{1b}: stale: bytes 9437184-10485759 (1 MiB, sectors 18432-20479)\n\
             b\\u{1b}: since it was added, in bytes 0-1048575: 3 wrong sectors found and 1 mended\n\
             b\\u{1b}: since it was added, in bytes 1048576-2097151: 2 wrong sectors found and 2 mended\n\
             b\\u{1b}: since it was added, in bytes 4194304-5242879: 7 errors\n\
             b\\u{1b}: since it was added, in bytes 103809024-104857599: 1 wrong sector found and 0 mended\n"
        );
    }

    #[test]
    fn a_map_without_end_is_refused() {
        let mut map = map();
        map.bucket_bytes = 0;
        assert!(cells_of(&map, 1024).is_err());
        map.bucket_bytes = 1;
        assert!(cells_of(&map, 1024).is_err());
    }
}
