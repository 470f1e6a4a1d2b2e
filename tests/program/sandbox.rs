//! What a daemon gives up when its images and sockets are open, as the kernel shows it; and what a
//! monitor may use then.

use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::str::FromStr;
use std::{fs, io};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use serde_json::{Value, json};
use syscalls::Sysno;
use testkit::HANG_LIMIT;
use testkit::client::Client;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::monitor::Monitor;
use testkit::process::{Process, wait_until};

use crate::place::{DISK_BYTES, Place, refusal};

/// A daemon over the images of `place`, with a monitor.
fn serve(place: &Place, options: &[&str]) -> (Daemon, Monitor) {
    let mut arguments = replica_arguments(&place.images);
    let socket = place.path("qmp.sock");
    arguments.extend(["--qmp".into(), socket.clone().into()]);
    arguments.extend(options.iter().map(Into::into));
    let daemon = Daemon::start_with_records(place.directory.path(), arguments);
    (daemon, Monitor::connect(&socket))
}

/// What /proc says of each thread of a process.
fn threads(process: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let statuses = tasks.filter_map(|task| {
        // It may have ended.
        fs::read_to_string(task.ok()?.path().join("status")).ok()
    });
    statuses.collect()
}

/// The value of a line of /proc/PID/status.
fn value<'a>(status: &'a str, name: &str) -> &'a str {
    let mut lines = status.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
    value.unwrap_or_else(|| panic!("no {name} in {status}"))
}

const SETS: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

#[test]
fn every_thread_has_given_up_its_rights() {
    for aio in ["io_uring", "threads"] {
        let place = Place::new(3);
        let (daemon, mut monitor) = serve(&place, &["--aio", aio]);
        monitor.execute("query-quorum", json!({}));
        // The monitor answers before the last thread has done so.
        let filtered = || {
            let threads = threads(daemon.id());
            threads.iter().all(|status| value(status, "Seccomp") == "2")
        };
        wait_until(HANG_LIMIT, filtered);
        let threads = threads(daemon.id());
        assert!(threads.len() > 3, "{threads:?}");
        for status in &threads {
            assert_eq!(value(status, "NoNewPrivs"), "1", "{status}");
            assert_eq!(value(status, "Seccomp"), "2", "{status}");
            for set in SETS {
                assert_eq!(value(status, set), "0000000000000000", "{status}");
            }
        }
        let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.id())).unwrap();
        let core = limits
            .lines()
            .find(|line| line.starts_with("Max core file size"));
        let core: Vec<&str> = core.expect("a line").split_whitespace().collect();
        assert_eq!(core[4..6], ["0", "0"], "{limits}");
    }
}

/// Those that close what a frontend has passed, whose connection another kind of thread serves.
#[test]
fn closing_threads_have_a_filter_of_their_own() {
    let place = Place::new(1);
    let (daemon, mut monitor) = serve(&place, &[]);
    let mut client = Client::connect(daemon.socket(), 1);
    client.read(0, 0, 4096).unwrap();
    drop(client);
    let named = |name: &str| {
        let mut threads = threads(daemon.id());
        threads.retain(|status| value(status, "Name") == name);
        threads
    };
    // The one that starts the others, and another one.
    assert!(wait_until(HANG_LIMIT, || named("frontend-close").len() > 1));
    monitor.execute("query-quorum", json!({}));
    let [filters, of_frontend, of_events] = ["frontend-close", "frontend", "events"].map(|name| {
        let threads = named(name);
        let filters = threads
            .iter()
            .map(|status| value(status, "Seccomp_filters"));
        filters.map(str::to_owned).collect::<BTreeSet<_>>()
    });
    // Filters add up, and these kinds have as many.
    assert_eq!(filters, of_events);
    assert_ne!(filters, of_frontend);
}

/// Of root, which may lock any memory; io_uring does so for all daemons of a user together.
#[test]
fn many_daemons_of_root_have_their_buffers() {
    let places: Vec<Place> = (0..12).map(|_| Place::new(2)).collect();
    let daemons: Vec<_> = places.iter().map(|place| serve(place, &[])).collect();
    for (daemon, _) in &daemons {
        Client::connect(daemon.socket(), 2)
            .read(1, 0, 4096)
            .unwrap();
    }
}

/// The system calls that the unit allows, and those that the service manager always does.
fn calls_of_the_unit() -> BTreeSet<String> {
    let unit = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/packaging/quorum-blkd@.service.in"
    );
    let unit = fs::read_to_string(unit).unwrap();
    let lines = unit
        .lines()
        .filter_map(|line| line.strip_prefix("SystemCallFilter="));
    let mut allowed = members("@default");
    let mut count = 0;
    for line in lines {
        let (names, denied) = match line.strip_prefix('~') {
            Some(names) => (names, true),
            None => (line, false),
        };
        for call in names.split_whitespace().flat_map(members) {
            if denied {
                allowed.remove(&call);
            } else {
                allowed.insert(call);
            }
        }
        count += 1;
    }
    assert!(count > 1, "{unit}");
    allowed
}

/// The calls of a set, or the call of that name.
fn members(name: &str) -> BTreeSet<String> {
    if !name.starts_with('@') {
        return BTreeSet::from([name.to_owned()]);
    }
    let shown = Command::new("systemd-analyze")
        .args(["--no-pager", "syscall-filter", name])
        .output()
        .unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let names = shown.lines().skip(1).map(str::trim);
    let names = names.filter(|name| !name.is_empty() && !name.starts_with('#'));
    names.flat_map(members).collect()
}

/// A filter that does this at a call.
fn at(name: &str, action: SeccompAction) -> BpfProgram {
    let number = i64::from(Sysno::from_str(name).unwrap().id());
    let filter = SeccompFilter::new(
        [(number, Vec::new())].into(),
        SeccompAction::Allow,
        action,
        std::env::consts::ARCH.try_into().unwrap(),
    );
    filter.unwrap().try_into().unwrap()
}

/// A filter that allows these calls and no others.
fn allow(calls: &BTreeSet<String>) -> BpfProgram {
    let numbers = calls.iter().filter_map(|name| Sysno::from_str(name).ok());
    let rules = numbers.map(|number| (i64::from(number.id()), Vec::new()));
    let filter = SeccompFilter::new(
        rules.collect(),
        SeccompAction::Errno(libc::EPERM.cast_unsigned()),
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into().unwrap(),
    );
    filter.unwrap().try_into().unwrap()
}

/// Starts a daemon with these calls only.
fn start_with(filter: BpfProgram, place: &Place, options: &[&str]) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blkd"));
    command
        .args(place.sockets_arguments())
        .args(replica_arguments(&place.images))
        .args(options)
        .stderr(fs::File::create(place.path("log")).unwrap());
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(move || apply_filter(&filter).map_err(io::Error::other)) };
    Process::spawn(&mut command).unwrap()
}

/// Serves a disk with these calls only. Returns the log.
fn serve_with(filter: BpfProgram, options: &[&str]) -> String {
    let place = Place::new(3);
    let mut daemon = start_with(filter, &place, options);
    let said = || fs::read_to_string(place.path("log")).unwrap();
    let has_begun = || ["serving the disk", "quorum-blkd: "].map(|text| said().contains(text));
    wait_until(HANG_LIMIT, || has_begun() != [false; 2]);
    assert_eq!(has_begun(), [true, false], "{}", said());
    let mut client = Client::connect(&place.path("disk.sock"), 1);
    client.write(0, 0, &[1; 4096]).unwrap();
    client.flush(0).unwrap();
    drop(client);
    daemon.signal(libc::SIGTERM);
    let status = daemon.wait_within(HANG_LIMIT).expect("it ends");
    assert_eq!(status.code(), Some(0), "{}", said());
    said()
}

#[test]
fn the_unit_lets_the_daemon_give_up_the_rest() {
    let log = serve_with(allow(&calls_of_the_unit()), &["--sandbox", "on"]);
    assert!(!log.contains("WARN"), "{log}");
}

/// The tasks of `--aio threads` close what they do not need one by one there.
#[test]
fn a_kernel_without_close_range_serves_the_disk() {
    let lacks = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let log = serve_with(at("close_range", lacks), &["--aio", "threads"]);
    assert!(log.contains("aio=threads"), "{log}");
}

/// Of the calls of a start, only such a process makes this one.
#[test]
fn a_call_of_a_process_that_opens_an_image_is_named_to_the_operator() {
    let place = Place::new(1);
    let mut daemon = start_with(at("fstatfs", SeccompAction::Trap), &place, &[]);
    let status = daemon.wait_within(HANG_LIMIT).expect("it is refused");
    assert_eq!(status.code(), Some(1));
    let log = fs::read_to_string(place.path("log")).unwrap();
    let why = "cannot open '";
    assert!(log.contains(why), "{log}");
    let call = "': the sandbox does not allow the system call fstatfs (";
    assert!(log.contains(call), "{log}");
}

/// In a container that forbids it.
#[test]
fn what_cannot_be_given_up_is_said_and_keeps_no_disk_from_being_served() {
    let mut calls = calls_of_the_unit();
    calls.retain(|name| {
        !name.starts_with("landlock") && !["capset", "seccomp"].contains(&name.as_str())
    });
    let log = serve_with(allow(&calls), &["--sandbox", "auto"]);
    for part in ["capabilities", "files", "system-calls"] {
        assert!(log.contains(part), "{log}");
    }
}

#[test]
fn without_a_sandbox_nothing_is_given_up() {
    let place = Place::new(1);
    let (daemon, _monitor) = serve(&place, &["--sandbox", "off"]);
    let own = fs::read_to_string("/proc/self/status").unwrap();
    for status in threads(daemon.id()) {
        assert_eq!(value(&status, "NoNewPrivs"), "0");
        assert_eq!(value(&status, "CapEff"), value(&own, "CapEff"));
    }
    assert!(!daemon.log().contains("sandbox"));
}

#[test]
fn the_user_is_changed_when_all_is_open() {
    for sandbox in ["auto", "off"] {
        let place = Place::new(2);
        let (mut daemon, mut monitor) =
            serve(&place, &["--user", "1234:5678", "--sandbox", sandbox]);
        for status in threads(daemon.id()) {
            assert_eq!(value(&status, "Uid"), "1234\t1234\t1234\t1234");
            assert_eq!(value(&status, "Gid"), "5678\t5678\t5678\t5678");
            assert_eq!(value(&status, "Groups").trim(), "5678");
            assert_eq!(value(&status, "CapEff"), "0000000000000000");
        }
        // The image of another user cannot be added, and one of this user can.
        fs::set_permissions(place.directory.path(), PermissionsExt::from_mode(0o777)).unwrap();
        let new = image(place.directory.path(), "new");
        fs::set_permissions(&new, PermissionsExt::from_mode(0o600)).unwrap();
        let refused = add(&mut monitor, &new).unwrap_err();
        assert!(
            refused.contains("Permission denied; give the image to the user"),
            "{refused}"
        );
        chown(&new, Some(1234), Some(5678)).unwrap();
        add(&mut monitor, &new).unwrap();
        assert!(daemon.terminate().success());
    }
}

#[test]
fn a_user_that_cannot_be_is_refused() {
    let place = Place::new(1);
    let unknown = place.refusal(&["--user", "no-such-user"]);
    let why = "invalid value 'no-such-user' for --user <USER[:GROUP]>: there is no such user; see \
               quorum-blkd --help";
    assert_eq!(unknown, why);
    let numbers = place.refusal(&["--user", "123456"]);
    assert!(
        numbers.contains("this number has no name here, so give its group too"),
        "{numbers}"
    );
    let group = place.refusal(&["--user", "root:no-such-group"]);
    assert!(group.contains("there is no such group"), "{group}");
}

/// An empty image.
fn image(directory: &Path, name: &str) -> std::path::PathBuf {
    let path = directory.join(name);
    fs::File::create(&path)
        .unwrap()
        .set_len(DISK_BYTES)
        .unwrap();
    path
}

/// Adds an image; the text of the error, if that is refused.
fn add(monitor: &mut Monitor, image: &Path) -> Result<(), String> {
    let text = |error: Value| error["desc"].as_str().unwrap().to_owned();
    let node = json!({ "driver": "file", "node-name": "new", "filename": image });
    monitor.try_execute("blockdev-add", node).map_err(text)?;
    let change = json!({ "parent": "quorum0", "node": "new" });
    let added = monitor.try_execute("x-blockdev-change", change);
    if added.is_err() {
        monitor.execute("blockdev-del", json!({ "node-name": "new" }));
    }
    added.map(drop).map_err(text)
}

#[test]
fn the_monitor_learns_nothing_of_files_outside_of_the_image_directories() {
    for sandbox in ["on", "off"] {
        let outside = tempfile::tempdir().unwrap();
        let other = image(outside.path(), "other.raw");
        let place = Place::new(2);
        let path = |name: &str| place.path(name);
        symlink(&other, path("absolute")).unwrap();
        symlink(outside.path().join("none"), path("dangling")).unwrap();
        let up = Path::new("..").join(outside.path().file_name().unwrap());
        symlink(up.join("other.raw"), path("relative")).unwrap();
        symlink(outside.path(), path("directory")).unwrap();
        let (_daemon, mut monitor) = serve(&place, &["--sandbox", sandbox]);
        let outside_of_all = [
            other.clone(),
            outside.path().join("none"),
            outside.path().to_owned(),
            "/etc/passwd".into(),
            "/nonexistent/image".into(),
            path("absolute"),
            path("dangling"),
            path("relative"),
            path("directory/other.raw"),
            path("directory/none"),
            place.directory.path().join(&up).join("other.raw"),
            place.directory.path().join(&up).join("none"),
            format!("/proc/{}/cwd", std::process::id()).into(),
        ];
        for path in outside_of_all {
            let refused = add(&mut monitor, &path).unwrap_err();
            let text = format!(
                "'{}' is outside of the image directories, or a symbolic link there leads out of \
                 them; use an image in one of them, or start the daemon with --image-dir for its \
                 directory too",
                path.display()
            );
            assert_eq!(refused, text);
        }
        // Paths in the directory get answers of their own, and a link in it is followed.
        let refused = add(&mut monitor, &path("none")).unwrap_err();
        assert!(refused.contains("No such file"), "{refused}");
        let refused = add(&mut monitor, place.directory.path()).unwrap_err();
        assert!(refused.contains("is a directory"), "{refused}");
        image(place.directory.path(), "inside.raw");
        symlink("inside.raw", path("link")).unwrap();
        add(&mut monitor, &path("link")).unwrap();
    }
}

#[test]
fn images_are_added_from_the_directories_that_are_given() {
    let given = tempfile::tempdir().unwrap();
    let new = image(given.path(), "new.raw");
    let place = Place::new(3);
    let beside = image(place.directory.path(), "beside.raw");
    let directory = given.path().to_str().unwrap();
    let (mut daemon, mut monitor) = serve(&place, &["--image-dir", directory]);
    let refused = add(&mut monitor, &beside).unwrap_err();
    assert!(
        refused.contains("is outside of the image directories"),
        "{refused}"
    );
    // One that was named at the start can be added again, wherever it is.
    let removed =
        json!({ "parent": "quorum0", "child": place.images[1].file_name().unwrap().to_str() });
    monitor.execute("x-blockdev-change", removed);
    let change = json!({ "driver": "file", "node-name": "again", "filename": place.images[1] });
    monitor.execute("blockdev-add", change);
    let change = json!({ "parent": "quorum0", "node": "again", "force": true });
    monitor.execute("x-blockdev-change", change);
    add(&mut monitor, &new).unwrap();
    assert!(daemon.terminate().success());
    assert!(place.sockets().is_empty());
}

#[test]
fn what_would_be_given_up_is_printed() {
    let output = Daemon::run_to_end(["--print-sandbox"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    let names: Vec<&str> = text
        .lines()
        .map(|line| line.split_whitespace().next().unwrap())
        .take_while(|name| *name != "file")
        .collect();
    let expected = [
        "core-dumps",
        "capabilities",
        "no-new-privileges",
        "files",
        "network",
        "abstract-sockets",
        "system-calls",
        "io-uring",
        "user",
    ];
    assert_eq!(names, expected);
    let place = Place::new(1);
    let mut arguments = place.sockets_arguments();
    arguments.extend(replica_arguments(&place.images));
    arguments.extend(["--print-sandbox", "--image-dir", "/srv/images"].map(Into::into));
    let output = Daemon::run_to_end(&arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    let here = place.directory.path().display();
    for line in [
        "image-directory   write    '/srv/images'\n".to_owned(),
        format!("image             write    '{here}/0.raw'\n"),
        "file              read     '/proc'\n".to_owned(),
        format!("file              remove   '{here}'\n"),
    ] {
        assert!(text.contains(&line), "no {line} in {text}");
    }
    arguments.extend(["--sandbox", "off"].map(Into::into));
    let output = Daemon::run_to_end(&arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        !text.contains("\nfile ") && text.contains("core-dumps        off"),
        "{text}"
    );
    let refused = refusal(["--print-sandbox", "--blk-file", "a", "--blk-file", "a"]);
    assert!(refused.contains("no socket"), "{refused}");
}
