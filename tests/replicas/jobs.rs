//! Replicas are added and removed, and jobs run, while a client reads and writes: real files, real
//! io_uring, the workers of the daemon within this process.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use testkit::HANG_LIMIT;
use testkit::machine;

use quorum_blk::admin::{Admin, Removed};
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::common::{ReplicaIndex, SECTOR_BYTES, SectorRange};
use quorum_blk::control::queue::EventQueue;
use quorum_blk::device::connection::{CacheMode, ConnectionSlot};
use quorum_blk::device::frontend::Frontend;
use quorum_blk::device::{Capacity, DiskInfo};
use quorum_blk::engine::{Policy, ReadPattern, Shared};
use quorum_blk::jobs::{JobId, JobKind, JobStatus, Sizes};
use quorum_blk::limits::REPLICAS_MAX;
use quorum_blk::replica::file::{
    EmptyImages, ImageDirectories, OpenOptions, Opening, Overwrite, ReplicaSource, Unopenable,
    open_all_with_records,
};
use quorum_blk::replica::ring::{Aio, RingFile};
use quorum_blk::replica::table::{MissingReplica, ReplicaTable};
use quorum_blk::statistics::Statistics;
use quorum_blk::worker::{Disk, Workers};
use testkit::client::Client;
use testkit::images::{are_identical, corrupt_sectors, create_images, data_ranges};
use testkit::stop::StopOnDrop;

const SIZE_BYTES: u64 = 64 << 20;

pub(super) struct Served {
    directory: tempfile::TempDir,
    pub(super) images: Vec<PathBuf>,
    statistics: Statistics,
    workers: Workers,
    pub(super) admin: Arc<Admin>,
    pub(super) shared: Arc<Shared>,
    table: Arc<ReplicaTable>,
    pub(super) socket: PathBuf,
}

pub(super) fn source(path: &Path) -> ReplicaSource {
    ReplicaSource {
        path: path.to_owned(),
        node_name: path.file_name().unwrap().to_str().unwrap().to_owned(),
    }
}

/// Serves three images with threshold 2, on two workers.
fn serve() -> Served {
    serve_without(None)
}

/// The same; the image in this place cannot be opened: it has another name.
pub(super) fn serve_without(missing: Option<usize>) -> Served {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, SIZE_BYTES);
    if let Some(missing) = missing {
        std::fs::rename(&images[missing], directory.path().join("elsewhere")).unwrap();
    }
    let sources: Vec<_> = images.iter().map(|path| source(path)).collect();
    let options = OpenOptions {
        read_only: false,
        direct: false,
        raw_anyway: false,
        block_bytes: 512,
    };
    let (empty, unopenable) = (EmptyImages::Refused, Unopenable::LeftOut);
    let opened = open_all_with_records(&sources, options, Opening::Here, empty, unopenable);
    let members = sources.iter().zip(opened.unwrap());
    let members: Vec<_> = members
        .map(|(source, opened)| match opened {
            Ok((file, _)) => Ok(file),
            Err(error) => Err(MissingReplica::new(source, &error.of_missing())),
        })
        .collect();
    let workers = 2;
    let capacity_sectors = SIZE_BYTES / SECTOR_BYTES;
    let slot = ConnectionSlot::new(workers, 256, CacheMode::default()).unwrap();
    let (released, is_released) = channel();
    let (stop, _) = channel();
    let disk = Disk {
        info: DiskInfo {
            capacity: Capacity::new(capacity_sectors),
            block_bytes: 512,
            physical_block_bytes: 4096,
            read_only: false,
            serial: String::new(),
            num_queues: workers,
            segments_max: 126,
        },
        policy: Policy {
            threshold: 2,
            read_pattern: ReadPattern::Quorum,
            rewrite_corrupted: false,
            repair_limit_sectors: u64::MAX,
            blkverify: false,
            job_sizes: Sizes::default(),
            block_sectors: 1,
            replica_timeout: Duration::from_secs(1),
        },
        aio: match std::env::var_os("QUORUM_BLK_TEST_AIO") {
            Some(aio) if aio == "threads" => Aio::Threads,
            _ => Aio::IoUring,
        },
        shared: Arc::new(Shared::new(3, 2, workers, capacity_sectors)),
        released,
        slots: vec![slot.clone()],
        statistics: Statistics::new(workers, REPLICAS_MAX),
        events: EventQueue::new().unwrap(),
        hold: Arc::default(),
        stop,
    };
    let statistics = disk.statistics.clone();
    let shared = Arc::clone(&disk.shared);
    let mut all = RangeSet::default();
    all.insert(SectorRange::new(0, capacity_sectors));
    for (index, member) in (0..).map(ReplicaIndex).zip(&members) {
        if member.is_err() {
            shared.leave_out(index, &all);
        }
    }
    let ring_files = members.iter().map(|member| match member {
        Ok(file) => file.ring_file(),
        Err(_) => RingFile::none(),
    });
    let ring_files = ring_files.collect();
    let table = Arc::new(ReplicaTable::with_missing(members));
    let workers = Workers::start(&disk, ring_files, workers).unwrap();
    let admin = Admin::start(
        &disk,
        &workers,
        Arc::clone(&table),
        (options, Opening::Here, ImageDirectories::anywhere()),
        is_released,
    )
    .unwrap();
    let frontend = Frontend::new(disk.info.clone(), slot, workers.virtqueue_server(0));
    let frontend = Arc::new(Mutex::new(frontend));
    let socket = directory.path().join("disk.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        while let Ok((connection, _)) = listener.accept() {
            Frontend::serve(&frontend, connection);
        }
    });
    Served {
        directory,
        images,
        statistics,
        workers,
        admin: Arc::new(admin),
        shared,
        table,
        socket,
    }
}

impl Served {
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A sparse image of the disk's size, with something in it that is not the disk's.
    pub(super) fn another(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0x5a; 8192], 12345).unwrap();
        file.set_len(SIZE_BYTES).unwrap();
        path
    }

    pub(super) fn wait_until(&self, what: &str, holds: impl Fn() -> bool) {
        let since = Instant::now();
        while !holds() {
            assert!(
                since.elapsed() < HANG_LIMIT,
                "{what}; {:?}",
                self.admin.jobs()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn wait_for_the_end_of(&self, id: JobId) {
        self.wait_until("the end of a job", || {
            self.admin.jobs().iter().all(|job| job.id != id)
        });
    }

    /// Ends everything; returns the images of the disk.
    pub(super) fn end(self) -> (tempfile::TempDir, Vec<PathBuf>) {
        let open = self.table.in_use();
        assert!(self.workers.exit().is_empty());
        let images = open.iter().map(|(_, file)| file.path.clone());
        (self.directory, images.collect())
    }
}

/// Writes random blocks all the time, and reads each back. Returns how many it wrote.
pub(super) fn verify_until(stop: &AtomicBool, socket: &Path, seed: u64) -> u64 {
    let mut client = Client::connect(socket, 1);
    let mut state = seed | 1;
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let offset = (state >> 33) % (SIZE_BYTES / 4096) * 4096;
        let data: Vec<u8> = state.to_le_bytes().repeat(512);
        client.write(0, offset, &data).unwrap();
        assert!(client.read(0, offset, 4096).unwrap() == data, "at {offset}");
        count += 1;
        if count % 64 == 0 {
            client.flush(0).unwrap();
        }
    }
    client.flush(0).unwrap();
    count
}

#[test]
fn a_replica_is_replaced_while_a_client_works() {
    let _machine = machine::shared();
    let served = serve();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let running = StopOnDrop(&stop);
        let verifier = scope.spawn(|| verify_until(&stop, &served.socket, 7));
        let fourth = served.another("fourth.raw");
        let id = served
            .admin
            .add_replica(&source(&fourth), Overwrite::Allowed)
            .unwrap()
            .unwrap();
        served.wait_for_the_end_of(id);
        // Nothing of it is stale: the one that it replaces can go.
        let first = source(&served.images[0]).node_name;
        assert_eq!(
            served.admin.remove_replica(&first).unwrap(),
            Removed::Closed
        );
        let second = source(&served.images[1]).node_name;
        assert_eq!(
            served.admin.remove_replica(&second).unwrap(),
            Removed::Closed
        );
        let third = source(&served.images[2]).node_name;
        let refused = served.admin.remove_replica(&third).unwrap_err().to_string();
        assert!(
            refused.contains("fewer replicas than the vote threshold"),
            "{refused}"
        );
        // A removed image is unlocked, and can be added again.
        let id = served
            .admin
            .add_replica(&source(&served.images[0]), Overwrite::Allowed)
            .unwrap()
            .unwrap();
        served.wait_for_the_end_of(id);
        drop(running);
        assert!(verifier.join().unwrap() > 0);
    });
    let (_directory, images) = served.end();
    assert_eq!(images.len(), 3);
    assert!(are_identical(&images));
}

#[test]
fn a_resync_keeps_holes() {
    let _machine = machine::shared();
    let served = serve();
    let mut client = Client::connect(&served.socket, 1);
    client.write(0, 40 << 20, &[7; 8192]).unwrap();
    client.flush(0).unwrap();
    let fourth = served.another("fourth.raw");
    let id = served
        .admin
        .add_replica(&source(&fourth), Overwrite::Allowed)
        .unwrap()
        .unwrap();
    served.wait_for_the_end_of(id);
    drop(client);
    let (_directory, images) = served.end();
    assert!(are_identical(&images));
    assert_eq!(data_ranges(&fourth), data_ranges(&images[0]));
}

#[test]
fn an_image_that_cannot_be_a_replica_is_refused() {
    let _machine = machine::shared();
    let served = serve();
    let refused = |source: &ReplicaSource| {
        served
            .admin
            .add_replica(source, Overwrite::Never)
            .unwrap_err()
            .to_string()
    };
    let missing = refused(&source(&served.path("missing.raw")));
    assert!(missing.contains("cannot open"), "{missing}");
    let short = served.another("short.raw");
    std::fs::File::options()
        .write(true)
        .open(&short)
        .unwrap()
        .set_len(SIZE_BYTES / 2)
        .unwrap();
    let differs = refused(&source(&short));
    assert!(
        differs.contains("33554432 bytes, less than the disk, which has 67108864"),
        "{differs}"
    );
    let again = ReplicaSource {
        node_name: "other".into(),
        ..source(&served.images[1])
    };
    let same = refused(&again);
    assert!(same.contains("are the same image"), "{same}");
    let named = ReplicaSource {
        node_name: source(&served.images[1]).node_name,
        path: served.another("fifth.raw"),
    };
    let twice = refused(&named);
    assert!(twice.contains("same node-name"), "{twice}");
    let unknown = served
        .admin
        .remove_replica("absent")
        .unwrap_err()
        .to_string();
    assert_eq!(unknown, "the disk has no replica 'absent'");
    assert!(served.admin.jobs().is_empty());
    assert_eq!(served.end().1.len(), 3);
}

#[test]
fn a_cancelled_resync_leaves_a_replica_that_does_not_vote() {
    let _machine = machine::shared();
    let served = serve();
    let fourth = served.another("fourth.raw");
    let name = source(&fourth).node_name;
    let id = served
        .admin
        .add_replica(&source(&fourth), Overwrite::Allowed)
        .unwrap()
        .unwrap();
    served.admin.job_pause(id).unwrap();
    let paused = || {
        served
            .admin
            .jobs()
            .iter()
            .any(|job| job.id == id && job.status == JobStatus::Paused)
    };
    if paused() {
        served.admin.job_cancel(id).unwrap();
        served.wait_for_the_end_of(id);
        let mut client = Client::connect(&served.socket, 1);
        assert!(
            client
                .read(0, 8192, 16384)
                .unwrap()
                .iter()
                .all(|byte| *byte == 0)
        );
        assert!(served.admin.jobs().is_empty(), "nothing begins by itself");
        let id = served.admin.resync(&name, 0).unwrap();
        served.wait_for_the_end_of(id);
    }
    let (_directory, images) = served.end();
    assert_eq!(images.len(), 4);
    assert!(are_identical(&images));
}

#[test]
fn a_scrub_finds_and_repairs_what_no_client_reads() {
    let _machine = machine::shared();
    let served = serve();
    let mut client = Client::connect(&served.socket, 1);
    for megabyte in 0..64 {
        client
            .write(
                0,
                megabyte << 20,
                &[u8::try_from(megabyte).unwrap() + 1; 65536],
            )
            .unwrap();
    }
    client.flush(0).unwrap();
    let totals = || served.statistics.replica(ReplicaIndex(1));
    let id = served.admin.scrub(false, 0).unwrap();
    served.wait_for_the_end_of(id);
    assert_eq!(totals().sectors_corrupt, 0);
    corrupt_sectors(&served.images[1], 98304..98306, 0xff);
    corrupt_sectors(&served.images[1], 20480..20481, 0xff);
    let id = served.admin.scrub(false, 0).unwrap();
    assert!(
        served
            .admin
            .jobs()
            .iter()
            .all(|job| job.kind == JobKind::Scrub { repair: false })
    );
    served.wait_for_the_end_of(id);
    assert_eq!(totals().sectors_corrupt, 3);
    assert!(!are_identical(&served.images));
    let id = served.admin.scrub(true, 0).unwrap();
    served.wait_for_the_end_of(id);
    assert_eq!(totals().sectors_repaired, 3);
    drop(client);
    let (_directory, images) = served.end();
    assert!(are_identical(&images));
}

#[test]
fn a_corrupt_sector_starts_a_scrub_around_it() {
    let _machine = machine::shared();
    let served = serve();
    let mut client = Client::connect(&served.socket, 1);
    corrupt_sectors(&served.images[2], 4096..4097, 0xff);
    corrupt_sectors(&served.images[2], 6000..6010, 0xff);
    client.read(0, 4096 * 512, 4096).unwrap();
    let found = || served.statistics.replica(ReplicaIndex(2)).sectors_corrupt;
    served.wait_until("the neighbours are found", || found() >= 11);
    drop(client);
    let _ = served.end();
}

#[test]
fn a_job_keeps_its_speed_limit() {
    let _machine = machine::shared();
    let served = serve();
    let began = Instant::now();
    let id = served.admin.scrub(false, 32 << 20).unwrap();
    served.wait_for_the_end_of(id);
    // 64 MiB, less the last chunks, which are not waited for.
    assert!(
        began.elapsed() >= Duration::from_millis(1300),
        "{:?}",
        began.elapsed()
    );
    let _ = served.end();
}
