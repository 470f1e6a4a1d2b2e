//! The patches under tests/mutants have their headers and apply to this tree.
//!
//! `make mutants` builds and runs each of them, which takes too long for `make test`. A change of
//! the code that a patch breaks fails here, so that its author fixes the patch at once.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use quorum_blk::sim::contract::first_sentence;

/// Applies the hunks of a unified diff to files given by `read`. Each hunk must have one place.
fn apply(
    diff: &str,
    read: impl Fn(&str) -> Result<String, String>,
) -> Result<BTreeMap<String, String>, String> {
    let mut files = BTreeMap::new();
    let mut path = String::new();
    let mut lines = diff.lines().peekable();
    while let Some(line) = lines.next() {
        if let Some(name) = line.strip_prefix("+++ b/") {
            path = name.trim_end().to_string();
            if !files.contains_key(&path) {
                files.insert(path.clone(), read(&path)?);
            }
        }
        if !line.starts_with("@@ ") {
            continue;
        }
        let (mut old, mut new) = (String::new(), String::new());
        while let Some(line) = lines.next_if(|line| line.starts_with([' ', '-', '+'])) {
            if line.starts_with("--- ") {
                break;
            }
            let (kind, text) = line.split_at(1);
            if kind != "+" {
                old += text;
                old += "\n";
            }
            if kind != "-" {
                new += text;
                new += "\n";
            }
        }
        let file = files.get_mut(&path).ok_or("a hunk comes before its file")?;
        match file.matches(&old).count() {
            1 => *file = file.replacen(&old, &new, 1),
            places => return Err(format!("{path}: {places} places for the hunk {line}")),
        }
    }
    if files.is_empty() {
        return Err("it changes no file".to_string());
    }
    Ok(files)
}

/// What is wrong with a patch.
fn check(patch: &str, root: &Path) -> Result<(), String> {
    let header = |name: &str| {
        let start = format!("{name}: ");
        let mut found = patch.lines().filter_map(|line| line.strip_prefix(&start));
        let value = found.next().ok_or(format!("it has no line {name}: "))?;
        match found.next() {
            None => Ok(value),
            Some(_) => Err(format!("it has two lines {name}: ")),
        }
    };
    let rule = header("Rule")?;
    first_sentence(rule).ok_or(format!("docs/contract.md has no rule {rule}"))?;
    let sentence = header("Breaks")?;
    if !sentence.ends_with('.') {
        return Err(format!("no sentence: {sentence}"));
    }
    match header("Caught-by")?.split(' ').collect::<Vec<_>>()[..] {
        ["sim"]
        | [
            "sim" | "unit" | "program" | "threads" | "exhaustive" | "crash",
            _,
        ] => {}
        _ => {
            return Err(
                "Caught-by: none of sim, sim NAME, unit NAME, program NAME, threads NAME, \
                 exhaustive NAME, crash CLASS"
                    .to_string(),
            );
        }
    }
    let read = |path: &str| {
        let text = fs::read_to_string(root.join(path));
        text.map_err(|error| format!("{path}: {error}"))
    };
    apply(patch, read).map(|_| ())
}

#[test]
fn every_patch_has_its_headers_and_applies() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/contract.md")).unwrap();
    let mut patches = 0;
    for entry in fs::read_dir(root.join("tests/mutants")).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_none_or(|extension| extension != "patch")
        {
            continue;
        }
        patches += 1;
        let patch = fs::read_to_string(&path).unwrap();
        if let Err(error) = check(&patch, root) {
            panic!("{}: {error}", path.display());
        }
        let name = path.file_stem().unwrap().display();
        assert!(
            page.contains(&format!("`{name}`")),
            "docs/contract.md does not list {name}"
        );
    }
    assert!(patches > 0);
}

#[test]
fn a_hunk_with_no_place_or_two_is_refused() {
    let read = |_: &str| Ok("one\ntwo\none\nthree\n".to_string());
    let diff = |old: &str| format!("--- a/file\n+++ b/file\n@@ -1 +1 @@\n-{old}\n+new\n");
    assert_eq!(
        apply(&diff("two"), read).unwrap()["file"],
        "one\nnew\none\nthree\n"
    );
    assert!(apply(&diff("four"), read).is_err());
    assert!(apply(&diff("one"), read).is_err());
    assert!(apply("nothing\n", read).is_err());
}
