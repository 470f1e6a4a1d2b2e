//! Imports between the rooms of src go one way: a room imports only rooms that the table of
//! ARCHITECTURE.md lists above it.

use std::fs;

use crate::files::{entries_of_src, root, texts_below};

const PAGE: &str = "ARCHITECTURE.md";

#[test]
fn a_room_imports_only_rooms_listed_above_it() {
    let rooms = rooms();
    let mut wrong = Vec::new();
    for (place, room) in rooms.iter().enumerate() {
        let path = format!("src/{room}");
        let path = if root().join(&path).is_dir() {
            path
        } else {
            format!("{path}.rs")
        };
        for text in texts_below(&path, |path| path.ends_with(".rs")) {
            for (index, line) in text.content.lines().enumerate() {
                for imported in imports(line) {
                    let above = rooms[..place].iter().any(|other| other == imported);
                    if imported != room && rooms.iter().any(|other| other == imported) && !above {
                        wrong.push(format!(
                            "{}:{}: {room} imports {imported}",
                            text.path,
                            index + 1
                        ));
                    }
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "imports against the order of {PAGE}: {wrong:#?}"
    );
}

#[test]
fn every_room_has_a_row() {
    let listed = rooms();
    let missing: Vec<String> = entries_of_src()
        .into_iter()
        .map(|name| name.trim_end_matches(".rs").to_owned())
        .filter(|name| name != "lib" && !listed.contains(name))
        .collect();
    assert!(missing.is_empty(), "{PAGE} has no row for {missing:?}");
}

/// The rooms of src in the order of the table.
fn rooms() -> Vec<String> {
    let page = fs::read_to_string(root().join(PAGE)).expect("the page");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `src/"));
    let rooms: Vec<String> = rows
        .filter_map(|row| row.split(['/', '.', '`']).next())
        .map(str::to_owned)
        .collect();
    assert!(rooms.len() > 10, "{PAGE} lists only {rooms:?}");
    rooms
}

/// The modules at the root of the crate that a line of code names. Links in comments are no
/// imports.
fn imports(line: &str) -> impl Iterator<Item = &str> {
    let code = line.split("//").next().unwrap_or_default();
    let paths = ["crate::", "quorum_blk::"].into_iter();
    paths.flat_map(move |start| {
        code.split(start).skip(1).filter_map(|rest| {
            rest.split(|character: char| !character.is_alphanumeric() && character != '_')
                .next()
        })
    })
}
