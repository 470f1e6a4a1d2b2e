//! Where records are, and what happens where there is no room for them.

use std::fs::{self, File};
use std::io::Write as _;

use testkit::fuse::FuseImage;
use testkit::images::data_ranges;
use testkit::machine;
use testkit::small_disk::SmallDisk;

use super::{Host, modify, read, write};

#[test]
fn without_records_nothing_is_made_and_the_status_says_so() {
    let _machine = machine::shared();
    let host = Host::new(2);
    let running = host.start_with(&host.images, &["--state", "none"]);
    assert_eq!(running.state()["records"], false);
    let (_, text) = running.blkctl(&["status"]);
    assert!(!text.contains("with records"), "{text}");
    running.end();
    assert!(!host.record(0).exists() && !host.record(1).exists());
    let running = host.start();
    assert_eq!(running.state()["records"], true);
    let (_, text) = running.blkctl(&["status"]);
    assert!(text.contains("with records"), "{text}");
    running.end();
}

#[test]
fn a_directory_without_room_for_records_needs_another_one() {
    let _machine = machine::shared();
    let host = Host::new(2);
    // Nothing can be made in the directory of such an image.
    let fuse = FuseImage::serve(&host.images[1]);
    let images = [host.images[0].clone(), fuse.path()];
    let line = host.refusal(&images, &[]);
    assert!(line.contains("--state-dir DIR"), "{line}");
    assert!(line.contains("--state none"), "{line}");
    let state = host.path("state");
    fs::create_dir(&state).unwrap();
    let more = ["--state-dir", state.to_str().unwrap()];
    let running = host.start_with(&images, &more);
    write(&mut running.client(), 0, 1);
    running.end();
    assert_eq!(fs::read_dir(&state).unwrap().count(), 1);
    let running = host.start_with(&images, &more);
    assert_eq!(read(&mut running.client(), 0), 1);
    running.end();
    // Without it the record is not found.
    let line = host.refusal(&images, &[]);
    assert!(line.contains("1 of 2 needed replicas"), "{line}");
    assert!(
        line.contains("no directory is known for the record"),
        "{line}"
    );
}

#[test]
fn a_start_that_cannot_listen_makes_no_record_and_removes_no_socket() {
    let _machine = machine::shared();
    let host = Host::new(2);
    let running = host.start_with(&host.images, &["--state", "none"]);
    let in_use = running.monitor.to_str().unwrap();
    for options in [["--qmp", "/nowhere/s"], ["--qmp", in_use]] {
        let line = host.refusal(&host.images, &options);
        assert!(line.contains(options[1]), "{line}");
        assert!(!host.record(0).exists() && !host.record(1).exists());
        assert!(!host.path("refused.sock").exists());
    }
    assert_eq!(running.state()["records"], false, "it listens still");
    running.end();
}

#[test]
fn a_full_file_system_refuses_the_start_and_not_a_write() {
    let _machine = machine::shared();
    let host = Host::new(2);
    let small = SmallDisk::mount(4 << 20);
    let image = small.path().join("full.raw");
    File::create_new(&image)
        .unwrap()
        .set_len(super::SIZE_BYTES)
        .unwrap();
    let mut ballast = File::create_new(small.path().join("ballast")).unwrap();
    while ballast.write_all(&[1; 65536]).is_ok() {}
    let images = [host.images[0].clone(), image];
    let line = host.refusal(&images, &[]);
    assert!(line.contains("there is no room for the record"), "{line}");
    assert!(line.contains("--state-dir DIR"), "{line}");
    drop(ballast);
    fs::remove_file(small.path().join("ballast")).unwrap();
    let running = host.start_with(&images, &[]);
    write(&mut running.client(), 0, 1);
    running.end();
}

#[test]
fn images_of_two_disks_are_no_new_one() {
    let _machine = machine::shared();
    let host = Host::new(2);
    for index in 0..100 {
        modify(&host.images[0], 20 * index, 1);
        modify(&host.images[1], 20 * index, 2);
    }
    let line = host.refusal(&host.images, &[]);
    assert!(line.contains("holds other data than"), "{line}");
    assert!(!host.record(0).exists());
    let empty = Host::new(1);
    let line = host.refusal(&[host.images[0].clone(), empty.images[0].clone()], &[]);
    assert!(
        line.contains("node-name") || line.contains("empty"),
        "{line}"
    );
    assert!(data_ranges(&empty.images[0]).is_empty());
}

#[test]
fn a_record_that_cannot_be_read_is_not_one_that_says_nothing() {
    let _machine = machine::shared();
    let host = Host::new(1);
    let image = FuseImage::serve(&host.images[0]);
    let state = host.path("state");
    fs::create_dir(&state).unwrap();
    let images = [image.path()];
    let options = ["--state-dir", state.to_str().unwrap()];
    host.start_with(&images, &options).end();
    let entry = fs::read_dir(&state).unwrap().next().unwrap().unwrap();
    let name = entry.file_name().into_string().unwrap();
    let record = FuseImage::serve_as(&entry.path(), &name);
    record.make_unreadable(0..4 << 20);
    let directory = record.directory();
    let options = ["--state-dir", directory.to_str().unwrap()];
    let line = host.refusal(&images, &options);
    assert!(line.contains("its record cannot be read"), "{line}");
    assert!(line.contains("quorum-blkctl forget"), "{line}");
}
