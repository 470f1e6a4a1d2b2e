//! What a client reads and writes is voted on: the daemon as a process, real image files, and
//! `blkio` as the client.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use testkit::HANG_LIMIT;
use testkit::machine;

use serde_json::Value;
use tempfile::TempDir;
use testkit::client::{Client, Failed, Request};
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::disk::is_of_the_vote;
use testkit::images::{Random, are_identical, corrupt_sectors, create_images, first_difference};
use testkit::process::wait_until;

const DISK_BYTES: u64 = 4 << 20;
const EIO: i32 = 5;

/// A daemon over new images, and a reader of its events.
struct Setup {
    images: Vec<PathBuf>,
    events: EventReader,
    daemon: Daemon,
    _directory: TempDir,
}

impl Setup {
    fn new(replicas: usize, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), replicas, DISK_BYTES);
        Self::over(directory, images, options)
    }

    fn over(directory: TempDir, images: Vec<PathBuf>, options: &[&str]) -> Self {
        let mut arguments = replica_arguments(&images);
        arguments.extend(options.iter().map(OsString::from));
        let daemon = Daemon::start(directory.path(), arguments);
        if options.contains(&"--rewrite-corrupted") {
            daemon.wait_until_compared();
        }
        let events = EventReader::connect(daemon.events_socket());
        Self {
            images,
            events,
            daemon,
            _directory: directory,
        }
    }

    fn connect(&self, queues: usize) -> Client {
        Client::connect(self.daemon.socket(), queues)
    }

    /// The first event of this name and, for QUORUM_REPORT_BAD, node.
    fn wait_for(&self, name: &str, node: Option<&str>) -> Value {
        let wanted = |event: &Value| {
            event["event"] == name && node.is_none_or(|node| event["data"]["node-name"] == node)
        };
        let event = self.events.wait_for(wanted, HANG_LIMIT);
        event.unwrap_or_else(|| panic!("no {name} of {node:?}, but {:?}", self.events.all()))
    }

    /// Ends the daemon as an operator does, and returns all events there were.
    fn end(&mut self) -> Vec<Value> {
        assert!(self.daemon.terminate().success());
        assert!(!self.daemon.socket().exists(), "the socket is left behind");
        let mut events = self.events.all_until_closed();
        // Events of jobs that start by themselves do not matter here.
        events.retain(is_of_the_vote);
        events
    }
}

fn pattern(random: &mut Random, len: usize) -> Vec<u8> {
    (0..len / 8)
        .flat_map(|_| random.number().to_le_bytes())
        .collect()
}

/// Random requests against a plain array of bytes, one at a time and on any queue.
#[test]
fn a_disk_returns_what_was_written() {
    let _machine = machine::shared();
    let mut random = Random::from_environment();
    for (replicas, queues, options) in [
        (1, 1, &[][..]),
        (2, 1, &["--cache", "writeback"][..]),
        (3, 1, &["--read-pattern", "fifo"][..]),
        (5, 2, &["--read-pattern", "threshold"][..]),
        (3, 4, &[][..]),
        (4, 2, &["--queue-size", "16"][..]),
        (5, 2, &["--rewrite-corrupted"][..]),
    ] {
        let queues_option = queues.to_string();
        let options: Vec<&str> = ["--num-queues", &queues_option]
            .iter()
            .chain(options)
            .copied()
            .collect();
        let mut setup = Setup::new(replicas, &options);
        let queue_size = if options.contains(&"16") { 16 } else { 256 };
        let mut client = Client::connect_sized(setup.daemon.socket(), queues, queue_size);
        assert_eq!(client.capacity_bytes(), DISK_BYTES);
        assert_eq!(client.max_queues(), i32::try_from(queues).unwrap());
        let mut model = vec![0; usize::try_from(DISK_BYTES).unwrap()];
        for _ in 0..300 {
            let queue = usize::try_from(random.within(0..queues as u64)).unwrap();
            // Mostly small, at times longer than a fragment.
            let sectors_max = if random.within(0..20) == 0 { 6000 } else { 40 };
            let sectors = random.within(1..sectors_max);
            let start = random.within(0..DISK_BYTES / 512 - sectors);
            let (offset, len) = (start * 512, usize::try_from(sectors * 512).unwrap());
            let place = usize::try_from(offset).unwrap()..usize::try_from(offset).unwrap() + len;
            match random.within(0..10) {
                0 => client.flush(queue).unwrap(),
                1..5 => {
                    let data = pattern(&mut random, len);
                    client.write(queue, offset, &data).unwrap();
                    model[place].copy_from_slice(&data);
                }
                _ => assert!(
                    client.read(queue, offset, len).unwrap() == model[place],
                    "a read returns other data"
                ),
            }
        }
        drop(client);
        assert_eq!(setup.end(), Vec::<Value>::new());
        assert!(are_identical(&setup.images));
        assert!(std::fs::read(&setup.images[0]).unwrap() == model);
    }
}

/// Many requests in flight on several queues, each in its own part of the disk.
#[test]
fn many_requests_at_once_are_served() {
    let _machine = machine::shared();
    const QUEUES: usize = 3;
    const REQUESTS: usize = 200;
    const LEN: usize = 4096;
    let mut random = Random::from_environment();
    let mut setup = Setup::new(3, &["--num-queues", "3"]);
    let mut client = setup.connect(QUEUES);
    let place = |queue: usize, index: usize| ((queue * REQUESTS + index) * LEN) as u64;
    for round in 0..5 {
        for queue in 0..QUEUES {
            let data = pattern(&mut random, REQUESTS * LEN);
            client.memory(queue)[..data.len()].copy_from_slice(&data);
            let writes: Vec<_> = (0..REQUESTS)
                .map(|index| Request::Write {
                    offset: place(queue, index),
                    memory: index * LEN,
                    len: LEN,
                })
                .collect();
            client.send(queue, &writes);
        }
        for queue in 0..QUEUES {
            let mut done = 0;
            while done < REQUESTS {
                let completions = client.poll(queue, 1);
                assert!(completions.iter().all(|(_, result)| result.is_ok()));
                done += completions.len();
            }
            let reads: Vec<_> = (0..REQUESTS)
                .map(|index| Request::Read {
                    offset: place(queue, index),
                    memory: (REQUESTS + index) * LEN,
                    len: LEN,
                })
                .collect();
            assert!(
                client.run(queue, &reads).iter().all(Result::is_ok),
                "round {round}"
            );
            let (written, read) =
                client.memory(queue)[..2 * REQUESTS * LEN].split_at(REQUESTS * LEN);
            assert!(written == read, "round {round}, queue {queue}");
        }
    }
    drop(client);
    assert_eq!(setup.end(), Vec::<Value>::new());
    assert!(are_identical(&setup.images));
}

#[test]
fn a_corrupt_replica_is_outvoted_reported_and_repaired() {
    let _machine = machine::shared();
    let mut setup = Setup::new(3, &["--rewrite-corrupted"]);
    let mut client = setup.connect(1);
    let data = vec![7; 16 * 512];
    client.write(0, 100 * 512, &data).unwrap();
    corrupt_sectors(&setup.images[1], 103..105, 0x5a);
    assert_eq!(client.read(0, 100 * 512, data.len()).unwrap(), data);
    let event = setup.wait_for("QUORUM_REPORT_BAD", None);
    let expected = serde_json::json!({
        "ret": 0, "node-name": "1.raw", "sector-num": 100, "sector-count": 16, "sectors-count": 16,
        "type": "read", "bad-sectors": [{"sector-num": 103, "sector-count": 2}],
        "digest": event["data"]["digest"], "winner-digest": event["data"]["winner-digest"],
    });
    assert_eq!(event["data"], expected);
    assert!(
        wait_until(HANG_LIMIT, || are_identical(&setup.images)),
        "not rewritten"
    );
    drop(client);
    assert_eq!(setup.end().len(), 1, "one lie, one event");
}

/// The read that QEMU's quorum fails: each sector has a majority, the request as a whole has none.
#[test]
fn replicas_corrupt_in_different_sectors_fail_nothing() {
    let _machine = machine::shared();
    let setup = Setup::new(3, &[]);
    let mut client = setup.connect(1);
    let data = vec![1; 16 * 512];
    client.write(0, 0, &data).unwrap();
    corrupt_sectors(&setup.images[0], 2..3, 0xff);
    corrupt_sectors(&setup.images[2], 9..10, 0xff);
    assert_eq!(client.read(0, 0, data.len()).unwrap(), data);
    let [first, third] =
        ["0.raw", "2.raw"].map(|node| setup.wait_for("QUORUM_REPORT_BAD", Some(node)));
    assert_eq!(
        first["data"]["bad-sectors"],
        serde_json::json!([{"sector-num": 2, "sector-count": 1}])
    );
    assert_eq!(
        third["data"]["bad-sectors"],
        serde_json::json!([{"sector-num": 9, "sector-count": 1}])
    );
}

#[test]
fn a_sector_with_three_versions_fails_alone() {
    let _machine = machine::shared();
    let setup = Setup::new(3, &["--node-name", "usr1"]);
    let mut client = setup.connect(1);
    client.write(0, 0, &[1; 64 * 512]).unwrap();
    corrupt_sectors(&setup.images[0], 20..21, 0x01);
    corrupt_sectors(&setup.images[1], 20..21, 0x02);
    assert_eq!(client.read(0, 16 * 512, 8 * 512), Err(Failed(EIO)));
    let event = setup.wait_for("QUORUM_FAILURE", None);
    assert_eq!(event["data"]["reference"], "usr1");
    assert_eq!(
        (&event["data"]["sector-num"], &event["data"]["sector-count"]),
        (&16.into(), &8.into())
    );
    assert_eq!(client.read(0, 24 * 512, 8 * 512).unwrap(), [1; 8 * 512]);
    // A write of the guest repairs it.
    client.write(0, 20 * 512, &[2; 512]).unwrap();
    assert_eq!(client.read(0, 20 * 512, 512).unwrap(), [2; 512]);
}

/// A replica whose file was truncated: a read beyond its end is an I/O error of that replica alone.
#[test]
fn an_io_error_fails_its_replica_only() {
    let _machine = machine::shared();
    for pattern in ["quorum", "fifo"] {
        let setup = Setup::new(3, &["--read-pattern", pattern]);
        let mut client = setup.connect(1);
        client.write(0, 2 << 20, &[9; 4096]).unwrap();
        let first = OpenOptions::new()
            .write(true)
            .open(&setup.images[0])
            .unwrap();
        first.set_len(1 << 20).unwrap();
        assert_eq!(client.read(0, 2 << 20, 4096).unwrap(), [9; 4096]);
        let event = setup.wait_for("QUORUM_REPORT_BAD", Some("0.raw"));
        assert_eq!(event["data"]["ret"], -EIO);
        assert_eq!(event["data"]["type"], "read");
        assert!(event["data"]["error"].is_string());
        assert_eq!(event["data"].get("bad-sectors"), None);
    }
}

#[test]
fn fifo_reads_in_order_and_repairs_from_the_good_reply() {
    let _machine = machine::shared();
    let setup = Setup::new(3, &["--read-pattern", "fifo", "--rewrite-corrupted"]);
    let mut client = setup.connect(1);
    client.write(0, 2 << 20, &[9; 4096]).unwrap();
    // The first replica is read, and not compared with the others.
    corrupt_sectors(&setup.images[1], 4096..4104, 0xff);
    assert_eq!(client.read(0, 2 << 20, 4096).unwrap(), [9; 4096]);
    let first = OpenOptions::new()
        .write(true)
        .open(&setup.images[0])
        .unwrap();
    first.set_len(2 << 20).unwrap();
    assert_eq!(
        client.read(0, 2 << 20, 4096).unwrap(),
        [9 ^ 0xff; 4096],
        "the second is the next"
    );
    let is_repaired = || {
        std::fs::read(&setup.images[0])
            .unwrap()
            .get(2 << 20..(2 << 20) + 4096)
            == Some(&[9 ^ 0xff; 4096])
    };
    assert!(wait_until(HANG_LIMIT, is_repaired));
}

/// A file in memory that can be made to refuse writes while it is open: a replica that fails to
/// write.
struct SealableImage(std::os::fd::OwnedFd);

impl SealableImage {
    fn new() -> Self {
        use std::os::fd::FromRawFd;
        // SAFETY: the name is a C string; the result is checked, and nothing else owns it.
        let fd = unsafe { libc::memfd_create(c"replica".as_ptr(), libc::MFD_ALLOW_SEALING) };
        assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
        // SAFETY: `fd` is open and ours.
        let image = Self(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) });
        std::fs::File::from(image.0.try_clone().unwrap())
            .set_len(DISK_BYTES)
            .unwrap();
        image
    }

    fn path(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        Path::new("/proc")
            .join(std::process::id().to_string())
            .join("fd")
            .join(self.0.as_raw_fd().to_string())
    }

    fn refuse_writes(&self) {
        use std::os::fd::AsRawFd;
        // SAFETY: a system call without pointers on a descriptor of ours.
        let result = unsafe {
            libc::fcntl(
                self.0.as_raw_fd(),
                libc::F_ADD_SEALS,
                libc::F_SEAL_FUTURE_WRITE,
            )
        };
        assert_eq!(result, 0, "sealing: {}", std::io::Error::last_os_error());
    }
}

#[test]
fn a_stale_replica_does_not_vote() {
    let _machine = machine::shared();
    let sealable: Vec<_> = (0..3).map(|_| SealableImage::new()).collect();
    let images: Vec<_> = sealable.iter().map(SealableImage::path).collect();
    let mut setup = Setup::over(
        tempfile::tempdir().unwrap(),
        images,
        &["--cache", "writeback"],
    );
    let mut client = setup.connect(1);
    client.write(0, 0, &[1; 4096]).unwrap();
    sealable[2].refuse_writes();
    client.write(0, 0, &[2; 4096]).unwrap();
    let node = setup.images[2]
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    let event = setup.wait_for("QUORUM_REPORT_BAD", Some(&node));
    assert_eq!(
        (&event["data"]["ret"], &event["data"]["type"]),
        (&(-libc::EPERM).into(), &"write".into())
    );
    client.flush(0).unwrap();
    // Its old data neither wins nor counts as corrupt: it is not read where it is stale.
    assert_eq!(client.read(0, 0, 8192).unwrap()[..4096], [2; 4096]);
    // With one more unreadable there are fewer than t.
    sealable[1].refuse_writes();
    assert_eq!(client.write(0, 8192, &[3; 512]), Err(Failed(EIO)));
    let failure = setup.wait_for("QUORUM_FAILURE", None);
    assert_eq!(
        (&failure["data"]["type"], &failure["data"]["sector-num"]),
        (&"write".into(), &16.into())
    );
    drop(client);
    let events = setup.end();
    assert!(
        events.iter().all(|event| event["data"]["type"] == "write"),
        "{events:?}"
    );
}

/// The client changes its buffers while they are written: all replicas get the same version.
#[test]
fn buffers_that_change_in_flight_do_not_make_replicas_diverge() {
    let _machine = machine::shared();
    let mut random = Random::from_environment();
    let mut setup = Setup::new(3, &[]);
    let mut client = setup.connect(1);
    for _ in 0..50 {
        let writes = Request::writes(32, 65536);
        client.send(0, &writes);
        let mut done = 0;
        while done < writes.len() {
            for byte in client.memory(0)[..32 * 65536].iter_mut().step_by(4096) {
                *byte = random.number().to_le_bytes()[0];
            }
            done += client.poll(0, 0).len();
        }
    }
    drop(client);
    setup.end();
    assert_eq!(
        first_difference(&setup.images[0], &setup.images[1]).unwrap(),
        None
    );
    assert_eq!(
        first_difference(&setup.images[0], &setup.images[2]).unwrap(),
        None
    );
}

#[test]
fn blkverify_stops_the_daemon_at_the_first_difference() {
    let _machine = machine::shared();
    let mut setup = Setup::new(2, &["--blkverify"]);
    let mut client = setup.connect(1);
    client.write(0, 0, &[1; 8192]).unwrap();
    corrupt_sectors(&setup.images[1], 9..10, 0xff);
    assert_eq!(client.read(0, 0, 4096).unwrap(), [1; 4096]);
    assert_eq!(client.read(0, 4096, 4096), Err(Failed(EIO)));
    assert_eq!(setup.daemon.wait().code(), Some(1));
    assert!(
        setup
            .daemon
            .log()
            .contains("the replicas differ at sector 9"),
        "{}",
        setup.daemon.log()
    );
    assert_eq!(
        setup.wait_for("QUORUM_FAILURE", None)["data"]["sector-num"],
        8
    );
}

#[test]
fn frontends_connect_and_disconnect() {
    let _machine = machine::shared();
    let mut setup = Setup::new(3, &["--num-queues", "2"]);
    for round in 0..5u8 {
        let mut client = setup.connect(1 + usize::from(round % 2));
        if round > 0 {
            assert_eq!(client.read(0, 4096, 512).unwrap(), [round; 512]);
        }
        client.write(0, 4096, &[round + 1; 512]).unwrap();
        // The last ones leave with requests in flight.
        let writes = [Request::Write {
            offset: 1 << 20,
            memory: 0,
            len: 1 << 20,
        }; 16];
        client.send(0, &writes);
        drop(client);
    }
    assert_eq!(setup.end(), Vec::<Value>::new());
    assert!(are_identical(&setup.images));
}

#[test]
fn a_read_only_disk_is_read_and_not_written() {
    let _machine = machine::shared();
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, DISK_BYTES);
    for image in &images {
        corrupt_sectors(image, 0..8, 0x11);
    }
    let setup = Setup::over(directory, images, &["--read-only"]);
    // The driver itself refuses writes to a read-only device, unless this is set.
    let mut blkio = blkio::Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio
        .set_str("path", setup.daemon.socket().to_str().unwrap())
        .unwrap();
    blkio.set_bool("read-only", true).unwrap();
    blkio.connect().unwrap();
    drop(blkio);
    let mut blkio = blkio::Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio
        .set_str("path", setup.daemon.socket().to_str().unwrap())
        .unwrap();
    assert!(
        blkio.connect().is_err() || blkio.start().is_err(),
        "a writable client was let in"
    );
}
