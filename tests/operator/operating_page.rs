//! docs/operating.md shows real output: its commands are one session, repeated here with a real
//! daemon.
//!
//! A comment `replay` in the page names something that happens between two commands. Times and the
//! progress of jobs are not compared.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use testkit::HANG_LIMIT;

use serde_json::json;
use testkit::client::Client;
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::corrupt_sectors;
use testkit::monitor::Monitor;
use testkit::process::{Process, wait_until};

const PAGE: &str = include_str!("../../docs/operating.md");
const SIZE_BYTES: u64 = 64 << 20;

/// The steps of the page, in order.
#[derive(Debug)]
enum Step {
    /// A command, and what it prints.
    Command(String, String),
    /// An event that the operator does not cause.
    Happens(String),
}

fn steps() -> Vec<Step> {
    let mut steps = Vec::new();
    for (index, part) in PAGE.split("```").enumerate() {
        if index % 2 == 0 {
            let comments = part.split("<!-- replay: ").skip(1);
            steps.extend(
                comments.map(|comment| Step::Happens(comment.split(" -->").next().unwrap().into())),
            );
            continue;
        }
        for command in part.replace("\n$ ", "\0").split('\0').skip(1) {
            let joined = command.replace("\\\n", "");
            let (line, output) = joined.split_once('\n').unwrap_or((&joined, ""));
            steps.push(Step::Command(line.to_owned(), output.trim_end().to_owned()));
        }
    }
    steps
}

/// The session: its processes, and the real paths of the names in the page.
struct Session {
    directory: tempfile::TempDir,
    dying: FuseImage,
    daemon: Option<Process>,
    events: Option<Process>,
    /// Jobs that the page does not show.
    jobs_before: i64,
    last_status: i32,
}

impl Session {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.raw", "b.raw", "backing.raw", "short.raw"] {
            let image = File::create_new(directory.path().join(name)).unwrap();
            image
                .set_len(if name == "short.raw" {
                    SIZE_BYTES / 2
                } else {
                    SIZE_BYTES
                })
                .unwrap();
        }
        Self {
            dying: FuseImage::serve(&directory.path().join("backing.raw")),
            directory,
            daemon: None,
            events: None,
            jobs_before: 0,
            last_status: 0,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Replaces names of the page by real ones.
    fn real(&self, text: &str) -> String {
        let dying = format!("{},node-name=c.raw", self.dying.path().display());
        let directory = self.directory.path().to_str().unwrap();
        let text = text.replace("/images/c.raw", &dying);
        let text = text
            .replace("/images", directory)
            .replace("/run/vm1", directory);
        with_jobs_numbered(&text, self.jobs_before)
    }

    /// Replaces real names by those of the page.
    fn shown(&self, text: &str) -> String {
        let text = text.replace(self.dying.path().to_str().unwrap(), "/images/c.raw");
        let text = text.replace(self.directory.path().to_str().unwrap(), "/images");
        with_jobs_numbered(&text, -self.jobs_before)
    }

    fn shell(&self, line: &str) -> Command {
        let programs = Path::new(env!("CARGO_BIN_EXE_quorum-blkctl"))
            .parent()
            .unwrap();
        let mut command = Command::new("/bin/sh");
        command
            .arg("-c")
            .arg(format!("exec {}", self.real(line)))
            .env("PATH", programs)
            .env("LANG", "C.UTF-8")
            .env("QUORUM_BLK_QMP", self.path("qmp.sock"))
            .env_remove("LC_ALL")
            .stdin(Stdio::null());
        command
    }

    fn spawn(&self, line: &str, output: &str) -> Process {
        let output = self.path(output);
        let mut command = self.shell(line);
        command.stdout(File::create(&output).unwrap());
        command.stderr(File::options().append(true).open(&output).unwrap());
        Process::spawn(&mut command).unwrap()
    }

    /// Runs a command and returns its output.
    fn execute(&mut self, line: &str) -> String {
        if let Some(line) = line.strip_suffix(" &") {
            self.daemon = Some(self.spawn(line, "daemon.log"));
            assert!(
                wait_until(HANG_LIMIT, || self.path("qmp.sock").exists()),
                "no daemon"
            );
            return String::new();
        }
        match line {
            "echo $?" => return self.last_status.to_string(),
            line if line.starts_with("export ") => return String::new(),
            "quorum-blkctl events" => {
                self.events = Some(self.spawn(line, "events"));
                // It follows events from here on: it has seen those of a job without work.
                let mut monitor = self.monitor();
                let hears = wait_until(HANG_LIMIT, || {
                    monitor.execute("quorum-resync", json!({ "node-name": "a.raw" }));
                    self.jobs_before += 1;
                    fs::metadata(self.path("events")).unwrap().len() > 0
                });
                assert!(hears);
                return String::new();
            }
            _ => {}
        }
        let mut process = self.spawn(line, "output");
        let status = process
            .wait_within(HANG_LIMIT)
            .unwrap_or_else(|| panic!("{line} goes on running"));
        self.last_status = status.code().unwrap();
        fs::read_to_string(self.path("output")).unwrap()
    }

    fn monitor(&self) -> Monitor {
        Monitor::connect(&self.path("qmp.sock"))
    }

    fn happens(&mut self, what: &str) {
        let mut guest = Client::connect(&self.path("disk.sock"), 1);
        match what {
            "corruption" => {
                corrupt_sectors(&self.path("b.raw"), 40000..40008, 0xff);
                corrupt_sectors(&self.path("b.raw"), 100_000..100_024, 0xff);
                guest.read(0, 40000 * 512, 4096).unwrap();
                // The sectors around it are scrubbed at once.
                let events = self.path("events");
                let is_scrubbed = || {
                    fs::read_to_string(&events)
                        .unwrap()
                        .contains("(neighbourhood-scrub) completed")
                };
                assert!(wait_until(HANG_LIMIT, is_scrubbed));
                let mut monitor = self.monitor();
                assert!(wait_until(HANG_LIMIT, || monitor
                    .execute("query-jobs", json!({}))
                    == json!([])));
            }
            "unreadable" => {
                self.dying.make_unreadable(2 << 20..(2 << 20) + 4096);
                guest.read(0, 2 << 20, 4096).unwrap();
                // The answer does not wait for the error, nor for the scrub of what is around it.
                let mut monitor = self.monitor();
                assert!(wait_until(HANG_LIMIT, || {
                    let state = monitor.execute("query-quorum", json!({}));
                    let has_errors = state["replicas"][2]["conditions"] == json!(["errors"]);
                    has_errors && monitor.execute("query-jobs", json!({})) == json!([])
                }));
            }
            "hang" => {
                for operation in [Operation::Read, Operation::Write, Operation::Sync] {
                    self.dying.inject(operation, Fault::Hang);
                }
                guest.write(0, 1 << 20, &[1; 65536]).unwrap();
                guest.flush(0).unwrap();
            }
            other => panic!("unknown step {other}"),
        }
    }
}

/// With other numbers of jobs.
fn with_jobs_numbered(text: &str, by: i64) -> String {
    let mut parts = text.split("job");
    let mut renamed = parts.next().unwrap().to_owned();
    for part in parts {
        let end = part.find(|character: char| !character.is_ascii_digit());
        let (number, rest) = part.split_at(end.unwrap_or(part.len()));
        let number = number
            .parse::<i64>()
            .map(|number| (number + by).to_string());
        write!(renamed, "job{}{rest}", number.unwrap_or_default()).unwrap();
    }
    renamed
}

/// Without times and progress, and without the column widths that depend on them.
fn comparable(text: &str) -> Vec<String> {
    const UNITS: [&str; 6] = ["ns", "us", "µs", "ms", "s", "min"];
    let is_progress =
        |line: &str| line.starts_with("job") && line.contains(") ") && line.contains(" %  ");
    let words = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let mut kept = Vec::new();
        for (index, word) in words.iter().enumerate() {
            let is_figure = word
                .chars()
                .all(|character| character.is_ascii_digit() || character == '.');
            let has_unit = words
                .get(index + 1)
                .is_some_and(|unit| UNITS.contains(unit));
            kept.push(match word {
                _ if is_figure && has_unit => "TIME",
                word if UNITS.contains(word) => "UNIT",
                word if word.ends_with('Z') && word.contains('T') => "MOMENT",
                word => word,
            });
        }
        kept.join(" ")
    };
    text.lines()
        .filter(|line| !is_progress(line))
        .map(words)
        .collect()
}

/// Whether all of `shown` is in `printed`, in this order.
fn contains_in_order(printed: &[String], shown: &[String]) -> bool {
    let mut printed = printed.iter();
    shown.iter().all(|line| printed.any(|other| other == line))
}

#[test]
fn the_examples_match_the_output() {
    let mut session = Session::new();
    let (mut transcript, mut differences) = (String::new(), Vec::new());
    let mut events_shown = Vec::new();
    for step in steps() {
        match step {
            Step::Happens(what) => session.happens(&what),
            Step::Command(line, shown) => {
                let printed = session.execute(&line);
                let printed = session.shown(&printed);
                writeln!(transcript, "$ {line}\n{}", printed.trim_end()).unwrap();
                if line == "quorum-blkctl events" {
                    events_shown = comparable(&shown);
                } else if comparable(&printed) != comparable(&shown) {
                    differences.push(line);
                }
            }
        }
    }
    let told = || comparable(&session.shown(&fs::read_to_string(session.path("events")).unwrap()));
    let all_told = wait_until(HANG_LIMIT, || contains_in_order(&told(), &events_shown));
    let events = fs::read_to_string(session.path("events")).unwrap();
    session.dying.clear_faults();
    assert!(
        differences.is_empty() && all_told && !events_shown.is_empty(),
        "not in docs/operating.md: {differences:#?}, the events: {}\nAll of \
         it:\n{transcript}\nEvents:\n{events}",
        !all_told
    );
}
