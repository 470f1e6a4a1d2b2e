//! `quorum-blkctl inspect`: the records of images, without a daemon.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::process::Output;

use serde_json::Value;
use testkit::HANG_LIMIT;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::create_images;
use testkit::process::wait_until;

use crate::offline_disk::{Disk, SIZE_BYTES, run, usual};

#[track_caller]
fn text(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:#?}");
    assert_eq!(output.stderr.is_empty(), code < 2, "{output:#?}");
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    text
}

#[test]
fn a_disk_that_was_ended_cleanly_would_start() {
    let mut disk = Disk::new();
    disk.record.clean = true;
    disk.keep(&[0, 1, 2], &usual());
    let shown = text(&disk.run("inspect", &["0.raw", "1.raw", "2.raw"]), 0);
    let first = "\
0.raw
  record   0.raw.quorum
  disk     00000000-0000-0000-0000-00000000000e, 64 MiB, 2 of 3 must agree
  replica  00000000-0000-0000-0000-000000000001, 0.raw
  table    epoch 1
  ended    cleanly
  marked   nowhere
  member  state   stale  doubtful
  0.raw   active  -      -
  1.raw   active  -      -
  2.raw   active  -      -

1.raw
";
    assert!(shown.starts_with(first), "{shown}");
    let last = "
A start would serve the disk with 3 of 3 replicas:
  replica  it would be
  0.raw    up to date
  1.raw    up to date
  2.raw    up to date
";
    assert!(shown.ends_with(last), "{shown}");
    // One was modified since, another one is not there.
    let image = fs::File::options().write(true).open(&disk.images[2]);
    let image = image.unwrap();
    image.write_all_at(&[7], 0).unwrap();
    let shown = text(&disk.run("inspect", &["0.raw", "1.raw", "2.raw"]), 1);
    assert!(
        shown.contains(
            "\n  2.raw    modified by another program since its clean end; copied as a whole\n"
        ),
        "{shown}"
    );
    image.set_len(512).unwrap();
    let output = disk.run("inspect", &["0.raw", "1.raw", "2.raw"]);
    assert_eq!(output.status.code(), Some(1));
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(shown.contains("less than the disk"), "{shown}");
    assert!(shown.ends_with("\n  2.raw    missing\n"), "{shown}");
    fs::remove_file(&disk.images[2]).unwrap();
    let output = disk.run("inspect", &["0.raw", "1.raw", "2.raw"]);
    assert_eq!(output.status.code(), Some(1));
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(
        shown.contains("\n2.raw\n  image    cannot open '2.raw': No such file or directory; "),
        "{shown}"
    );
    assert!(shown.ends_with("\n  2.raw    missing\n"), "{shown}");
}

#[test]
fn a_disk_that_has_to_recover_would_start_and_says_where_what_is_missing() {
    let mut disk = Disk::new();
    disk.disturb();
    disk.keep(&[0, 1, 2], &usual());
    let shown = text(&disk.run("inspect", &["0.raw", "1.raw", "2.raw"]), 1);
    let of_record = "
  table    epoch 2
  ended    not cleanly, or not yet
  marked   2 MiB in 2 extents of 1 MiB
  member  state     stale              doubtful
  0.raw   active    -                  -
  1.raw   active    4 KiB (8 sectors)  512 B (1 sector)
  2.raw   inactive  where marked       -
";
    assert!(shown.contains(of_record), "{shown}");
    let last = "
A start would serve the disk with 3 of 3 replicas:
  replica  it would be
  0.raw    up to date
  1.raw    has missed changes; stale in 4 KiB; doubtful in 512 B
  2.raw    has missed changes; stale in 2 MiB
It was not ended cleanly; 2 MiB would be recovered while it is served.
";
    assert!(shown.ends_with(last), "{shown}");
    let without = text(&disk.run("inspect", &["0.raw", "1.raw"]), 1);
    assert!(
        without.contains(
            "\nA start would serve the disk with 2 of 3 replicas:\n  replica  it would be\n"
        ) && without.contains("\n  2.raw    missing: no image was given\n"),
        "{without}"
    );
    let json = text_of_json(
        &disk.run("inspect", &["--json", "0.raw", "1.raw", "2.raw"]),
        1,
    );
    assert_eq!(json["version"], 1);
    assert_eq!(json["images"][1]["node-name"], "1.raw");
    assert_eq!(json["images"][1]["in-use"], false);
    let kept = &json["images"][0]["kept"];
    assert_eq!(kept["record"]["epoch"]["number"], 2);
    assert_eq!(kept["marked"]["sectors-count"], 4096);
    assert_eq!(kept["marked-extents"], 2);
    assert_eq!(kept["record"]["members"][1]["doubtful"]["sectors-count"], 1);
    assert_eq!(json["start"]["decision"], "serve");
    assert_eq!(json["start"]["images"][1]["why"], "missed-changes");
    assert_eq!(json["start"]["was-clean"], false);
}

fn text_of_json(output: &Output, code: i32) -> Value {
    assert_eq!(output.status.code(), Some(code), "{output:#?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_start_that_would_be_refused_is_one_with_the_same_line() {
    let mut disk = Disk::new();
    disk.disturb();
    disk.keep(&[0, 1, 2], &usual());
    let refused = disk.run("inspect", &["2.raw"]);
    text(&refused, 3);
    let line = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(
        line,
        "quorum-blkctl: a start would be refused: '0.raw', '1.raw' could have gone on without the \
         other replicas, since the vote threshold is 2; start with them, or, if they are lost with \
         what they hold, add --force-start\n"
    );
    let json = text_of_json(&disk.run("inspect", &["2.raw", "--json"]), 3);
    assert_eq!(json["start"]["decision"], "refuse");
    let reason = json["start"]["reason"].as_str().unwrap();
    assert!(line.contains(reason), "{reason}");
}

#[test]
fn images_without_a_record_are_a_new_disk() {
    let directory = tempfile::tempdir().unwrap();
    create_images(directory.path(), 2, SIZE_BYTES);
    let shown = text(&run(directory.path(), "inspect", &["0.raw", "1.raw"]), 0);
    assert_eq!(
        shown,
        "0.raw\n  record   none: it is part of no disk yet\n\n\
         1.raw\n  record   none: it is part of no disk yet\n\n\
         None of these has a record: a start would make a new disk of them.\n"
    );
    fs::write(directory.path().join("1.raw.quorum"), "something else").unwrap();
    let refused = run(directory.path(), "inspect", &["0.raw", "1.raw"]);
    assert_eq!(refused.status.code(), Some(3));
    let shown = String::from_utf8(refused.stdout).unwrap();
    assert!(
        shown
            .contains("\n1.raw\n  record   neither slot of its record can be used; the first: it "),
        "{shown}"
    );
    let line = String::from_utf8(refused.stderr).unwrap();
    assert!(
        line.starts_with("quorum-blkctl: a start would be refused: cannot use '1.raw': neither "),
        "{line}"
    );
}

#[test]
fn an_image_in_use_can_be_inspected() {
    let disk = Disk::new();
    disk.keep(&[0, 1, 2], &usual());
    let mut arguments: Vec<OsString> = replica_arguments(&disk.images);
    arguments.extend(["--cache", "writeback"].map(Into::into));
    let daemon = Daemon::start_with_records(disk.directory.path(), arguments);
    let shown = String::from_utf8(disk.run("inspect", &["0.raw"]).stdout).unwrap();
    let expected =
        "0.raw\n  image    in use: another process writes to it; what is shown may change\n";
    assert!(shown.starts_with(expected), "{shown}");
    let is_in_use = || {
        let json = disk.run("inspect", &["--json", "0.raw"]).stdout;
        let json: Value = serde_json::from_slice(&json).unwrap();
        json["images"][0]["in-use"] == true
    };
    assert!(is_in_use());
    drop(daemon);
    assert!(wait_until(HANG_LIMIT, || !is_in_use()));
}

#[test]
fn a_state_directory_that_is_not_there_hides_no_record() {
    let disk = Disk::new();
    let refused = disk.run("inspect", &["--state-dir", "nowhere", "0.raw"]);
    assert_eq!(refused.status.code(), Some(3));
    let line = String::from_utf8(refused.stderr).unwrap();
    assert!(
        line.contains("cannot open state directory 'nowhere': No such file or directory"),
        "{line}"
    );
}
