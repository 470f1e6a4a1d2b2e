//! Replays the inputs of the fuzz targets (fuzz/README.md): the seeds, the inputs that the fuzzer
//! made of them, and those of faults that are fixed.

#[path = "../fuzz/src/lib.rs"]
#[allow(dead_code, unreachable_pub)]
mod targets;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use targets::seeds::{self, Seed};

/// The fuzzer's directory.
const FUZZ: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz");

/// Runs all inputs of a target. With `QUORUM_BLK_FUZZ_SEEDS=1` it leaves the seeds where the fuzzer
/// finds them.
fn replay(target: &str, seeds: &[Seed], run: fn(&[u8])) {
    // Some look at what the process has open.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = |name| Path::new(FUZZ).join(name).join(target);
    for (name, input) in seeds {
        let _named = NamedInPanics(&format!("the seed {name}"));
        run(input);
    }
    if std::env::var("QUORUM_BLK_FUZZ_SEEDS").is_ok_and(|value| value == "1") {
        fs::create_dir_all(directory("work")).unwrap();
        for (name, input) in seeds {
            fs::write(directory("work").join(name), input).unwrap();
        }
    }
    let corpus = files(&directory("corpus"));
    assert!(!corpus.is_empty(), "{target}: no corpus");
    for file in corpus.iter().chain(&files(&directory("regressions"))) {
        let _named = NamedInPanics(&file.display().to_string());
        run(&fs::read(file).unwrap());
    }
    println!("{target}: {} seeds and {} files", seeds.len(), corpus.len());
}

/// Says which input it was when the test fails.
struct NamedInPanics<'a>(&'a str);

impl Drop for NamedInPanics<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the input was {}", self.0);
        }
    }
}

/// The files in a directory, if it is there.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Vec::new(),
        Err(error) => panic!("{}: {error}", directory.display()),
    };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn requests() {
    replay("request", &seeds::request::all(), targets::request::run);
}

#[test]
fn devices() {
    replay("device", &seeds::device::all(), targets::device::run);
}

#[test]
fn messages() {
    replay("message", &seeds::message::all(), targets::message::run);
}

#[test]
fn monitors() {
    replay("monitor", &seeds::monitor::all(), targets::monitor::run);
}

#[test]
fn records() {
    replay("record", &seeds::record::all(), targets::record::run);
}
