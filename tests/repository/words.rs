//! Words that docs/glossary.md bans do not come back.

use std::fs;

use crate::files::{all_texts, root};

const PAGE: &str = "docs/glossary.md";

/// A phrase of the list: for each of its words, the forms that it can have.
struct Banned {
    words: Vec<Vec<String>>,
    /// Names in which the phrase may stand.
    allowed: Vec<String>,
}

#[test]
fn banned_words_do_not_come_back() {
    let banned = banned();
    let mut found = Vec::new();
    for text in all_texts() {
        // This page names the words, as does the list of renames in the changelog.
        if text.path == PAGE {
            continue;
        }
        let is_changelog = text.path == "CHANGELOG.md";
        for (index, line) in text.content.lines().enumerate() {
            if is_changelog && line.contains('→') {
                continue;
            }
            let line = line.to_lowercase();
            let words = split(&line);
            for phrase in banned.iter().filter(|phrase| phrase.is_in(&words, &line)) {
                found.push(format!("{}:{}: {}", text.path, index + 1, phrase.name()));
            }
        }
    }
    assert!(
        found.is_empty(),
        "{} banned words; {PAGE} says what to write instead: {found:#?}",
        found.len()
    );
}

impl Banned {
    /// A line of the list: words, each with its forms separated by `|`; after ` except ` the
    /// allowed names, separated by spaces.
    fn parse(line: &str) -> Self {
        let (phrase, allowed) = line.split_once(" except ").unwrap_or((line, ""));
        let forms = |word: &str| word.split('|').map(str::to_owned).collect();
        Self {
            words: phrase.split(' ').map(forms).collect(),
            allowed: allowed.split_whitespace().map(str::to_lowercase).collect(),
        }
    }

    fn is_in(&self, words: &[&str], line: &str) -> bool {
        let fits = |found: &[&str]| {
            let mut pairs = found.iter().zip(&self.words);
            pairs.all(|(word, forms)| forms.iter().any(|form| form == word))
        };
        if !words.windows(self.words.len()).any(fits) {
            return false;
        }
        let mut rest = line.to_owned();
        for name in &self.allowed {
            rest = rest.replace(name, " ");
        }
        self.allowed.is_empty() || split(&rest).windows(self.words.len()).any(fits)
    }

    fn name(&self) -> String {
        let words: Vec<&str> = self.words.iter().map(|forms| forms[0].as_str()).collect();
        words.join(" ")
    }
}

/// The words of a line, with an empty word where anything but a space, `_` or `-` separates two.
fn split(line: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = line;
    while let Some(start) = rest.find(char::is_alphanumeric) {
        if !matches!(&rest[..start], "" | " " | "_" | "-") {
            words.push("");
        }
        rest = &rest[start..];
        let is_end = |character: char| !character.is_alphanumeric() && character != '\'';
        let end = rest.find(is_end).unwrap_or(rest.len());
        words.push(rest[..end].trim_end_matches('\''));
        rest = &rest[end..];
    }
    words
}

fn banned() -> Vec<Banned> {
    let page = fs::read_to_string(root().join(PAGE)).expect("the glossary");
    let list = page
        .split("```banned\n")
        .nth(1)
        .expect("a list of banned words");
    let list = list.split("```").next().expect("the end of the list");
    let banned: Vec<Banned> = list.lines().map(Banned::parse).collect();
    assert!(banned.len() > 10, "{PAGE} bans {} words", banned.len());
    banned
}
