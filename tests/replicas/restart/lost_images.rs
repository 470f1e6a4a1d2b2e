//! An image whose file system goes while the disk is served, and comes back (W13): the replica is
//! missing meanwhile, and gets what it may have missed, not all of the disk.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use testkit::HANG_LIMIT;
use testkit::fuse::FuseImage;
use testkit::images::are_identical;
use testkit::machine;
use testkit::process::wait_until;

use super::{Host, Running, SIZE_BYTES, modify, newest_sequence, read, write};

/// Has `link` lead to the file that is served now.
fn lead_to(link: &Path, fuse: &FuseImage) {
    let new = link.with_extension("new");
    symlink(fuse.path(), &new).unwrap();
    fs::rename(&new, link).unwrap();
}

/// A disk whose third image is on a file system of its own.
struct Disk {
    host: Host,
    fuse: FuseImage,
    running: Running,
}

impl Disk {
    fn start() -> Self {
        let mut host = Host::new(3);
        let fuse = FuseImage::serve(&host.images[2]);
        let link = host.path("c.raw");
        lead_to(&link, &fuse);
        host.images.push(link);
        let images = [0, 1, 3].map(|place| host.images[place].clone());
        let state = host.path("state");
        fs::create_dir(&state).unwrap();
        let more = ["--state-dir", state.to_str().unwrap()];
        let running = host.start_with(&images, &more);
        Self {
            host,
            fuse,
            running,
        }
    }

    /// The server of the file system is killed.
    fn lose(&self) {
        self.fuse.abort();
        self.running
            .state_when(|state| state["replicas"][2]["state"] == "missing");
        let log = self.running.daemon.log();
        assert!(
            log.contains("is lost") && log.contains("not connected"),
            "{log}"
        );
        let (code, text) = self.running.blkctl(&["status"]);
        assert!(code == 1 && text.contains("missing"), "{code}: {text}");
    }

    /// It is started again.
    fn serve_again(&mut self) {
        let before = std::mem::replace(&mut self.fuse, FuseImage::serve(&self.host.images[2]));
        lead_to(&self.host.images[3], &self.fuse);
        drop(before);
    }

    /// Ends the daemon: all images are equal.
    fn end(self) {
        self.running.end();
        drop(self.fuse);
        assert!(are_identical(&self.host.images[..3]));
    }
}

#[test]
fn a_replica_whose_file_system_comes_back_gets_what_it_has_missed() {
    let _machine = machine::shared();
    let mut disk = Disk::start();
    let mut client = disk.running.client();
    (0..64).for_each(|index| write(&mut client, index, 1));
    disk.lose();
    // It is lost at once for requests, and nothing fails.
    write(&mut client, 3, 2);
    disk.serve_again();
    disk.running.wait_until_healthy();
    assert_eq!(read(&mut client, 3), 2);
    write(&mut client, 5, 3);
    // The extent that is marked, of eight.
    let written = disk.fuse.written_bytes();
    assert!((4096..1200 << 10).contains(&written), "{written} bytes");
    // And once more.
    disk.lose();
    write(&mut client, 7, 4);
    disk.serve_again();
    disk.running.wait_until_healthy();
    drop(client);
    disk.end();
}

/// What comes back is an older copy: its record is of a table that has changed since, or has only
/// fewer entries than the one that was lost.
#[test]
fn an_old_copy_in_the_place_of_a_lost_image_is_not_believed() {
    let _machine = machine::shared();
    let mut disk = Disk::start();
    let mut client = disk.running.client();
    write(&mut client, 0, 1);
    let mut records = fs::read_dir(disk.host.path("state")).unwrap();
    let record = records.next().unwrap().unwrap().path();
    let old = disk.host.path("old.record");
    for is_of_this_table in [true, false] {
        fs::copy(&record, &old).unwrap();
        if is_of_this_table {
            // Its result is in the records soon after it.
            let before = newest_sequence(&record);
            assert_eq!(disk.running.blkctl(&["scrub"]).0, 0);
            let came = wait_until(HANG_LIMIT, || newest_sequence(&record) > before);
            assert!(came, "{}", disk.running.daemon.log());
        } else {
            disk.lose();
            write(&mut client, 1, 2);
            disk.serve_again();
            disk.running.wait_until_healthy();
        }
        write(&mut client, 2, 3);
        disk.lose();
        modify(&disk.host.images[2], 2, 9);
        fs::copy(&old, &record).unwrap();
        disk.serve_again();
        disk.running.wait_until_healthy();
        let written = disk.fuse.written_bytes();
        assert!(written >= SIZE_BYTES, "{written}: it is copied as a whole");
    }
    drop(client);
    disk.end();
}
