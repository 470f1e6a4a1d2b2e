//! Discard and write-zeroes leave the same bytes on every replica, whatever each can do natively
//! (W4).

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use tempfile::TempDir;
use testkit::client::{Client, Request};
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::fuse::FuseImage;
use testkit::images::{Random, allocated_bytes, are_identical, create_images};
use testkit::loop_device::LoopDevice;

const DISK_BYTES: u64 = 24 << 20;

/// A place for images that is a tmpfs.
const TMPFS: &str = "/dev/shm";

/// Four replicas of four kinds, with the same random bytes on all.
struct Kinds {
    /// A file, one on tmpfs, one behind a loop device, and one on a file system without holes.
    backing: Vec<PathBuf>,
    device: LoopDevice,
    fuse: FuseImage,
    contents: Vec<u8>,
    directory: TempDir,
    _tmpfs: TempDir,
}

impl Kinds {
    fn new(random: &mut Random) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tmpfs = tempfile::tempdir_in(TMPFS).unwrap();
        let mut backing = create_images(directory.path(), 4, DISK_BYTES);
        backing[1] = tmpfs.path().join("1.raw");
        let mut contents = vec![0; usize::try_from(DISK_BYTES).unwrap()];
        fill(&mut contents, random);
        for path in &backing {
            fs::write(path, &contents).unwrap();
            File::open(path).unwrap().sync_all().unwrap();
        }
        Self {
            device: LoopDevice::attach(&backing[2]),
            fuse: FuseImage::serve(&backing[3]),
            backing,
            contents,
            directory,
            _tmpfs: tmpfs,
        }
    }

    fn start(&self, options: &[&str]) -> Daemon {
        let mut replicas = self.backing.clone();
        replicas[2] = self.device.path().to_owned();
        replicas[3] = self.fuse.path();
        let mut arguments = Vec::new();
        for (index, replica) in replicas.iter().enumerate() {
            arguments.push(OsString::from("--blk-file"));
            let mut value = replica.clone().into_os_string();
            value.push(format!(",node-name=r{index}"));
            arguments.push(value);
        }
        arguments.extend(options.iter().map(OsString::from));
        Daemon::start(self.directory.path(), arguments)
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let start = usize::try_from(offset).unwrap();
        self.contents[start..start + usize::try_from(len).unwrap()].fill(0);
    }

    fn assert_contents(&self) {
        for path in &self.backing {
            assert!(
                fs::read(path).unwrap() == self.contents,
                "{} is another",
                path.display()
            );
        }
    }
}

fn fill(bytes: &mut [u8], random: &mut Random) {
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&random.number().to_le_bytes());
    }
}

#[test]
fn every_kind_of_replica_reads_as_zeroes_and_nothing_else_changes() {
    let mut kinds = Kinds::new(&mut Random::from_environment());
    let mut daemon = kinds.start(&[]);
    let events = EventReader::connect(daemon.events_socket());
    let mut client = Client::connect(daemon.socket(), 1);
    let block = 4096;
    let requests = [
        // More than one fragment, and neither end on a block of the file system.
        Request::Discard {
            offset: block,
            len: (9 << 20) + 3 * block,
        },
        Request::WriteZeroes {
            offset: (12 << 20) + block,
            len: (2 << 20) - block,
            unmap: true,
        },
        Request::WriteZeroes {
            offset: 16 << 20,
            len: 7 * block,
            unmap: false,
        },
    ];
    let allocated =
        |kinds: &Kinds| [0, 1, 2].map(|index: usize| allocated_bytes(&kinds.backing[index]));
    let before = allocated(&kinds);
    for (request, keeps_space) in requests.into_iter().zip([false, false, true]) {
        let then = allocated_bytes(&kinds.backing[0]);
        assert_eq!(client.run(0, &[request]), [Ok(())]);
        let (Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. }) = request
        else {
            unreachable!()
        };
        kinds.zero(offset, len);
        // The file system's own account of the file may take a block more.
        assert_eq!(
            allocated_bytes(&kinds.backing[0]) >= then,
            keeps_space,
            "{request:?}"
        );
    }
    client.flush(0).unwrap();
    // Voted reads around each edge give the same.
    for (offset, len) in [
        (0, 4 * 4096),
        (9 << 20, 16 * 4096),
        (12 << 20, 4 * 4096),
        (16 << 20, 16 * 4096),
    ] {
        let start = usize::try_from(offset).unwrap();
        let read = client.read(0, offset, len).unwrap();
        assert!(read == kinds.contents[start..start + len], "at {offset}");
    }
    let now = allocated(&kinds);
    println!("bytes of the file, on tmpfs, under the loop device: {before:?}, then {now:?}");
    for (before, now) in before.into_iter().zip(now) {
        // 11 MiB are deallocated; the edges need not be.
        assert!(before - now > 21_000 * 512, "{before} - {now}");
    }
    drop(client);
    assert!(daemon.terminate().success());
    kinds.assert_contents();
    assert_eq!(events.all(), Vec::<serde_json::Value>::new());
}

#[test]
fn racing_zeroes_and_writes_leave_the_replicas_equal() {
    let mut random = Random::from_environment();
    let kinds = Kinds::new(&mut random);
    let mut daemon = kinds.start(&["--num-queues", "2"]);
    let events = EventReader::connect(daemon.events_socket());
    let mut client = Client::connect(daemon.socket(), 2);
    for _ in 0..60 {
        for queue in 0..2 {
            let mut batch = Vec::new();
            for index in 0..16 {
                let (offset, len) = (
                    random.within(0..16) * 4096,
                    (1 + random.within(0..4)) * 4096,
                );
                let memory = index * 16384;
                batch.push(match random.within(0..5) {
                    0 => Request::Discard { offset, len },
                    1 => Request::WriteZeroes {
                        offset,
                        len,
                        unmap: true,
                    },
                    2 => Request::WriteZeroes {
                        offset,
                        len,
                        unmap: false,
                    },
                    3 => Request::Read {
                        offset,
                        memory,
                        len: usize::try_from(len).unwrap(),
                    },
                    _ => Request::Write {
                        offset,
                        memory,
                        len: usize::try_from(len).unwrap(),
                    },
                });
            }
            let memory = &mut client.memory(queue)[..16 * 16384];
            fill(memory, &mut random);
            client.send(queue, &batch);
        }
        for queue in 0..2 {
            let mut left = 16;
            while left > 0 {
                for (_, result) in client.poll(queue, 1) {
                    assert_eq!(result, Ok(()));
                    left -= 1;
                }
            }
        }
    }
    client.flush(0).unwrap();
    drop(client);
    assert!(daemon.terminate().success());
    assert!(are_identical(&kinds.backing));
    assert_eq!(events.all(), Vec::<serde_json::Value>::new());
}

/// A range far larger than a fragment, of a disk that is one hole: as quick as the file systems
/// are.
#[test]
fn a_whole_disk_is_discarded() {
    const BYTES: u64 = 5 << 30;
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, BYTES);
    for image in &images {
        let file = File::options().write(true).open(image).unwrap();
        for offset in [0, 1 << 30, BYTES - 4096] {
            file.write_all_at(&[7; 4096], offset).unwrap();
        }
    }
    let mut daemon = Daemon::start(directory.path(), replica_arguments(&images));
    let mut client = Client::connect(daemon.socket(), 1);
    let half = BYTES / 5 * 2;
    let parts = [(0, half), (half, half), (2 * half, BYTES - 2 * half)];
    let requests = parts.map(|(offset, len)| Request::Discard { offset, len });
    assert_eq!(client.run(0, &requests), [Ok(()); 3]);
    assert_eq!(client.read(0, BYTES - 4096, 4096), Ok(vec![0; 4096]));
    drop(client);
    assert!(daemon.terminate().success());
    for image in &images {
        assert_eq!(allocated_bytes(image), 0, "{}", image.display());
    }
}
