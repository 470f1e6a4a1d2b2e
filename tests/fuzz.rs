//! The inputs of the fuzz targets (fuzz/README.md), replayed: the seeds, and what the fuzzer has made of them.

#[path = "../fuzz/src/lib.rs"]
#[allow(dead_code, unreachable_pub)]
mod targets;

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use targets::seeds::{self, Seed};

/// Where the corpora are.
const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus");

/// Runs all inputs of a target. With `QUORUM_BLK_FUZZ_SEEDS=1` it puts the seeds into the corpus.
fn replay(target: &str, seeds: &[Seed], run: fn(&[u8])) {
    // One looks at what the process has open.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = Path::new(CORPUS).join(target);
    for (name, input) in seeds {
        println!("{target}: seed {name}");
        run(input);
        if std::env::var_os("QUORUM_BLK_FUZZ_SEEDS").is_some_and(|value| !value.is_empty()) {
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join(name), input).unwrap();
        }
    }
    let mut files: Vec<_> = fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no corpus in {}", directory.display());
    for file in &files {
        println!("{}", file.display());
        run(&fs::read(file).unwrap());
    }
    println!(
        "{target}: {} seeds and {} files of the corpus",
        seeds.len(),
        files.len()
    );
}

#[test]
fn requests() {
    replay("request", &seeds::request(), targets::request::run);
}

#[test]
fn devices() {
    replay("device", &seeds::device(), targets::device::run);
}

#[test]
fn messages() {
    replay("message", &seeds::message_inputs(), targets::message::run);
}
