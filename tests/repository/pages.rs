//! The pages lead to what exists: links, paths, and the functions that ARCHITECTURE.md names.

use crate::files::{Text, all_texts, entries_of_src, root, texts_below};
use crate::source::Item;

/// The directories with which a path in a page begins. Some pages leave out `src/`.
const TOPS: [&str; 7] = [
    "src",
    "tests",
    "testkit",
    "benches",
    "fuzz",
    "packaging",
    "docs",
];

#[test]
fn links_and_paths_in_the_pages_exist() {
    let mut missing = Vec::new();
    let rooms = entries_of_src();
    for page in pages() {
        let directory = root().join(&page.path);
        let directory = directory.parent().expect("a file is in a directory");
        for target in links(&page.content) {
            if !target.is_empty() && !target.contains(':') && !directory.join(target).exists() {
                missing.push(format!("{}: link to {target}", page.path));
            }
        }
        for quoted in quoted(&page.content) {
            let Some((top, rest)) = quoted.split_once('/') else {
                continue;
            };
            let is_room = rooms.iter().any(|room| room == top);
            // Capitals stand for any name, as in `tests/mutants/NAME.patch`.
            let is_path = (is_room || TOPS.contains(&top) && !rest.starts_with("mutants/NAME"))
                && rest
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
            let exists = [root(), &root().join("src"), directory]
                .iter()
                .any(|start| start.join(quoted).exists());
            if is_path && !exists {
                missing.push(format!("{}: path {quoted}", page.path));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn functions_that_the_architecture_names_exist() {
    let sources = texts_below("src", |path| path.ends_with(".rs"));
    let page = pages()
        .find(|page| page.path == "ARCHITECTURE.md")
        .expect("the page");
    let is_item = |name: &&str| {
        let parts = name.split_once("::");
        parts.is_some_and(|(owner, _)| owner.starts_with(char::is_uppercase))
    };
    let named: Vec<&str> = quoted(&page.content).filter(is_item).collect();
    assert!(named.len() > 10, "ARCHITECTURE.md names only {named:?}");
    let is_defined = |name: &&&str| {
        let item = Item::new(name);
        sources
            .iter()
            .any(|source| item.is_defined_in(&source.content))
    };
    let missing: Vec<_> = named.iter().filter(|name| !is_defined(name)).collect();
    assert!(
        missing.is_empty(),
        "ARCHITECTURE.md names what does not exist: {missing:?}"
    );
}

fn pages() -> impl Iterator<Item = Text> {
    all_texts()
        .into_iter()
        .filter(|text| text.path.ends_with(".md"))
}

/// The targets of links, without their anchors.
fn links(content: &str) -> impl Iterator<Item = &str> {
    let targets = content.split("](").skip(1);
    targets.filter_map(|rest| rest.split([')', '#']).next())
}

/// What is in single backticks, line by line.
fn quoted(content: &str) -> impl Iterator<Item = &str> {
    let lines = content.lines().filter(|line| !line.contains("```"));
    lines.flat_map(|line| line.split('`').skip(1).step_by(2))
}
