//! A session of a page, repeated with the real programs: the commands that the page shows, and what
//! they print.
//!
//! A comment `replay` in the page names something that happens between two commands; the test of
//! the page does it. Times, the progress of jobs and the ids of records are not compared. A line
//! `...` in an output stands for any number of lines.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::monitor::Monitor;
use testkit::process::{Process, wait_until};
use uuid::Uuid;

/// A step of a page.
#[derive(Debug)]
pub(crate) enum Step {
    /// A command, and what it prints.
    Command(String, String),
    /// An event that the operator does not cause.
    Happens(String),
}

/// The steps of a page, in order.
pub(crate) fn steps(page: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    for (index, part) in page.split("```").enumerate() {
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

/// The shell of a session: its processes, and the real paths of the names in the page.
pub(crate) struct Session {
    directory: tempfile::TempDir,
    /// Names of the page: what a command gets instead, and what is printed where the page has them.
    names: Vec<Name>,
    /// Where commands run, below the directory of the session.
    place: PathBuf,
    /// `NAME="VALUE"`, as the page has them.
    variables: Vec<String>,
    daemon: Option<Process>,
    /// Options of the daemon that only this session needs.
    pub(crate) hidden_options: String,
    /// Jobs that the page does not show: numbers of the daemon.
    pub(crate) hidden_jobs: Range<i64>,
    last_status: i32,
    transcript: String,
    differences: Vec<String>,
}

struct Name {
    in_page: String,
    given: String,
    printed: String,
}

impl Session {
    /// A session whose sockets are in `/run/vm1`.
    pub(crate) fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            names: Vec::new(),
            place: PathBuf::new(),
            variables: Vec::new(),
            daemon: None,
            hidden_options: String::new(),
            hidden_jobs: 0..0,
            last_status: 0,
            transcript: String::new(),
            differences: Vec::new(),
        }
    }

    /// A file in the directory of the session.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where the page has a name, a command gets `given`, and `printed` is printed. The first name
    /// that fits counts.
    pub(crate) fn name(&mut self, in_page: &str, given: &str, printed: &str) {
        self.names.push(Name {
            in_page: in_page.to_owned(),
            given: given.to_owned(),
            printed: printed.to_owned(),
        });
    }

    /// Gives a name of the page to another directory, whose names are the same.
    pub(crate) fn name_again(&mut self, in_page: &str, directory: &str) {
        self.names.retain(|name| name.in_page != in_page);
        self.name(in_page, directory, directory);
    }

    /// Replaces names of the page by real ones.
    fn real(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for name in &self.names {
            text = text.replace(&name.in_page, &name.given);
        }
        let text = text.replace("/run/vm1/", self.path("").to_str().unwrap());
        let Range { start, end } = self.hidden_jobs;
        with_jobs_numbered(&text, start, end - start)
    }

    /// Replaces real names by those of the page.
    pub(crate) fn shown(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for name in &self.names {
            text = text.replace(&name.printed, &name.in_page);
        }
        let Range { start, end } = self.hidden_jobs;
        with_jobs_numbered(&text, start, start - end)
    }

    fn shell(&self, line: &str) -> Command {
        let programs = Path::new(env!("CARGO_BIN_EXE_quorum-blkctl"))
            .parent()
            .unwrap();
        let mut path = programs.as_os_str().to_owned();
        path.push(":/usr/bin:/bin");
        let mut script = String::new();
        for variable in &self.variables {
            writeln!(script, "{}", self.real(variable)).unwrap();
        }
        let mut command = Command::new("/bin/sh");
        command
            .arg("-c")
            .arg(format!("{script}exec {}", self.real(line)))
            .current_dir(self.path("").join(&self.place))
            .env("PATH", path)
            .env("LANG", "C.UTF-8")
            .env("QUORUM_BLK_QMP", self.monitor_path())
            .env_remove("LC_ALL")
            .stdin(Stdio::null());
        command
    }

    /// Starts a command whose output goes to a file in the directory of the session.
    pub(crate) fn spawn(&self, line: &str, output: &str) -> Process {
        let output = self.path(output);
        let mut command = self.shell(line);
        command.stdout(File::create(&output).unwrap());
        command.stderr(File::options().append(true).open(&output).unwrap());
        Process::spawn(&mut command).unwrap()
    }

    /// Starts the daemon, and waits until it serves the disk.
    pub(crate) fn start_daemon(&mut self, line: &str) {
        let line = format!("{line} {}", self.hidden_options);
        let mut daemon = self.spawn(&line, "daemon.log");
        let is_served = wait_until(HANG_LIMIT, || {
            !daemon.is_alive() || UnixStream::connect(self.monitor_path()).is_ok()
        });
        assert!(is_served && daemon.is_alive(), "{line}: {}", self.log());
        self.daemon = Some(daemon);
    }

    /// Ends the daemon as an operator does.
    pub(crate) fn end_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("a daemon runs");
        daemon.signal(libc::SIGTERM);
        let status = daemon.wait_within(HANG_LIMIT);
        let ended_well = status.is_some_and(|status| status.success());
        assert!(ended_well, "{}", self.log());
    }

    /// Runs a command and returns its output.
    pub(crate) fn execute(&mut self, line: &str) -> String {
        if let Some(line) = line.strip_suffix(" &") {
            self.start_daemon(line);
            return String::new();
        }
        if let Some(place) = line.strip_prefix("cd ") {
            self.place = self.real(place).into();
            return String::new();
        }
        match line {
            "echo $?" => return self.last_status.to_string(),
            "kill %1" => {
                self.end_daemon();
                return String::new();
            }
            line if line.starts_with("export ") => return String::new(),
            line if is_assignment(line) => {
                self.variables.push(line.to_owned());
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

    /// Runs a command, and compares its output with that in the page.
    pub(crate) fn step(&mut self, line: &str, in_page: &str) {
        let printed = self.execute(line);
        self.note(line, &printed, in_page);
    }

    fn note(&mut self, line: &str, printed: &str, in_page: &str) {
        let printed = self.shown(printed);
        writeln!(self.transcript, "$ {line}\n{}", printed.trim_end()).unwrap();
        if !is_shown(&printed, in_page) {
            self.differences.push(line.to_owned());
        }
    }

    /// A heading in the transcript.
    pub(crate) fn note_event(&mut self, what: &str) {
        writeln!(self.transcript, "--- {what}").unwrap();
    }

    /// The commands so far whose output is not that in the page.
    pub(crate) fn differences(&self) -> &[String] {
        &self.differences
    }

    /// All commands, and what they have printed.
    pub(crate) fn transcript(&self) -> &str {
        &self.transcript
    }

    /// Waits until what goes on by itself is over: no job runs, and each replica is up to date or
    /// missing.
    pub(crate) fn wait_until_settled(&self) {
        let mut monitor = self.monitor();
        let mut state = Value::Null;
        let is_settled = wait_until(HANG_LIMIT, || {
            state = monitor.execute("query-quorum", json!({}));
            let mut replicas = state["replicas"].as_array().unwrap().iter();
            replicas
                .all(|replica| replica["state"] == "in-service" || replica["state"] == "missing")
                && monitor.execute("query-jobs", json!({})) == json!([])
        });
        assert!(is_settled, "{state:#}\n{}", self.log());
    }

    /// Ends the daemon at once, as a power failure does.
    pub(crate) fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("a daemon runs");
        daemon.signal(libc::SIGKILL);
        daemon.wait_within(HANG_LIMIT).expect("it was killed");
    }

    /// What the daemon has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("daemon.log")).unwrap_or_default()
    }

    fn monitor_path(&self) -> PathBuf {
        self.path("qmp.sock")
    }

    /// A connection to the daemon's monitor.
    pub(crate) fn monitor(&self) -> Monitor {
        Monitor::connect(&self.monitor_path())
    }
}

/// Whether it is `NAME="VALUE"`.
fn is_assignment(line: &str) -> bool {
    line.split_once('=').is_some_and(|(name, _)| {
        name.chars()
            .all(|character| character.is_ascii_alphanumeric() || character == '_')
    })
}

/// With other numbers of jobs, from `first` on.
fn with_jobs_numbered(text: &str, first: i64, by: i64) -> String {
    let mut parts = text.split("job");
    let mut renamed = parts.next().unwrap().to_owned();
    for part in parts {
        let end = part.find(|character: char| !character.is_ascii_digit());
        let (number, rest) = part.split_at(end.unwrap_or(part.len()));
        let number = number.parse::<i64>().map(|number| match number < first {
            true => number.to_string(),
            false => (number + by).to_string(),
        });
        write!(renamed, "job{}{rest}", number.unwrap_or_default()).unwrap();
    }
    renamed
}

/// Whether a program has printed what a page shows.
fn is_shown(printed: &str, in_page: &str) -> bool {
    let (printed, in_page) = (comparable(printed), comparable(in_page));
    let parts: Vec<_> = in_page.split(|line| line == "...").collect();
    let [first, middle @ .., last] = parts.as_slice() else {
        return printed == in_page;
    };
    let rest = printed.strip_prefix(*first);
    let Some(mut rest) = rest.and_then(|rest| rest.strip_suffix(*last)) else {
        return false;
    };
    for part in middle {
        let mut starts = 0..=rest.len();
        let Some(start) = starts.find(|start| rest[*start..].starts_with(part)) else {
            return false;
        };
        rest = &rest[start + part.len()..];
    }
    true
}

/// Without times, ids and progress, and without the column widths that depend on them.
pub(crate) fn comparable(text: &str) -> Vec<String> {
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
            // How many tables there were depends on how soon each replica was up to date.
            let is_epoch = index > 0 && words[index - 1] == "epoch";
            kept.push(match word {
                _ if is_figure && is_epoch => "EPOCH",
                _ if is_figure && has_unit => "TIME",
                word if UNITS.contains(word) => "UNIT",
                word if word.ends_with('Z') && word.contains('T') => "MOMENT",
                word => word,
            });
        }
        without_ids(&kept.join(" "))
    };
    text.lines()
        .filter(|line| !is_progress(line))
        .map(words)
        .collect()
}

/// With the same word for each UUID: they are drawn anew in each session.
fn without_ids(line: &str) -> String {
    const LENGTH: usize = 36;
    let mut line = line.to_owned();
    let mut start = 0_usize;
    while let Some(end) = start.checked_add(LENGTH).filter(|end| *end <= line.len()) {
        let is_id = |text: &str| text.contains('-') && Uuid::try_parse(text).is_ok();
        if line.get(start..end).is_some_and(is_id) {
            line.replace_range(start..end, "ID");
        }
        start += 1;
    }
    line
}

#[test]
fn three_dots_stand_for_any_lines() {
    let printed = "a\nb\nc\nb\nd\n";
    for page in [
        "a\nb\nc\nb\nd",
        "...",
        "a\n...",
        "...\nd",
        "a\n...\nb\nd",
        "a\n...\nc\n...",
        "...\nb\n...\nb\n...",
    ] {
        assert!(is_shown(printed, page), "{page}");
    }
    for page in [
        "",
        "a",
        "a\nb\nc\nb",
        "b\n...",
        "...\nb",
        "...\nc\n...\nc\n...",
        "a\n...\nd\n...\nd",
    ] {
        assert!(!is_shown(printed, page), "{page}");
    }
    let id = "5f1c2d9e-0b7a-4e36-9d55-7c2f4be0a811";
    assert_eq!(without_ids(&format!("x{id}, ({id}) µ")), "xID, (ID) µ");
}
