//! Images and records that something else has changed while no daemon ran.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use testkit::images::are_identical;
use testkit::machine;

use super::{Host, copy_with_record, in_image, modify, read, write};

/// A disk that was written to and ended.
fn ended(replicas: usize) -> Host {
    let host = Host::new(replicas);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.end();
    host
}

#[test]
fn an_image_that_another_program_has_modified_is_copied_anew() {
    let _machine = machine::shared();
    let host = ended(3);
    modify(&host.images[2], 0, 99);
    let running = host.start();
    let log = running.daemon.log();
    assert!(log.contains("modified by another program"), "{log}");
    assert_eq!(read(&mut running.client(), 0), 1);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&host.images));
}

#[test]
fn a_majority_of_modified_images_is_refused_until_one_is_adopted() {
    let _machine = machine::shared();
    let host = ended(3);
    modify(&host.images[1], 0, 99);
    modify(&host.images[2], 0, 99);
    let line = host.refusal(&host.images, &[]);
    assert!(line.contains("another program has modified"), "{line}");
    assert!(line.contains("--adopt NODE"), "{line}");
    let running = host.start_with(&host.images, &["--adopt", "2.raw"]);
    let log = running.daemon.log();
    assert!(log.contains("all others are overwritten with it"), "{log}");
    assert!(!log.contains("when they come back"), "{log}");
    assert_eq!(read(&mut running.client(), 0), 99);
    // Whether the others are copied by now or not.
    running.end();
    let running = host.start_with(&host.images, &["--vote-threshold", "2"]);
    assert_eq!(read(&mut running.client(), 0), 99);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&host.images));
    let running = host.start();
    assert_eq!(read(&mut running.client(), 0), 99);
    assert_eq!(running.state()["vote-threshold"], 2);
    running.end();
    // All are equal by now.
    let running = host.start_with(&host.images, &["--adopt", "1.raw"]);
    let log = running.daemon.log();
    assert!(log.contains("--adopt has no effect"), "{log}");
    running.end();
}

#[test]
fn an_image_that_had_missed_writes_is_not_adopted_by_mistake() {
    let _machine = machine::shared();
    let host = ended(3);
    let running = host.start_with(&host.images[..2], &[]);
    write(&mut running.client(), 0, 2);
    running.end();
    for image in &host.images {
        // What it holds already.
        modify(image, 0, in_image(image, 0));
    }
    let line = host.refusal(&host.images, &[]);
    let of_these = "; of these '0.raw', '1.raw' were up to date";
    assert!(line.ends_with(of_these), "{line}");
    let line = host.refusal(&host.images, &["--adopt", "2.raw"]);
    assert!(
        line.contains("'2.raw': this replica is not up to date"),
        "{line}"
    );
    let running = host.start_with(&host.images, &["--adopt", "1.raw"]);
    assert_eq!(read(&mut running.client(), 0), 2);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&host.images));
}

#[test]
fn an_old_image_that_is_copied_back_with_its_record_does_not_vote() {
    let _machine = machine::shared();
    let host = ended(3);
    let copies: Vec<_> = (1..3)
        .map(|index| host.path(&format!("copy{index}")))
        .collect();
    for (image, copy) in host.images[1..].iter().zip(&copies) {
        copy_with_record(image, copy);
    }
    let running = host.start();
    write(&mut running.client(), 0, 2);
    running.end();
    copy_with_record(&copies[1], &host.images[2]);
    assert_eq!(in_image(&host.images[2], 0), 1);
    let running = host.start();
    let log = running.daemon.log();
    assert!(log.contains("restored from an older copy"), "{log}");
    assert_eq!(read(&mut running.client(), 0), 2);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&host.images));
}

/// Copies of the last two images with their records, made while the disk is served; then it is
/// written to and ended.
fn copied_while_served() -> (Host, [PathBuf; 2]) {
    let host = ended(3);
    let copies = [1, 2].map(|index| host.path(&format!("copy{index}")));
    let running = host.start();
    write(&mut running.client(), 0, 2);
    for (image, copy) in host.images[1..].iter().zip(&copies) {
        copy_with_record(image, copy);
    }
    write(&mut running.client(), 0, 3);
    running.end();
    (host, copies)
}

#[test]
fn an_image_that_was_copied_while_it_was_served_does_not_vote_after_a_clean_end() {
    let _machine = machine::shared();
    let (host, copies) = copied_while_served();
    copy_with_record(&copies[1], &host.images[2]);
    assert_eq!(in_image(&host.images[2], 0), 2);
    let running = host.start();
    let log = running.daemon.log();
    assert!(log.contains("restored from an older copy"), "{log}");
    assert_eq!(read(&mut running.client(), 0), 3);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&host.images));
    assert_eq!(in_image(&host.images[2], 0), 3);
}

/// After a kill it would not be recognized.
#[test]
fn an_image_that_was_copied_while_it_was_served_is_replaced_by_itself_after_a_kill() {
    let _machine = machine::shared();
    let host = ended(3);
    let copy = host.path("copy");
    let running = host.start();
    write(&mut running.client(), 0, 2);
    copy_with_record(&host.images[2], &copy);
    write(&mut running.client(), 0, 3);
    running.kill();
    copy_with_record(&copy, &host.images[2]);
    fs::remove_file(host.record(2)).unwrap();
    let running = host.start_with(&host.images[..2], &[]);
    let image = host.images[2].to_str().unwrap();
    let (code, text) = running.blkctl(&["replace", "2.raw", image, "--force"]);
    assert_eq!(code, 0, "{text}");
    running.wait_until_healthy();
    running.end();
    let running = host.start();
    assert_eq!(running.states(), ["in-service"; 3]);
    assert_eq!(read(&mut running.client(), 0), 3);
    running.end();
    assert!(are_identical(&host.images));
}

#[test]
fn a_majority_that_was_copied_while_it_was_served_is_refused_after_a_clean_end() {
    let _machine = machine::shared();
    let (host, copies) = copied_while_served();
    for (copy, image) in copies.iter().zip(&host.images[1..]) {
        copy_with_record(copy, image);
    }
    let line = host.refusal(&host.images, &[]);
    for name in ["1.raw", "2.raw"] {
        let why = format!("'{name}': restored from an older copy");
        assert!(line.contains(&why), "{line}");
    }
    let line = host.refusal(&host.images, &["--adopt", "1.raw"]);
    assert!(line.contains("'0.raw' would be"), "{line}");
    let running = host.start_with(&host.images, &["--adopt", "0.raw"]);
    assert_eq!(read(&mut running.client(), 0), 3);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&host.images));
}

#[test]
fn a_forced_start_leaves_behind_what_was_missing() {
    let _machine = machine::shared();
    let host = ended(3);
    let one = &host.images[..1];
    let line = host.refusal(one, &[]);
    assert!(line.contains("--force-start"), "{line}");
    let running = host.start_with(one, &["--force-start", "--vote-threshold", "1"]);
    assert_eq!(running.states(), ["in-service", "missing", "missing"]);
    write(&mut running.client(), 0, 5);
    running.end();
    let running = host.start_with(&host.images, &["--vote-threshold", "1"]);
    let log = running.daemon.log();
    assert!(log.contains("left behind by a forced start"), "{log}");
    assert_eq!(read(&mut running.client(), 0), 5);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&host.images));
}

#[test]
fn two_sides_that_have_gone_on_alone_are_never_served_together() {
    let _machine = machine::shared();
    let host = ended(3);
    let (one, others) = host.images.split_at(1);
    let running = host.start_with(one, &["--force-start", "--vote-threshold", "1"]);
    write(&mut running.client(), 0, 5);
    running.end();
    let running = host.start_with(others, &[]);
    write(&mut running.client(), 0, 6);
    running.end();
    for more in [&[][..], &["--force-start"]] {
        let line = host.refusal(&host.images, more);
        assert!(line.contains("gone on without each other"), "{line}");
        for name in ["0.raw", "1.raw", "2.raw", "--adopt NODE"] {
            assert!(line.contains(name), "{line}");
        }
    }
    let contents = host.images.iter().map(|image| in_image(image, 0));
    assert_eq!(contents.collect::<Vec<_>>(), [5, 6, 6]);
    // Each side is a disk of its own.
    let running = host.start_with(others, &[]);
    assert_eq!(read(&mut running.client(), 0), 6);
    running.end();
    let running = host.start_with(&host.images, &["--adopt", "1.raw"]);
    assert_eq!(read(&mut running.client(), 0), 6);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&host.images));
    assert_eq!(in_image(&host.images[0], 0), 6);
}

/// Its vote threshold is lower then, as it would be for the first half.
#[test]
fn the_other_half_goes_on_only_if_it_is_forced() {
    let _machine = machine::shared();
    let host = Host::new(2);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    let (code, text) = running.blkctl(&["fail", "1.raw", "--force"]);
    assert_eq!(code, 0, "{text}");
    write(&mut running.client(), 0, 2);
    running.end();
    let other = &host.images[1..];
    let line = host.refusal(other, &[]);
    assert!(line.contains("and --force-start"), "{line}");
    let line = host.refusal(other, &["--vote-threshold", "1"]);
    assert!(
        line.contains("'0.raw' could have gone on without them"),
        "{line}"
    );
    let forced = ["--vote-threshold", "1", "--force-start"];
    let running = host.start_with(other, &forced);
    assert_eq!(read(&mut running.client(), 0), 1);
    running.end();
    let line = host.refusal(&host.images, &["--vote-threshold", "1"]);
    assert!(line.contains("gone on without each other"), "{line}");
}

#[test]
fn a_replica_whose_record_is_destroyed_is_copied_anew() {
    let _machine = machine::shared();
    let host = ended(3);
    let record = File::options().write(true).open(host.record(1)).unwrap();
    for offset in [0, 1 << 20] {
        record.write_all_at(&[7; 4096], offset).unwrap();
    }
    let running = host.start();
    let log = running.daemon.log();
    assert!(log.contains("its record cannot be used"), "{log}");
    running.wait_until_healthy();
    running.end();
    assert!(host.path("1.raw.quorum.unusable").exists());
}

#[test]
fn an_image_without_a_record_is_copied_as_the_line_says() {
    let _machine = machine::shared();
    let host = ended(3);
    fs::remove_file(host.record(1)).unwrap();
    let line = host.refusal(&host.images, &[]);
    let (_, command) = line.split_once("quorum-blkctl ").unwrap();
    let mut command: Vec<&str> = command
        .split(' ')
        .map(|word| word.trim_matches('\''))
        .collect();
    assert_eq!(command[..2], ["replace", "1.raw"], "{line}");
    // It holds data.
    command.push("--force");
    let others = [host.images[0].clone(), host.images[2].clone()];
    let running = host.start_with(&others, &[]);
    let (code, text) = running.blkctl(&command);
    assert_eq!(code, 0, "{text}");
    running.wait_until_healthy();
    running.end();
    let running = host.start();
    assert_eq!(running.states(), ["in-service"; 3]);
    assert_eq!(running.state()["vote-threshold"], 2);
    running.end();
}

#[test]
fn a_start_that_was_cut_short_while_it_made_the_first_records_is_repeated() {
    let _machine = machine::shared();
    let host = ended(3);
    // As if only one record had been made, and nothing was written yet.
    for index in 1..3 {
        fs::remove_file(host.record(index)).unwrap();
    }
    let made = fs::read(host.record(0)).unwrap();
    let line = host.refusal(&host.images, &[]);
    assert!(line.contains("has no record"), "{line}");
    assert!(
        fs::read(host.record(0)).unwrap() == made,
        "nothing was changed"
    );
    // A record that says nothing yet.
    let blank = vec![0; made.len()];
    fs::write(host.record(0), blank).unwrap();
    let running = host.start();
    assert_eq!(read(&mut running.client(), 0), 1);
    running.end();
    assert!(host.record(2).exists());
}
