//! `quorum-blkctl forget`: images are taken out of their disk, without a daemon.

use std::fs;
use std::process::Output;

use quorum_blk::record::Stale;
use testkit::daemon::{Daemon, replica_arguments};

use crate::offline_disk::{Disk, usual};

fn stdout(output: Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:#?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_image_that_is_forgotten_is_part_of_no_disk_and_the_others_say_so() {
    let mut disk = Disk::new();
    disk.record.members[2].stale = Stale::All;
    disk.keep(&[0, 1, 2], &usual());
    let path = |name: &str| disk.directory.path().join(name);
    let kept = fs::read(path("2.raw.quorum")).unwrap();
    let said = stdout(disk.run("forget", &["2.raw"]), 0);
    assert_eq!(
        said,
        "2.raw is part of no disk any more\n\
        \x20 disk 00000000-0000-0000-0000-00000000000e counts 2.raw as missing until it is \
         removed there\n\
        \x20 it lacks the newest data in 64 MiB, which nothing remembers any more\n\
        \x20 a start with it alone makes a new disk of what it holds\n\
        \x20 to undo this, before anything writes to it: mv -n '2.raw.quorum.forgotten' \
         '2.raw.quorum'\n"
    );
    assert!(!path("2.raw.quorum").exists());
    assert_eq!(fs::read(path("2.raw.quorum.forgotten")).unwrap(), kept);
    let refused = disk.run("inspect", &["0.raw", "1.raw", "2.raw"]);
    let line = String::from_utf8(refused.stderr).unwrap();
    assert!(
        line.contains("'2.raw' has no record, so it is no replica"),
        "{line}"
    );
    let without = stdout(disk.run("inspect", &["0.raw", "1.raw"]), 1);
    assert!(
        without.contains("  2.raw    missing: no image was given\n"),
        "{without}"
    );
    // Once more, and after it was a replica again.
    let said = stdout(disk.run("forget", &["2.raw"]), 0);
    assert_eq!(said, "2.raw has no record: it is part of no disk\n");
    disk.keep(&[2], &usual());
    stdout(disk.run("forget", &["2.raw"]), 0);
    assert!(path("2.raw.quorum.forgotten.1").exists());
    assert_eq!(fs::read(path("2.raw.quorum.forgotten")).unwrap(), kept);
}

#[test]
fn nothing_is_forgotten_of_images_of_which_one_is_in_use() {
    let disk = Disk::new();
    disk.keep(&[0, 1, 2], &usual());
    // An image that has a record is not served alone, nor without it.
    let [record, aside] = ["2.raw.quorum", "aside"].map(|name| disk.directory.path().join(name));
    fs::rename(&record, &aside).unwrap();
    let arguments = replica_arguments(&disk.images[2..]);
    let _daemon = Daemon::start(disk.directory.path(), arguments);
    fs::rename(&aside, &record).unwrap();
    let refused = disk.run("forget", &["0.raw", "1.raw", "2.raw"]);
    assert_eq!(refused.status.code(), Some(3));
    let line = String::from_utf8(refused.stderr).unwrap();
    assert!(
        line.starts_with("quorum-blkctl: '2.raw' is in use by another process"),
        "{line}"
    );
    for name in ["0.raw.quorum", "1.raw.quorum", "2.raw.quorum"] {
        assert!(disk.directory.path().join(name).exists());
    }
}
