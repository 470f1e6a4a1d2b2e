//! The vote threshold while replicas come and go: one that was not given follows their number, and
//! a command changes it (W10).

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::client::Client;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::create_images;
use testkit::monitor::Monitor;
use testkit::process::wait_until;

const SIZE_BYTES: u64 = 4 << 20;

struct Served {
    daemon: Daemon,
    directory: tempfile::TempDir,
}

impl Served {
    /// A daemon with the first `count` of its images.
    fn new(count: usize, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), 3, SIZE_BYTES);
        let daemon = start(&directory, &images[..count], options);
        Self { daemon, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn monitor(&self) -> Monitor {
        Monitor::connect(&self.path("qmp.sock"))
    }

    /// Runs quorum-blkctl; returns its exit status and its output.
    fn run(&self, line: &str) -> (Option<i32>, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_quorum-blkctl"))
            .env("QUORUM_BLK_QMP", self.path("qmp.sock"))
            .args(line.split(' '))
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    }

    #[track_caller]
    fn run_well(&self, line: &str) -> String {
        let (code, text) = self.run(line);
        assert_eq!(code, Some(0), "{text}");
        text
    }

    /// The status says this, soon: the threshold becomes higher a moment after a resync.
    #[track_caller]
    fn wait_for_status(&self, words: &str) {
        let says = || self.run("status").1.contains(words);
        assert!(wait_until(HANG_LIMIT, says), "{}", self.run("status").1);
    }
}

fn start(directory: &tempfile::TempDir, images: &[PathBuf], options: &[&str]) -> Daemon {
    let mut arguments: Vec<OsString> = replica_arguments(images);
    arguments.extend(["--cache", "writeback"].map(Into::into));
    arguments.extend(["--qmp".into(), directory.path().join("qmp.sock").into()]);
    arguments.extend(options.iter().map(Into::into));
    Daemon::start(directory.path(), arguments)
}

#[test]
fn follows_the_number_of_replicas_and_is_that_of_the_next_start() {
    let served = Served::new(1, &[]);
    served.wait_for_status("1 of 1 must agree");
    let mut client = Client::connect(served.daemon.socket(), 1);
    client.write(0, 0, &[7; 65536]).unwrap();
    let new = |name: &str| served.path(name).display().to_string();
    served.run_well(&format!("add {} --create", new("second.raw")));
    served.wait_for_status("2 of 2 must agree");
    client.write(0, 4096, &[8; 4096]).unwrap();
    served.run_well(&format!("add {} --create", new("third.raw")));
    served.wait_for_status("2 of 3 must agree");
    assert_eq!(client.read(0, 4096, 4096).unwrap(), [8; 4096]);
    client.flush(0).unwrap();
    drop(client);
    let names = ["0.raw", "second.raw", "third.raw"];
    let images = names.map(|name| served.path(name));
    let Served { daemon, directory } = served;
    drop(daemon);
    let daemon = start(&directory, &images, &[]);
    let served = Served { daemon, directory };
    served.wait_for_status("healthy  4 MiB, 2 of 3 must agree");
    // Down again: the disk has fewer replicas than it should, and the operator says that it shall.
    served.run_well("remove third.raw");
    served.run_well("remove second.raw");
    let (code, text) = served.run("status");
    assert_eq!(code, Some(1), "{text}");
    assert!(
        text.contains("degraded  4 MiB, 1 of 1 must agree"),
        "{text}"
    );
    assert!(
        text.contains("the disk has 1 replica, and had 3 at its start"),
        "{text}"
    );
    let (code, text) = served.run("remove 0.raw");
    assert_eq!(code, Some(3), "{text}");
    assert!(
        text.contains("fewer replicas than the vote threshold"),
        "{text}"
    );
    served.run_well("clear");
    served.run_well("status");
    let mut client = Client::connect(served.daemon.socket(), 1);
    assert_eq!(client.read(0, 4096, 4096).unwrap(), [8; 4096]);
}

#[test]
fn that_was_given_stays_until_a_command_changes_it() {
    let served = Served::new(3, &["--vote-threshold", "1"]);
    served.run_well(&format!(
        "add {} --create",
        served.path("new.raw").display()
    ));
    served.wait_for_status("1 of 4 must agree");
    let text = served.run_well("threshold 4");
    assert!(text.contains("quorum0: 4 of 4 must agree"), "{text}");
    assert!(
        text.contains("an I/O error when one replica fails"),
        "{text}"
    );
    assert!(text.contains("--vote-threshold 4"), "{text}");
    let (code, text) = served.run("remove new.raw");
    assert_eq!(code, Some(3), "{text}");
    assert!(
        text.contains("fewer replicas than the vote threshold"),
        "{text}"
    );
    let text = served.run_well("threshold 2");
    assert!(
        text.contains("two versions of a sector may have enough"),
        "{text}"
    );
    let text = served.run_well("threshold majority");
    assert!(text.contains("quorum0: 3 of 4 must agree"), "{text}");
    assert!(text.contains("no --vote-threshold"), "{text}");
    served.run_well("remove new.raw");
    served.wait_for_status("2 of 3 must agree");
}

#[test]
fn that_no_replicas_fit_is_refused() {
    let served = Served::new(3, &[]);
    let (code, text) = served.run("threshold 4");
    assert_eq!(code, Some(3), "{text}");
    let says = "the vote threshold 4 is out of range: with 3 replicas it can be 1 to 3";
    assert!(text.contains(says), "{text}");
    assert_eq!(served.run("threshold 0").0, Some(2));
    assert_eq!(served.run("threshold most").0, Some(2));
    let mut monitor = served.monitor();
    for arguments in [
        json!({}),
        json!({ "majority": false }),
        json!({ "vote-threshold": 2, "majority": true }),
        json!({ "vote-threshold": 0 }),
        json!({ "vote-threshold": -1 }),
        json!({ "vote-threshold": 1.5 }),
        json!({ "vote-threshold": "2" }),
        json!({ "vote-threshold": u64::MAX }),
        json!({ "vote-threshold": 2, "node-name": "0.raw" }),
        json!({ "majority": "yes" }),
    ] {
        let refused = monitor.try_execute("quorum-set-threshold", arguments.clone());
        let error = refused.expect_err(&arguments.to_string());
        assert_eq!(error["class"], "GenericError", "{arguments}");
    }
    let state: Value = monitor.execute("query-quorum", json!({}));
    let thresholds = [
        "vote-threshold",
        "wanted-vote-threshold",
        "intended-replicas",
    ];
    assert_eq!(thresholds.map(|name| &state[name]), [2, 2, 3]);
    assert_eq!(state["vote-threshold-follows"], true);
    let compared = Served::new(2, &["--blkverify"]);
    let (code, text) = compared.run("threshold 1");
    assert_eq!(code, Some(3), "{text}");
    assert!(
        text.contains("--blkverify has exactly two replicas"),
        "{text}"
    );
}
