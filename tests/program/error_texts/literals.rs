//! The texts in the sources: their string literals of a few words.

use std::fs;
use std::path::Path;

/// Calls and attributes whose literals no user reads, or reads as help or in the log.
const SKIPPED: [&str; 13] = [
    "arg(",
    "assert!(",
    "assert_eq!(",
    "command(",
    "debug!(",
    "debug_assert!(",
    "error!(",
    "expect(",
    "info!(",
    "panic!(",
    "trace!(",
    "unreachable!(",
    "warn!(",
];

/// All sources but those of the simulator and of tests, with their paths.
pub(super) fn sources(root: &Path) -> Vec<(String, String)> {
    let mut found = below(root, "src");
    found.retain(|(path, _)| !path.starts_with("src/sim/") && !path.contains("tests"));
    found
}

/// All files with tests, with their paths.
pub(super) fn tests(root: &Path) -> Vec<(String, String)> {
    [below(root, "src"), below(root, "tests")].concat()
}

fn below(root: &Path, directory: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root.join(directory))
        .unwrap()
        .map(Result::unwrap)
    {
        let path = format!("{directory}/{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            found.extend(below(root, &path));
        } else if path.ends_with(".rs") {
            found.push((path, fs::read_to_string(entry.path()).unwrap()));
        }
    }
    found
}

/// The texts of a source, without its tests and comments.
pub(super) fn texts(source: &str) -> Vec<String> {
    let mut rest = source.split("#[cfg(test)]\nmod ").next().unwrap();
    let mut texts = Vec::new();
    // Brackets that are open within a call that is skipped.
    let mut depth = 0;
    while let Some(character) = rest.chars().next() {
        let starts_word = !rest.is_empty() && depth == 0;
        if rest.starts_with("//") {
            rest = rest.split_once('\n').map_or("", |(_, rest)| rest);
        } else if rest.starts_with("'\"'") || rest.starts_with("'\\''") {
            rest = &rest[3..];
        } else if character == '"' {
            let (literal, after) = literal(&rest[1..]);
            if depth == 0 && is_text(&literal) {
                texts.push(words(&literal));
            }
            rest = after;
        } else if let Some(call) = SKIPPED.iter().find(|call| rest.starts_with(*call))
            && starts_word
        {
            depth = 1;
            rest = &rest[call.len()..];
        } else {
            match character {
                '(' if depth > 0 => depth += 1,
                ')' if depth > 0 => depth -= 1,
                _ => {}
            }
            rest = &rest[character.len_utf8()..];
        }
    }
    texts
}

/// A literal up to its end, and what comes after.
fn literal(source: &str) -> (String, &str) {
    let mut text = String::new();
    let mut rest = source;
    loop {
        let end = rest.find(['"', '\\']).expect("a literal ends");
        text.push_str(&rest[..end]);
        let found = rest.as_bytes()[end];
        rest = &rest[end + 1..];
        if found == b'"' {
            return (text, rest);
        }
        let escaped = rest.chars().next().expect("a literal ends");
        rest = &rest[escaped.len_utf8()..];
        match escaped {
            '\n' => rest = rest.trim_start(),
            'n' => text.push('\n'),
            other => text.push(other),
        }
    }
}

/// Without what is only for the layout.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn is_text(literal: &str) -> bool {
    let is_word = |word: &&str| {
        let letters = word.chars().filter(char::is_ascii_alphabetic).count();
        letters >= 2 && !word.starts_with('{')
    };
    literal.split_whitespace().count() >= 3
        && literal.split_whitespace().filter(is_word).count() >= 2
}

/// Is the text in the output, with anything for its values?
pub(super) fn fits(text: &str, output: &str) -> bool {
    let output = words(output);
    let mut rest = &output[..];
    let mut text = text;
    while !text.is_empty() {
        let (fixed, after) = text.split_once('{').unwrap_or((text, ""));
        let Some(at) = rest.find(fixed) else {
            return false;
        };
        rest = &rest[at + fixed.len()..];
        text = after.split_once('}').map_or("", |(_, after)| after);
    }
    true
}

#[test]
fn texts_are_found_and_compared() {
    let source = r#"
        // "not this comment"
        #[error("a {} text; of two \
            lines {b}")]
        x.expect("not this (one) either"); warn!("nor (that) one, ever"); 'x'; "two words"
        f("it's a \"quoted\" text")
        #[cfg(test)]
        "#;
    let found = texts(source);
    assert_eq!(
        found,
        ["a {} text; of two lines {b}", "it's a \"quoted\" text"]
    );
    assert!(fits(
        "a {} text {b}: {}, end",
        "x a long\n  text 5: 6, end of it"
    ));
    assert!(!fits("a {} text", "text a b"));
}
