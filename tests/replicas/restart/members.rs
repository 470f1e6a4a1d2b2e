//! Replicas that are added and removed, and a command line that names others than the records.

use std::fs;

use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::are_identical;
use testkit::machine;

use super::{Host, Running, copy_with_record, in_image, read, write};

#[test]
fn a_removed_replica_is_refused_and_an_added_one_is_a_member() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    let new = host.path("new.raw");
    let name = new.to_str().unwrap();
    let (code, text) = running.blkctl(&["add", name, "--create"]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = running.blkctl(&["remove", "2.raw"]);
    assert_eq!(code, 0, "{text}");
    write(&mut running.client(), 1, 2);
    running.kill();
    let line = host.refusal(&host.images, &[]);
    assert!(line.contains("was removed from disk"), "{line}");
    let mut images = host.images[..2].to_vec();
    images.push(new);
    let running = host.start_with(&images, &[]);
    assert_eq!(running.states().len(), 3);
    assert_eq!(read(&mut running.client(), 1), 2);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&images));
}

#[test]
fn an_image_of_another_disk_is_not_added() {
    let _machine = machine::shared();
    let (host, other) = (Host::new(2), Host::new(1));
    let of_other = other.start();
    of_other.end();
    let running = host.start_with(&host.images, &["--image-dir", "/"]);
    let before = fs::read(other.record(0)).unwrap();
    let image = other.images[0].to_str().unwrap();
    let (code, text) = running.blkctl(&["add", image, "--force", "--node-name", "x"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("is a replica of disk"), "{text}");
    assert!(fs::read(other.record(0)).unwrap() == before);
    // Nor a copy of one of its own.
    let copy = host.path("copy.raw");
    copy_with_record(&host.images[1], &copy);
    let (code, text) = running.blkctl(&["add", copy.to_str().unwrap(), "--force"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("is replica '1.raw' of this disk"), "{text}");
    running.end();
    let line = host.refusal(&[host.images[0].clone(), other.images[0].clone()], &[]);
    assert!(line.contains("0.raw"), "{line}");
}

#[test]
fn an_image_that_a_later_version_knows_is_not_added() {
    let _machine = machine::shared();
    let (host, other) = (Host::new(2), Host::new(1));
    other.start().end();
    // A feature, in a text of the same length.
    let mut record = fs::read(other.record(0)).unwrap();
    let [before, after] = [
        "\"incompatible\": [],\n  \"compatible\": [],",
        "\"incompatible\": [\"x\"],\"compatible\": [],",
    ];
    for slot in record.chunks_mut(1 << 20).take(2) {
        let length = slot[52..59].iter();
        let length = length.fold(0, |length, digit| 10 * length + usize::from(digit - b'0'));
        let slot = &mut slot[..length];
        let mut places = slot.windows(before.len());
        let place = places.position(|text| text == before.as_bytes()).unwrap();
        slot[place..place + after.len()].copy_from_slice(after.as_bytes());
        let checksum = format!("{:08x}", crc32c::crc32c(&slot[33..]));
        slot[25..33].copy_from_slice(checksum.as_bytes());
    }
    fs::write(other.record(0), &record).unwrap();
    let running = host.start_with(&host.images, &["--image-dir", "/"]);
    let image = other.images[0].to_str().unwrap();
    let (code, text) = running.blkctl(&["add", image, "--force", "--node-name", "x"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("use the version that wrote it"), "{text}");
    assert!(fs::read(other.record(0)).unwrap() == record);
    running.end();
}

#[test]
fn a_member_that_the_command_line_does_not_name_is_missing() {
    let _machine = machine::shared();
    let host = Host::new(3);
    host.start().end();
    let running = host.start_with(&[host.images[2].clone(), host.images[0].clone()], &[]);
    let state = running.state();
    let replicas = state["replicas"].as_array().unwrap();
    let names: Vec<_> = replicas
        .iter()
        .map(|replica| &replica["node-name"])
        .collect();
    assert_eq!(names, ["2.raw", "0.raw", "1.raw"]);
    assert_eq!(replicas[2]["state"], "missing");
    let reason = replicas[2]["missing-reason"].as_str().unwrap();
    assert!(reason.contains("--blk-file"), "{reason}");
    assert_eq!(replicas[2]["missing-retried"], false);
    assert_eq!(state["vote-threshold"], 2);
    write(&mut running.client(), 0, 1);
    let (code, text) = running.blkctl(&["remove", "1.raw"]);
    assert_eq!(code, 0, "{text}");
    running.end();
    let line = host.refusal(&host.images, &[]);
    assert!(line.contains("'1.raw' was removed"), "{line}");
}

#[test]
fn a_disk_that_has_grown_starts_with_its_new_size() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    let (code, text) = running.blkctl(&["resize", "16M"]);
    assert_eq!(code, 0, "{text}");
    let last = (16 << 20) / 4096 - 1;
    let mut client = running.client();
    write(&mut client, last, 2);
    running.kill();
    let running = host.start();
    assert_eq!(read(&mut running.client(), last), 2);
    running.end();
}

#[test]
fn a_higher_threshold_waits_until_enough_replicas_are_up_to_date() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let served: Vec<_> = host.images[1..]
        .iter()
        .map(|image| FuseImage::serve(image))
        .collect();
    let _clear: Vec<_> = served.iter().map(FuseImage::fault_guard).collect();
    let mut images = host.images[..1].to_vec();
    images.extend(served.iter().map(FuseImage::path));
    let state = host.path("state");
    fs::create_dir(&state).unwrap();
    let start = |votes| {
        let state = state.to_str().unwrap();
        host.start_with(&images, &["--state-dir", state, "--vote-threshold", votes])
    };
    let running = start("1");
    for image in &served {
        image.inject(Operation::Write, Fault::Fail(libc::EIO));
    }
    write(&mut running.client(), 0, 1);
    // After a clean end nothing is recovered, for which one vote would be enough.
    running.end();
    for image in &served {
        image.clear_faults();
    }
    // One replica alone has what was written.
    let running = start("2");
    assert_eq!(read(&mut running.client(), 0), 1);
    running.state_when(|state| state["vote-threshold"] == 2);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&host.images));
}

#[test]
fn a_threshold_that_a_command_has_set_is_kept_unless_the_command_line_has_one() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let expect = |more: &[&str], votes: u64, follows: bool| {
        let running = host.start_with(&host.images, more);
        let state = running.state();
        assert_eq!(state["vote-threshold"], votes, "{more:?}");
        assert_eq!(state["vote-threshold-follows"], follows, "{more:?}");
        running
    };
    let set = |running: Running, threshold: &str| {
        let (code, text) = running.blkctl(&["threshold", threshold]);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("The next start has it too, unless"), "{text}");
        running.kill();
    };
    set(expect(&[], 2, true), "3");
    expect(&[], 3, false).end();
    expect(&["--vote-threshold", "1"], 1, false).end();
    set(expect(&[], 1, false), "majority");
    expect(&[], 2, true).end();
}

#[test]
fn a_new_disk_where_a_missing_one_was_takes_its_place_and_name() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.end();
    // The file system of the third image is new and empty.
    fs::remove_file(&host.images[2]).unwrap();
    fs::remove_file(host.record(2)).unwrap();
    let running = host.start();
    assert_eq!(running.states(), ["in-service", "in-service", "missing"]);
    let image = host.images[2].to_str().unwrap();
    let (code, text) = running.blkctl(&["replace", "2.raw", image, "--create"]);
    assert_eq!(code, 0, "{text}");
    running.kill();
    // The records know the new one by the name of the old one.
    let elsewhere = host.path("elsewhere");
    fs::rename(&host.images[2], &elsewhere).unwrap();
    let running = host.start();
    assert_eq!(running.states(), ["in-service", "in-service", "missing"]);
    assert_eq!(running.state()["replicas"][2]["node-name"], "2.raw");
    fs::rename(&elsewhere, &host.images[2]).unwrap();
    running.wait_until_healthy();
    running.end();
    assert_eq!(in_image(&host.images[2], 0), 1);
}
