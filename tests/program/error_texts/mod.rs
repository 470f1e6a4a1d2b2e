//! Every text of an error or an advice is in a list, with the situation that gives it. Of each, the
//! list says what an operator loses who follows it; a text that costs data in silence is wrong.
//!
//! `list.txt` has a section for each source file. The list and the sources are compared in both
//! directions, and the situations with a `run` are provoked: with the real programs, in a directory
//! of their own, after `prelude.sh`. The text must be in their output.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

use testkit::HANG_LIMIT;
use testkit::images::create_images;
use testkit::process::Process;
use testkit::programs;

mod literals;

const LIST: &str = "tests/program/error_texts/list.txt";

/// Files that advise without `#[error]`, or have parts of such texts; and those of the client but
/// [`SHOWS`].
const MORE_FILES: [&str; 9] = [
    "src/admin/resize.rs",
    "src/config/command_line.rs",
    "src/config/mod.rs",
    "src/config/records.rs",
    "src/config/sandbox.rs",
    "src/control/qmp/change.rs",
    "src/control/qmp/commands.rs",
    "src/control/qmp/executor.rs",
    "src/daemon/operator.rs",
];

/// Files of the client that only show what the daemon or the records say.
const SHOWS: [&str; 13] = [
    "arguments.rs",
    "completion.rs",
    "connection.rs",
    "disk_map.rs",
    "events.rs",
    "inspect.rs",
    "jobs.rs",
    "progress.rs",
    "replies.rs",
    "status.rs",
    "table.rs",
    "terminal.rs",
    "verify.rs",
];

/// Words of an advice that may cost something: the list must say what.
const COSTLY: [&str; 15] = [
    "--empty-anyway",
    "--force",
    "--raw-anyway",
    "--repair",
    "--setrw",
    "allow",
    "cancel",
    "choose another path",
    "convert",
    "move",
    "overwrit",
    "remove",
    "replace",
    "shrink",
    "stop",
];

/// A text in the list.
#[derive(Debug, Default)]
struct Entry {
    file: String,
    text: String,
    when: String,
    lost: String,
    run: String,
    seen: String,
    unseen: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn list() -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let (mut file, mut part) = (String::new(), String::new());
    let text = fs::read_to_string(root().join(LIST)).unwrap();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (key, value) = if let Some(name) = line.strip_prefix("== ") {
            name.clone_into(&mut file);
            continue;
        } else if let Some(text) = line.strip_prefix("* ") {
            let file = file.clone();
            entries.push(Entry {
                file,
                ..Entry::default()
            });
            ("text", text)
        } else if let Some(more) = line.strip_prefix("    ") {
            (part.as_str(), more)
        } else if let Some((key, value)) = line.trim_start().split_once(": ") {
            (key, value)
        } else {
            assert_eq!(line, "", "{LIST}");
            continue;
        };
        let entry = entries.last_mut().expect("a text comes first");
        let place = match key {
            "text" => &mut entry.text,
            "when" => &mut entry.when,
            "lost" => &mut entry.lost,
            "run" => &mut entry.run,
            "seen" => &mut entry.seen,
            "unseen" => &mut entry.unseen,
            other => panic!("{LIST}: {other}"),
        };
        if !place.is_empty() {
            place.push_str(match key {
                "run" => "\n",
                "seen" => "",
                _ => " ",
            });
        }
        place.push_str(value.trim());
        part = key.to_owned();
    }
    entries
}

/// The texts of the sources, each with its file.
fn texts_of_sources() -> BTreeSet<(String, String)> {
    let mut texts = BTreeSet::new();
    for (path, content) in literals::sources(root()) {
        let of_client = path.strip_prefix("src/client/");
        let advises = of_client.is_some_and(|name| !SHOWS.contains(&name));
        if content.contains("#[error(") || MORE_FILES.contains(&path.as_str()) || advises {
            let of_file = literals::texts(&content);
            texts.extend(of_file.into_iter().map(|text| (path.clone(), text)));
        }
    }
    texts
}

#[test]
fn every_text_is_in_the_list_and_every_entry_is_a_text() {
    let listed: BTreeSet<_> = list()
        .into_iter()
        .map(|entry| (entry.file, entry.text))
        .collect();
    let written = texts_of_sources();
    assert!(written.len() > 100, "{written:#?}");
    let missing: Vec<_> = written.difference(&listed).collect();
    let surplus: Vec<_> = listed.difference(&written).collect();
    assert!(
        missing.is_empty() && surplus.is_empty(),
        "not in {LIST}: {missing:#?}\nin {LIST} only: {surplus:#?}"
    );
}

#[test]
fn every_entry_says_when_and_what_is_lost_and_how_that_is_known() {
    let sources: Vec<_> = literals::tests(root());
    let mut wrong = Vec::new();
    for entry in list() {
        let ways = [&entry.run, &entry.seen, &entry.unseen];
        let known = ways.iter().filter(|way| !way.is_empty()).count() == 1;
        let is_costly = COSTLY.iter().any(|word| entry.text.contains(word));
        if entry.when.is_empty() || !known || is_costly && entry.lost.is_empty() {
            wrong.push(format!("{}: {}: incomplete", entry.file, entry.text));
        }
        if let Some((file, name)) = entry.seen.split_once("::") {
            let test = format!("#[test]\nfn {name}()");
            let unindented = |content: &str| content.replace("\n    ", "\n");
            let is_test = |(path, content): &(String, String)| {
                path == file && unindented(content).contains(&test)
            };
            if !sources.iter().any(is_test) {
                wrong.push(format!("no test {}", entry.seen));
            }
        } else if !entry.seen.is_empty() {
            wrong.push(format!("not FILE::TEST: {}", entry.seen));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn each_situation_gives_its_text() {
    let mut entries = list();
    entries.retain(|entry| !entry.run.is_empty());
    let count = entries.len();
    let entries = Mutex::new(entries);
    let wrong = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let next = || entries.lock().unwrap().pop();
                while let Some(entry) = next() {
                    let output = output_of(&entry.run);
                    if !literals::fits(&entry.text, &output) {
                        let text = format!("{}\n  gives {output:?}", entry.text);
                        wrong.lock().unwrap().push(text);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(count > 50, "only {count} are provoked");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Runs a script in a new directory with three images; returns all that it printed.
fn output_of(script: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    for image in create_images(directory.path(), 3, 1 << 20) {
        let name = match image.file_name().unwrap().to_str().unwrap() {
            "0.raw" => "a.raw",
            "1.raw" => "b.raw",
            _ => "c.raw",
        };
        fs::rename(&image, directory.path().join(name)).unwrap();
    }
    let output = directory.path().join(".output");
    let file = File::create(&output).unwrap();
    let daemon = programs::program(programs::DAEMON);
    let path = std::env::var("PATH").unwrap();
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(format!("{}\n{script}", include_str!("prelude.sh")))
        .current_dir(directory.path())
        .env_remove("QUORUM_BLKD_LOG")
        .env(
            "PATH",
            format!("{}:{path}", daemon.parent().unwrap().display()),
        )
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file);
    let ended = Process::spawn(&mut command)
        .unwrap()
        .wait_within(HANG_LIMIT);
    assert!(ended.is_some(), "it does not end: {script}");
    fs::read_to_string(output).unwrap()
}
