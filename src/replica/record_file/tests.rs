//! Unit tests: where records are, and what is not taken for one.

use super::*;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use rustix::fs::{CWD, Mode, OFlags, fcntl_getfl, mkfifoat};
use testkit::images::allocated_bytes;
use testkit::loop_device::LoopDevice;
use testkit::small_disk::SmallDisk;

use super::device_name::{Devices, escaped};
use super::error::{RecordFault, Step};
use crate::replica::file::{
    EmptyImages, ImageIdentity, OpenOptions, Opening, ReplicaSource, Unopenable,
    open_all_with_records,
};

const IMAGE_BYTES: u64 = 1 << 20;
/// Not a multiple of a block.
pub(super) const RECORD_BYTES: usize = (256 << 10) + 100;

fn usual() -> StateDirectory {
    StateDirectory::Usual("/nowhere/quorum-blk".into())
}

pub(super) fn given(path: &Path) -> StateDirectory {
    StateDirectory::Given(path.to_owned())
}

pub(super) fn options() -> OpenOptions {
    OpenOptions {
        read_only: false,
        direct: false,
        raw_anyway: false,
        block_bytes: 512,
    }
}

/// The content of a record.
pub(super) fn content(byte: u8) -> Vec<u8> {
    vec![byte; RECORD_BYTES]
}

pub(super) fn image(path: &Path) {
    File::create(path).unwrap().set_len(IMAGE_BYTES).unwrap();
}

/// The way to the record of an image that the calling thread has opened.
pub(super) fn access(image: &Path) -> RecordAccess {
    access_as(image, false)
}

fn access_as(image: &Path, read_only: bool) -> RecordAccess {
    let identity = ImageIdentity::of(&fs::metadata(image).unwrap());
    let keeper = Keeper::new(image, identity, read_only);
    // No names of devices but those that the tests give.
    let keeper = keeper.with_devices(Devices::at("/nowhere/by-id", "/nowhere/udev"));
    RecordAccess::new(image.to_owned(), None, keeper)
}

/// What the record of an image holds.
fn found(image: &Path, state: &StateDirectory) -> Option<(PathBuf, Vec<u8>)> {
    let found = access(image).find(state).unwrap();
    found.map(|(record, content)| (record.path, bytes(&content)))
}

/// All that a record holds.
pub(super) fn bytes(content: &RecordContent) -> Vec<u8> {
    content.part(0, usize::MAX).unwrap()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string();
    let mut names: Vec<_> = entries.map(|entry| name(entry).unwrap()).collect();
    names.sort();
    names
}

/// The line of an error.
pub(super) fn line<T: std::fmt::Debug>(result: Result<T, RecordError>, path: &Path) -> String {
    let line = result.unwrap_err().to_string();
    assert!(
        !line.contains(char::is_control) && !line.contains("os error"),
        "{line}"
    );
    assert!(line.contains(&path.display().to_string()), "{line}");
    line
}

#[test]
fn a_record_is_complete_private_and_durable() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.raw");
    image(&path);
    std::os::unix::fs::chown(&path, Some(1234), Some(4321)).unwrap();
    let mut access = access(&path);
    assert!(access.find(&usual()).unwrap().is_none());
    assert_eq!(names(directory.path()), ["a.raw"]);

    let record = access.make(&usual(), &content(7)).unwrap();
    assert_eq!(record.path, directory.path().join("a.raw.quorum"));
    assert_eq!(record.size_bytes, RECORD_BYTES as u64);
    assert_eq!(names(directory.path()), ["a.raw", "a.raw.quorum"]);
    let metadata = fs::metadata(&record.path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 4321));
    assert!(allocated_bytes(&record.path) >= RECORD_BYTES as u64);
    assert!(fcntl_getfl(&record.file).unwrap().contains(OFlags::DSYNC));

    record.write(4096, b"here").unwrap();
    access.write(8192, b"there").unwrap();
    let end = record.size_bytes;
    assert!(record.write(end - 1, b"..").is_err());
    line(access.write(end - 1, b".."), &record.path);
    let mut expected = content(7);
    expected[4096..4100].copy_from_slice(b"here");
    expected[8192..8197].copy_from_slice(b"there");
    let (again, read) = access.find(&usual()).unwrap().unwrap();
    assert_eq!((bytes(&read), read.unreadable_bytes), (expected, 0));
    assert!(fcntl_getfl(&again.file).unwrap().contains(OFlags::DSYNC));
}

#[test]
fn a_record_is_beside_the_file_that_the_links_lead_to() {
    let directory = tempfile::tempdir().unwrap();
    let [pool, links] = ["pool", "links"].map(|name| directory.path().join(name));
    fs::create_dir(&pool).unwrap();
    fs::create_dir(&links).unwrap();
    for name in ["a.raw", "b.raw"] {
        image(&pool.join(name));
    }
    symlink("../pool/a.raw", links.join("first")).unwrap();
    symlink(links.join("first"), links.join("disk")).unwrap();
    let disk = links.join("disk");
    access(&disk).make(&usual(), &content(1)).unwrap();
    assert_eq!(names(&pool), ["a.raw", "a.raw.quorum", "b.raw"]);
    assert_eq!(names(&links), ["disk", "first"]);
    assert_eq!(found(&pool.join("a.raw"), &usual()).unwrap().1, content(1));

    // What the link leads to now has no record.
    fs::remove_file(&disk).unwrap();
    symlink("../pool/b.raw", &disk).unwrap();
    assert_eq!(found(&disk, &usual()), None);

    // A descriptor leads to the file, wherever it is.
    let open = File::open(pool.join("a.raw")).unwrap();
    let descriptor = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&open));
    assert_eq!(
        found(Path::new(&descriptor), &usual()).unwrap().1,
        content(1)
    );
}

/// It may have a record, where it is now.
#[test]
fn an_image_that_is_in_no_known_directory_is_not_one_without_record() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.raw");
    image(&path);
    let mut moved = access(&path);
    fs::rename(&path, directory.path().join("b.raw")).unwrap();
    image(&path);
    for result in [
        moved.find(&usual()).map(|_| ()),
        moved.make(&usual(), &content(1)).map(|_| ()),
    ] {
        let line = line(result, &path);
        assert!(line.contains("no directory is known"), "{line}");
        assert!(
            line.contains("--state-dir DIR") && line.contains("--state none"),
            "{line}"
        );
    }
    assert_eq!(names(directory.path()), ["a.raw", "b.raw"]);
}

#[test]
fn a_read_only_disk_reads_records_and_writes_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.raw");
    image(&path);
    let mut reader = access_as(&path, true);
    assert!(reader.find(&usual()).unwrap().is_none());
    reader.make(&usual(), &content(1)).unwrap_err();
    assert_eq!(names(directory.path()), ["a.raw"]);
    access(&path).make(&usual(), &content(1)).unwrap();
    let (record, read) = reader.find(&usual()).unwrap().unwrap();
    assert_eq!(bytes(&read), content(1));
    record.write(0, b"x").unwrap_err();
    reader.write(0, b"x").unwrap_err();
    assert_eq!(found(&path, &usual()).unwrap().1, content(1));
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.raw");
    let record = directory.path().join("a.raw.quorum");
    image(&path);
    let refused = |kind: &str| {
        let line = line(access(&path).find(&usual()), &record);
        assert!(
            line.contains(&format!("is {kind};")) && line.ends_with("move it away"),
            "{line}"
        );
    };
    image(&directory.path().join("other"));
    symlink("other", &record).unwrap();
    refused("a symbolic link");
    fs::remove_file(&record).unwrap();
    mkfifoat(CWD, &record, Mode::RUSR | Mode::WUSR).unwrap();
    refused("a FIFO");
    fs::remove_file(&record).unwrap();
    fs::create_dir(&record).unwrap();
    refused("a directory");
    fs::remove_dir(&record).unwrap();
    File::create(&record)
        .unwrap()
        .set_len(RECORD_BYTES_MAX + 1)
        .unwrap();
    let line = line(access(&path).find(&usual()), &record);
    assert!(line.contains("it is no record"), "{line}");
}

#[test]
fn a_record_that_is_there_is_not_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.raw");
    image(&path);
    let mut access = access(&path);
    let record = access.make(&usual(), &content(1)).unwrap();
    let line = line(access.make(&usual(), &content(2)), &record.path);
    assert!(line.contains("another process has made"), "{line}");
    assert_eq!(found(&path, &usual()).unwrap().1, content(1));
    assert_eq!(names(directory.path()), ["a.raw", "a.raw.quorum"]);
}

#[test]
fn what_was_in_the_place_of_a_record_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.raw");
    let record = directory.path().join("a.raw.quorum");
    let kept = directory.path().join("a.raw.quorum.unusable");
    image(&path);
    let mut access = access(&path);
    // Perhaps it is no record.
    fs::write(&record, "a letter").unwrap();
    for round in [1, 2] {
        let (_, read) = access.find(&usual()).unwrap().unwrap();
        assert_ne!(bytes(&read), content(round));
        let made = access.make_instead(&content(round)).unwrap();
        made.write(0, &[round]).unwrap();
        assert_eq!(found(&path, &usual()).unwrap().1, content(round));
        assert_eq!(fs::read(&kept).unwrap(), b"a letter");
        assert_eq!(names(directory.path()).len(), 3);
    }
}

#[test]
fn without_room_beside_the_image_a_record_is_in_the_state_directory() {
    let small = SmallDisk::mount_read_only(4 << 20, |path| image(&path.join("a.raw")));
    let path = small.path().join("a.raw");
    let beside = small.path().join("a.raw.quorum");
    assert_eq!(found(&path, &usual()), None);
    let line_of = line(access(&path).make(&usual(), &content(1)), &beside);
    assert!(
        line_of.contains("Read-only file system; name another directory"),
        "{line_of}"
    );
    assert!(
        line_of.contains("--state-dir DIR") && line_of.contains("--state none"),
        "{line_of}"
    );

    let state = tempfile::tempdir().unwrap();
    let missing = given(&state.path().join("missing"));
    for result in [
        access(&path).find(&missing).map(|_| ()),
        access(&path).make(&missing, &content(1)).map(|_| ()),
    ] {
        let line = line(result, missing.path());
        assert!(
            line.contains("--state-dir must name the directory"),
            "{line}"
        );
    }
    let state = given(state.path());
    let record = access(&path).make(&state, &content(1)).unwrap();
    assert_eq!(record.path.parent(), Some(state.path()));
    assert_eq!(found(&path, &state), Some((record.path, content(1))));
}

#[test]
fn two_records_of_one_image_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let state = tempfile::tempdir().unwrap();
    let state = given(state.path());
    let path = directory.path().join("a.raw");
    image(&path);
    let beside = access(&path).make(&state, &content(1)).unwrap().path;
    assert_eq!(beside, directory.path().join("a.raw.quorum"));
    let away = directory.path().join("away");
    fs::rename(&beside, &away).unwrap();
    let name = device_name::escaped(&fs::canonicalize(&path).unwrap());
    let other = state.path().join(name).with_extension("raw.quorum");
    fs::write(&other, content(2)).unwrap();
    assert_eq!(found(&path, &state), Some((other.clone(), content(2))));
    fs::rename(&away, &beside).unwrap();
    let line = line(access(&path).find(&state), &path);
    for record in [beside, other] {
        assert!(line.contains(&record.display().to_string()), "{line}");
    }
}

#[test]
fn a_full_file_system_refuses_a_record_when_it_is_made() {
    let small = SmallDisk::mount(RECORD_BYTES as u64);
    let path = small.path().join("a.raw");
    image(&path);
    fs::write(small.path().join("ballast"), vec![1; 100 << 10]).unwrap();
    let result = access(&path).make(&usual(), &content(1));
    let line = line(result, &small.path().join("a.raw.quorum"));
    assert!(line.contains("No space left on device"), "{line}");
    assert_eq!(names(&small.path()), ["a.raw", "ballast"]);
    fs::remove_file(small.path().join("ballast")).unwrap();
    access(&path).make(&usual(), &[1; 4096]).unwrap();
    assert_eq!(found(&path, &usual()).unwrap().1, [1; 4096]);
}

#[test]
fn the_record_of_a_block_device_is_in_the_state_directory() {
    let directory = tempfile::tempdir().unwrap();
    image(&directory.path().join("backing"));
    let device = LoopDevice::attach(&directory.path().join("backing"));
    // A link, as ZFS makes them: with the kernel's name of it, it would be refused.
    let volume = directory.path().join("volume");
    symlink(device.path(), &volume).unwrap();
    let path = volume.as_path();
    let missing = directory.path().join("state");
    let state = StateDirectory::Usual(missing.clone());
    assert_eq!(found(path, &state), None);
    assert!(!missing.exists());
    let line_of = line(access(path).make(&usual(), &content(1)), usual().path());
    assert!(
        line_of.contains("--state-dir DIR") && line_of.contains("--state none"),
        "{line_of}"
    );

    let made = access(path).make(&state, &content(1)).unwrap();
    let mut name = escaped(path);
    name.push(".quorum");
    assert_eq!(made.path, missing.join(&name));
    assert_eq!(
        fs::metadata(&missing).unwrap().permissions().mode() & 0o777,
        0o700
    );
    assert_eq!(found(path, &state), Some((made.path, content(1))));

    // It is found under any of the names that the device has.
    let by_id = directory.path().join("by-id");
    fs::create_dir(&by_id).unwrap();
    let named = |links: &[&str]| {
        for link in links {
            symlink(path, by_id.join(link)).unwrap();
        }
        let identity = ImageIdentity::of(&fs::metadata(path).unwrap());
        let devices = Devices::at(&by_id, "/nowhere/udev");
        let keeper = Keeper::new(path, identity, false).with_devices(devices);
        RecordAccess::new(path.to_owned(), None, keeper)
    };
    let made = named(&["ata-DISK_1"]).make(&state, &content(2)).unwrap();
    let (again, read) = named(&["wwn-0x5"]).find(&state).unwrap().unwrap();
    assert_eq!((again.path, bytes(&read)), (made.path, content(2)));
}

#[test]
fn an_image_that_is_opened_has_a_way_to_its_record() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.raw");
    image(&path);
    let options = options();
    let source = ReplicaSource {
        path,
        node_name: "a".into(),
    };
    let (empty, unopenable) = (EmptyImages::Refused, Unopenable::Refused);
    let opened = open_all_with_records(&[source], options, Opening::Here, empty, unopenable);
    let [Ok((_replica, mut access))] = <[_; 1]>::try_from(opened.unwrap()).unwrap() else {
        panic!("it is open");
    };
    access.make(&usual(), &content(1)).unwrap();
    assert_eq!(
        bytes(&access.find(&usual()).unwrap().unwrap().1),
        content(1)
    );
}

#[test]
fn hints_fit_the_error() {
    let line = |step, errno| {
        let fault = RecordFault::Failed(step, "/x".into(), errno);
        fault.about("/image".into()).to_string()
    };
    assert_eq!(
        line(Step::Open, libc::EACCES),
        "cannot open record '/x': Permission denied; make it readable and writable for this user"
    );
    assert_eq!(
        line(Step::Open, libc::EROFS),
        "cannot open record '/x': Read-only file system; make its file system writable, or use \
         --read-only"
    );
    assert_eq!(
        line(Step::Look, libc::EIO),
        "cannot look for a record in '/x': Input/output error"
    );
    assert_eq!(
        line(Step::Replace, libc::ENOSPC),
        "cannot replace record '/x': No space left on device"
    );
}

#[test]
fn the_usual_state_directory_is_that_of_the_service() {
    let usual = |variable: Option<&str>| {
        StateDirectory::usual(variable.map(OsStr::new))
            .path()
            .display()
            .to_string()
    };
    assert_eq!(usual(None), "/var/lib/quorum-blk");
    assert_eq!(usual(Some("")), "/var/lib/quorum-blk");
    assert_eq!(usual(Some("/var/lib/a:/var/lib/b")), "/var/lib/a");
}
