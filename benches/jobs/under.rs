//! The disk that is measured: its images, the daemon that serves it, its guest and its operator.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::common::client::Client;
use super::common::daemon::{Daemon, replica_arguments};
use super::common::images::create_images;
use super::common::monitor::Monitor;
use super::disk_plan::Storage;
use super::drive::drive;
use super::guest::{GuestQueue, QUEUE_SIZE};
use super::interrupt::{self, Interrupted};
use super::requests::{Requests, WriteData};
use super::rows::{DISK_BYTES, JobKind, Row};

const REPLICAS: usize = 3;
/// The one that is brought up to date.
const STALE: &str = "2.raw";
const FILL_BYTES: usize = 1 << 20;
/// Before anything is counted: the daemon finds its pace.
const LEAD_IN: Duration = Duration::from_millis(200);

/// The images, full of data that is the same in all.
pub struct Machine {
    storage: Storage,
    images: Vec<PathBuf>,
    directory: TempDir,
}

/// A pair of measurements: a second of each.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Requests of the guest while the job is paused.
    pub alone: f64,
    /// Requests of the guest while it runs.
    pub beside: f64,
    /// Bytes of the disk that it does.
    pub job_bytes: f64,
}

/// The disk while it is served.
pub struct Served<'a> {
    // The queue must go before the daemon ends.
    client: Client,
    monitor: Monitor,
    daemon: Daemon,
    machine: &'a Machine,
    row: Row,
    _sockets: TempDir,
}

impl Machine {
    pub fn new(storage: Storage, directory: &Path) -> Result<Self, Interrupted> {
        let directory = tempfile::tempdir_in(directory).expect("creating a directory for images");
        let images = create_images(directory.path(), REPLICAS, *DISK_BYTES);
        let files: Vec<File> = open(&images).collect();
        let mut data = WriteData::new();
        let mut piece = vec![0; FILL_BYTES];
        for offset in (0..*DISK_BYTES).step_by(FILL_BYTES) {
            interrupt::check()?;
            data.fill(&mut piece);
            for file in &files {
                file.write_all_at(&piece, offset).expect("filling an image");
            }
        }
        let machine = Self {
            storage,
            images,
            directory,
        };
        machine.sync();
        for file in files.iter().filter(|_| storage == Storage::Disk) {
            // SAFETY: posix_fadvise takes no pointer.
            let result = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
            assert_eq!(result, 0, "dropping an image from the page cache");
        }
        Ok(machine)
    }

    /// Leaves nothing to be written back.
    fn sync(&self) {
        open(&self.images).for_each(|file| file.sync_all().expect("syncing an image"));
    }

    pub fn serve(&self, row: &Row) -> Served<'_> {
        let sockets = tempfile::tempdir_in(self.directory.path()).expect("a directory");
        let monitor = sockets.path().join("qmp.sock");
        let mut arguments = replica_arguments(&self.images);
        let queue_size = QUEUE_SIZE.to_string();
        arguments.extend(["--queue-size".into(), queue_size.into()]);
        // A disk that is busy with writing back is not to be taken for one that hangs.
        arguments.extend(["--replica-timeout".into(), "20000".into()]);
        arguments.extend(["--qmp".into(), monitor.clone().into()]);
        if self.storage != Storage::Disk {
            arguments.extend(["--cache".into(), "writeback".into()]);
        }
        let daemon = Daemon::start(sockets.path(), arguments);
        Served {
            client: Client::connect_sized(daemon.socket(), 1, QUEUE_SIZE),
            monitor: Monitor::connect(&monitor),
            daemon,
            machine: self,
            row: *row,
            _sockets: sockets,
        }
    }
}

fn open(images: &[PathBuf]) -> impl Iterator<Item = File> {
    let open = |path| File::options().read(true).write(true).open(path);
    images
        .iter()
        .map(move |path| open(path).expect("opening an image"))
}

impl Served<'_> {
    /// Measures with the job paused and with it running.
    pub fn measure(&mut self, time: Duration, seed: u64) -> Result<Measured, Interrupted> {
        if self.row.load.is_none() {
            return self.measure_idle();
        }
        loop {
            interrupt::check()?;
            let job = self.job();
            self.monitor.execute("job-pause", json!({ "id": job }));
            let alone = self.guest(time, seed)?;
            let before = self.progress(&job).unwrap_or(0.0);
            self.monitor.execute("job-resume", json!({ "id": job }));
            let since = Instant::now();
            let beside = self.guest(time, seed + (1 << 20))?;
            let elapsed = since.elapsed().as_secs_f64();
            // One that has come to its end has not been there all the time.
            if let Some(after) = self.progress(&job) {
                let job_bytes = (after - before) / elapsed;
                return Ok(Measured {
                    alone,
                    beside,
                    job_bytes,
                });
            }
        }
    }

    /// Measures a whole job, which nobody is beside.
    fn measure_idle(&mut self) -> Result<Measured, Interrupted> {
        let (since, job) = (Instant::now(), self.job());
        while self.progress(&job).is_some() {
            interrupt::check()?;
            thread::sleep(Duration::from_millis(5));
        }
        let bytes = f64::from(u32::try_from(*DISK_BYTES >> 10).expect("less than 4 TiB")) * 1024.0;
        Ok(Measured {
            alone: 0.0,
            beside: 0.0,
            job_bytes: bytes / since.elapsed().as_secs_f64(),
        })
    }

    /// Requests a second.
    fn guest(&mut self, time: Duration, seed: u64) -> Result<f64, Interrupted> {
        let load = self.row.load.expect("somebody to be beside");
        if load.writes() && self.machine.storage != Storage::Disk {
            self.machine.sync();
        }
        let (queue, memory) = self.client.queues().next().expect("a queue");
        let mut requests = Requests::new(&load, 0, seed);
        let mut queue = GuestQueue::new(queue, memory, load.pattern.len);
        let start = Instant::now() + LEAD_IN;
        let latencies = drive(
            &mut queue,
            &mut requests,
            load.pattern.depth,
            &(start..start + time),
        )?;
        Ok(latencies.len() as f64 / time.as_secs_f64())
    }

    fn jobs(&mut self) -> Vec<Value> {
        let jobs = self.monitor.execute("query-jobs", json!({}));
        jobs.as_array().expect("a list").clone()
    }

    fn progress(&mut self, id: &Value) -> Option<f64> {
        let job = self.jobs().into_iter().find(|job| job["id"] == *id)?;
        job["current-progress"].as_f64()
    }

    /// What the job is called; begins one where none is.
    fn job(&mut self) -> Value {
        if let Some(job) = self.jobs().into_iter().next() {
            return job["id"].clone();
        }
        let (what, disk) = ("x-blockdev-change", "quorum0");
        match self.row.job {
            JobKind::Scrub => self.monitor.execute("quorum-scrub", json!({}))["id"].clone(),
            JobKind::Resync => {
                self.monitor
                    .execute(what, json!({ "parent": disk, "child": STALE }));
                let node =
                    json!({ "driver": "file", "node-name": STALE, "filename": self.machine.images[2] });
                self.monitor.execute("blockdev-add", node);
                self.monitor
                    .execute(what, json!({ "parent": disk, "node": STALE }));
                self.jobs().first().expect("a resync begins by itself")["id"].clone()
            }
        }
    }

    /// Ends it with nothing stale, as the next one takes the images for equal.
    pub fn end(mut self) {
        for job in self.jobs() {
            let id = json!({ "id": job["id"] });
            match self.row.job {
                JobKind::Scrub => drop(self.monitor.execute("job-cancel", id)),
                JobKind::Resync => drop(self.monitor.execute("job-resume", id)),
            }
        }
        while !self.jobs().is_empty() {
            thread::sleep(Duration::from_millis(10));
        }
        drop(self.client);
        assert!(self.daemon.terminate().success(), "quorum-blkd failed");
        self.machine.sync();
    }
}
