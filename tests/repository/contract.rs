//! docs/contract.md and the code agree: tags that the code cites are defined, rules that are
//! defined are cited, and the code, tests and mutants that a rule names exist.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use crate::files::{Text, root, texts_below};
use crate::source::{Item, has_test, words};

const PAGE: &str = "docs/contract.md";
const MUTANTS: &str = "tests/mutants";

/// A section of the page.
#[derive(Debug)]
struct Rule {
    tag: String,
    heading: String,
    sentence: String,
    code: Vec<String>,
    tests: Vec<String>,
    mutants: Vec<String>,
}

#[test]
fn sections_have_the_form_that_the_simulator_reads() {
    let mut tags = BTreeSet::new();
    for rule in rules() {
        let Rule { tag, heading, .. } = &rule;
        assert!(tags.insert(tag.clone()), "{PAGE} defines {tag} twice");
        assert!(
            heading.chars().count() <= 100,
            "{heading}: the first sentence makes the heading longer than 100 columns"
        );
        let is_sentence = rule.sentence.ends_with('.') && !rule.sentence.contains(". ");
        assert!(
            is_sentence,
            "{heading}: not one sentence that ends in a full stop"
        );
        assert!(!rule.code.is_empty(), "{tag} names no code");
        assert!(!rule.tests.is_empty(), "{tag} names no test");
    }
}

#[test]
fn tags_in_the_code_are_defined_and_rules_are_cited() {
    let defined: BTreeSet<String> = rules().into_iter().map(|rule| rule.tag).collect();
    let letters: BTreeSet<char> = defined
        .iter()
        .filter_map(|tag| tag.chars().next())
        .collect();
    let cited = cited_tags(&letters);
    assert!(cited.len() > 10, "the search finds only {:?}", cited.keys());
    let undefined: BTreeMap<_, _> = cited
        .iter()
        .filter(|(tag, _)| !defined.contains(*tag))
        .collect();
    assert!(
        undefined.is_empty(),
        "cited, but not defined in {PAGE}: {undefined:#?}"
    );
    let uncited: Vec<_> = defined
        .iter()
        .filter(|tag| !cited.contains_key(*tag))
        .collect();
    assert!(
        uncited.is_empty(),
        "defined in {PAGE}, but cited nowhere in the code: {uncited:?}"
    );
}

#[test]
fn code_that_rules_name_exists() {
    let mut missing = Vec::new();
    for rule in rules() {
        let (paths, items): (Vec<_>, Vec<_>) = rule.code.iter().partition(|name| is_path(name));
        missing.extend(
            paths
                .iter()
                .filter(|path| !root().join(path).exists())
                .map(|path| format!("{}: path {path}", rule.tag)),
        );
        let sources: Vec<Text> = paths
            .iter()
            .flat_map(|path| texts_below(path, |name| name.ends_with(".rs")))
            .collect();
        missing.extend(
            items
                .iter()
                .filter(|name| {
                    let item = Item::new(name);
                    !sources
                        .iter()
                        .any(|source| item.is_defined_in(&source.content))
                })
                .map(|item| format!("{}: item {item}, in none of its paths", rule.tag)),
        );
    }
    assert!(
        missing.is_empty(),
        "{PAGE} names what does not exist: {missing:#?}"
    );
}

#[test]
fn tests_that_rules_name_exist() {
    let mut missing = Vec::new();
    for rule in rules() {
        for name in &rule.tests {
            let Some((path, function)) = name.split_once("::") else {
                panic!("{}: {name} is not of the form path::function", rule.tag);
            };
            let source = fs::read_to_string(root().join(path)).unwrap_or_default();
            if !has_test(&source, function) {
                missing.push(format!("{}: {name}", rule.tag));
            }
        }
    }
    assert!(
        missing.is_empty(),
        "{PAGE} names tests that do not exist: {missing:#?}"
    );
}

#[test]
fn mutants_that_rules_name_exist_and_each_mutant_is_named_by_its_rule() {
    let rules = rules();
    let mutants: BTreeMap<String, Text> = texts_below(MUTANTS, |path| path.ends_with(".patch"))
        .into_iter()
        .map(|text| {
            let name = text.path.rsplit('/').next().expect("a file has a name");
            (name.trim_end_matches(".patch").to_owned(), text)
        })
        .collect();
    for rule in &rules {
        let missing = rule
            .mutants
            .iter()
            .find(|name| !mutants.contains_key(*name));
        assert_eq!(
            missing, None,
            "{} names a mutant that is not in {MUTANTS}",
            rule.tag
        );
    }
    for (name, patch) in &mutants {
        let broken = patch
            .content
            .lines()
            .find_map(|line| line.strip_prefix("Rule: "));
        let broken = broken.unwrap_or_else(|| panic!("{name} does not say which rule it breaks"));
        let rule = rules.iter().find(|rule| rule.tag == broken);
        let names_it = rule.is_some_and(|rule| rule.mutants.contains(name));
        assert!(
            names_it,
            "{PAGE}: {broken} does not name {name}, which breaks it"
        );
    }
}

/// The sections of the page, in order.
fn rules() -> Vec<Rule> {
    let page = fs::read_to_string(root().join(PAGE)).expect("the contract");
    let mut rules: Vec<Rule> = Vec::new();
    let mut list = "";
    for line in page.lines() {
        if let Some((tag, sentence)) = heading(line) {
            rules.push(Rule {
                tag: tag.to_owned(),
                heading: line.to_owned(),
                sentence: sentence.to_owned(),
                code: Vec::new(),
                tests: Vec::new(),
                mutants: Vec::new(),
            });
            list = "";
            continue;
        }
        list = match line {
            _ if line.starts_with("- Code: ") => "code",
            _ if line.starts_with("- Tests:") => "tests",
            _ if line.starts_with("- Mutants: ") => "mutants",
            _ if line.starts_with("  ") => list,
            _ => "",
        };
        let Some(rule) = rules.last_mut() else {
            continue;
        };
        let names = line.split('`').skip(1).step_by(2).map(str::to_owned);
        match list {
            "code" => rule.code.extend(names),
            "tests" => rule.tests.extend(names),
            "mutants" => rule.mutants.extend(names),
            _ => {}
        }
    }
    assert!(rules.len() > 20, "{PAGE} has {} sections", rules.len());
    rules
}

/// Tag and sentence of a heading such as `### R1 A read ...`.
fn heading(line: &str) -> Option<(&str, &str)> {
    let (tag, sentence) = line.strip_prefix("### ")?.split_once(' ')?;
    is_tag(tag).then_some((tag, sentence))
}

/// A capital letter and a number from 1 to 19.
fn is_tag(word: &str) -> bool {
    let is_number = |digits: &[u8]| matches!(digits, [b'1'..=b'9'] | [b'1', b'0'..=b'9']);
    matches!(word.as_bytes(), [b'A'..=b'Z', number @ ..] if is_number(number))
}

/// The tags that the code cites, with a file for each. `R1 to R9` cites all nine.
fn cited_tags(letters: &BTreeSet<char>) -> BTreeMap<String, String> {
    let is_code = |path: &str| {
        let ending = path.ends_with(".rs") || path.ends_with(".patch");
        ending && !path.starts_with("tests/repository/")
    };
    let is_citation =
        |word: &str| is_tag(word) && word.starts_with(|letter| letters.contains(&letter));
    let mut cited = BTreeMap::new();
    for start in [
        "src",
        "tests",
        "testkit",
        "benches",
        "fuzz/src",
        "fuzz/targets",
    ] {
        for text in texts_below(start, is_code) {
            let words: Vec<&str> = words(&text.content).collect();
            for (index, word) in words
                .iter()
                .enumerate()
                .filter(|(_, word)| is_citation(word))
            {
                let last = match words.get(index + 1..index + 3) {
                    Some(["to", last]) if is_citation(last) => last,
                    _ => word,
                };
                let number = |tag: &str| tag[1..].parse::<u32>().unwrap();
                for number in number(word)..=number(last) {
                    let tag = format!("{}{number}", &word[..1]);
                    cited.entry(tag).or_insert_with(|| text.path.clone());
                }
            }
        }
    }
    cited
}

fn is_path(name: &str) -> bool {
    name.contains('/')
}
