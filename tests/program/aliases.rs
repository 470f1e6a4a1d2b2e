//! Images that share their bytes, and block devices that something else uses, are refused.
//!
//! Takes the right to attach loop devices and to mount (root).

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use testkit::daemon::{Daemon, replica_arguments};
use testkit::loop_device::LoopDevice;
use testkit::process::{run, text};

use crate::place::{Place, assert_says, refusal};

/// Another device node for a block device.
fn second_node(place: &Place, device: &Path) -> PathBuf {
    let node = place.path("node");
    let number = fs::metadata(device).unwrap().rdev();
    let (major, minor) = (libc::major(number), libc::minor(number));
    run(
        "mknod",
        &[text(&node), "b", &major.to_string(), &minor.to_string()],
    );
    assert!(fs::metadata(&node).unwrap().file_type().is_block_device());
    node
}

#[test]
fn two_loop_devices_over_one_file_are_refused() {
    let place = Place::new(2);
    let first = LoopDevice::attach(&place.images[0]);
    let second = LoopDevice::attach(&place.images[0]);
    let both = [first.path().to_owned(), second.path().to_owned()];
    let line = place.refusal_of(&[&both[..], &place.images[1..]].concat(), &[]);
    assert_says(
        &line,
        &["are the same image", text(&both[0]), text(&both[1])],
    );
    // The file has no name any more.
    fs::remove_file(&place.images[0]).unwrap();
    assert_says(&place.refusal_of(&both, &[]), &["are the same image"]);
}

#[test]
fn a_file_and_a_loop_device_over_it_are_refused() {
    let place = Place::new(1);
    let file = place.images[0].clone();
    let device = LoopDevice::attach(&file);
    let over_it = LoopDevice::attach(device.path());
    for device in [device.path(), over_it.path()] {
        let images = [file.clone(), device.to_owned()];
        assert_says(&place.refusal_of(&images, &[]), &["are the same image"]);
    }
}

#[test]
fn a_disk_and_its_partition_are_refused() {
    let place = Place::new(1);
    let device = LoopDevice::attach(&place.images[0]);
    let disk = device.path().to_owned();
    // The first partition: 1024 sectors from sector 512 on.
    run("addpart", &[text(&disk), "1", "512", "1024"]);
    let partition = PathBuf::from(format!("{}p1", disk.display()));
    let line = place.refusal_of(&[partition.clone(), disk.clone()], &[]);
    run("delpart", &[text(&disk), "1"]);
    assert_says(&line, &[text(&partition), "is part of", text(&disk)]);
}

#[test]
fn a_mounted_device_is_refused() {
    let place = Place::new(1);
    let file = fs::File::options().write(true).open(&place.images[0]);
    file.unwrap().set_len(16 << 20).unwrap();
    run("mkfs.ext4", &["-q", text(&place.images[0])]);
    let device = LoopDevice::attach(&place.images[0]);
    let mount_point = place.path("mounted");
    fs::create_dir(&mount_point).unwrap();
    run("mount", &[text(device.path()), text(&mount_point)]);
    let inside = mount_point.join("inside.raw");
    fs::File::create(&inside).unwrap().set_len(1 << 20).unwrap();
    let mounted = place.refusal_of(&[device.path().to_owned()], &[]);
    let with_file = place.refusal_of(&[inside.clone(), device.path().to_owned()], &[]);
    run("umount", &[text(&mount_point)]);
    assert_says(&mounted, &["is in use", "mounted", text(device.path())]);
    assert_says(&with_file, &[text(&inside), "is part of"]);
}

/// Its device nodes are different files, so the locks of their bytes exclude nothing.
#[test]
fn two_daemons_do_not_serve_one_device() {
    let place = Place::new(1);
    let device = LoopDevice::attach(&place.images[0]);
    let node = second_node(&place, device.path());
    let served = tempfile::tempdir().unwrap();
    let images = [device.path().to_owned()];
    let mut daemon = Daemon::start(served.path(), replica_arguments(&images));
    let mut arguments = place.sockets_arguments();
    arguments.extend(replica_arguments(std::slice::from_ref(&node)));
    assert_says(&refusal(arguments), &["node", "is in use"]);
    assert!(daemon.terminate().success());
    let line = place.refusal_of(&[node, device.path().to_owned()], &[]);
    assert_says(&line, &["are the same image"]);
}
