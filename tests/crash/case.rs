//! A crash state, with what is expected of a start with it; and how it is kept for later.

use std::fs;
use std::io;
use std::path::Path;

use testkit::fuse::logged::Content;

use crate::files::{Progress, Promises};
use crate::history::Version;

/// What a start must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Serve the disk.
    Serve,
    /// End with a line that says that the others could have gone on.
    Refuse,
}

/// What the disk must hold.
#[derive(Clone)]
pub(crate) enum Expected {
    /// In each sector one of these.
    Versions(Vec<Vec<Version>>),
    /// A file system of this kind, with files that keep these promises.
    Files(String, Promises),
}

/// A crash state.
#[derive(Clone)]
pub(crate) struct Case {
    /// All images and records.
    pub(crate) content: Content,
    pub(crate) expected: Expected,
    /// The disk has one of these sizes in bytes.
    pub(crate) sizes: Vec<u64>,
    /// The replicas that are started.
    pub(crate) started: Vec<usize>,
    pub(crate) start: Start,
    /// How many replicas the disk has.
    pub(crate) replicas: usize,
    pub(crate) has_records: bool,
    /// The replicas that are left out are there at the next start.
    pub(crate) others_return: bool,
    /// Too few of those that are started hold everything: sectors may be unreadable, or the start
    /// may be refused. What can be read is as it must be.
    pub(crate) may_lack: bool,
    /// No replica may have to be copied as a whole.
    pub(crate) is_sound: bool,
}

const EXPECTED: &str = "expected.txt";

impl Case {
    /// From now on these replicas are started, of which some may lack something.
    pub(crate) fn start_with(
        &mut self,
        started: Vec<usize>,
        threshold: usize,
        lacks: impl Fn(&usize) -> bool,
    ) {
        let is_enough = started.len() >= threshold;
        self.start = match is_enough {
            true => Start::Serve,
            false => Start::Refuse,
        };
        let whole = started.iter().filter(|replica| !lacks(replica));
        self.may_lack = is_enough && whole.count() < threshold;
        self.started = started;
    }

    /// Keeps it in a new directory.
    pub(crate) fn save(&self, directory: &Path, problems: &[String]) -> io::Result<()> {
        let _ = fs::remove_dir_all(directory);
        fs::create_dir_all(directory.join("files"))?;
        self.content.write_to(&directory.join("files"), |_| true)?;
        fs::write(directory.join("problems.txt"), problems.join("\n"))?;
        let mut text = format!(
            "{} {} {} {} {} {} {} {}\n",
            self.replicas,
            joined(&self.started),
            self.start == Start::Serve,
            self.has_records,
            self.others_return,
            self.may_lack,
            self.is_sound,
            joined(&self.sizes),
        );
        match &self.expected {
            Expected::Versions(permitted) => {
                for versions in permitted.chunk_by(|left, right| left == right) {
                    let each: Vec<String> = versions[0].iter().map(Version::to_string).collect();
                    text.push_str(&format!("{} {}\n", versions.len(), each.join(" ")));
                }
            }
            Expected::Files(kind, promises) => {
                text.push_str(&format!("{kind}\n"));
                for (name, Progress { durable, begun }) in promises {
                    text.push_str(&format!("{durable} {begun} {name}\n"));
                }
            }
        }
        fs::write(directory.join(EXPECTED), text)
    }

    /// Reads what [`Self::save`] has kept.
    pub(crate) fn load(directory: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(directory.join(EXPECTED))?;
        let mut lines = text.lines();
        let first: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
        let [
            replicas,
            started,
            serves,
            has_records,
            others_return,
            may_lack,
            is_sound,
            sizes,
        ] = first[..]
        else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let rest: Vec<&str> = lines.collect();
        let expected = match rest.first() {
            Some(kind) if kind.starts_with(char::is_alphabetic) => {
                Expected::Files((*kind).into(), promises(&rest[1..]))
            }
            _ => Expected::Versions(permitted(&rest)),
        };
        let index = |text: &str| usize::try_from(number(text)).expect("small");
        Ok(Self {
            content: Content::read_from(&directory.join("files"))?,
            expected,
            started: started.split(',').map(index).collect(),
            start: match serves {
                "true" => Start::Serve,
                _ => Start::Refuse,
            },
            replicas: index(replicas),
            has_records: has_records == "true",
            others_return: others_return == "true",
            may_lack: may_lack == "true",
            is_sound: is_sound == "true",
            sizes: sizes.split(',').map(number).collect(),
        })
    }
}

fn joined<T: ToString>(numbers: &[T]) -> String {
    let numbers: Vec<String> = numbers.iter().map(T::to_string).collect();
    numbers.join(",")
}

fn permitted(lines: &[&str]) -> Vec<Vec<Version>> {
    let mut permitted = Vec::new();
    for line in lines {
        let mut numbers = line.split(' ').map(number);
        let count = numbers.next().unwrap_or(0);
        let versions: Vec<Version> = numbers.collect();
        permitted.extend((0..count).map(|_| versions.clone()));
    }
    permitted
}

fn promises(lines: &[&str]) -> Promises {
    let promise = |line: &&str| {
        let mut parts = line.splitn(3, ' ');
        let [durable, begun] = [(); 2].map(|()| number(parts.next().unwrap_or_default()));
        let name = parts.next().unwrap_or_default().to_owned();
        (name, Progress { durable, begun })
    };
    lines.iter().map(promise).collect()
}

fn number(text: &str) -> u64 {
    text.parse().expect("a number")
}
