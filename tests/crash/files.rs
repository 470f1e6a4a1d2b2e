//! What the files of a file system must hold after a power cut: the oracle for programs that sync.
//!
//! Each promise has a name and counts: how far it was durable, and how far the program had begun.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Lines, Read, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use testkit::fuse::logged::Moment;
use testkit::sectors::SECTOR;

/// Bytes of a page that is written in place.
pub(crate) const PAGE: usize = 4096;

/// How far a program has come with something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// At least so far: this was synced.
    pub(crate) durable: u64,
    /// At most so far.
    pub(crate) begun: u64,
}

/// What each promise is about, and how far it goes.
pub(crate) type Promises = BTreeMap<String, Progress>;

/// What programs have begun and synced, and when.
#[derive(Debug, Default)]
pub(crate) struct FileHistory(Vec<(Moment, String, u64, bool)>);

impl FileHistory {
    /// A program begins with this number.
    pub(crate) fn begun(&mut self, now: Moment, name: &str, number: u64) {
        self.0.push((now, name.into(), number, false));
    }

    /// What has this number is synced.
    pub(crate) fn durable(&mut self, now: Moment, name: &str, number: u64) {
        self.0.push((now, name.into(), number, true));
    }

    /// What holds if the power fails at `moment`.
    pub(crate) fn promises(&self, moment: Moment) -> Promises {
        let mut promises = Promises::new();
        for (at, name, number, is_durable) in &self.0 {
            if *at <= moment {
                let progress = promises.entry(name.clone()).or_default();
                progress.begun = progress.begun.max(*number);
                if *is_durable {
                    progress.durable = progress.durable.max(*number);
                }
            }
        }
        promises
    }
}

/// An entry of a log, a configuration or a message: its number again and again, with a length that
/// depends on it.
pub(crate) fn entry(kind: &str, number: u64) -> Vec<u8> {
    let line = format!("{kind} {number}\n");
    let count = 1 + (number * 37 + kind.len() as u64) % 200;
    line.repeat(usize::try_from(count).expect("small"))
        .into_bytes()
}

/// A page with this version: each of its sectors says so.
pub(crate) fn page(place: u64, version: u64) -> Vec<u8> {
    [place, version]
        .map(u64::to_le_bytes)
        .concat()
        .repeat(PAGE / 16)
}

/// Checks all promises below `root`. Returns what does not hold.
pub(crate) fn check(root: &Path, promises: &Promises) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, progress) in promises {
        let (kind, rest) = name.split_once(' ').unwrap_or((name, ""));
        let checked = match kind {
            "log" => check_log(root, *progress),
            "config" => check_config(root, *progress),
            "page" => check_page(&root.join("pages"), rest, *progress),
            "mapped" => check_page(&root.join("mapped"), rest, *progress),
            "mail" => check_mail(root, rest, *progress),
            _ => continue,
        };
        if let Err(problem) = checked {
            problems.push(format!("{name} {progress:?}: {problem}"));
        }
    }
    problems.extend(check_databases(root, promises));
    problems
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn check_log(root: &Path, progress: Progress) -> Result<(), String> {
    let entries = |numbers: RangeInclusive<u64>| -> Vec<u8> {
        numbers.flat_map(|number| entry("log", number)).collect()
    };
    let durable = entries(1..=progress.durable);
    let later = entries(progress.durable + 1..=progress.begun);
    match read(&root.join("log")) {
        Ok(bytes) => {
            let rest = bytes.strip_prefix(&durable[..]).ok_or_else(|| {
                let pairs = bytes.iter().zip(&durable);
                let same = pairs.take_while(|(left, right)| left == right).count();
                let (has, needs) = (bytes.len(), durable.len());
                format!("{has} bytes, {same} of {needs} as written")
            })?;
            match is_part_of(rest, &later) {
                true => Ok(()),
                false => Err(format!("{} bytes at the end, not as written", rest.len())),
            }
        }
        Err(_) if progress.durable == 0 => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether this can be left of what was written to a new part of a file and not synced: its
/// beginning, with zeroes where it was not written.
fn is_part_of(bytes: &[u8], written: &[u8]) -> bool {
    let mut pairs = bytes.iter().zip(written);
    let is_legal = pairs.all(|(found, written)| found == written || *found == 0);
    is_legal && bytes.len() <= written.len()
}

fn check_config(root: &Path, progress: Progress) -> Result<(), String> {
    match read(&root.join("config")) {
        Ok(bytes) => {
            let mut versions = progress.durable..=progress.begun;
            let found = versions.any(|version| bytes == entry("config", version));
            found.then_some(()).ok_or_else(|| {
                let start = String::from_utf8_lossy(&bytes[..bytes.len().min(20)]);
                format!("{} bytes, {start:?}", bytes.len())
            })
        }
        Err(_) if progress.durable == 0 => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// Power cuts tear pages, but not sectors.
fn check_page(path: &Path, place: &str, progress: Progress) -> Result<(), String> {
    let place = place.parse().expect("a number");
    let mut bytes = vec![0; PAGE];
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.read_exact_at(&mut bytes, place * PAGE as u64)
        .map_err(|error| error.to_string())?;
    for (sector, bytes) in bytes.chunks_exact(SECTOR).enumerate() {
        let mut versions = progress.durable..=progress.begun;
        if !versions.any(|version| bytes == &page(place, version)[..SECTOR]) {
            return Err(format!("sector {sector} begins with {:?}", &bytes[..16]));
        }
    }
    Ok(())
}

/// A message is delivered (1) and removed (2).
fn check_mail(root: &Path, number: &str, progress: Progress) -> Result<(), String> {
    let content = entry("mail", number.parse().expect("a number"));
    match (read(&root.join("mail").join(number)), progress) {
        (Ok(_), Progress { durable: 2, .. }) => Err("it is there".into()),
        (Ok(bytes), Progress { durable: 1, .. }) if bytes != content => {
            Err(format!("{} bytes of {}", bytes.len(), content.len()))
        }
        (Ok(bytes), Progress { durable: 0, .. }) if !is_part_of(&bytes, &content) => {
            Err(format!("{} bytes, not as written", bytes.len()))
        }
        (
            Err(error),
            Progress {
                begun: 1,
                durable: 1,
            },
        ) => Err(error.to_string()),
        _ => Ok(()),
    }
}

/// Checks databases with one process for all that a thread checks, because to start it takes
/// longest.
fn check_databases(root: &Path, promises: &Promises) -> Vec<String> {
    let wrong = promises.iter().filter_map(|(name, progress)| {
        let path = root.join(name.strip_prefix("database ")?);
        if progress.durable == 0 && !path.exists() {
            return None;
        }
        let line = CHECKER.with(|checker| checker.borrow_mut().check(&path));
        let rows = line.strip_prefix("ok ").and_then(|rows| rows.parse().ok());
        match rows {
            Some(rows) if (progress.durable..=progress.begun).contains(&rows) => None,
            _ => Some(format!("{} {progress:?}: {line}", path.display())),
        }
    });
    wrong.collect()
}

thread_local! {
    static CHECKER: RefCell<Checker> = RefCell::new(Checker::start());
}

/// A process that checks databases. It ends with its standard input.
struct Checker {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Checker {
    fn start() -> Self {
        let mut command = Command::new("python3");
        command.arg(SCRIPT).arg("check");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("running python3");
        let stdout = child.stdout.take().expect("a pipe");
        Self {
            child,
            lines: BufReader::new(stdout).lines(),
        }
    }

    /// What it says of the database with this path.
    fn check(&mut self, path: &Path) -> String {
        let mut stdin = self.child.stdin.as_ref().expect("a pipe");
        writeln!(stdin, "{}", path.display()).expect("asking python3");
        let line = self.lines.next().expect("python3 has ended");
        line.expect("an answer of python3")
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// The program that uses databases.
pub(crate) const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/crash/database.py");

/// Whether files with these contents keep a promise.
fn keeps(files: &[(&str, Vec<u8>)], name: &str, durable: u64, begun: u64) -> bool {
    let root = tempfile::tempdir().expect("creating a directory");
    std::fs::create_dir(root.path().join("mail")).expect("creating a directory");
    for (name, content) in files {
        std::fs::write(root.path().join(name), content).expect("writing a file");
    }
    let promises = Promises::from([(name.into(), Progress { durable, begun })]);
    check(root.path(), &promises).is_empty()
}

#[test]
fn a_log_ends_with_nothing_that_was_not_written() {
    let [first, second] = [1, 2].map(|number| entry("log", number));
    let log = |bytes: Vec<u8>| keeps(&[("log", bytes)], "log", 1, 2);
    assert!(log(first.clone()));
    assert!(log([&first[..], &second[..9]].concat()));
    assert!(log([&first[..], &[0; 9], &second[9..]].concat()));
    assert!(!log(first[1..].to_vec()));
    assert!(!log([&first[..], b"garbage"].concat()));
    assert!(!log([&first[..], &second, &[0]].concat()));
    assert!(!keeps(&[], "log", 1, 2));
    assert!(keeps(&[], "log", 0, 1));
}

#[test]
fn a_configuration_is_one_that_was_written_as_a_whole() {
    let config = |number, durable| {
        let bytes = entry("config", number);
        keeps(&[("config", bytes)], "config", durable, 3)
    };
    assert!(config(2, 2) && config(3, 2) && !config(1, 2) && !config(4, 2));
    assert!(!keeps(&[("config", Vec::new())], "config", 2, 3));
    assert!(!keeps(&[], "config", 1, 3) && keeps(&[], "config", 0, 3));
}

#[test]
fn a_message_is_there_until_it_is_removed() {
    let mail = entry("mail", 7);
    let has = |bytes: &[u8], durable, begun| {
        keeps(&[("mail/7", bytes.to_vec())], "mail 7", durable, begun)
    };
    let lacks = |durable, begun| keeps(&[], "mail 7", durable, begun);
    assert!(has(&mail, 1, 1) && !has(&mail[1..], 1, 1) && !lacks(1, 1));
    assert!(has(&mail, 1, 2) && lacks(1, 2) && !has(&mail, 2, 2) && lacks(2, 2));
    assert!(has(&mail[..9], 0, 1) && !has(b"garbage", 0, 1) && lacks(0, 1));
}

#[test]
fn each_sector_of_a_page_holds_a_version_that_was_written() {
    for (file, kind) in [("pages", "page 1"), ("mapped", "mapped 1")] {
        let page_of =
            |bytes: Vec<u8>| keeps(&[(file, [vec![0; PAGE], bytes].concat())], kind, 3, 4);
        let torn = [&page(1, 3)[..SECTOR], &page(1, 4)[SECTOR..]].concat();
        assert!(page_of(page(1, 3)) && page_of(page(1, 4)) && page_of(torn));
        assert!(!page_of(page(1, 2)) && !page_of(page(1, 5)) && !page_of(page(2, 3)));
        assert!(!page_of(Vec::new()));
    }
}
