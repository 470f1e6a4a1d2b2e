//! The files of the repository that people read.

use std::fs;
use std::path::{Path, PathBuf};

/// A text file: its path from the root of the repository, and its content.
pub(crate) struct Text {
    pub(crate) path: String,
    pub(crate) content: String,
}

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The text files at or below `start` for which `is_wanted` holds, sorted by path.
pub(crate) fn texts_below(start: &str, is_wanted: impl Fn(&str) -> bool) -> Vec<Text> {
    let mut paths = Vec::new();
    collect(&root().join(start), &mut paths);
    paths.sort();
    let mut texts = Vec::new();
    for path in paths {
        let name = path.strip_prefix(root()).expect("below the root");
        let name = name.to_str().expect("paths are UTF-8").to_owned();
        if is_wanted(&name) {
            let content =
                fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            texts.push(Text {
                path: name,
                content,
            });
        }
    }
    texts
}

/// Everything that people read: code, build files, tests, benchmarks, fuzz targets, packaging,
/// documentation.
pub(crate) fn all_texts() -> Vec<Text> {
    const STARTS: [&str; 12] = [
        "src",
        "tests",
        "testkit",
        "benches",
        "fuzz/src",
        "fuzz/targets",
        "fuzz/README.md",
        "fuzz/run.sh",
        "packaging",
        "docs",
        "Makefile",
        ".",
    ];
    const ENDINGS: [&str; 6] = [".rs", ".md", ".sh", ".mk", ".py", "Makefile"];
    let is_unit = |path: &str| path.starts_with("packaging/") && !path.ends_with(".json");
    let is_text = |path: &str| ENDINGS.iter().any(|ending| path.ends_with(ending)) || is_unit(path);
    let mut texts = Vec::new();
    for start in STARTS {
        // Of the root itself only the pages, not the directories below it.
        let is_here = |path: &str| start != "." || !path.contains('/') && path.ends_with(".md");
        texts.extend(texts_below(start, |path| is_text(path) && is_here(path)));
    }
    assert!(
        texts.len() > 100,
        "the repository has more than {} files",
        texts.len()
    );
    texts
}

fn collect(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        let is_root = path.join("Cargo.lock").exists() && path.join("src").exists();
        for entry in fs::read_dir(path).expect("reading a directory") {
            let entry = entry.expect("reading a directory").path();
            if !is_root || entry.is_file() {
                collect(&entry, found);
            }
        }
    } else if path.exists() {
        found.push(path.to_owned());
    }
}

/// The names of the files and directories in src.
pub(crate) fn entries_of_src() -> Vec<String> {
    let entries = std::fs::read_dir(root().join("src")).expect("reading src");
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        let name = entry.expect("reading src").file_name();
        name.into_string().expect("a UTF-8 name")
    };
    entries.map(name).collect()
}
