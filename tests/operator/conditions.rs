//! A replica that returned an error is not healthy, nor is a disk whose guest got one: the status,
//! its exit code, the metrics and the events say so, until the cause is gone or the operator has
//! seen it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::disk::{Disk, Plan, System, node_name};
use testkit::fuse::{Fault, Operation};
use testkit::process::{Process, wait_until};

const BLOCK_BYTES: usize = 4096;

fn serve(faulty: &[usize]) -> Disk {
    // The machine may be slow; the replicas are not.
    let plan = Plan {
        faulty: faulty.to_vec(),
        replica_timeout: Duration::from_secs(60),
        ..Plan::default()
    };
    Disk::start(System::Ours, &plan)
}

/// Runs quorum-blkctl; returns its exit status and what it printed.
fn operate(disk: &Disk, line: &str) -> (i32, String) {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("output");
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blkctl"));
    command.env_clear().arg("--qmp").arg(disk.monitor_socket());
    command
        .args(line.split(' '))
        .stdout(fs::File::create(&output).unwrap());
    let status = Process::spawn(&mut command)
        .unwrap()
        .wait_within(HANG_LIMIT);
    let code = status.and_then(|status| status.code()).unwrap();
    (code, printed(&output))
}

fn printed(path: &Path) -> String {
    String::from_utf8(fs::read(path).unwrap()).unwrap()
}

/// The status, which is the exit code that the map has too.
#[track_caller]
fn status(disk: &Disk, health: &str) -> String {
    let (code, text) = operate(disk, "status");
    let expected = i32::from(health != "healthy");
    assert_eq!(
        (code, operate(disk, "map").0),
        (expected, expected),
        "{text}"
    );
    assert!(text.starts_with(&format!("quorum0  {health}  ")), "{text}");
    // Except for paths, which are not cut in a pipe.
    let mut lines = text.lines().filter(|line| !line.contains('/'));
    assert!(lines.all(|line| line.chars().count() <= 80), "{text}");
    text
}

fn state(disk: &Disk) -> Value {
    disk.monitor().execute("query-quorum", json!({}))
}

#[test]
fn a_replica_that_fails_its_reads_is_not_healthy() {
    let disk = serve(&[2]);
    let mut client = disk.connect();
    client.write(0, 0, &[7; BLOCK_BYTES]).unwrap();
    status(&disk, "healthy");

    let image = disk.faulty(2);
    image.inject(Operation::Read, Fault::Fail(libc::EIO));
    for _ in 0..5 {
        client.read(0, 0, BLOCK_BYTES).unwrap();
    }
    let all_fail = || state(&disk)["replicas"][2]["errors"]["read"].as_u64() >= Some(5);
    assert!(wait_until(HANG_LIMIT, all_fail));
    let text = status(&disk, "degraded");
    let what = format!("{} returned ", node_name(2));
    assert!(text.contains(&what) && text.contains(" s ago: read: Input/output error"));
    let replica = &state(&disk)["replicas"][2];
    assert_eq!(replica["conditions"], json!(["errors"]));
    let last = &replica["errors"]["last"];
    assert_eq!(
        (&last["type"], &last["ret"]),
        (&json!("read"), &json!(-libc::EIO))
    );
    assert_eq!(last["sector-count"], BLOCK_BYTES / 512);

    // A scrub that meets failed reads again clears nothing, one that meets none clears them.
    assert_eq!(operate(&disk, "scrub").0, 1);
    status(&disk, "degraded");
    image.clear_faults();
    status(&disk, "degraded");
    assert_eq!(operate(&disk, "scrub").0, 0);
    status(&disk, "healthy");
}

#[test]
fn a_disk_whose_guest_got_an_error_is_failing_until_the_operator_has_seen_it() {
    let disk = serve(&[0, 1, 2]);
    let mut client = disk.connect();
    for replica in 0..3 {
        disk.faulty(replica)
            .inject(Operation::Write, Fault::Fail(libc::ENOSPC));
    }
    client.write(0, 0, &[7; BLOCK_BYTES]).unwrap_err();
    for replica in 0..3 {
        disk.faulty(replica).clear_faults();
    }
    client.write(0, 0, &[8; BLOCK_BYTES]).unwrap();

    let event = disk.wait_for("QUORUM_FAILURE", None);
    let data = &event["data"];
    assert_eq!(
        (&data["requester"], &data["ret"]),
        (&json!("guest"), &json!(-libc::ENOSPC))
    );
    assert_eq!(data["error"], "No space left on device");
    // A scrub only reads: it does not know what the guest has lost.
    assert_eq!(operate(&disk, "scrub").0, 0);
    let text = status(&disk, "failing");
    assert!(
        text.contains("the guest got 1 I/O error; the last "),
        "{text}"
    );
    assert!(
        text.contains(" ago: write: No space left on device"),
        "{text}"
    );
    assert!(text.contains("make room for the images"), "{text}");
    assert_eq!(state(&disk)["conditions"], json!(["guest-errors"]));

    let (code, text) = operate(&disk, "clear no-such-replica");
    assert_eq!(code, 3, "{text}");
    status(&disk, "failing");
    assert_eq!(operate(&disk, "clear").0, 0);
    status(&disk, "healthy");
}

#[test]
fn the_errors_of_one_replica_are_cleared_by_its_name() {
    let disk = serve(&[0, 1]);
    let mut client = disk.connect();
    for replica in [0, 1] {
        disk.faulty(replica)
            .inject(Operation::Sync, Fault::Fail(libc::EIO));
        client.write(0, 0, &[7; BLOCK_BYTES]).unwrap();
        client.flush(0).unwrap();
        disk.faulty(replica).clear_faults();
        // What it may have lost is copied to it before the other one loses something.
        let is_copied = || state(&disk)["replicas"][replica]["stale-bytes"] == 0;
        assert!(wait_until(HANG_LIMIT, is_copied));
    }
    assert_eq!(operate(&disk, &format!("clear {}", node_name(0))).0, 0);
    let text = status(&disk, "degraded");
    assert!(text.contains(&format!("{} returned 1 error", node_name(1))));
    assert!(
        !text.contains(&format!("{} returned", node_name(0))),
        "{text}"
    );
    operate(&disk, &format!("clear {}", node_name(1)));
    status(&disk, "healthy");
}

#[test]
fn an_eviction_and_the_return_are_events() {
    let (disk, mut client) = Disk::with_evicted_replica(Duration::from_millis(200));
    disk.wait_for("QUORUM_REPLICA_EVICTED", Some(1));
    let text = status(&disk, "degraded");
    assert!(text.contains("is evicted: it does not answer"), "{text}");
    assert_eq!(
        state(&disk)["replicas"][1]["conditions"],
        json!(["evicted", "stale"])
    );
    disk.faulty(1).clear_faults();
    disk.wait_for("QUORUM_REPLICA_REJOINED", Some(1));
    let is_copied = || state(&disk)["health"] == "healthy";
    assert!(wait_until(HANG_LIMIT, is_copied), "{}", state(&disk));

    // Again and again: it is back each time, but not healthy any more.
    for round in 2..=3 {
        disk.faulty(1).inject(Operation::Write, Fault::Hang);
        client.write(0, 0, &[round; BLOCK_BYTES]).unwrap();
        disk.faulty(1).clear_faults();
        let is_back = || {
            let replica = &state(&disk)["replicas"][1];
            replica["rejoins"] == round && replica["stale-bytes"] == 0
        };
        assert!(wait_until(HANG_LIMIT, is_back), "{}", state(&disk));
    }
    let event = disk.wait_for("QUORUM_REPLICA_KEPT_OUT", Some(1));
    assert!(event["data"]["milliseconds"].is_u64(), "{event}");
    assert!(status(&disk, "degraded").contains("r1 is flapping"));
}

#[test]
fn an_image_that_another_program_changes_is_noticed() {
    let disk = serve(&[]);
    let mut client = disk.connect();
    client.write(0, 0, &[7; BLOCK_BYTES]).unwrap();
    status(&disk, "healthy");
    let conditions = |index: usize| {
        let mut state = state(&disk);
        state["replicas"][index]["conditions"].take()
    };
    let comes = |index: usize, expected: Value| {
        let came = wait_until(HANG_LIMIT, || conditions(index) == expected);
        assert!(came, "{index}: {expected}, but {}", state(&disk));
    };
    let moved = disk.images[0].with_extension("moved");
    fs::rename(&disk.images[0], &moved).unwrap();
    fs::remove_file(&disk.images[1]).unwrap();
    let third = fs::File::options().write(true).open(&disk.images[2]);
    third.unwrap().set_len(1 << 20).unwrap();
    comes(0, json!(["moved"]));
    comes(1, json!(["unlinked"]));
    let event = disk.wait_for("QUORUM_REPLICA_IMAGE_CHANGED", Some(1));
    assert_eq!(event["data"]["conditions"], json!(["unlinked"]));
    comes(2, json!(["truncated"]));
    let text = status(&disk, "degraded");
    for line in [
        "r0 was moved by another program",
        "r1 was deleted by another program",
        "r2 was truncated by another program",
        "quorum-blkctl replace r1 FILE",
    ] {
        assert!(text.contains(line), "{text}");
    }
    // Another file with its name is not the image.
    fs::write(&disk.images[0], [0; 512]).unwrap();
    fs::remove_file(&disk.images[0]).unwrap();
    fs::rename(&moved, &disk.images[0]).unwrap();
    comes(0, json!([]));
}
