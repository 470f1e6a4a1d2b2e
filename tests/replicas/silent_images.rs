//! Images on a file system that does not answer, at the start of the daemon and when they are
//! added: what is asked to wait gives up, and nothing else waits.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::disk::{Disk, Plan, System};
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::{are_identical, create_images};
use testkit::monitor::Monitor;
use testkit::mounts;
use testkit::process::{Process, wait_until};
use testkit::programs;

const SIZE_BYTES: u64 = 4 << 20;
/// What opening an image asks of its file system, in turn.
const STEPS: [Operation; 3] = [Operation::Attributes, Operation::Open, Operation::Read];

/// Images may be anywhere.
const ANYWHERE: [&str; 2] = ["--image-dir", "/"];

/// An image that hangs at `operation`.
fn silent(directory: &Path, operation: Operation) -> FuseImage {
    let image = FuseImage::serve(&create_images(directory, 1, SIZE_BYTES)[0]);
    image.inject(operation, Fault::Hang);
    image
}

/// An image in a directory, where a process without capabilities can open it, and its path.
fn mounted(directory: &Path) -> (FuseImage, PathBuf) {
    let mount_point = directory.join("mounted");
    std::fs::create_dir(&mount_point).unwrap();
    let backing = create_images(directory, 1, SIZE_BYTES).remove(0);
    let image = FuseImage::serve_in(&mount_point, &backing);
    (image, mount_point.join("image"))
}

/// Runs a test with mounts of its own.
fn with_mounts(test: fn()) {
    let test = thread::spawn(move || {
        mounts::separate();
        test();
    });
    if let Err(panic) = test.join() {
        std::panic::resume_unwind(panic);
    }
}

/// The arguments for a disk of two images that answer and one that does not.
fn arguments(directory: &Path, silent: &FuseImage) -> Vec<OsString> {
    let place = directory.join("others");
    std::fs::create_dir(&place).unwrap();
    let mut images: Vec<PathBuf> = create_images(&place, 2, SIZE_BYTES);
    images.push(silent.path());
    let mut arguments = replica_arguments(&images);
    arguments.extend(["--socket-path".into(), directory.join("disk.sock").into()]);
    arguments
}

#[test]
fn a_start_fails_if_an_image_does_not_answer() {
    thread::scope(|scope| {
        for operation in STEPS {
            scope.spawn(move || {
                let directory = tempfile::tempdir().unwrap();
                let image = silent(directory.path(), operation);
                let output = Daemon::run_to_end(arguments(directory.path(), &image));
                // It hangs still: the daemon has not waited for it to end.
                assert!(image.asked(operation) > image.done(operation));
                let text = String::from_utf8(output.stderr).unwrap();
                assert_eq!(output.status.code(), Some(1), "{operation:?}: {text}");
                let path = image.path().display().to_string();
                let last = text.lines().last().unwrap_or_default();
                assert!(
                    last.contains(&path) && last.contains("does not answer"),
                    "{operation:?}: {text}"
                );
                assert!(!directory.path().join("disk.sock").exists());
            });
        }
    });
}

#[test]
fn sigterm_ends_a_start_that_waits_for_an_image() {
    for operation in STEPS {
        let directory = tempfile::tempdir().unwrap();
        let image = silent(directory.path(), operation);
        let mut command = programs::command(programs::DAEMON);
        command
            .args(arguments(directory.path(), &image))
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let mut daemon = Process::spawn(&mut command).unwrap();
        assert!(wait_until(HANG_LIMIT, || image.asked(operation) > 0));
        daemon.signal(libc::SIGTERM);
        let status = daemon.wait_within(HANG_LIMIT);
        assert!(status.is_some(), "{operation:?}: it still waits");
        assert!(image.asked(operation) > image.done(operation));
    }
}

fn add(monitor: &mut Monitor, image: &Path, name: &str) -> Result<Value, String> {
    let node = json!({ "driver": "file", "node-name": name, "filename": image });
    monitor.execute("blockdev-add", node);
    let change = json!({ "parent": "quorum0", "node": name });
    let added = monitor.try_execute("x-blockdev-change", change);
    added.map_err(|error| error["desc"].as_str().expect("a text").to_owned())
}

fn remove(monitor: &mut Monitor, name: &str) {
    let change = json!({ "parent": "quorum0", "child": name });
    monitor.execute("x-blockdev-change", change);
}

#[test]
fn only_its_own_command_waits_for_an_image_that_is_added() {
    with_mounts(add_beside_a_silent_one);
}

fn add_beside_a_silent_one() {
    let disk = Disk::start(
        System::Ours,
        &Plan {
            size_bytes: SIZE_BYTES,
            more: ANYWHERE.to_vec(),
            ..Plan::default()
        },
    );
    let directory = tempfile::tempdir().unwrap();
    let (image, path) = mounted(directory.path());
    image.inject(Operation::Open, Fault::Hang);
    let image = &image;
    let hangs = || image.asked(Operation::Open) > image.done(Operation::Open);
    let names = |monitor: &mut Monitor| {
        let state = monitor.execute("query-quorum", json!({}));
        let replicas = state["replicas"].as_array().expect("replicas").clone();
        replicas.len()
    };
    thread::scope(|scope| {
        let (mut waiting, mut monitor) = (disk.monitor(), disk.monitor());
        let added = scope.spawn(move || add(&mut waiting, &path, "silent"));
        assert!(wait_until(HANG_LIMIT, || image.asked(Operation::Open) > 0));
        // Meanwhile, another image is added, resynced and removed.
        let other = directory.path().join("other");
        std::fs::create_dir(&other).unwrap();
        let other = create_images(&other, 1, SIZE_BYTES).remove(0);
        add(&mut monitor, &other, "other").unwrap();
        let is_synced = || monitor.execute("query-jobs", json!({})) == json!([]);
        assert!(wait_until(HANG_LIMIT, is_synced));
        assert_eq!(names(&mut monitor), 4);
        let change = json!({ "parent": "quorum0", "node": "silent" });
        let again = monitor
            .try_execute("x-blockdev-change", change)
            .unwrap_err();
        let why = again["desc"].as_str().unwrap().to_owned();
        let is_late = added.is_finished();
        assert!(why.contains("is being added") || is_late, "{why}");
        remove(&mut monitor, "other");
        assert_eq!(names(&mut monitor), 3);
        assert!(hangs());
        let error = added.join().unwrap().expect_err("it hangs still");
        assert!(error.contains("does not answer"), "{error}");
        assert!(hangs());

        // As soon as it answers, it can be added.
        image.clear_faults();
        let change = json!({ "parent": "quorum0", "node": "silent" });
        monitor.execute("x-blockdev-change", change);
        assert_eq!(names(&mut monitor), 4);
        let is_synced = || monitor.execute("query-jobs", json!({})) == json!([]);
        assert!(wait_until(HANG_LIMIT, is_synced));
    });
    disk.end();
    assert!(are_identical(&disk.images));
}

#[test]
fn sigterm_ends_the_daemon_while_an_image_is_added_that_does_not_answer() {
    with_mounts(end_while_a_silent_one_is_added);
}

fn end_while_a_silent_one_is_added() {
    let disk = Disk::start(
        System::Ours,
        &Plan {
            size_bytes: SIZE_BYTES,
            more: ANYWHERE.to_vec(),
            ..Plan::default()
        },
    );
    for operation in STEPS {
        let directory = tempfile::tempdir().unwrap();
        let (image, path) = mounted(directory.path());
        image.inject(operation, Fault::Hang);
        let mut monitor = disk.monitor();
        let name = format!("{operation:?}");
        let node = json!({ "driver": "file", "node-name": name, "filename": path });
        monitor.execute("blockdev-add", node);
        let change = json!({ "parent": "quorum0", "node": name });
        monitor.send("x-blockdev-change", change);
        assert!(wait_until(HANG_LIMIT, || image.asked(operation) > 0));
        if operation == STEPS[2] {
            disk.end();
            assert!(image.asked(operation) > image.done(operation));
        }
    }
}
