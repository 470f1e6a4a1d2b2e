//! A guest without a write cache, on images that the kernel cannot write back: the file system of
//! an image lies on a loop device whose file has no space any more. No block is lost whose write
//! was acknowledged, and nothing that a replica lost is believed.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use testkit::HANG_LIMIT;
use testkit::disk::{Disk, Plan};
use testkit::frontend::{self, Layout, Queue, Request, Vmm};
use testkit::images::create_images;
use testkit::load::figure;
use testkit::loop_device::LoopDevice;
use testkit::machine::shared;
use testkit::process::{run, text};
use testkit::small_disk::SmallDisk;
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

const BLOCK: usize = 4096;
const MEBIBYTE: u64 = 1 << 20;
const DISK_BYTES: u64 = 16 * MEBIBYTE;
/// Blocks that the guest writes.
const BLOCKS: u64 = 3 * 512;
/// There is space for one block of so many.
const SPACE_FOR: u64 = 3;
/// On as many threads as there are CPUs: one thread has the kernel make one write after another.
const QUEUES: usize = 4;
const IN_FLIGHT: usize = 16;
/// The last blocks are written few at a time: with many in flight nearly every flush fails, and so
/// does every write if there is one replica.
const FEW: usize = 2;
const BY_FEW: usize = 400;

/// An ext4 whose device has no space for most of its blocks.
struct FullExt4 {
    root: File,
    _device: LoopDevice,
    small: SmallDisk,
}

impl FullExt4 {
    /// With an image of `DISK_BYTES`. Takes the right to mount (root).
    fn with_image() -> Self {
        let small = SmallDisk::mount(24 * MEBIBYTE);
        let backing = small.path().join("backing");
        File::create_new(&backing)
            .and_then(|file| file.set_len(32 * MEBIBYTE))
            .expect("creating a file");
        // Without a journal, which would end the file system at the first error. With small blocks,
        // ext4 does not report the loss of every one.
        run(
            "mkfs.ext4",
            &[
                "-q",
                "-b",
                "4096",
                "-O",
                "^has_journal",
                "-m",
                "0",
                text(&backing),
            ],
        );
        let device = LoopDevice::attach(&backing).with_requests_of_one_page();
        let ext4 = Self {
            root: mount(device.path()),
            _device: device,
            small,
        };
        let image = ext4.image();
        let mut file = File::create_new(&image).expect("creating the image");
        for block in 0..DISK_BYTES / BLOCK as u64 {
            let has_space = block % SPACE_FOR == 0;
            file.write_all(&[u8::from(has_space); BLOCK])
                .expect("writing the image");
        }
        file.sync_all().expect("writing the image");
        // All blocks are allocated on the device, but the file below loses those that are zero.
        run("fallocate", &["--dig-holes", text(&backing)]);
        ext4.fill();
        ext4
    }

    fn image(&self) -> PathBuf {
        let descriptor = self.root.as_raw_fd();
        PathBuf::from(format!(
            "/proc/{}/fd/{descriptor}/image",
            std::process::id()
        ))
    }

    fn ballast(&self) -> PathBuf {
        self.small.path().join("ballast")
    }

    /// Fills the file system below.
    fn fill(&self) {
        let mut file = File::create_new(self.ballast()).expect("creating a file");
        while file.write_all(&[1; BLOCK]).is_ok() {}
    }

    fn make_space(&self) {
        fs::remove_file(self.ballast()).expect("removing the ballast");
    }
}

/// Mounts an ext4 and detaches it from the directory tree: it ends with its last user.
fn mount(device: &Path) -> File {
    let directory = tempfile::tempdir().expect("creating a directory");
    let name = |path: &Path| CString::new(path.as_os_str().as_bytes()).expect("no NUL in a path");
    let (from, at) = (name(device), name(directory.path()));
    let options = c"errors=continue,nodiscard".as_ptr().cast();
    // SAFETY: all arguments are C strings that outlive the call.
    let result = unsafe { libc::mount(from.as_ptr(), at.as_ptr(), c"ext4".as_ptr(), 0, options) };
    assert_eq!(result, 0, "mount: {}", io::Error::last_os_error());
    let root = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(directory.path());
    // SAFETY: the path is a C string that outlives the call.
    let result = unsafe { libc::umount2(at.as_ptr(), libc::MNT_DETACH) };
    assert_eq!(result, 0, "umount2: {}", io::Error::last_os_error());
    root.expect("opening the root of an ext4")
}

/// What the guest writes into a block.
fn content(block: u64) -> Vec<u8> {
    (block + 1).to_le_bytes().repeat(BLOCK / 8)
}

/// The blocks in which the disk below the image does not hold what the guest has written. The page
/// cache may hold it still.
fn lost(image: &Path, blocks: &[u64]) -> Vec<u64> {
    #[repr(align(4096))]
    struct Aligned([u8; BLOCK]);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(image)
        .expect("opening an image");
    let mut bytes = Aligned([0; BLOCK]);
    let mut is_lost = |block: &u64| {
        file.read_exact_at(&mut bytes.0, block * BLOCK as u64)
            .expect("reading an image");
        bytes.0[..] != content(*block)
    };
    blocks
        .iter()
        .copied()
        .filter(|block| is_lost(block))
        .collect()
}

/// Has a guest without a write cache write all blocks, most of them many at a time. Returns the
/// acknowledged ones and those that failed.
fn write_all(disk: &Disk) -> (Vec<u64>, Vec<u64>) {
    let plan = frontend::Plan {
        queues: QUEUES,
        slots: IN_FLIGHT,
        ..frontend::Plan::without_write_cache()
    };
    let mut vmm = Vmm::start(disk.socket(), &plan);
    let (mut acknowledged, mut failed) = (Vec::new(), Vec::new());
    // In no order, so that good blocks and bad ones are in flight together.
    let blocks: Vec<u64> = (0..BLOCKS).map(|number| number * 947 % BLOCKS).collect();
    let mut next = blocks.into_iter();
    let most = |left: usize| match left > BY_FEW {
        true => QUEUES * IN_FLIGHT,
        false => FEW,
    };
    let mut in_flight = HashMap::new();
    loop {
        for (index, queue) in vmm.queues.iter_mut().enumerate() {
            while queue.has_room(Layout::DIRECT)
                && in_flight.len() < most(next.len())
                && let Some(block) = next.next()
            {
                let request = Request::write(block * BLOCK as u64 / 512, content(block));
                let head = queue.submit(&request, Layout::DIRECT);
                in_flight.insert((index, head), block);
            }
            while let Some(done) = queue.pop() {
                let block = in_flight.remove(&(index, done.head));
                let is_done = u32::from(done.status) == VIRTIO_BLK_S_OK;
                let list = if is_done {
                    &mut acknowledged
                } else {
                    &mut failed
                };
                list.push(block.expect("a request in flight"));
            }
            queue.ask_for_calls();
        }
        if in_flight.is_empty() && next.len() == 0 {
            break;
        }
        if !in_flight.is_empty() && !vmm.queues.iter().any(Queue::has_used) {
            assert!(vmm.wait_for_any(HANG_LIMIT), "no call");
        }
    }
    vmm.stop_virtqueues().expect("stopping the virtqueues");
    assert_eq!((acknowledged.len() + failed.len()) as u64, BLOCKS);
    (acknowledged, failed)
}

fn plan(replicas: usize) -> Plan {
    Plan {
        replicas,
        threshold: replicas / 2 + 1,
        size_bytes: DISK_BYTES,
        queues: QUEUES,
        direct: false,
        // A resync that has failed waits as long until it is tried again.
        replica_timeout: Duration::from_secs(5),
        // The image on the small file system holds marks, which the guest overwrites.
        more: vec!["--empty-anyway"],
        ..Plan::default()
    }
}

#[test]
fn no_acknowledged_block_is_lost_on_the_only_replica() {
    let _machine = shared();
    let ext4 = FullExt4::with_image();
    let disk = Disk::over(&plan(1), vec![ext4.image()]);
    let (acknowledged, failed) = write_all(&disk);
    // A resync may have written again what cannot be written back.
    disk.end_even_unflushed();
    let lost = lost(&ext4.image(), &acknowledged);
    figure(
        "one replica, not all of it can be written back",
        &format!(
            "{} writes succeed, {} fail; {} of the acknowledged blocks are lost",
            acknowledged.len(),
            failed.len(),
            lost.len()
        ),
    );
    assert!(!failed.is_empty(), "there was space for everything");
    assert_eq!(lost, Vec::<u64>::new());
}

#[test]
fn a_replica_that_lost_blocks_is_stale_there_and_is_resynced() {
    let _machine = shared();
    let ext4 = FullExt4::with_image();
    let directory = tempfile::tempdir().unwrap();
    let mut images = create_images(directory.path(), 2, DISK_BYTES);
    images.push(ext4.image());
    let disk = Disk::over(&plan(3), images);
    let (acknowledged, failed) = write_all(&disk);
    figure(
        "one replica of three, not all of it can be written back",
        &format!(
            "{} writes succeed, {} fail",
            acknowledged.len(),
            failed.len()
        ),
    );
    assert_eq!(failed, Vec::<u64>::new(), "two replicas are good");
    disk.wait_for("QUORUM_REPORT_BAD", Some(2));

    // What it has lost is copied again when there is space: all of it was known.
    ext4.make_space();
    let stale = |state: &serde_json::Value| state["replicas"][2]["stale-bytes"].as_u64();
    disk.state_when(|state| stale(state) == Some(0));
    disk.end();
    for image in &disk.images {
        assert_eq!(lost(image, &acknowledged), Vec::<u64>::new(), "{image:?}");
    }
}
