//! Which of the images may be started without the others, and what they return.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::are_identical;
use testkit::machine;
use testkit::process::wait_until;
use testkit::programs;

use super::{
    BLOCK, Host, Running, block, copy_with_record, in_image, modify, newest_sequence, number_of,
    read, record_of, write,
};
use testkit::client::Request;

/// All subsets of three images, in order, but the empty one.
fn subsets(images: &[PathBuf]) -> impl Iterator<Item = (Vec<usize>, Vec<PathBuf>)> + '_ {
    (1_usize..8).map(|bits| {
        let places: Vec<usize> = (0..3).filter(|place| bits >> place & 1 == 1).collect();
        let chosen = places.iter().map(|place| images[*place].clone());
        (places.clone(), chosen.collect())
    })
}

/// Starts the disk with each subset: the third image lacks what block 1 holds, number 2.
fn start_each(images: &[PathBuf]) {
    for (places, chosen) in subsets(images) {
        let host = Host::copied(&chosen);
        if places.len() == 1 {
            let line = host.refusal(&host.images, &[]);
            assert!(line.contains("could have gone on without"), "{line}");
            continue;
        }
        let running = host.start();
        let mut client = running.client();
        assert_eq!(read(&mut client, 0), 1, "{places:?}");
        let new = client.read(0, BLOCK as u64, BLOCK);
        match (new, places.contains(&0) && places.contains(&1)) {
            (Ok(bytes), _) => assert_eq!(number_of(&bytes), 2, "{places:?}"),
            // One copy is less than the vote threshold.
            (Err(_), false) => {}
            (Err(failed), true) => panic!("{places:?}: {failed:?}"),
        }
        if places.len() == 3 {
            drop(client);
            running.wait_until_healthy();
            running.end();
            assert!(are_identical(&host.images));
            assert_eq!(in_image(&host.images[2], 1), 2);
        }
    }
}

/// A disk whose third image is behind a server that can fail.
struct Faulty {
    host: Host,
    fuse: FuseImage,
    state: PathBuf,
}

impl Faulty {
    fn new() -> Self {
        let host = Host::new(3);
        let fuse = FuseImage::serve(&host.images[2]);
        let state = host.path("state");
        fs::create_dir(&state).unwrap();
        Self { host, fuse, state }
    }

    fn start(&self) -> Running {
        let mut images = self.host.images.clone();
        images[2] = self.fuse.path();
        let timeout = Duration::from_secs(1).as_millis().to_string();
        let state = self.state.to_str().unwrap();
        let more = ["--state-dir", state, "--replica-timeout", &timeout];
        self.host.start_with(&images, &more)
    }

    /// Kills the daemon, and copies the images with their records. That of the third image is in
    /// the state directory.
    fn copied_when_killed(&self, running: Running) -> Copies {
        running.kill();
        self.fuse.clear_faults();
        let directory = tempfile::tempdir().unwrap();
        let mut records = fs::read_dir(&self.state)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let images = self.host.images.iter().enumerate();
        let copied = images.map(|(place, image)| {
            let copy = directory.path().join(format!("{place}.raw"));
            match place {
                2 => {
                    fs::copy(image, &copy).unwrap();
                    fs::copy(records.next().unwrap(), record_of(&copy)).unwrap();
                }
                _ => copy_with_record(image, &copy),
            }
            copy
        });
        let images = copied.collect();
        Copies {
            images,
            _directory: directory,
        }
    }
}

/// Copies of the images of a disk.
struct Copies {
    images: Vec<PathBuf>,
    _directory: tempfile::TempDir,
}

#[test]
fn what_an_evicted_replica_has_missed_is_not_believed_after_a_kill() {
    let _machine = machine::shared();
    let disk = Faulty::new();
    let _clear = disk.fuse.fault_guard();
    let running = disk.start();
    let mut client = running.client();
    write(&mut client, 0, 1);
    disk.fuse.inject(Operation::Write, Fault::Hang);
    write(&mut client, 1, 2);
    assert_eq!(running.states(), ["in-service", "in-service", "evicted"]);
    drop(client);
    let copies = disk.copied_when_killed(running);
    start_each(&copies.images);
}

/// One write after the other fails there: the records are not written for each of them.
#[test]
fn what_a_replica_has_missed_again_and_again_is_not_believed_after_a_kill() {
    let _machine = machine::shared();
    let disk = Faulty::new();
    let _clear = disk.fuse.fault_guard();
    let running = disk.start();
    let mut client = running.client();
    write(&mut client, 0, 1);
    disk.fuse
        .inject(Operation::Write, Fault::Fail(libc::ENOSPC));
    let record = record_of(&disk.host.images[0]);
    let before = newest_sequence(&record);
    for number in 0..100 {
        client.write(0, BLOCK as u64, &block(number)).unwrap();
    }
    write(&mut client, 1, 2);
    let written = newest_sequence(&record) - before;
    assert!((1..20).contains(&written), "{written} rounds");
    drop(client);
    let copies = disk.copied_when_killed(running);
    start_each(&copies.images);
}

#[test]
fn what_a_failed_flush_may_have_lost_is_not_believed_after_a_kill() {
    let _machine = machine::shared();
    let disk = Faulty::new();
    let _clear = disk.fuse.fault_guard();
    let running = disk.start();
    let mut client = running.client();
    write(&mut client, 0, 1);
    disk.fuse
        .inject(Operation::Sync, Fault::FailOnce(libc::EIO));
    write(&mut client, 1, 2);
    drop(client);
    let copies = disk.copied_when_killed(running);
    // Linux drops what it cannot write back.
    modify(&copies.images[2], 1, 0);
    start_each(&copies.images);
}

#[test]
fn what_a_missing_replica_has_missed_is_not_believed_after_any_end() {
    let _machine = machine::shared();
    for is_killed in [false, true] {
        let host = Host::new(3);
        let running = host.start();
        write(&mut running.client(), 0, 1);
        running.end();
        let elsewhere = host.path("elsewhere");
        fs::rename(&host.images[2], &elsewhere).unwrap();
        let running = host.start();
        assert_eq!(running.states(), ["in-service", "in-service", "missing"]);
        write(&mut running.client(), 1, 2);
        match is_killed {
            true => running.kill(),
            false => running.end(),
        }
        fs::rename(&elsewhere, &host.images[2]).unwrap();
        start_each(&host.images);
    }
}

#[test]
fn an_image_that_is_not_the_missing_replica_is_not_taken_in() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.end();
    let elsewhere = host.path("elsewhere");
    fs::rename(&host.images[2], &elsewhere).unwrap();
    let running = host.start();
    let (code, text) = running.blkctl(&["status"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("2.raw") && text.contains("missing"), "{text}");
    assert!(
        text.contains("it is taken in when it can be used"),
        "{text}"
    );
    write(&mut running.client(), 1, 2);
    // An image that is not the member is not taken in.
    let other = Host::new(1);
    let of_other = other.start();
    of_other.end();
    let until = |text: &str, happens: &dyn Fn()| {
        happens();
        running.state_when(|state| {
            let replica = &state["replicas"][2];
            assert_eq!(replica["state"], "missing", "it was taken in");
            let reason = replica["missing-reason"].as_str();
            reason.is_some_and(|reason| reason.contains(text))
        });
    };
    until("of disk", &|| {
        copy_with_record(&other.images[0], &host.images[2])
    });
    until("is the image of replica '1.raw'", &|| {
        copy_with_record(&host.images[1], &host.images[2]);
    });
    // Its own image, but no record.
    until("has no record", &|| {
        fs::rename(&elsewhere, &host.images[2]).unwrap();
        fs::remove_file(host.record(2)).unwrap();
    });
    running.end();
}

#[test]
fn a_replica_that_returns_while_the_disk_is_served_gets_what_it_has_missed() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.end();
    let elsewhere = host.path("elsewhere");
    fs::rename(&host.images[2], &elsewhere).unwrap();
    let running = host.start();
    write(&mut running.client(), 1, 2);
    fs::rename(&elsewhere, &host.images[2]).unwrap();
    running.wait_until_healthy();
    write(&mut running.client(), 2, 3);
    running.kill();
    start_each(&host.images);
    let images = &host.images;
    assert!(
        [0, 1, 2]
            .iter()
            .all(|block| in_image(&images[2], *block) == block + 1)
    );
}

#[test]
fn what_a_replica_was_given_is_durable_after_a_clean_end() {
    let _machine = machine::shared();
    let host = Host::new(3);
    host.start().end();
    let elsewhere = host.path("elsewhere");
    fs::rename(&host.images[2], &elsewhere).unwrap();
    let running = host.start();
    write(&mut running.client(), 1, 2);
    fs::rename(&elsewhere, &host.images[2]).unwrap();
    running.wait_until_healthy();
    // No flush of a guest has made the copy durable, but the end does.
    running.end();
    let running = host.start();
    let log = running.daemon.log();
    assert!(!log.contains("not up to date"), "{log}");
    running.end();
}

#[test]
fn a_replica_that_was_copied_is_up_to_date_after_a_kill() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.end();
    modify(&host.images[2], 0, 99);
    let running = host.start();
    running.wait_until_healthy();
    let is_recorded = || {
        let output = programs::command(programs::BLKCTL)
            .args(["inspect", "--json"])
            .args(&host.images)
            .output()
            .unwrap();
        let inspected: Value = serde_json::from_slice(&output.stdout).unwrap();
        let members = &inspected["images"][0]["kept"]["record"]["members"];
        members[2]["stale"] == "nowhere"
    };
    assert!(wait_until(HANG_LIMIT, is_recorded));
    running.kill();
    let running = host.start_with(&host.images[1..], &[]);
    assert_eq!(read(&mut running.client(), 0), 1);
    running.end();
}

#[test]
fn what_was_in_flight_at_a_kill_is_old_or_new_and_the_same_for_ever() {
    let _machine = machine::shared();
    let host = Host::new(3);
    for round in 1..4_u64 {
        let running = host.start();
        let mut client = running.client();
        let before: Vec<u64> = (0..256).map(|index| read(&mut client, index)).collect();
        let again: Vec<u64> = (0..256).map(|index| read(&mut client, index)).collect();
        assert_eq!(before, again);
        assert!(before.iter().all(|number| *number < round), "{before:?}");
        write(&mut client, 300, round);
        for (index, bytes) in client.memory(0).chunks_mut(BLOCK).take(256).enumerate() {
            let _ = index;
            bytes.copy_from_slice(&block(round));
        }
        client.send(0, &Request::writes(256, BLOCK));
        running.kill();
        drop(client);
    }
    let running = host.start();
    let mut client = running.client();
    assert_eq!(read(&mut client, 300), 3, "what was flushed");
    drop(client);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&host.images));
}

/// Nothing but the start makes it begin.
#[test]
fn a_disk_that_no_guest_uses_is_recovered() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.kill();
    let running = host.start();
    let state = running.state_when(|state| state["unrecovered-bytes"] == 0);
    assert_eq!(state["conditions"], json!([]), "{state:#}");
    running.end();
}

#[test]
fn a_single_image_is_a_disk_as_well() {
    let _machine = machine::shared();
    let host = Host::new(1);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.kill();
    let running = host.start();
    assert_eq!(read(&mut running.client(), 0), 1);
    running.end();
    let running = host.start();
    assert_eq!(read(&mut running.client(), 0), 1);
    running.end();
}

/// The first and the third image have failed writes of block 1. The third one holds the last one,
/// but has missed so many that the records say only roughly which.
#[test]
fn what_only_a_missing_replica_holds_is_waited_for() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let served = [0, 2].map(|place| FuseImage::serve(&host.images[place]));
    let _clear = served.each_ref().map(FuseImage::fault_guard);
    let state = host.path("state");
    fs::create_dir(&state).unwrap();
    let images = [served[0].path(), host.images[1].clone(), served[1].path()];
    // The records are looked through once in eight times this.
    let timeout = Duration::from_secs(30).as_millis().to_string();
    let state = state.to_str().unwrap();
    let options = ["--state-dir", state, "--replica-timeout", &timeout];
    let running = host.start_with(&images, &options);
    let mut client = running.client();
    write(&mut client, 1, 1);
    served[1].inject(Operation::Write, Fault::Fail(libc::ENOSPC));
    for number in 0..100 {
        client.write(0, BLOCK as u64, &block(number)).unwrap();
    }
    served[0].inject(Operation::Write, Fault::Fail(libc::ENOSPC));
    served[1].clear_faults();
    write(&mut client, 1, 2);
    drop(client);
    running.kill();
    served[0].clear_faults();
    let others = [images[0].clone(), images[2].clone()];
    let line = host.refusal(&others, &options);
    assert!(line.contains("only '1.raw' may hold"), "{line}");
    let running = host.start_with(&images, &options);
    assert_eq!(read(&mut running.client(), 1), 2);
    running.kill();
    // It is still the only one, or the others have a copy.
    let running = host.start_with(&images, &options);
    assert_eq!(read(&mut running.client(), 1), 2);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&host.images));
}
