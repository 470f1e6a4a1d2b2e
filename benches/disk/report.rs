//! Writes docs/benchmarks.md and its pictures.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::machine;
use super::plan::{IMAGE_BYTES, Pattern, Row, Storage, is_varied, patterns};
use super::plot::{self, Panel, Scale};
use super::settings::Settings;
use super::spread::Spread;
use super::summary::{Figures, Outcome, microseconds, percent, short, times};
use super::systems::System;

const ALL: [System; 3] = [System::Ours, System::Peer, System::Ceiling];

/// Writes the page and the pictures into `docs`.
pub fn write(outcomes: &[Outcome], settings: &Settings, docs: &Path) {
    let pictures = docs.join("benchmarks");
    fs::create_dir_all(&pictures).expect("creating docs/benchmarks");
    let names = ALL.map(System::name);
    let rate = |sequential| {
        let unit = if sequential { "MB/s" } else { "requests/s" };
        let value = move |figures: &Figures| {
            if sequential {
                figures.megabytes_per_second
            } else {
                figures.requests_per_second.median
            }
        };
        panels(outcomes, sequential, unit, &ALL, &value)
    };
    let latency = |figures: &Figures| figures.latency_us[1];
    let cpu = |figures: &Figures| figures.cpu_us;
    let served = &ALL[..2];
    let random =
        |unit, value: &dyn Fn(&Figures) -> f64| panels(outcomes, false, unit, served, value);
    for (name, picture) in [
        ("ratio", ratio_picture(outcomes)),
        (
            "requests",
            plot::bars(
                "Random 4 KiB requests a second: more is better",
                &names,
                &rate(false),
                Scale::Linear,
            ),
        ),
        (
            "throughput",
            plot::bars(
                "Sequential throughput: more is better",
                &names,
                &rate(true),
                Scale::Linear,
            ),
        ),
        (
            "latency",
            plot::bars(
                "p99 latency of random 4 KiB requests: less is better (logarithmic)",
                &names[..2],
                &random("µs", &latency),
                Scale::Logarithmic,
            ),
        ),
        (
            "cpu",
            plot::bars(
                "CPU time of the daemon for each random 4 KiB request: less is better",
                &names[..2],
                &random("µs", &cpu),
                Scale::Linear,
            ),
        ),
    ] {
        fs::write(pictures.join(name).with_extension("svg"), picture).expect("writing a picture");
    }
    fs::write(docs.join("benchmarks.md"), document(outcomes, settings))
        .expect("writing the report");
}

fn document(outcomes: &[Outcome], settings: &Settings) -> String {
    let mut text = String::from(
        "<!-- Written by `make bench`. -->\n\n# Benchmarks\n\n\
         `make bench` writes this page. It compares `quorum-blkd` with the quorum export of\n\
         `qemu-storage-daemon` (the *peer*) and with one thread that only reads and writes the\n\
         files (the *ceiling*).\n\n",
    );
    summary(&mut text, outcomes);
    for (name, caption) in [
        (
            "ratio",
            "Requests/s of quorum-blkd ÷ qemu-storage-daemon; lines span the rounds.",
        ),
        ("requests", "Requests a second."),
        ("throughput", "Megabytes a second."),
        ("latency", "p99 latency."),
        (
            "cpu",
            "CPU time of the daemon and its kernel threads per request.",
        ),
    ] {
        let _ = writeln!(text, "![{caption}](benchmarks/{name}.svg)\n");
    }
    text += "## The machine\n\n| | |\n| --- | --- |\n";
    for (what, value) in machine::describe(&settings.directory) {
        let _ = writeln!(text, "| {what} | {value} |");
    }
    how(&mut text, settings);
    for storage in Storage::ALL {
        let _ = writeln!(
            text,
            "\n## Three replicas, one queue: {}\n",
            storage.title()
        );
        let rows: Vec<&Outcome> = main_rows(outcomes, storage).collect();
        let name = |row: &Row| format!("{}, depth {}", row.pattern.title, row.pattern.depth);
        tables(&mut text, "load", &rows, &name);
    }
    for storage in [Storage::Cache, Storage::Tmpfs] {
        let _ = writeln!(text, "\n## Other disks: {}", storage.title());
        for pattern in patterns().iter().filter(|pattern| is_varied(pattern)) {
            let _ = writeln!(text, "\n### {}, depth {}\n", pattern.title, pattern.depth);
            let is_of = |row: &Row| row.storage == storage && row.pattern == *pattern;
            let mut rows: Vec<&Outcome> = outcomes
                .iter()
                .filter(|outcome| is_of(&outcome.row))
                .collect();
            rows.sort_by_key(|outcome| (outcome.row.replicas, outcome.row.queues));
            tables(&mut text, "disk", &rows, &Row::disk);
        }
    }
    text
}

/// The result in a few rows.
fn summary(text: &mut String, outcomes: &[Outcome]) {
    text.push_str("Requests per second with three replicas and one queue:\n\n");
    text.push_str(
        "| | × qemu-storage-daemon (geometric mean) | lowest | highest | of the ceiling |\n",
    );
    text.push_str("| --- | ---: | --- | --- | ---: |\n");
    for storage in Storage::ALL {
        let ratio =
            |outcome: &Outcome| Some((outcome.ratio_to(System::Peer)?.median, outcome.row.pattern));
        let mut ratios: Vec<(f64, Pattern)> =
            main_rows(outcomes, storage).filter_map(ratio).collect();
        ratios.sort_by(|(left, _), (right, _)| left.total_cmp(right));
        let of_ceiling =
            main_rows(outcomes, storage).filter_map(|outcome| outcome.ratio_to(System::Ceiling));
        let of_ceiling = mean(of_ceiling.map(|ratio| ratio.median));
        let named = |(ratio, pattern): &(f64, Pattern)| {
            format!(
                "{} ({}, depth {})",
                times(*ratio),
                pattern.title,
                pattern.depth
            )
        };
        if let (Some(lowest), Some(highest)) = (ratios.first(), ratios.last()) {
            let _ = writeln!(
                text,
                "| {} | **{}** | {} | {} | {} |",
                storage.title(),
                times(mean(ratios.iter().map(|(ratio, _)| *ratio))),
                named(lowest),
                named(highest),
                percent(of_ceiling)
            );
        }
    }
    text.push('\n');
}

fn how(text: &mut String, settings: &Settings) {
    let images = format!(
        "All systems serve the same {} MiB images of random data in turn, in {} rounds of {} s, \
         each after a warm-up of a fifth. Figures are medians of the rounds, with the lowest and \
         the highest in parentheses. Ratios are taken within a round; tables show their median.",
        IMAGE_BYTES >> 20,
        settings.rounds,
        settings.time.as_secs_f64(),
    );
    text.push_str("\n## How it is measured\n\n");
    for item in [
        images.as_str(),
        "The client of both daemons is blkio's `virtio-blk-vhost-user` driver, with one thread for \
         each queue. Latency is measured from submission to the moment the completion is seen. \
         With several queues, depth is that of each.",
        "The ceiling is one thread for each queue with an io_uring that does the same requests on \
         all N files, without vote or guest, and discards what it reads. It waits for a quarter of \
         its operations at a time, and divides large reads from the page cache into parts of 64 \
         KiB. With `--read-pattern threshold` it reads as many files as make a quorum. It is not a \
         strict limit: a system that does the same work in a better way can exceed it.",
        "*page cache*: files that fit memory and are cached, with `--cache writeback` and \
         `cache.direct=off`. *tmpfs*: the same on `/dev/shm`. *disk*: O_DIRECT for all three \
         systems.",
        "No two requests in flight overlap, and every block written is unique. Images are filled \
         by writes of 4 KiB, because ext4 takes ten times as long for small writes into files that \
         were written by the megabyte. Dirty pages are written back between measurements. The \
         replicas must be identical at the end.",
        "qemu-storage-daemon runs with `aio=io_uring` and an iothread, quorum-blkd with its \
         defaults and `--replica-timeout 20000`, so that a disk that is busy writing back does not \
         count as one that hangs.",
        "CPU time is that of all threads of the daemon, including the kernel's io_uring threads. \
         Memory is the peak resident set, including guest memory that the daemon has touched.",
    ] {
        push_item(text, item);
    }
}

/// Adds an item of a list, wrapped at 100 columns.
fn push_item(text: &mut String, item: &str) {
    const COLUMNS: usize = 100;
    let mut column = 1;
    text.push('-');
    for word in item.split(' ') {
        let len = word.chars().count();
        if column + 1 + len > COLUMNS {
            text.push_str("\n ");
            column = 1;
        }
        text.push(' ');
        text.push_str(word);
        column += 1 + len;
    }
    text.push('\n');
}

fn tables(text: &mut String, first: &str, rows: &[&Outcome], name: &dyn Fn(&Row) -> String) {
    let _ = writeln!(
        text,
        "| {first} | requests/s | peer | ceiling | × peer | of the ceiling | MB/s | peer |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    );
    for outcome in rows {
        let [ours, peer, ceiling] = ALL.map(|system| outcome.figures(system));
        let rate = |figures: &Option<Figures>| {
            cell(figures, |figures| {
                with_range(figures.requests_per_second, short)
            })
        };
        let megabytes = |figures: &Option<Figures>| {
            cell(figures, |figures| short(figures.megabytes_per_second))
        };
        let ratio = outcome.ratio_to(System::Peer);
        let of_ceiling = outcome.ratio_to(System::Ceiling);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            name(&outcome.row),
            rate(&ours),
            rate(&peer),
            rate(&ceiling),
            cell(&ratio, |ratio| format!(
                "**{}** ({:.2}–{:.2})",
                times(ratio.median),
                ratio.min,
                ratio.max
            )),
            cell(&of_ceiling, |fraction| percent(fraction.median)),
            megabytes(&ours),
            megabytes(&peer),
        );
    }
    let _ = writeln!(
        text,
        "\n| {first} | p50 / p99 / p99.9, µs | peer | ceiling | CPU µs | peer | ceiling | memory \
         MiB | peer |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    );
    for outcome in rows {
        let [ours, peer, ceiling] = ALL.map(|system| outcome.figures(system));
        let latency = |figures: &Option<Figures>| {
            cell(figures, |figures| {
                figures.latency_us.map(microseconds).join(" / ")
            })
        };
        let cpu = |figures: &Option<Figures>| cell(figures, |figures| short(figures.cpu_us));
        let memory = |figures: &Option<Figures>| {
            let memory = figures.and_then(|figures| figures.memory_mib);
            cell(&memory, |mib| short(*mib))
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            name(&outcome.row),
            latency(&ours),
            latency(&peer),
            latency(&ceiling),
            cpu(&ours),
            cpu(&peer),
            cpu(&ceiling),
            memory(&ours),
            memory(&peer),
        );
    }
}

fn ratio_picture(outcomes: &[Outcome]) -> String {
    let group = |pattern: Pattern| {
        let of_storage = |storage| {
            let mut rows = main_rows(outcomes, storage);
            rows.find(|outcome| outcome.row.pattern == pattern)?
                .ratio_to(System::Peer)
        };
        let label = format!("{}, depth {}", pattern.title, pattern.depth);
        (label, Storage::ALL.map(of_storage).to_vec())
    };
    let groups: Vec<_> = patterns().into_iter().map(group).collect();
    plot::ratios(
        "quorum-blkd ÷ qemu-storage-daemon, requests a second: right of 1× is faster",
        &Storage::ALL.map(Storage::title),
        &groups,
    )
}

/// One panel for each storage, with the `value` of each system on the main rows that are
/// `sequential`, or those that are not.
fn panels(
    outcomes: &[Outcome],
    sequential: bool,
    unit: &str,
    systems: &[System],
    value: &dyn Fn(&Figures) -> f64,
) -> Vec<Panel> {
    let group = |outcome: &Outcome| {
        let pattern = &outcome.row.pattern;
        let mut title = pattern.title.to_owned();
        for implied in ["4 KiB ", "random ", "random, ", "sequential "] {
            title = title.replace(implied, "");
        }
        let values = systems
            .iter()
            .map(|system| outcome.figures(*system).as_ref().map(value));
        (
            [title, format!("depth {}", pattern.depth)],
            values.collect(),
        )
    };
    let panel = |storage: Storage| Panel {
        title: format!("{}, {unit}", storage.title()),
        groups: main_rows(outcomes, storage)
            .filter(|outcome| outcome.row.pattern.is_sequential() == sequential)
            .map(group)
            .collect(),
    };
    Storage::ALL.map(panel).into()
}

fn main_rows(outcomes: &[Outcome], storage: Storage) -> impl Iterator<Item = &Outcome> {
    let is_wanted = move |row: &Row| row.is_main() && row.storage == storage;
    outcomes
        .iter()
        .filter(move |outcome| is_wanted(&outcome.row))
}

/// The geometric mean.
fn mean(ratios: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = ratios.fold((0.0, 0.0), |(sum, count), ratio| {
        (sum + ratio.ln(), count + 1.0)
    });
    (sum / count).exp()
}

fn with_range(spread: Spread, text: fn(f64) -> String) -> String {
    format!(
        "{} ({}–{})",
        text(spread.median),
        text(spread.min),
        text(spread.max)
    )
}

fn cell<T>(value: &Option<T>, text: impl Fn(&T) -> String) -> String {
    value.as_ref().map_or("–".into(), text)
}
