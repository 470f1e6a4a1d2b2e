//! The block size belongs to the disk, whatever the images are on and however they were copied.
//!
//! Takes the right to attach loop devices and to mount (root); needs mkfs.xfs.

use std::fs::{self, File};
use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::frontend::{Plan, Vmm};
use testkit::images::{are_identical, create_images};
use testkit::loop_device::LoopDevice;
use testkit::monitor::Monitor;
use testkit::mounts::Mounted;
use testkit::process::{run, text};

const SIZE_BYTES: u64 = 4 << 20;

/// A new file system of this kind, in a file of the directory.
fn mounted(kind: &str, arguments: &[&str], size_bytes: u64) -> (TempDir, Mounted) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("fs");
    File::create(&file).unwrap().set_len(size_bytes).unwrap();
    run(
        &format!("mkfs.{kind}"),
        &[arguments, &[text(&file)]].concat(),
    );
    let mounted = Mounted::mount(&file, kind).unwrap();
    (directory, mounted)
}

/// What a guest sees and what each replica does, of a disk on these images that works.
fn served(images: &[PathBuf], options: &[&str]) -> (u32, Vec<bool>) {
    let directory = tempfile::tempdir().unwrap();
    let qmp = directory.path().join("qmp.sock");
    let mut arguments = replica_arguments(images);
    arguments.extend(["--qmp".into(), qmp.clone().into()]);
    arguments.extend(options.iter().map(Into::into));
    let mut daemon = Daemon::start(directory.path(), arguments);
    let state = Monitor::connect(&qmp).execute("query-quorum", json!({}));
    let replicas = state["replicas"].as_array().expect("replicas");
    let direct = |replica: &Value| replica["direct-io"].as_bool().expect("a truth value");
    let direct = replicas.iter().map(direct).collect();
    let mut vmm = Vmm::start(daemon.socket(), &Plan::default());
    let block_bytes = vmm.config_u32(20);
    let blocks = usize::try_from(block_bytes).unwrap();
    // Two blocks that are not aligned to more.
    let sector = 3 * u64::from(block_bytes) / 512;
    let data: Vec<u8> = (0..2 * blocks)
        .map(|at| (at % 251).to_le_bytes()[0] + 1)
        .collect();
    vmm.queues[0].write_disk(sector, &data);
    assert!(vmm.queues[0].read_disk(sector, data.len()) == data);
    drop(vmm);
    assert!(daemon.terminate().success(), "{}", daemon.log());
    assert!(are_identical(images));
    (block_bytes, direct)
}

/// A copy by reflink needs larger blocks for direct I/O than its original.
#[test]
fn copies_on_xfs_change_nothing() {
    let (_file, xfs) = mounted("xfs", &["-q", "-m", "reflink=1"], 512 << 20);
    let mut images = create_images(xfs.path(), 1, SIZE_BYTES);
    fs::write(&images[0], vec![7; usize::try_from(SIZE_BYTES).unwrap()]).unwrap();
    assert_eq!(served(&images, &[]).0, 512);
    for name in ["1.raw", "2.raw"] {
        let copy = xfs.path().join(name);
        run("cp", &["--reflink=always", text(&images[0]), text(&copy)]);
        images.push(copy);
    }
    assert_eq!(served(&images, &[]).0, 512);
}

/// tmpfs and btrfs state no alignment, and a file that is one hole does not show any.
#[test]
fn images_change_nothing_when_they_are_no_holes_any_more() {
    let tmpfs = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
    let (_file, btrfs) = mounted("btrfs", &["-q"], 256 << 20);
    for place in [tmpfs.path(), btrfs.path()] {
        let images = create_images(place, 3, SIZE_BYTES);
        assert_eq!(served(&images, &[]).0, 512);
        assert_eq!(served(&images, &[]).0, 512);
        for image in &images {
            fs::write(image, vec![7; usize::try_from(SIZE_BYTES).unwrap()]).unwrap();
        }
        assert_eq!(served(&images, &[]).0, 512);
    }
}

/// One device with blocks of 4096 bytes among three images.
#[test]
fn a_device_with_larger_blocks_is_accessed_through_the_page_cache() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, SIZE_BYTES);
    let device = LoopDevice::attach_with_blocks(&images[1], 4096);
    let mut served_images = images.clone();
    served_images[1] = device.path().to_owned();
    let small = served(&images, &[]);
    let (block_bytes, direct) = served(&served_images, &[]);
    assert_eq!((block_bytes, small.0), (512, 512));
    assert_eq!(direct, [small.1[0], false, small.1[2]]);
    // With blocks of that size direct I/O is possible.
    let (block_bytes, direct) = served(&served_images, &["--block-size", "4096"]);
    assert_eq!(block_bytes, 4096);
    assert!(direct[1]);
    drop(device);
    assert!(are_identical(&images));
}
