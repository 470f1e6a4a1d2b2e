//! A disk that is ended and started again, with its records: what a replica has missed is not
//! believed, whatever ends the daemon and whichever of the images are there (S2, S3, S7, S9).

mod bad_images;
mod changed;
mod devices;
mod lost_images;
mod members;
mod results;
mod rooms;
mod subsets;
mod unsettled;
mod unwritten;

use std::cell::Cell;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::client::Client;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::create_images;
use testkit::monitor::Monitor;
use testkit::process::wait_until;
use testkit::programs;

const SIZE_BYTES: u64 = 8 << 20;
const BLOCK: usize = 4096;

/// The images of a disk, with their records, and the sockets of its daemons.
struct Host {
    directory: tempfile::TempDir,
    images: Vec<PathBuf>,
    starts: Cell<u32>,
}

/// A daemon that serves the disk.
struct Running {
    daemon: Daemon,
    monitor: PathBuf,
}

impl Host {
    /// With new images.
    fn new(replicas: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), replicas, SIZE_BYTES);
        Self {
            directory,
            images,
            starts: Cell::new(0),
        }
    }

    /// With copies of these images and records.
    fn copied(images: &[PathBuf]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let copies = images.iter().map(|image| {
            let copy = directory.path().join(image.file_name().unwrap());
            copy_with_record(image, &copy);
            copy
        });
        let images = copies.collect();
        Self {
            directory,
            images,
            starts: Cell::new(0),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The arguments for these images, and more. They say what is remembered, so that the test kit
    /// names no directory for records.
    fn arguments(&self, images: &[PathBuf], more: &[&str]) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        if !more.contains(&"--state") {
            arguments.extend(["--state".into(), "records".into()]);
        }
        arguments.extend(replica_arguments(images));
        arguments.extend(more.iter().map(Into::into));
        arguments
    }

    /// Serves the disk.
    fn start(&self) -> Running {
        self.start_with(&self.images, &[])
    }

    /// Serves the disk with these images.
    fn start_with(&self, images: &[PathBuf], more: &[&str]) -> Running {
        self.starts.set(self.starts.get() + 1);
        let sockets = self.path(&format!("run{}", self.starts.get()));
        fs::create_dir(&sockets).unwrap();
        let monitor = sockets.join("qmp.sock");
        let mut arguments = self.arguments(images, more);
        arguments.extend(["--qmp".into(), monitor.clone().into()]);
        arguments.push("--shared".into());
        Running {
            daemon: Daemon::start(&sockets, arguments),
            monitor,
        }
    }

    /// The line with which a start is refused.
    fn refusal(&self, images: &[PathBuf], more: &[&str]) -> String {
        let mut arguments = self.arguments(images, more);
        arguments.extend(["--socket-path".into(), self.path("refused.sock").into()]);
        let output = Daemon::run_to_end(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        let line = text.lines().last().unwrap_or_default();
        assert!(line.starts_with("quorum-blkd: "), "{text}");
        line.to_owned()
    }

    fn record(&self, index: usize) -> PathBuf {
        record_of(&self.images[index])
    }
}

impl Running {
    fn client(&self) -> Client {
        Client::connect(self.daemon.socket(), 1)
    }

    fn state(&self) -> Value {
        Monitor::connect(&self.monitor).execute("query-quorum", json!({}))
    }

    /// The state as soon as it `is_wanted`.
    fn state_when(&self, mut is_wanted: impl FnMut(&Value) -> bool) -> Value {
        let mut monitor = Monitor::connect(&self.monitor);
        let mut state = Value::Null;
        let came = wait_until(HANG_LIMIT, || {
            state = monitor.execute("query-quorum", json!({}));
            is_wanted(&state)
        });
        assert!(came, "{state:#}\n{}", self.daemon.log());
        state
    }

    /// Waits until all replicas are in service and stale nowhere, and no job runs.
    fn wait_until_healthy(&self) {
        self.state_when(|state| {
            let replicas = state["replicas"].as_array().unwrap();
            replicas
                .iter()
                .all(|replica| replica["state"] == "in-service")
        });
        let mut monitor = Monitor::connect(&self.monitor);
        let mut jobs = Value::Null;
        let ended = wait_until(HANG_LIMIT, || {
            jobs = monitor.execute("query-jobs", json!({}));
            jobs.as_array().unwrap().is_empty()
        });
        assert!(ended, "{jobs:#}");
    }

    /// The state of each replica, by place.
    fn states(&self) -> Vec<String> {
        let state = self.state();
        let replicas = state["replicas"].as_array().unwrap().iter();
        let states = replicas.map(|replica| replica["state"].as_str().unwrap().to_owned());
        states.collect()
    }

    /// Runs a command of `quorum-blkctl`: its exit code, and all that it printed.
    fn blkctl(&self, arguments: &[&str]) -> (i32, String) {
        let output = programs::command(programs::BLKCTL)
            .env("QUORUM_BLK_QMP", &self.monitor)
            .args(arguments)
            .output()
            .expect("running quorum-blkctl");
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        (output.status.code().expect("it ended by itself"), text)
    }

    /// Ends the daemon as an operator does.
    fn end(mut self) {
        let status = self.daemon.terminate();
        assert!(status.success(), "{}", self.daemon.log());
    }

    /// Ends it at once.
    fn kill(mut self) {
        self.daemon.signal(libc::SIGKILL);
        self.daemon.wait();
    }
}

fn record_of(image: &Path) -> PathBuf {
    let mut path = image.as_os_str().to_owned();
    path.push(".quorum");
    path.into()
}

/// The sequence number of the newest slot of a record.
fn newest_sequence(record: &Path) -> u64 {
    let file = File::open(record).unwrap();
    let slots = [0, 1 << 20].map(|offset| {
        let mut text = vec![0; 4096];
        let count = file.read_at(&mut text, offset).unwrap();
        let text = String::from_utf8_lossy(&text[..count]).into_owned();
        let number = text.split("\"sequence\": ").nth(1)?;
        number.split(',').next()?.parse::<u64>().ok()
    });
    slots.into_iter().flatten().max().expect("a slot")
}

/// Copies an image as an operator does, with its time of modification, and its record.
fn copy_with_record(from: &Path, to: &Path) {
    for (from, to) in [
        (from.to_owned(), to.to_owned()),
        (record_of(from), record_of(to)),
    ] {
        fs::copy(&from, &to).unwrap();
        let modified = fs::metadata(&from).unwrap().modified().unwrap();
        let copy = File::options().write(true).open(&to).unwrap();
        copy.set_modified(modified).unwrap();
    }
}

/// A block that holds nothing but this number.
fn block(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK / 8)
}

/// Writes a block with a number, and has it flushed.
fn write(client: &mut Client, index: u64, number: u64) {
    let offset = index * BLOCK as u64;
    client.write(0, offset, &block(number)).unwrap();
    client.flush(0).unwrap();
}

/// The number that a block of the disk has.
fn read(client: &mut Client, index: u64) -> u64 {
    let bytes = client.read(0, index * BLOCK as u64, BLOCK).unwrap();
    number_of(&bytes)
}

fn number_of(bytes: &[u8]) -> u64 {
    let number = u64::from_le_bytes(*bytes.first_chunk().unwrap());
    assert_eq!(bytes, block(number), "one number");
    number
}

/// What a block of an image has.
fn in_image(image: &Path, index: u64) -> u64 {
    let mut bytes = vec![0; BLOCK];
    let file = File::open(image).unwrap();
    file.read_exact_at(&mut bytes, index * BLOCK as u64)
        .unwrap();
    number_of(&bytes)
}

/// Another program writes to an image.
fn modify(image: &Path, index: u64, number: u64) {
    let file = File::options().write(true).open(image).unwrap();
    file.write_all_at(&block(number), index * BLOCK as u64)
        .unwrap();
    file.sync_all().unwrap();
}
