//! Starts that write no records, although the images have some (S9).

use std::fs;
use std::os::unix::fs::symlink;

use testkit::client::Client;
use testkit::machine;
use testkit::programs;

use super::{Host, read, write};

#[test]
fn images_with_records_are_not_served_without_them() {
    let _machine = machine::shared();
    let host = Host::new(2);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.end();
    for options in [&["--state", "none"][..], &["--blkverify"]] {
        let line = host.refusal(&host.images, options);
        assert!(line.contains("0.raw' has the record"), "{line}");
        assert!(line.contains("quorum-blkctl forget"), "{line}");
    }
    let forgotten = programs::command(programs::BLKCTL)
        .arg("forget")
        .args(&host.images)
        .status()
        .unwrap();
    assert!(forgotten.success());
    let running = host.start_with(&host.images, &["--state", "none"]);
    assert_eq!(read(&mut running.client(), 0), 1);
    running.end();
    assert!(!host.record(0).exists());
}

#[test]
fn an_image_that_may_have_a_record_is_not_served_without_it() {
    let _machine = machine::shared();
    let host = Host::new(2);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.end();
    let moved = host.path("moved");
    for index in 0..2 {
        fs::rename(host.record(index), &moved).unwrap();
        symlink(&moved, host.record(index)).unwrap();
        let line = host.refusal(&host.images[index..=index], &["--state", "none"]);
        assert!(line.contains("is a symbolic link"), "{line}");
    }
}

#[test]
fn a_read_only_disk_believes_no_stale_replica() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.end();
    let elsewhere = host.path("elsewhere");
    fs::rename(&host.images[0], &elsewhere).unwrap();
    let running = host.start();
    write(&mut running.client(), 0, 2);
    running.end();
    fs::rename(&elsewhere, &host.images[0]).unwrap();
    let content = || {
        let files = (0..3).flat_map(|place| [host.images[place].clone(), host.record(place)]);
        files
            .map(|file| fs::read(file).unwrap())
            .collect::<Vec<_>>()
    };
    let before = content();
    let running = host.start_with(&host.images, &["--read-only"]);
    assert_eq!(running.states(), ["missing", "in-service", "in-service"]);
    assert_eq!(running.state()["records"], false);
    assert_eq!(running.state()["replicas"][0]["missing-retried"], false);
    for command in [
        &["remove", "0.raw"][..],
        &["remove", "2.raw"],
        &["fail", "2.raw", "--force"],
    ] {
        let (code, text) = running.blkctl(command);
        assert_eq!(code, 3, "{text}");
        assert!(text.contains("the disk is read-only"), "{text}");
    }
    let mut client = Client::connect_read_only(running.daemon.socket());
    assert_eq!(read(&mut client, 0), 2);
    drop(client);
    running.end();
    let line = host.refusal(&host.images[..2], &["--read-only"]);
    assert!(line.contains("start it without --read-only"), "{line}");
    assert!(content() == before, "a read-only disk has changed a file");
}

#[test]
fn a_read_only_disk_has_nothing_to_recover() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.kill();
    let line = host.refusal(&host.images, &["--read-only"]);
    assert!(line.contains("start it without --read-only"), "{line}");
    let running = host.start();
    running.wait_until_healthy();
    running.end();
    let running = host.start_with(&host.images, &["--read-only"]);
    let mut client = Client::connect_read_only(running.daemon.socket());
    assert_eq!(read(&mut client, 0), 1);
    drop(client);
    running.end();
}
