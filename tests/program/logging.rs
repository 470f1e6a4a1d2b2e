//! The log of a real daemon: its lines, their levels and values.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use testkit::client::Client;
use testkit::daemon::replica_arguments;
use testkit::disk::Disk;
use testkit::images::create_images;
use testkit::process::{Process, wait_until};
use testkit::programs;

const LIMIT: Duration = Duration::from_secs(10);

/// Where the log goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stderr {
    File,
    /// A file of which the environment says that it is the journal.
    Journal,
    /// A file, and the environment is that of a service whose journal it is not.
    OtherJournal,
}

/// Runs a daemon for a disk called `vm1` with this log level, has a frontend connect, write and
/// disconnect, ends the daemon and returns its log and exit status.
fn log_of_a_life(stderr: Stderr, level: Option<&str>) -> (String, Option<i32>) {
    let directory = tempfile::tempdir().unwrap();
    let (socket, log) = (
        directory.path().join("disk.sock"),
        directory.path().join("log"),
    );
    let file = File::create(&log).unwrap();
    let metadata = file.metadata().unwrap();
    let mut command = programs::command(programs::DAEMON);
    command
        .args(["--node-name", "vm1", "--socket-path"])
        .arg(&socket)
        .args(replica_arguments(&create_images(
            directory.path(),
            3,
            1 << 20,
        )))
        // The first start with records would scrub, too.
        .args(["--state", "none"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(file);
    set_environment(&mut command, stderr, level, &metadata);
    let mut process = Process::spawn(&mut command).unwrap();
    wait_until(LIMIT, || socket.exists() || !process.is_alive());
    if socket.exists() {
        let mut client = Client::connect(&socket, 1);
        client.write(0, 0, &[7; 4096]).unwrap();
        drop(client);
        let text = || fs::read_to_string(&log).unwrap();
        let is_quiet = level == Some("error");
        let seen = wait_until(LIMIT, || {
            is_quiet || text().contains("frontend disconnected")
        });
        assert!(seen, "{}", text());
        process.signal(libc::SIGTERM);
    }
    let status = process
        .wait_within(LIMIT)
        .expect("the daemon is still there");
    (fs::read_to_string(log).unwrap(), status.code())
}

fn set_environment(
    command: &mut Command,
    stderr: Stderr,
    level: Option<&str>,
    file: &fs::Metadata,
) {
    command
        .env_remove("QUORUM_BLKD_LOG")
        .env_remove("JOURNAL_STREAM");
    if let Some(level) = level {
        command.env("QUORUM_BLKD_LOG", level);
    }
    let journal = match stderr {
        Stderr::File => return,
        Stderr::Journal => format!("{}:{}", file.dev(), file.ino()),
        Stderr::OtherJournal => format!("{}:{}", file.dev(), file.ino() + 1),
    };
    command.env("JOURNAL_STREAM", journal);
}

const LIFE: [&str; 4] = [
    "disk=vm1 serving the disk size=1048576 replicas=3 vote-threshold=2 aio=io_uring",
    "disk=vm1 frontend connected connection=0",
    "disk=vm1 frontend disconnected connection=0",
    "disk=vm1 stopping reason=requested",
];

#[test]
fn a_life_is_four_lines_with_a_timestamp_each() {
    for stderr in [Stderr::File, Stderr::OtherJournal] {
        let (log, status) = log_of_a_life(stderr, None);
        assert_eq!(status, Some(0), "{log}");
        let lines: Vec<&str> = log.lines().collect();
        assert_eq!(lines.len(), LIFE.len(), "{log}");
        for (line, expected) in lines.iter().zip(LIFE) {
            let (timestamp, rest) = line.split_once(' ').unwrap();
            // 2026-11-28T19:24:34.123Z
            assert_eq!((timestamp.len(), &timestamp[10..11]), (24, "T"), "{line}");
            assert!(timestamp.ends_with('Z'), "{line}");
            assert_eq!(rest, format!("INFO {expected}"));
        }
    }
}

#[test]
fn the_journal_gets_priorities_and_no_timestamps() {
    let (log, status) = log_of_a_life(Stderr::Journal, None);
    assert_eq!(status, Some(0), "{log}");
    let expected: Vec<String> = LIFE.iter().map(|line| format!("<6>{line}")).collect();
    assert_eq!(log.lines().collect::<Vec<_>>(), expected);
}

/// The error would be a panic if it were printed with `eprintln!`.
#[test]
fn an_error_without_a_reader_has_its_exit_status() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = programs::command(programs::DAEMON);
    command.arg("--no-such-option").stdin(Stdio::null());
    let status = command.stdout(Stdio::null()).stderr(writer).status();
    assert_eq!(status.unwrap().code(), Some(1));
}

#[test]
fn a_level_that_does_not_exist_is_refused() {
    for (stderr, prefix) in [(Stderr::File, ""), (Stderr::Journal, "<3>")] {
        let (log, status) = log_of_a_life(stderr, Some("info,loud"));
        assert_eq!(status, Some(1), "{log}");
        let line = "quorum-blkd: QUORUM_BLKD_LOG: 'loud' is not a log level; \
                    use off, error, warn, info, debug or trace, or MODULE=LEVEL\n";
        assert_eq!(log, format!("{prefix}{line}"));
    }
    assert_eq!(
        log_of_a_life(Stderr::File, Some("error")),
        (String::new(), Some(0))
    );
}

#[test]
fn evicting_and_rejoining_a_replica_are_a_line_each() {
    let (disk, _client) = Disk::with_evicted_replica(Duration::from_millis(200));
    disk.faulty(1).clear_faults();
    let lines = |message: &str| {
        let log = disk.log();
        let lines = log.lines().filter(|line| line.contains(message));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(
        wait_until(LIMIT, || !lines("job completed").is_empty()),
        "{}",
        disk.log()
    );
    let replica = testkit::disk::node_name(1);
    for (message, level) in [("replica evicted", "WARN"), ("replica rejoined", "INFO")] {
        let [line] = &lines(message)[..] else {
            panic!("not one line of {message}: {}", disk.log());
        };
        assert!(line.contains(&format!(" {level} disk=")), "{line}");
        assert!(line.ends_with(&format!(" replica={replica}")), "{line}");
    }
    // The error that led to the eviction, with the values of its event and no JSON.
    let [error] = &lines("replica returned an error")[..] else {
        panic!("not one error: {}", disk.log());
    };
    let values = format!("replica={replica} type=write sector-num=0 sector-count=8 error=");
    assert!(error.contains(&values), "{error}");
    assert!(!disk.log().contains('{'), "{}", disk.log());
}

/// Libraries log too, at the levels for debugging.
#[test]
fn lines_for_debugging_have_the_same_form() {
    let (log, status) = log_of_a_life(Stderr::File, Some("trace"));
    assert_eq!(status, Some(0), "{log}");
    assert!(log.contains(" DEBUG disk=vm1 "), "{log}");
    for line in log.lines() {
        let parts: Vec<&str> = line.splitn(4, ' ').collect();
        let [timestamp, level, disk, message] = parts[..] else {
            panic!("{line}");
        };
        assert_eq!((timestamp.len(), disk), (24, "disk=vm1"), "{line}");
        let levels = ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"];
        assert!(levels.contains(&level), "{line}");
        // Neither JSON nor the debug form of a structure.
        assert!(!message.contains(['{', '[', '(']), "{line}");
    }
}
