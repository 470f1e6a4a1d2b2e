//! Unit tests: records on file systems that hang or fail, and the messages to the process that
//! opens them.

use super::*;

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::time::Duration;

use testkit::HANG_LIMIT;
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::process::wait_until;

use super::device_name::escaped;
use super::tests::{RECORD_BYTES, access, bytes, content, given, image, line, options};
use crate::replica::file::{ImageIdentity, Opener};

/// The way to the record of an image through another thread, which makes the system calls as a
/// process does for the daemon.
fn access_apart(image: &Path) -> RecordAccess {
    let mut opener = Opener::on_a_thread(image, options());
    let identity = ImageIdentity::of(&fs::metadata(image).unwrap());
    opener.answer_to_start();
    let keeper = Keeper::new(image, identity, false);
    RecordAccess::new(image.to_owned(), Some(opener), keeper)
}

/// Serves a record with faults, and returns with the server the state directory for the image.
fn served(directory: &Path, image_path: &Path) -> (FuseImage, StateDirectory) {
    let name = escaped(&fs::canonicalize(image_path).unwrap());
    let backing = directory.join("backing");
    fs::write(&backing, content(3)).unwrap();
    let server = FuseImage::serve_as(&backing, &format!("{}.quorum", name.to_str().unwrap()));
    let state = given(&server.directory());
    (server, state)
}

#[test]
fn a_block_that_cannot_be_read_costs_no_other_one_its_content() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.raw");
    image(&path);
    let (server, state) = served(directory.path(), &path);
    server.make_unreadable(8192..8193);
    server.make_unreadable((RECORD_BYTES - 1) as u64..RECORD_BYTES as u64);
    let (record, read) = access(&path).find(&state).unwrap().unwrap();
    let mut expected = content(3);
    expected[8192..12288].fill(0);
    expected[RECORD_BYTES - 100..].fill(0);
    assert_eq!(read.unreadable_bytes, 4096 + 100);
    assert!(bytes(&read) == expected);
    record.write(0, &[4; 512]).unwrap();
    assert_eq!(server.durable_writes(), 1);
}

#[test]
fn a_record_that_does_not_answer_is_given_up() {
    for operation in [Operation::Attributes, Operation::Open, Operation::Read] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.raw");
        image(&path);
        let (server, state) = served(directory.path(), &path);
        let _clear = server.fault_guard();
        assert!(access_apart(&path).find(&state).unwrap().is_some());
        let asked = server.asked(operation);
        server.inject(operation, Fault::Hang);
        let mut access = access_apart(&path).with_limit(Duration::from_millis(200));
        let line_of = line(access.find(&state), &path);
        assert!(
            line_of.contains("does not answer"),
            "{operation:?}: {line_of}"
        );
        let is_asked = || server.asked(operation) > asked;
        assert!(wait_until(HANG_LIMIT, is_asked), "{operation:?}");
        // A late answer is not that to a later question.
        server.clear_faults();
        assert!(matches!(
            access.find(&state),
            Err(RecordError::Silent { .. })
        ));
        drop(access);
    }
}

#[test]
fn another_process_does_all_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory
        .path()
        .join(OsString::from_vec(b"not UTF-8 \xff".to_vec()));
    image(&path);
    let state = given(directory.path());
    let mut access = access_apart(&path);
    assert!(access.find(&state).unwrap().is_none());
    let largest = vec![5; usize::try_from(RECORD_BYTES_MAX).unwrap()];
    let made = access.make(&state, &largest).unwrap();
    access.write(RECORD_BYTES_MAX - 4, b"end!").unwrap();
    made.write(0, b"begin").unwrap();
    let (record, read) = access.find(&state).unwrap().unwrap();
    assert_eq!(record.path, made.path);
    assert!(bytes(&read).starts_with(b"begin\x05") && bytes(&read).ends_with(b"\x05end!"));
    access.make_instead(&content(6)).unwrap();
    assert_eq!(bytes(&access.find(&state).unwrap().unwrap().1), content(6));
    let mut kept = record.path.into_os_string();
    kept.push(".unusable");
    fs::remove_file(&kept).unwrap();
    fs::create_dir(&kept).unwrap();
    access.make_instead(&content(7)).unwrap();
}
