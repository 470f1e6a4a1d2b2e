//! What opens images once the daemon has given up the right to: a process that keeps that right,
//! and starts one for each image, which then reaches that image only.

use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::client::Client;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::monitor::Monitor;
use testkit::mounts;
use testkit::process::{Process, wait_until};

use crate::place::{DISK_BYTES, Place};

/// A daemon with records over `images`, with a monitor.
fn serve(place: &Place, images: &[PathBuf], options: &[&str]) -> (Daemon, Monitor) {
    let mut arguments = replica_arguments(images);
    let socket = place.path("qmp.sock");
    arguments.extend(["--qmp".into(), socket.clone().into()]);
    arguments.extend(options.iter().map(Into::into));
    let daemon = Daemon::start_with_records(place.directory.path(), arguments);
    (daemon, Monitor::connect(&socket))
}

/// Adds an image as the replica `new`; the text of the error, if that is refused.
fn add(monitor: &mut Monitor, image: &Path) -> Result<(), String> {
    let node = json!({ "driver": "file", "node-name": "new", "filename": image });
    monitor.execute("blockdev-add", node);
    let change = json!({ "parent": "quorum0", "node": "new" });
    let added = monitor.try_execute("x-blockdev-change", change);
    added.map(drop).map_err(|error| error["desc"].to_string())
}

fn image(path: &Path) {
    File::create(path).unwrap().set_len(DISK_BYTES).unwrap();
}

/// The process that the daemon has started.
fn spawner(daemon: &Daemon) -> u32 {
    let children = format!("/proc/{0}/task/{0}/children", daemon.id());
    let children = fs::read_to_string(children).unwrap();
    let mut children = children.split_whitespace();
    let spawner = children.next().expect("a process").parse().unwrap();
    assert_eq!(children.next(), None, "one process");
    spawner
}

fn mount(arguments: &[&str], on: &Path) {
    let status = Command::new("mount").args(arguments).arg(on).status();
    assert!(status.unwrap().success());
}

fn tmpfs(on: &Path) {
    mount(&["-t", "tmpfs", "tmpfs"], on);
}

/// Also where its path leads through a link out of the image directories.
#[test]
fn an_image_is_found_when_its_file_system_was_mounted_anew() {
    std::thread::spawn(|| {
        mounts::separate();
        let (place, elsewhere) = (Place::new(2), tempfile::tempdir().unwrap());
        let mount_point = elsewhere.path().join("mounted");
        fs::create_dir(&mount_point).unwrap();
        let (link, real) = (place.path("link"), mount_point.join("c.raw"));
        symlink(&real, &link).unwrap();
        tmpfs(&mount_point);
        image(&real);
        let images = [&place.images[..], std::slice::from_ref(&link)].concat();
        let directory = place.directory.path().to_str().unwrap();
        let (mut daemon, mut monitor) = serve(&place, &images, &["--image-dir", directory]);
        let removed = json!({ "parent": "quorum0", "child": "link" });
        monitor.execute("x-blockdev-change", removed);
        let unmounted = || {
            let status = Command::new("umount").arg(&mount_point).status();
            status.unwrap().success()
        };
        assert!(wait_until(HANG_LIMIT, unmounted), "the image is closed");
        tmpfs(&mount_point);
        image(&real);
        add(&mut monitor, &link).unwrap();
        assert!(real.with_extension("raw.quorum").exists());
        assert!(daemon.terminate().success());
    })
    .join()
    .unwrap();
}

#[test]
fn an_image_in_shared_memory_is_a_file_as_any_other() {
    let place = Place::new(2);
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let directory = memory.path().to_str().unwrap();
    let (mut daemon, mut monitor) = serve(&place, &place.images, &["--image-dir", directory]);
    let new = memory.path().join("new.raw");
    image(&new);
    add(&mut monitor, &new).unwrap();
    assert!(new.with_extension("raw.quorum").exists());
    assert!(daemon.terminate().success());
}

/// The value of a line of /proc/PID/status.
fn value(process: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let mut lines = status.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
    value.expect("a line").to_owned()
}

#[test]
fn the_spawner_has_no_other_rights_and_ends_with_the_daemon() {
    let place = Place::new(2);
    let (mut daemon, _monitor) = serve(&place, &place.images, &["--user", "1234:5678"]);
    let spawner = spawner(&daemon);
    assert_eq!(value(spawner, "Uid"), "1234\t1234\t1234\t1234");
    assert_eq!(value(spawner, "NoNewPrivs"), "1");
    assert_eq!(value(spawner, "Seccomp"), "2");
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(value(spawner, set), "0000000000000000");
    }
    daemon.signal(libc::SIGKILL);
    daemon.wait();
    let has_ended = || !Path::new(&format!("/proc/{spawner}")).exists();
    assert!(wait_until(HANG_LIMIT, has_ended));
}

/// A monitor cannot end it with what it asks for.
#[test]
fn what_is_no_path_is_refused_and_the_spawner_goes_on() {
    let place = Place::new(2);
    let (mut daemon, mut monitor) = serve(&place, &place.images, &[]);
    let long = place.path(&"a/".repeat(10_000));
    let refused = add(&mut monitor, &long).unwrap_err();
    assert!(refused.contains("File name too long"), "{refused}");
    monitor.execute("blockdev-del", json!({ "node-name": "new" }));
    let new = place.path("new.raw");
    image(&new);
    add(&mut monitor, &new).unwrap();
    assert!(daemon.terminate().success());
}

#[test]
fn the_disk_is_served_on_without_the_spawner() {
    let place = Place::new(2);
    let (mut daemon, mut monitor) = serve(&place, &place.images, &[]);
    let spawner = spawner(&daemon);
    let killed = Command::new("kill")
        .args(["-9", &spawner.to_string()])
        .status();
    assert!(killed.unwrap().success());
    let has_ended = || !Path::new(&format!("/proc/{spawner}")).exists();
    assert!(wait_until(HANG_LIMIT, has_ended));
    let new = place.path("new.raw");
    image(&new);
    let refused = add(&mut monitor, &new).unwrap_err();
    let why = "the process that starts those that open images (quorum-blkd --start-openers) has \
               ended; restart the daemon";
    assert!(refused.contains(why), "{refused}");
    let mut client = Client::connect(daemon.socket(), 1);
    client.write(0, 0, &[1; 4096]).unwrap();
    client.flush(0).unwrap();
    drop(client);
    let says = || {
        daemon
            .log()
            .contains("the process that starts those that open images has ended")
    };
    assert!(wait_until(HANG_LIMIT, says), "{}", daemon.log());
    assert!(daemon.terminate().success());
}

/// A program that its user may not execute, as one below /root.
#[test]
fn a_disk_is_served_though_its_user_cannot_start_the_program() {
    let place = Place::new(2);
    let program = place.path("quorum-blkd");
    fs::copy(env!("CARGO_BIN_EXE_quorum-blkd"), &program).unwrap();
    fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).unwrap();
    let run = |sandbox: &str| {
        let mut command = Command::new(&program);
        command
            .args(place.sockets_arguments())
            .args(replica_arguments(&place.images))
            .args(["--user", "1234:5678", "--sandbox", sandbox])
            .stderr(File::create(place.path("log")).unwrap());
        Process::spawn(&mut command).unwrap()
    };
    let log = || fs::read_to_string(place.path("log")).unwrap();
    let mut daemon = run("auto");
    assert!(
        wait_until(HANG_LIMIT, || log().contains("serving the disk")),
        "{}",
        log()
    );
    assert!(
        log().contains("check that the user may execute the program"),
        "{}",
        log()
    );
    daemon.signal(libc::SIGTERM);
    daemon.wait_within(HANG_LIMIT).expect("it ends");
    let status = run("on").wait_within(HANG_LIMIT).expect("it ends");
    assert_eq!(status.code(), Some(1), "{}", log());
}

/// One that could not be started in time is not started later: it would keep its file system busy.
#[test]
fn an_image_is_left_alone_that_nothing_waits_for_any_more() {
    let place = Place::new(2);
    let (mut daemon, mut monitor) = serve(&place, &place.images, &[]);
    let spawner = spawner(&daemon);
    let signal = |name: &str| {
        let status = Command::new("kill")
            .args([name, &spawner.to_string()])
            .status();
        assert!(status.unwrap().success());
    };
    let new = place.path("new.raw");
    image(&new);
    signal("-STOP");
    let refused = add(&mut monitor, &new).unwrap_err();
    assert!(refused.contains("does not answer"), "{refused}");
    signal("-CONT");
    // It deals with one request after the other.
    add_again(&mut monitor);
    let openers = || {
        let children = format!("/proc/{spawner}/task/{spawner}/children");
        fs::read_to_string(children).unwrap()
    };
    assert!(
        wait_until(HANG_LIMIT, || openers().is_empty()),
        "{}",
        openers()
    );
    assert!(daemon.terminate().success());
}

/// Adds the replica `new` again.
fn add_again(monitor: &mut Monitor) {
    let change = json!({ "parent": "quorum0", "node": "new" });
    monitor.execute("x-blockdev-change", change);
}

/// A process that opens an image, and this end of its socket.
struct Opener {
    _process: Process,
    socket: OwnedFd,
}

impl Opener {
    /// One that may keep records in `records`.
    fn start(image: &Path, records: &Path) -> Self {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (socket, its_end) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blkd"));
        command
            .args([
                "--open-image",
                "read-write",
                "cached",
                "filtered",
                "confined",
            ])
            .args([image, Path::new(""), Path::new("given-state"), records])
            .stdin(its_end)
            .stderr(Stdio::null());
        let opener = Self {
            _process: Process::spawn(&mut command).unwrap(),
            socket,
        };
        assert_eq!(opener.answer(), json!({ "Ok": null }), "it has started");
        assert!(opener.answer()["Ok"].is_object());
        opener
    }

    fn send(&self, order: &Value, file: &File) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
        let bytes = order.to_string();
        let parts = [IoSlice::new(bytes.as_bytes())];
        sendmsg(&self.socket, &parts, &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    fn answer(&self) -> Value {
        let mut bytes = vec![0; 1 << 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(
            &self.socket,
            &mut into,
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        );
        let count = received.unwrap().bytes;
        serde_json::from_slice(&bytes[..count]).unwrap()
    }

    /// Has it make a record in `directory`.
    fn make_record(&self, directory: &Path) -> Value {
        let bytes = directory.as_os_str().as_bytes();
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let content = tempfile::tempfile().unwrap();
        content.set_len(4096).unwrap();
        let order = json!({ "Record": { "Make": { "Given": digits } } });
        self.send(&order, &content).unwrap();
        self.answer()
    }
}

/// It has read what a stranger may have written to the image.
#[test]
fn a_process_that_has_opened_an_image_reaches_that_and_its_record_only() {
    std::thread::spawn(|| {
        mounts::separate();
        let place = Place::new(1);
        let [allowed, other, read_only] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        // Its directory cannot be written, so that its record is in the one that is given.
        tmpfs(read_only.path());
        let path = read_only.path().join("a.raw");
        File::create(&path).unwrap();
        mount(&["--bind", place.images[0].to_str().unwrap()], &path);
        mount(&["-o", "remount,ro"], read_only.path());
        let opener = Opener::start(&path, allowed.path());
        let refused = opener.make_record(other.path());
        assert!(refused["Err"].is_object(), "{refused}");
        assert_eq!(fs::read_dir(other.path()).unwrap().count(), 0);
        let made = opener.make_record(allowed.path());
        assert!(made["Ok"].is_object(), "{made}");
        assert_eq!(fs::read_dir(allowed.path()).unwrap().count(), 1);
    })
    .join()
    .unwrap();
}
