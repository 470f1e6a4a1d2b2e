//! An image that is there and cannot be used: the disk is started without it, and it is taken in
//! with what it has missed when it is good again.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use quorum_blk::limits::{MISSING_RETRY_INTERVAL, OPEN_LIMIT, RECORD_EXTENT_BYTES_MIN};
use quorum_blk::replica::file;
use testkit::HANG_LIMIT;
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::are_identical;
use testkit::machine;
use testkit::process::{Process, wait_until};
use testkit::programs;

use super::{BLOCK, Host, Running, SIZE_BYTES, in_image, read, write};
use crate::image_locks::{StorageDaemon, WRITABLE};

const SECTORS: u64 = SIZE_BYTES / 512;
const EXTENT_SECTORS: u64 = RECORD_EXTENT_BYTES_MIN / 512;
const BLOCKS: u64 = SIZE_BYTES / BLOCK as u64;
/// What opening an image asks of its file system, in turn.
const STEPS: [Operation; 3] = [Operation::Attributes, Operation::Open, Operation::Read];
const ENDS: [End; 2] = [End::Clean, End::Kill];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Clean,
    Kill,
}

impl End {
    fn of(self, running: Running) {
        match self {
            Self::Clean => running.end(),
            Self::Kill => running.kill(),
        }
    }
}

/// A disk of which the last image, and perhaps its record, are behind servers that can fail.
struct Served {
    host: Host,
    image: FuseImage,
    state: PathBuf,
}

impl Served {
    /// With what [`fill`] writes, and ended.
    fn new(replicas: usize, end: End) -> Self {
        let host = Host::new(replicas);
        let image = FuseImage::serve(host.images.last().unwrap());
        let state = host.path("state");
        fs::create_dir(&state).unwrap();
        let served = Self { host, image, state };
        fill(served.start(), end, || served.start());
        served
    }

    fn images(&self) -> Vec<PathBuf> {
        let mut images = self.host.images.clone();
        *images.last_mut().unwrap() = self.image.path();
        images
    }

    fn start(&self) -> Running {
        let more = ["--state-dir", self.state.to_str().unwrap()];
        self.host.start_with(&self.images(), &more)
    }

    /// The record of the last image, from now on behind a server.
    fn serve_record(&mut self) -> FuseImage {
        let entry = fs::read_dir(&self.state).unwrap().next().unwrap().unwrap();
        let name = entry.file_name().into_string().unwrap();
        let record = FuseImage::serve_as(&entry.path(), &name);
        self.state = record.directory();
        record
    }
}

/// Writes block 0 in a run that ends cleanly, and the last one in a run that ends so: then block 0
/// is not marked.
fn fill(first: Running, end: End, start: impl Fn() -> Running) {
    write(&mut first.client(), 0, 1);
    first.end();
    let running = start();
    write(&mut running.client(), BLOCKS - 1, 2);
    end.of(running);
}

fn filled(end: End) -> Host {
    let host = Host::new(3);
    fill(host.start(), end, || host.start());
    host
}

/// The disk is served without its last image for this reason, and written to.
fn goes_on_without_the_last(running: &Running, why: &str) {
    let state = running.state();
    let replicas = state["replicas"].as_array().unwrap();
    let (last, others) = replicas.split_last().unwrap();
    let are_in_service = others
        .iter()
        .all(|replica| replica["state"] == "in-service");
    assert!(are_in_service, "{state:#}");
    assert_eq!(last["state"], "missing", "{state:#}");
    let reason = last["missing-reason"].as_str().unwrap();
    assert!(reason.contains(why), "{reason}");
    let (code, text) = running.blkctl(&["status"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("missing"), "{text}");
    let mut client = running.client();
    assert_eq!(read(&mut client, 0), 1);
    assert_eq!(read(&mut client, BLOCKS - 1), 2);
    write(&mut client, BLOCKS / 2, 3);
}

/// Waits until the last replica is in service with all it has missed. How many sectors were copied.
fn returns(running: &Running) -> u64 {
    running.wait_until_healthy();
    let mut client = running.client();
    assert_eq!(read(&mut client, 0), 1);
    assert_eq!(read(&mut client, BLOCKS - 1), 2);
    assert_eq!(read(&mut client, BLOCKS / 2), 3);
    let state = running.state();
    let last = state["replicas"].as_array().unwrap().last().unwrap();
    assert_eq!(last["corrupt-sectors-found"], 0, "{last:#}");
    last["resynced-sectors"].as_u64().unwrap()
}

/// The same, after which the disk is ended. At most the extents are copied that were changed
/// without it, and those that no flush of all had covered at a kill; not that of block 0.
fn returns_with_what_it_has_missed(host: &Host, running: Running, end: End) {
    let extents = match end {
        End::Clean => 1,
        End::Kill => 2,
    };
    let copied = returns(&running);
    // Less where marks were taken away meanwhile.
    let expected = BLOCK as u64 / 512..=extents * EXTENT_SECTORS;
    assert!(expected.contains(&copied), "{copied} sectors");
    running.end();
    assert!(are_identical(&host.images));
}

#[test]
fn an_image_that_cannot_be_opened_is_left_out() {
    let _machine = machine::shared();
    for (end, is_loop) in [(End::Clean, true), (End::Kill, false)] {
        let host = filled(end);
        let (image, elsewhere) = (&host.images[2], host.path("elsewhere"));
        fs::rename(image, &elsewhere).unwrap();
        let why = if is_loop {
            symlink(image, image).unwrap();
            "symbolic links"
        } else {
            fs::create_dir(image).unwrap();
            "is a directory"
        };
        let running = host.start();
        goes_on_without_the_last(&running, why);
        if is_loop {
            fs::remove_file(image).unwrap();
        } else {
            fs::remove_dir(image).unwrap();
        }
        fs::rename(&elsewhere, image).unwrap();
        returns_with_what_it_has_missed(&host, running, end);
    }
}

#[test]
fn an_image_that_another_process_uses_is_left_out() {
    let _machine = machine::shared();
    for end in ENDS {
        let host = filled(end);
        // QEMU does not wait until a process that was killed has closed it.
        drop(file::open(&host.images[2], "2.raw", WRITABLE).unwrap());
        let other = StorageDaemon::serve(&host.images[2], true);
        let running = host.start();
        goes_on_without_the_last(&running, "in use by another process");
        drop(other);
        returns_with_what_it_has_missed(&host, running, end);
    }
}

#[test]
fn an_image_whose_file_system_fails_is_left_out() {
    let _machine = machine::shared();
    // A root user may open any file, but a server may refuse it.
    let faults = [
        (Operation::Attributes, libc::EIO, "Input/output error"),
        (Operation::Open, libc::EIO, "Input/output error"),
        (Operation::Open, libc::EACCES, "Permission denied"),
    ];
    for (operation, errno, why) in faults {
        for end in ENDS {
            let disk = Served::new(3, end);
            let _clear = disk.image.fault_guard();
            disk.image.inject(operation, Fault::Fail(errno));
            let running = disk.start();
            goes_on_without_the_last(&running, why);
            disk.image.clear_faults();
            returns_with_what_it_has_missed(&disk.host, running, end);
        }
    }
}

/// It may be one bad block, and all that is written to it counts.
#[test]
fn an_image_of_which_nothing_can_be_read_is_not_left_out() {
    let _machine = machine::shared();
    for end in ENDS {
        let disk = Served::new(3, end);
        let _clear = disk.image.fault_guard();
        disk.image.inject(Operation::Read, Fault::Fail(libc::EIO));
        let running = disk.start();
        let mut client = running.client();
        assert_eq!(read(&mut client, 0), 1);
        assert_eq!(read(&mut client, BLOCKS - 1), 2);
        write(&mut client, BLOCKS / 2, 3);
        assert_eq!(read(&mut client, BLOCKS / 2), 3);
        drop(client);
        let state = running.state();
        let last = &state["replicas"][2];
        assert_ne!(last["state"], "missing", "{state:#}");
        assert!(last["errors"]["read"].as_u64() > Some(0), "{last:#}");
        disk.image.clear_faults();
        running.wait_until_healthy();
        running.end();
        assert!(are_identical(&disk.host.images));
    }
}

#[test]
fn an_image_whose_record_cannot_be_read_is_left_out() {
    let _machine = machine::shared();
    for end in ENDS {
        let mut disk = Served::new(3, end);
        let record = disk.serve_record();
        let _clear = [disk.image.fault_guard(), record.fault_guard()];
        record.inject(Operation::Read, Fault::Fail(libc::EIO));
        let running = disk.start();
        // It cannot be replaced there either.
        goes_on_without_the_last(&running, "cannot be used");
        record.clear_faults();
        returns_with_what_it_has_missed(&disk.host, running, end);
        drop(record);
    }
}

/// Starts the disk, whose last image does not answer.
fn start_in_time(start: impl FnOnce() -> Running) -> Running {
    let since = Instant::now();
    let running = start();
    // One step of it has no answer, and what else a start does takes no second.
    let took = since.elapsed();
    assert!(took < OPEN_LIMIT + OPEN_LIMIT / 2, "{took:?}");
    running
}

#[test]
fn an_image_that_does_not_answer_is_left_out() {
    let _machine = machine::shared();
    let check = |operation, end| {
        let disk = Served::new(3, end);
        let image = &disk.image;
        let _clear = image.fault_guard();
        image.inject(operation, Fault::Hang);
        let running = start_in_time(|| disk.start());
        goes_on_without_the_last(&running, "does not answer");
        // It hangs still, and is asked again.
        let asked = image.asked(operation);
        assert!(asked > image.done(operation));
        let is_tried = || image.asked(operation) > asked;
        assert!(wait_until(HANG_LIMIT, is_tried));
        image.clear_faults();
        returns_with_what_it_has_missed(&disk.host, running, end);
    };
    thread::scope(|scope| {
        for operation in STEPS {
            for end in ENDS {
                scope.spawn(move || check(operation, end));
            }
        }
    });
}

#[test]
fn an_image_whose_record_does_not_answer_is_left_out() {
    let _machine = machine::shared();
    let mut disk = Served::new(3, End::Clean);
    let record = disk.serve_record();
    let _clear = [disk.image.fault_guard(), record.fault_guard()];
    record.inject(Operation::Read, Fault::Hang);
    let running = start_in_time(|| disk.start());
    goes_on_without_the_last(&running, "does not answer");
    assert!(record.asked(Operation::Read) > record.done(Operation::Read));
    record.clear_faults();
    returns_with_what_it_has_missed(&disk.host, running, End::Clean);
    drop(record);
}

#[test]
fn too_many_images_that_do_not_answer_fail_the_start() {
    let _machine = machine::shared();
    let disk = Served::new(3, End::Clean);
    let image = &disk.image;
    let _clear = image.fault_guard();
    image.inject(Operation::Open, Fault::Hang);
    fs::rename(&disk.host.images[1], disk.host.path("elsewhere")).unwrap();
    let more = ["--state-dir", disk.state.to_str().unwrap()];
    let since = Instant::now();
    let line = disk.host.refusal(&disk.images(), &more);
    let took = since.elapsed();
    assert!(took < OPEN_LIMIT + OPEN_LIMIT / 2, "{took:?}");
    assert!(line.contains("could have gone on without"), "{line}");
    assert!(line.contains("does not answer"), "{line}");
    assert!(image.asked(Operation::Open) > image.done(Operation::Open));
}

#[test]
fn sigterm_ends_a_start_with_records_that_waits_for_an_image() {
    let _machine = machine::shared();
    for operation in STEPS {
        let disk = Served::new(3, End::Kill);
        let image = &disk.image;
        let _clear = image.fault_guard();
        let asked = image.asked(operation);
        image.inject(operation, Fault::Hang);
        let more = ["--state-dir", disk.state.to_str().unwrap()];
        let mut arguments = disk.host.arguments(&disk.images(), &more);
        arguments.extend(["--socket-path".into(), disk.host.path("disk.sock").into()]);
        let mut command = programs::command(programs::DAEMON);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let mut daemon = Process::spawn(&mut command).unwrap();
        assert!(wait_until(HANG_LIMIT, || image.asked(operation) > asked));
        let since = Instant::now();
        daemon.signal(libc::SIGTERM);
        let status = daemon.wait_within(HANG_LIMIT);
        assert!(status.is_some(), "{operation:?}: it still waits");
        let took = since.elapsed();
        assert!(took < OPEN_LIMIT / 2, "{operation:?}: {took:?}");
        assert!(image.asked(operation) > image.done(operation));
        // It has changed nothing.
        image.clear_faults();
        let running = disk.start();
        running.wait_until_healthy();
        assert_eq!(read(&mut running.client(), BLOCKS - 1), 2);
        running.end();
        assert!(are_identical(&disk.host.images));
    }
}

#[test]
fn sigterm_ends_a_daemon_that_tries_an_image_which_does_not_answer() {
    let _machine = machine::shared();
    let disk = Served::new(3, End::Clean);
    let image = &disk.image;
    let _clear = image.fault_guard();
    image.inject(Operation::Open, Fault::Fail(libc::EIO));
    let running = disk.start();
    goes_on_without_the_last(&running, "Input/output error");
    let asked = image.asked(Operation::Open);
    image.inject(Operation::Open, Fault::Hang);
    assert!(wait_until(HANG_LIMIT, || image.asked(Operation::Open) > asked));
    let since = Instant::now();
    running.end();
    let took = since.elapsed();
    assert!(took < OPEN_LIMIT / 2, "{took:?}");
    assert!(image.asked(Operation::Open) > image.done(Operation::Open));
    image.clear_faults();
    // The records say exactly what it has missed by then.
    let running = disk.start();
    assert_eq!(returns(&running), BLOCK as u64 / 512);
    running.end();
    assert!(are_identical(&disk.host.images));
}

/// A process that waits for a FUSE server cannot be killed.
#[test]
fn an_image_that_does_not_answer_leaves_few_processes_behind() {
    let _machine = machine::shared();
    let disk = Served::new(3, End::Clean);
    let image = &disk.image;
    let _clear = image.fault_guard();
    image.inject(Operation::Open, Fault::Hang);
    let running = disk.start();
    let asked = image.asked(Operation::Open);
    goes_on_without_the_last(&running, "does not answer");
    // A try begins after the usual time, and has 20 s. Two processes wait then, and the next try
    // comes after four times as long, not after the usual time again.
    thread::sleep(OPEN_LIMIT + 3 * MISSING_RETRY_INTERVAL + Duration::from_secs(3));
    assert_eq!(image.asked(Operation::Open), asked + 1);
    assert_eq!(
        image.asked(Operation::Open) - image.done(Operation::Open),
        2
    );
    image.clear_faults();
    let since = Instant::now();
    running.state_when(|state| state["replicas"][2]["state"] == "in-service");
    let took = since.elapsed();
    assert!(took < 3 * MISSING_RETRY_INTERVAL, "{took:?}");
    returns_with_what_it_has_missed(&disk.host, running, End::Clean);
}

/// Five replicas, since three of them are to be in service.
#[test]
fn a_missing_image_that_does_not_answer_delays_no_other_one() {
    let _machine = machine::shared();
    let disk = Served::new(5, End::Clean);
    let image = &disk.image;
    let _clear = image.fault_guard();
    image.inject(Operation::Open, Fault::Fail(libc::EIO));
    let (absent, elsewhere) = (&disk.host.images[3], disk.host.path("elsewhere"));
    fs::rename(absent, &elsewhere).unwrap();
    let running = disk.start();
    let states = ["in-service", "in-service", "in-service"];
    let both = [&states[..], &["missing", "missing"]].concat();
    assert_eq!(running.states(), both);
    write(&mut running.client(), BLOCKS / 2, 3);
    image.inject(Operation::Open, Fault::Hang);
    let asked = image.asked(Operation::Open);
    assert!(wait_until(HANG_LIMIT, || image.asked(Operation::Open) > asked));
    fs::rename(&elsewhere, absent).unwrap();
    let since = Instant::now();
    running.state_when(|state| state["replicas"][3]["state"] == "in-service");
    let took = since.elapsed();
    assert!(took < OPEN_LIMIT - Duration::from_secs(4), "{took:?}");
    assert_eq!(image.asked(Operation::Open), asked + 1);
    assert!(image.asked(Operation::Open) > image.done(Operation::Open));
    image.clear_faults();
    returns_with_what_it_has_missed(&disk.host, running, End::Clean);
}

/// What was cut off is lost, whatever the image has there when it has its length again.
#[test]
fn an_image_that_was_shorter_than_the_disk_is_copied_as_a_whole() {
    let _machine = machine::shared();
    for end in ENDS {
        for length in [512, SIZE_BYTES / 2] {
            let host = filled(end);
            let image = File::options().write(true).open(&host.images[2]);
            let image = image.unwrap();
            image.set_len(length).unwrap();
            let running = host.start();
            goes_on_without_the_last(&running, "less than the disk");
            image.set_len(SIZE_BYTES).unwrap();
            assert_eq!(returns(&running), SECTORS, "{end:?}, {length} bytes");
            running.end();
            assert!(are_identical(&host.images));
            assert_eq!(in_image(&host.images[2], 0), 1);
        }
    }
}

/// The records say so, since nothing else shows it after a kill.
#[test]
fn an_image_that_was_shorter_than_the_disk_is_not_believed_after_another_start() {
    let _machine = machine::shared();
    for end in ENDS {
        let host = filled(End::Kill);
        let image = File::options().write(true).open(&host.images[2]);
        let image = image.unwrap();
        image.set_len(512).unwrap();
        let running = host.start();
        goes_on_without_the_last(&running, "less than the disk");
        end.of(running);
        image.set_len(SIZE_BYTES).unwrap();
        let running = host.start();
        let log = running.daemon.log();
        assert!(log.contains("has to be copied as a whole"), "{log}");
        assert_eq!(returns(&running), SECTORS, "{end:?}");
        running.end();
        assert!(are_identical(&host.images));
    }
}

/// One has the place of an image whose file system is not mounted yet.
#[test]
fn an_empty_file_in_the_place_of_an_image_is_not_taken_for_it() {
    let _machine = machine::shared();
    let host = filled(End::Kill);
    let elsewhere = host.path("elsewhere");
    fs::rename(&host.images[2], &elsewhere).unwrap();
    File::create(&host.images[2]).unwrap();
    let running = host.start();
    goes_on_without_the_last(&running, "less than the disk");
    let lost = running.state_when(|state| state["replicas"][2]["state"] == "missing");
    assert!(lost["replicas"][2]["stale-bytes"].as_u64() < Some(SIZE_BYTES));
    fs::rename(&elsewhere, &host.images[2]).unwrap();
    assert!(
        returns(&running) < SECTORS,
        "only what it has missed is copied"
    );
    running.end();
    assert!(are_identical(&host.images));
}

/// It was not there at the start, and the image that is there now lost what it held.
#[test]
fn an_image_that_was_shorter_than_the_disk_when_it_came_back_is_not_believed() {
    let _machine = machine::shared();
    for is_ended in [false, true] {
        let host = filled(End::Kill);
        let elsewhere = host.path("elsewhere");
        fs::rename(&host.images[2], &elsewhere).unwrap();
        let running = host.start();
        goes_on_without_the_last(&running, "No such file");
        let image = File::options().write(true).open(&elsewhere).unwrap();
        image.set_len(512).unwrap();
        fs::rename(&elsewhere, &host.images[2]).unwrap();
        running.state_when(|state| {
            let last = &state["replicas"][2];
            let reason = last["missing-reason"].as_str().unwrap();
            reason.contains("less than the disk") && last["stale-bytes"] == SIZE_BYTES
        });
        let running = if is_ended {
            // The records have it as soon as a flush is answered.
            write(&mut running.client(), BLOCKS / 2, 3);
            running.kill();
            image.set_len(SIZE_BYTES).unwrap();
            host.start()
        } else {
            image.set_len(SIZE_BYTES).unwrap();
            running
        };
        assert_eq!(returns(&running), SECTORS, "{is_ended}");
        running.end();
        assert!(are_identical(&host.images));
    }
}
