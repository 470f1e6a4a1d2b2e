//! docs/qmp.md shows real output: its examples are one conversation, repeated here with a real
//! daemon.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use testkit::HANG_LIMIT;

use serde_json::{Value, json};
use testkit::client::Client;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::{corrupt_sectors, create_images};
use testkit::monitor::Monitor;
use testkit::process::wait_until;

const MANUAL: &str = include_str!("../../docs/qmp.md");

/// The directory of the images in the manual.
const DIRECTORY: &str = "/images";

/// A message of the manual.
#[derive(Debug)]
enum Message {
    Sent(String),
    Received(Value),
}

/// The messages in the manual, in order: each begins with an arrow, and ends with the next or with
/// the block it is in.
fn messages() -> Vec<Message> {
    let mut all = Vec::new();
    for block in MANUAL
        .split("```")
        .skip(1)
        .step_by(2)
        .filter(|block| block.starts_with("\n-> ") || block.starts_with("\n<- "))
    {
        for message in block
            .replace("\n-> ", "\0>")
            .replace("\n<- ", "\0<")
            .split('\0')
            .skip(1)
        {
            let (direction, text) = message.split_at(1);
            all.push(match direction {
                ">" => Message::Sent(text.trim().to_owned()),
                _ => Message::Received(
                    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}")),
                ),
            });
        }
    }
    all
}

/// Times, the progress of a job, and the number of its chunks.
fn is_of_the_moment(name: &str) -> bool {
    ["-ns", "_ns", "-progress", "completed", "seconds"]
        .iter()
        .any(|end| name.ends_with(end))
}

/// The next reply, and the events before it.
fn reply(stream: &mut impl BufRead) -> String {
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        let message: Value = serde_json::from_str(&line).unwrap();
        if message.get("event").is_none() {
            return line;
        }
    }
}

/// Whether it equals the message of the manual, except for times, which only have to be numbers.
fn is_as_shown(real: &Value, shown: &Value, name: &str) -> bool {
    match (real, shown) {
        (Value::Object(real), Value::Object(shown)) => {
            let same = |(name, value): (&String, &Value)| {
                shown
                    .get(name)
                    .is_some_and(|shown| is_as_shown(value, shown, name))
            };
            real.len() == shown.len() && real.iter().all(same)
        }
        (Value::Array(real), Value::Array(shown)) => {
            let mut pairs = real.iter().zip(shown);
            real.len() == shown.len() && pairs.all(|(real, shown)| is_as_shown(real, shown, name))
        }
        (Value::Number(_), Value::Number(_)) if is_of_the_moment(name) => true,
        _ => real == shown,
    }
}

/// The events of the manual: a write, a flush, and a read that finds and repairs a corrupt sector.
fn play_the_manual(daemon: &Daemon, directory: &std::path::Path) {
    let mut client = Client::connect(daemon.socket(), 1);
    client.write(0, 0, &[7; 65536]).unwrap();
    client.flush(0).unwrap();
    corrupt_sectors(&directory.join("1.raw"), 20..21, 0xff);
    client.read(0, 8192, 4096).unwrap();
    let mut monitor = Monitor::connect(&directory.join("qmp.sock"));
    let is_quiet = wait_until(HANG_LIMIT, || {
        let state = monitor.execute("query-quorum", json!({}));
        let is_repaired = state["replicas"][1]["repaired-sectors"] == 1;
        let operations = state["replicas"]
            .as_array()
            .unwrap()
            .iter()
            .map(|replica| &replica["operations"]);
        let mut kinds = operations.flat_map(|operations| operations.as_object().unwrap().values());
        // The sectors around it are scrubbed at once.
        let no_job = monitor.execute("query-jobs", json!({})) == json!([]);
        is_repaired && no_job && kinds.all(|kind| kind["in-flight"] == 0)
    });
    assert!(is_quiet);
}

#[test]
fn the_examples_match_the_output() {
    let directory = tempfile::tempdir().unwrap();
    let mut arguments = replica_arguments(&create_images(directory.path(), 3, 1 << 30));
    let options = "--rewrite-corrupted --cache writeback --num-queues 1 --qmp";
    arguments.extend(options.split(' ').map(OsString::from));
    arguments.push(directory.path().join("qmp.sock").into());
    let mut daemon = Daemon::start(directory.path(), arguments);
    daemon.wait_until_compared();
    let new = File::create_new(directory.path().join("new.raw")).unwrap();
    new.set_len(1 << 30).unwrap();
    play_the_manual(&daemon, directory.path());

    let stream = UnixStream::connect(directory.path().join("qmp.sock")).unwrap();
    stream.set_read_timeout(Some(HANG_LIMIT)).unwrap();
    let mut stream = BufReader::new(stream);
    let (mut transcript, mut differences) = (String::new(), Vec::new());
    let (mut shown, mut listed) = (BTreeSet::new(), BTreeSet::new());
    for message in messages() {
        match message {
            Message::Sent(text) => {
                let text = text.replace(DIRECTORY, directory.path().to_str().unwrap());
                stream.get_mut().write_all(text.as_bytes()).unwrap();
                let sent: Value = serde_json::from_str(&text).unwrap();
                shown.extend(sent["execute"].as_str().map(str::to_owned));
                writeln!(transcript, "-> {text}").unwrap();
            }
            Message::Received(shown) => {
                let line = reply(&mut stream);
                let line = line.replace(directory.path().to_str().unwrap(), DIRECTORY);
                write!(transcript, "<- {line}").unwrap();
                let real: Value = serde_json::from_str(&line).unwrap();
                let commands = real["return"].as_array().into_iter().flatten();
                listed.extend(
                    commands
                        .filter_map(|command| command["name"].as_str())
                        .map(str::to_owned),
                );
                if !is_as_shown(&real, &shown, "") {
                    differences.push(line);
                }
            }
        }
    }
    assert!(
        differences.is_empty(),
        "not in docs/qmp.md: {differences:?}\nAll of it:\n{transcript}"
    );
    for command in &listed {
        assert!(
            shown.contains(command),
            "docs/qmp.md has no example of {command}"
        );
        assert!(
            MANUAL.contains(&format!("`{command}`")),
            "docs/qmp.md does not document {command}"
        );
    }
    // The last command is `quit`.
    assert!(daemon.wait().success());
}
