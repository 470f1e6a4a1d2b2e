//! The measured disk: the daemon that serves it, its guest and its operator.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::disk_plan::Storage;
use super::drive::drive;
use super::guest::{GuestQueue, QUEUE_SIZE};
use super::images::Images;
use super::interrupt::{self, Interrupted};
use super::requests::Requests;
use super::rows::{DISK_BYTES, GUEST_BYTES, JobKind, Row};
use testkit::client::Client;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::monitor::Monitor;

/// Replicas of the disk.
pub const REPLICAS: usize = 3;
/// The replica of a resync.
const STALE: &str = "2.raw";
/// Bytes of one write when images are created.
pub const FILL_BYTES: usize = 1 << 20;
/// Time before anything is counted, in which the job finds its pace.
const LEAD_IN: Duration = Duration::from_millis(200);

/// A pair of measurements, each per second.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Requests of the guest while the job is paused.
    pub alone: f64,
    /// Requests of the guest while it runs.
    pub beside: f64,
    /// Bytes of the disk that the job does.
    pub job_bytes: f64,
}

/// The disk while it is served.
pub struct Served<'a> {
    // The queue must go before the daemon ends.
    client: Client,
    monitor: Monitor,
    daemon: Daemon,
    images: &'a Images,
    row: Row,
    _sockets: TempDir,
}

impl<'a> Served<'a> {
    pub fn start(row: &Row, images: &'a Images) -> Self {
        let sockets = tempfile::tempdir().expect("creating a directory");
        let monitor = sockets.path().join("qmp.sock");
        let mut arguments = replica_arguments(images.first(REPLICAS));
        let queue_size = QUEUE_SIZE.to_string();
        arguments.extend(["--queue-size".into(), queue_size.into()]);
        // A disk that is busy writing back must not count as one that hangs.
        arguments.extend(["--replica-timeout".into(), "20000".into()]);
        arguments.extend(["--qmp".into(), monitor.clone().into()]);
        if row.storage != Storage::Disk {
            arguments.extend(["--cache".into(), "writeback".into()]);
        }
        let daemon = Daemon::start(sockets.path(), arguments);
        Self {
            client: Client::connect_sized(daemon.socket(), 1, QUEUE_SIZE),
            monitor: Monitor::connect(&monitor),
            daemon,
            images,
            row: *row,
            _sockets: sockets,
        }
    }

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
            // A job that has ended did not run for all of the time.
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

    /// Measures a whole job on an idle disk.
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
        let load = self.row.load.expect("a guest beside the job");
        if load.writes() && self.row.storage != Storage::Disk {
            self.images.sync(REPLICAS)?;
        }
        let (queue, memory) = self.client.queues().next().expect("a queue");
        let mut requests = Requests::new(&load, GUEST_BYTES, 0, seed);
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

    /// The id of the job; starts one if there is none.
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
                let file = &self.images.first(REPLICAS)[2];
                let node = json!({ "driver": "file", "node-name": STALE, "filename": file });
                self.monitor.execute("blockdev-add", node);
                self.monitor
                    .execute(what, json!({ "parent": disk, "node": STALE }));
                self.jobs().first().expect("a resync begins by itself")["id"].clone()
            }
        }
    }

    /// Ends the daemon when no replica is stale, since the next one starts with equal images.
    pub fn end(mut self) -> Result<(), Interrupted> {
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
        self.images.sync(REPLICAS)
    }
}
