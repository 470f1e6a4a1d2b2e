//! The log on stderr: one line for each record.
//!
//! ```text
//! 2026-11-28T19:24:34.123Z WARN disk=vm1 replica evicted replica=1.raw timeout-ms=1000
//! ```
//!
//! The message comes first, its values follow as `key=value`. A daemon serves one disk, so the
//! format adds `disk=` to every line; `replica=` comes from the records that are about one.
//!
//! Invariants: a record is one line, whatever its text contains; a line has one timestamp, that of
//! the journal where stderr is connected to it; no thread waits for the reader of stderr but the
//! one that writes.

#![forbid(unsafe_code)]

mod floods;
mod queue;

use std::fmt;
use std::io;
use std::sync::OnceLock;

use env_logger::Builder;
use jiff::Timestamp;
use log::kv::{self, VisitSource};
use log::{Level, LevelFilter, Metadata, Record};

use self::floods::Site;
use self::queue::Queue;
use crate::common::message::{Quoted, is_obeyed};
use crate::limits::LOG_FLUSH_LIMIT;
use crate::sandbox::{self, ThreadKind};

/// Overrides `-v`: a level, or `MODULE=LEVEL`, or several of them with commas between.
pub const LEVEL_VARIABLE: &str = "QUORUM_BLKD_LOG";

/// systemd sets this to the device and inode of the socket that leads to the journal.
const JOURNAL_VARIABLE: &str = "JOURNAL_STREAM";

/// [`LEVEL_VARIABLE`] does not hold levels.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{LEVEL_VARIABLE}: {} is not a log level; \
     use off, error, warn, info, debug or trace, or MODULE=LEVEL",
    Quoted(.0)
)]
pub struct UnknownLevel(String);

/// The log of the process.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    levels: env_logger::Logger,
    style: Style,
    queue: Queue,
}

/// Starts the log of the disk named `disk`. Without [`LEVEL_VARIABLE`], `verbosity` (the number of
/// `-v`) selects the level. Until [`start_writer`], each thread writes its lines itself, or leaves
/// them for later where stderr is not read.
///
/// # Errors
/// If [`LEVEL_VARIABLE`] is set and does not hold levels.
pub(super) fn start(disk: &str, verbosity: u8) -> Result<(), UnknownLevel> {
    let levels = std::env::var_os(LEVEL_VARIABLE).unwrap_or_default();
    let filters = filters(&levels.to_string_lossy(), verbosity)?;
    let mut builder = Builder::new();
    for (module, level) in filters {
        builder.filter(module.as_deref(), level);
    }
    let log = LOG.get_or_init(|| Log {
        levels: builder.build(),
        style: Style::of_stderr(disk),
        queue: Queue::new(),
    });
    log::set_max_level(log.levels.filter());
    log::set_logger(log).expect("the process has one log");
    Ok(())
}

/// Starts the thread that writes the lines from now on, so that no other thread waits for the
/// reader of stderr.
///
/// # Errors
/// If the thread cannot be created.
pub(super) fn start_writer() -> io::Result<()> {
    let Some(log) = LOG.get() else {
        return Ok(());
    };
    let thread = std::thread::Builder::new().name("log".into());
    thread.spawn(|| {
        sandbox::enter(ThreadKind::Log);
        write_all_lines(log)
    })?;
    log.queue.set_writer();
    Ok(())
}

fn write_all_lines(log: &Log) -> ! {
    loop {
        let batch = log.queue.take();
        let mut lines = batch.lines;
        if batch.dropped > 0 {
            let fields = format!(" count={}", batch.dropped);
            let text = format_args!("log lines were dropped: stderr was not read");
            lines.extend(log.style.line(Level::Warn, text, &fields).into_bytes());
        }
        for kind in batch.left_out {
            let mut fields = format!(" count={}", kind.count);
            push_field(&mut fields, "kind", &kind.text);
            let text = format_args!("log lines were left out: too many of one kind");
            lines.extend(log.style.line(kind.level, text, &fields).into_bytes());
        }
        // Without a reader there is nothing that could be done.
        let _ = queue::write_all(&lines);
    }
}

impl log::Log for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.levels.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        let (level, text) = (record.level(), *record.args());
        if !self.levels.matches(record)
            || Site::of(record).is_some_and(|site| !self.queue.admits(site, level, text))
        {
            return;
        }
        let mut fields = Fields::default();
        let visited = record.key_values().visit(&mut fields);
        visited.expect("the visitor does not fail");
        let line = self.style.line(level, text, &fields.0);
        self.queue.push(level, line.as_bytes());
    }

    fn flush(&self) {
        self.queue.flush(LOG_FLUSH_LIMIT);
    }
}

/// Waits until the lines are written, for at most [`LOG_FLUSH_LIMIT`].
pub fn flush() {
    log::logger().flush();
}

/// How many lines were dropped because stderr was not read.
pub(super) fn dropped() -> u64 {
    LOG.get().map_or(0, |log| log.queue.lines_dropped())
}

/// Prints why the daemon cannot start, or why it ended.
pub fn print_error(error: &dyn std::error::Error) {
    let priority = if is_journal() { "<3>" } else { "" };
    let line = format!("{priority}quorum-blkd: {error}\n");
    match LOG.get() {
        Some(log) => {
            log.queue.push_last(line.as_bytes());
            flush();
        }
        // Not eprintln!, which would panic when the reader of stderr is gone.
        None => drop(queue::write_all(line.as_bytes())),
    }
}

/// Prints an error of a thread that may hold any lock, and after which the process ends. `fields`
/// are as [`push_field`] makes them.
pub(super) fn print_last(text: &'static str, fields: &str) {
    let Some(log) = LOG.get() else { return };
    flush();
    let line = log.style.line(Level::Error, format_args!("{text}"), fields);
    let _ = queue::write_within(line.as_bytes(), LOG_FLUSH_LIMIT);
}

/// The levels in `text`, each with its module. `verbosity` decides for modules that are not in it.
fn filters(text: &str, verbosity: u8) -> Result<Vec<(Option<String>, LevelFilter)>, UnknownLevel> {
    let parse = |directive: &str| {
        let (module, level) = match directive.split_once('=') {
            Some((module, level)) => (Some(module.trim().to_owned()), level),
            None => (None, directive),
        };
        match level.trim().parse() {
            Ok(level) if module.as_deref() != Some("") => Ok((module, level)),
            _ => Err(UnknownLevel(directive.to_owned())),
        }
    };
    let mut filters = match text {
        "" => Vec::new(),
        _ => text.split(',').map(parse).collect::<Result<_, _>>()?,
    };
    if filters.iter().all(|(module, _)| module.is_some()) {
        let level = match verbosity {
            0 => LevelFilter::Info,
            1 => LevelFilter::Debug,
            _ => LevelFilter::Trace,
        };
        filters.push((None, level));
    }
    Ok(filters)
}

/// The parts that all lines share.
struct Style {
    disk: String,
    /// The journal adds a timestamp, and reads the level off the line.
    is_journal: bool,
}

impl Style {
    fn of_stderr(disk: &str) -> Self {
        Self {
            disk: disk.to_owned(),
            is_journal: is_journal(),
        }
    }

    /// A line with its end; `fields` are as [`push_field`] makes them.
    fn line(&self, level: Level, text: fmt::Arguments<'_>, fields: &str) -> String {
        let mut line = if self.is_journal {
            // sd-daemon(3)
            let priority = match level {
                Level::Error => 3,
                Level::Warn => 4,
                Level::Info => 6,
                Level::Debug | Level::Trace => 7,
            };
            format!("<{priority}>")
        } else {
            format!("{:.3} {level} ", Timestamp::now())
        };
        let mut head = String::new();
        push_field(&mut head, "disk", &self.disk);
        line.push_str(head.trim_start());
        line.push(' ');
        push_on_one_line(&mut line, &text.to_string());
        line.push_str(fields);
        line.push('\n');
        line
    }
}

/// Whether stderr is connected to the journal.
fn is_journal() -> bool {
    let journal = std::env::var(JOURNAL_VARIABLE).ok();
    let stderr = rustix::fs::fstat(io::stderr()).ok();
    journal
        .zip(stderr)
        .is_some_and(|(journal, stderr)| journal == format!("{}:{}", stderr.st_dev, stderr.st_ino))
}

/// The values of a record, as text.
#[derive(Default)]
struct Fields(String);

impl<'kvs> VisitSource<'kvs> for Fields {
    fn visit_pair(&mut self, key: kv::Key<'kvs>, value: kv::Value<'kvs>) -> Result<(), kv::Error> {
        push_field(&mut self.0, key.as_str(), &value.to_string());
        Ok(())
    }
}

/// Adds ` key=value`, with quotes around a value that is not one plain word.
pub(super) fn push_field(line: &mut String, key: &str, value: &str) {
    let is_plain = |character: char| {
        !character.is_whitespace() && !is_obeyed(character) && !"\"=\\".contains(character)
    };
    line.extend([" ", key, "="]);
    if !value.is_empty() && value.chars().all(is_plain) {
        line.push_str(value);
        return;
    }
    line.push('"');
    for character in value.chars() {
        if "\"\\".contains(character) {
            line.push('\\');
        }
        push_escaped(line, character);
    }
    line.push('"');
}

fn push_on_one_line(line: &mut String, text: &str) {
    text.chars()
        .for_each(|character| push_escaped(line, character));
}

fn push_escaped(line: &mut String, character: char) {
    if is_obeyed(character) {
        line.extend(character.escape_default());
    } else {
        line.push(character);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(is_journal: bool, disk: &str, text: &str, fields: &[(&str, &str)]) -> String {
        let mut all = String::new();
        for (key, value) in fields {
            push_field(&mut all, key, value);
        }
        let disk = disk.to_owned();
        Style { disk, is_journal }.line(Level::Warn, format_args!("{text}"), &all)
    }

    #[test]
    fn a_line_has_its_disk_and_its_values() {
        let fields = [("replica", "1.raw"), ("timeout-ms", "1000")];
        let stamped = line(false, "vm1", "replica evicted", &fields);
        let (timestamp, rest) = stamped.split_once(' ').unwrap();
        assert!(timestamp.parse::<Timestamp>().is_ok(), "{timestamp}");
        let expected = "WARN disk=vm1 replica evicted replica=1.raw timeout-ms=1000\n";
        assert_eq!(rest, expected);
    }

    #[test]
    fn the_journal_gets_a_priority_and_no_timestamp() {
        assert_eq!(line(true, "vm1", "stopped", &[]), "<4>disk=vm1 stopped\n");
    }

    #[test]
    fn a_record_is_one_line_for_any_contents() {
        let fields = [("replica", "a \"b\"\\"), ("error", "x\ny"), ("empty", "")];
        assert_eq!(
            line(true, "a\nb", "two\nlines\u{202e}", &fields),
            "<4>disk=\"a\\nb\" two\\nlines\\u{202e} \
             replica=\"a \\\"b\\\"\\\\\" error=\"x\\ny\" empty=\"\"\n"
        );
    }

    #[test]
    fn levels_are_read_or_rejected() {
        let of = |text, verbosity| filters(text, verbosity);
        assert_eq!(of("", 0), Ok(vec![(None, LevelFilter::Info)]));
        assert_eq!(of("", 1), Ok(vec![(None, LevelFilter::Debug)]));
        assert_eq!(of("", 9), Ok(vec![(None, LevelFilter::Trace)]));
        assert_eq!(of("Warn", 2), Ok(vec![(None, LevelFilter::Warn)]));
        let module = Some("quorum_blk::control".to_owned());
        assert_eq!(
            of("off, quorum_blk::control=debug", 0),
            Ok(vec![
                (None, LevelFilter::Off),
                (module.clone(), LevelFilter::Debug)
            ])
        );
        assert_eq!(
            of("quorum_blk::control=debug", 0),
            Ok(vec![
                (module, LevelFilter::Debug),
                (None, LevelFilter::Info)
            ]),
            "the other modules are not silenced"
        );
        for (text, wrong) in [
            ("loud", "loud"),
            ("info,loud", "loud"),
            ("a=loud", "a=loud"),
            ("=info", "=info"),
            ("info,", ""),
            (" ", " "),
        ] {
            assert_eq!(of(text, 0), Err(UnknownLevel(wrong.to_owned())), "{text}");
        }
        assert_eq!(
            UnknownLevel("loud".to_owned()).to_string(),
            "QUORUM_BLKD_LOG: 'loud' is not a log level; \
             use off, error, warn, info, debug or trace, or MODULE=LEVEL"
        );
    }
}
