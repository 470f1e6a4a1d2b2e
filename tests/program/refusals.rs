//! What the daemon refuses to serve, and the line that says why.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use testkit::HANG_LIMIT;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::process::wait_until;

use crate::place::{DISK_BYTES, Place, StorageDaemon, assert_says, refusal};

#[test]
fn images_of_different_sizes_are_refused() {
    let place = Place::new(3);
    let second = OpenOptions::new()
        .write(true)
        .open(&place.images[1])
        .unwrap();
    second.set_len(2 * DISK_BYTES).unwrap();
    let line = place.refusal_of(&place.images[..2], &[]);
    assert_says(
        &line,
        &["differ in size", "0.raw", "1.raw", "1048576", "2097152"],
    );
    // Of three it is the larger one that differs, and is used in part.
    let mut daemon = Daemon::start(place.directory.path(), replica_arguments(&place.images));
    assert!(daemon.terminate().success());
    let first = OpenOptions::new().write(true).open(&place.images[0]);
    first.unwrap().set_len(DISK_BYTES / 2).unwrap();
    assert_says(&place.refusal(&[]), &["differ in size", "0.raw", "524288"]);
}

#[test]
fn images_of_invalid_size_are_refused() {
    for (bytes, text) in [(0, "is empty"), (1000, "not a multiple of")] {
        let place = Place::new(1);
        let image = OpenOptions::new()
            .write(true)
            .open(&place.images[0])
            .unwrap();
        image.set_len(bytes).unwrap();
        assert_says(&place.refusal(&[]), &["0.raw", text]);
    }
}

#[test]
fn the_same_image_twice_is_refused() {
    let place = Place::new(2);
    let first = place.images[0].clone();
    let line = place.refusal_of(&[first.clone(), first.clone()], &[]);
    assert_says(&line, &["0.raw", "given twice"]);

    let linked = place.path("symbolic.raw");
    symlink(&first, &linked).unwrap();
    let line = place.refusal_of(&[first.clone(), place.images[1].clone(), linked], &[]);
    assert_says(&line, &["0.raw", "symbolic.raw", "are the same image"]);

    let linked = place.path("hard.raw");
    fs::hard_link(&first, &linked).unwrap();
    let line = place.refusal_of(&[linked, first.clone()], &[]);
    assert_says(&line, &["0.raw", "hard.raw", "are the same image"]);

    // By another path.
    let detour = place.path("detour");
    symlink(place.directory.path(), &detour).unwrap();
    let renamed = format!("{},node-name=other", detour.join("0.raw").display());
    let line = place.refusal_of(&[first, renamed.into()], &[]);
    assert_says(&line, &["are the same image"]);
}

#[test]
fn the_same_node_name_twice_is_refused() {
    let place = Place::new(2);
    let named = |image: &Path, name| PathBuf::from(format!("{},node-name={name}", image.display()));
    let images = [
        named(&place.images[0], "left"),
        named(&place.images[1], "left"),
    ];
    assert_says(&place.refusal_of(&images, &[]), &["node-name", "'left'"]);
    let images = [named(&place.images[0], "quorum0")];
    assert_says(
        &place.refusal_of(&images, &[]),
        &["'quorum0'", "voted disk"],
    );
}

#[test]
fn a_threshold_out_of_range_is_refused() {
    let place = Place::new(3);
    for threshold in ["0", "4", "1000"] {
        let line = place.refusal(&["--vote-threshold", threshold]);
        assert_says(&line, &["--vote-threshold", threshold, "1 to 3"]);
    }
    for threshold in ["-1", "two", "", "1.5"] {
        let line = place.refusal(&["--vote-threshold", threshold]);
        assert_says(&line, &["--vote-threshold", "invalid value"]);
    }
}

#[test]
fn blkverify_is_refused_without_two_replicas_and_threshold_two() {
    for (replicas, options) in [
        (1, &["--blkverify"][..]),
        (3, &["--blkverify"]),
        (3, &["--blkverify", "--vote-threshold", "2"]),
        (2, &["--blkverify", "--vote-threshold", "1"]),
        (2, &["--blkverify", "--rewrite-corrupted"]),
        (2, &["--blkverify", "--read-pattern", "fifo"]),
    ] {
        assert_says(&Place::new(replicas).refusal(options), &["--blkverify"]);
    }
}

#[test]
fn files_that_are_no_images_are_refused() {
    let place = Place::new(1);
    let first = place.images[0].clone();
    let fifo = place.path("fifo");
    let name = std::ffi::CString::new(fifo.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path is a C string that outlives the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let refusal = |path: &Path| place.refusal_of(&[first.clone(), path.to_owned()], &[]);

    let line = refusal(&place.path("missing.raw"));
    assert_says(
        &line,
        &["cannot open", "missing.raw", "No such file or directory"],
    );
    assert_says(
        &refusal(place.directory.path()),
        &["is a directory", "regular file"],
    );
    assert_says(&refusal(&fifo), &["fifo", "is a FIFO"]);
    assert_says(&refusal(Path::new("/dev/null")), &["is a character device"]);
    // The refusal is one line, also if the path contains a line end.
    assert_says(
        &refusal(&place.path("a\nb,node-name=two")),
        &["cannot open", "a\\nb"],
    );
}

#[test]
fn an_image_that_another_daemon_serves_is_refused() {
    let served = Place::new(3);
    let _daemon = Daemon::start(served.directory.path(), replica_arguments(&served.images));
    let place = Place::new(2);
    for options in [&[][..], &["--read-only"]] {
        let images = [&place.images[..], &served.images[2..]].concat();
        let images = images.iter().enumerate();
        let images: Vec<PathBuf> = images
            .map(|(index, image)| format!("{},node-name={index}", image.display()).into())
            .collect();
        assert_says(
            &place.refusal_of(&images, options),
            &["2.raw", "in use by another process"],
        );
    }
}

#[test]
fn an_image_that_qemu_has_open_is_refused() {
    let place = Place::new(2);
    let image = place.images[1].display().to_string();
    let qemu = StorageDaemon::start(
        place.directory.path(),
        &[
            "--blockdev",
            &format!("driver=file,filename={image},node-name=file"),
            "--nbd-server",
            &format!("addr.type=unix,addr.path={}", place.path("nbd").display()),
            "--export",
            "type=nbd,id=export,node-name=file,writable=on",
        ],
    );
    let mut arguments = place.sockets_arguments();
    arguments.extend(replica_arguments(&place.images));
    assert_says(&refusal(arguments), &["1.raw", "in use by another process"]);
    assert_eq!(place.sockets(), ["nbd"], "qemu's own");
    drop(qemu);
    let mut daemon = Daemon::start(place.directory.path(), replica_arguments(&place.images));
    assert!(daemon.terminate().success());
}

#[test]
fn unknown_options_are_refused() {
    let place = Place::new(3);
    for options in [&["--no-such-option", "1"][..], &["surplus"]] {
        assert_says(
            &place.refusal(options),
            &["unexpected argument", options[0]],
        );
    }
    for options in [
        ["--read-pattern", "majority"],
        ["--replica-timeout", "soon"],
        ["--cache", "unsafe"],
        ["--num-queues", "0"],
        ["--num-queues", "65"],
        ["--repair-limit", "0"],
        ["--repair-limit", "4095"],
        ["--repair-limit", "+16M"],
        ["--repair-limit", "16MiB"],
        ["--repair-limit", "99999999T"],
        ["--memory-max", "16MiB"],
        ["--socket-mode", "1777"],
        ["--socket-mode", "rw"],
        ["--socket-group", "no such group"],
    ] {
        let line = place.refusal(&options);
        assert_says(&line, &options);
    }
    for options in [
        ["--queue-size", "3"],
        ["--queue-size", "2048"],
        ["--serial", "b3e5c1f0-8a11-4d7e-9c55-0123456789ab"],
    ] {
        assert_says(&place.refusal(&options), &options[..1]);
    }
}

#[test]
fn missing_and_conflicting_options_are_refused() {
    let place = Place::new(1);
    assert_says(&place.refusal_of(&[], &[]), &["--blk-file"]);
    assert_says(
        &refusal(replica_arguments(&place.images)),
        &["--socket-path", "--fd"],
    );
    assert_says(&place.refusal(&["--fd", "3"]), &["--socket-path", "--fd"]);
    let line = place.refusal(&["--read-only", "--rewrite-corrupted"]);
    assert_says(&line, &["--read-only", "--rewrite-corrupted"]);
    assert_says(&refusal(&[] as &[&str]), &["--socket-path"]);
}

/// A path in use for each of the sockets; the other socket is removed.
#[test]
fn a_socket_path_in_use_is_refused() {
    let options = ["--socket-path", "--events", "--qmp"];
    for (taken, other) in [(0, 1), (1, 0), (2, 0)] {
        let place = Place::new(2);
        let refusal = |path: &Path| {
            let mut arguments = replica_arguments(&place.images);
            arguments.extend([options[taken].into(), path.into()]);
            arguments.extend([options[other].into(), place.path("other.sock").into()]);
            let line = refusal(arguments);
            assert!(!place.path("other.sock").exists(), "after {line}");
            line
        };
        let live = UnixListener::bind(place.path("live.sock")).unwrap();
        assert_says(
            &refusal(&place.path("live.sock")),
            &["live.sock", "another process listens"],
        );
        // It is still there, and takes connections.
        let _client = UnixStream::connect(place.path("live.sock")).unwrap();
        live.accept().unwrap();

        fs::write(place.path("file"), "precious").unwrap();
        assert_says(&refusal(&place.path("file")), &["file", "not a socket"]);
        assert_eq!(fs::read(place.path("file")).unwrap(), b"precious");
        assert_says(&refusal(place.directory.path()), &["not a socket"]);
        assert_says(
            &refusal(&place.path("nowhere/disk.sock")),
            &["No such file or directory"],
        );
        assert_says(&refusal(&place.path(&"x".repeat(108))), &["1 to 107 bytes"]);
        assert_says(&refusal(&place.path("other.sock")), &["its own path"]);
        assert_eq!(place.sockets(), ["live.sock"]);
    }
}

#[test]
fn sockets_of_a_dead_daemon_are_replaced() {
    let place = Place::new(1);
    for name in ["disk.sock", "events.sock"] {
        drop(UnixListener::bind(place.path(name)).unwrap());
    }
    let mut daemon = Daemon::start(place.directory.path(), replica_arguments(&place.images));
    for socket in [daemon.socket(), daemon.events_socket()] {
        assert!(wait_until(HANG_LIMIT, || UnixStream::connect(socket).is_ok()));
    }
    assert!(daemon.terminate().success());
    assert_eq!(place.sockets(), Vec::<String>::new());
}

/// A UUID is too long; what virtio can carry of it is proposed.
#[test]
fn a_serial_number_that_is_too_long_gets_a_proposal() {
    let uuid = "b3e5c1f0-8a11-4d7e-9c55-0123456789ab";
    let line = Place::new(1).refusal(&["--serial", uuid]);
    assert_says(&line, &["for example 'b3e5c1f0-8a11-4d7e-9'"]);
}

/// An image of another format, as qemu-img makes it, would be served as the bytes of its headers.
#[test]
fn images_of_other_formats_are_refused() {
    let place = Place::new(3);
    for format in [
        "qcow",
        "qcow2",
        "qed",
        "vdi",
        "vhdx",
        "vmdk",
        "vpc",
        "parallels",
    ] {
        let image = place.path("other");
        let created = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .args([image.as_os_str(), OsStr::new("16M")])
            .status();
        assert!(created.unwrap().success(), "{format}");
        for options in [&[][..], &["--cache", "writeback"]] {
            let others = &place.images[..2];
            let line = place.refusal_of(&[std::slice::from_ref(&image), others].concat(), options);
            assert_says(
                &line,
                &["other", &format!("is a {format} image"), "NEW.raw"],
            );
        }
        // Some formats end in the middle of a sector.
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        let bytes = file.metadata().unwrap().len();
        file.set_len(bytes.next_multiple_of(4096)).unwrap();
        let images = [image];
        let mut arguments = replica_arguments(&images);
        arguments.push("--raw-anyway".into());
        let mut daemon = Daemon::start(place.directory.path(), arguments);
        assert!(daemon.terminate().success());
    }
}

/// Formats that have a footer: VHD images of a fixed size are raw but for their last sector.
#[test]
fn an_image_with_the_footer_of_another_format_is_refused() {
    let place = Place::new(1);
    let image = place.path("fixed.vhd");
    let created = Command::new("qemu-img")
        .args(["create", "-q", "-f", "vpc", "-o", "subformat=fixed"])
        .args([image.as_os_str(), OsStr::new("16M")])
        .status();
    assert!(created.unwrap().success());
    assert_says(&place.refusal_of(&[image], &[]), &["is a vpc image"]);
}

/// With the first command line of the README: the data would be outvoted, and overwritten.
#[test]
fn empty_images_beside_one_that_holds_data_are_refused() {
    let mut place = Place::new(3);
    let precious = OpenOptions::new().write(true).open(&place.images[1]);
    precious.unwrap().write_all_at(b"precious", 65536).unwrap();
    let says = [
        "0.raw' and ",
        "2.raw' are empty",
        "1.raw' holds data",
        "quorum-blkctl add",
        "--empty-anyway",
    ];
    let patterns = ["quorum", "threshold", "fifo"].map(|pattern| ["--read-pattern", pattern]);
    for options in patterns.iter().map(|pattern| &pattern[..]).chain([
        &["--rewrite-corrupted"][..],
        &["--cache", "writeback"],
        &["--vote-threshold", "1"],
        &["--read-only"],
    ]) {
        assert_says(&place.refusal(options), &says);
    }
    assert_says(&place.refusal_of(&place.images[..2], &[]), &says[2..]);
    let mut arguments = replica_arguments(&place.images);
    arguments.push("--empty-anyway".into());
    let mut daemon = Daemon::start(place.directory.path(), arguments);
    assert!(daemon.terminate().success());
    // As advised: the one that holds data alone.
    place.images = vec![place.images[1].clone()];
    let mut daemon = Daemon::start(place.directory.path(), replica_arguments(&place.images));
    assert!(daemon.terminate().success());
}

/// Where zeroes are stored, as on a new disk, they are read: all of them, or samples.
#[test]
fn images_full_of_stored_zeroes_are_empty() {
    let place = Place::new(3);
    for image in &place.images[..2] {
        fs::write(image, vec![0; usize::try_from(DISK_BYTES).unwrap()]).unwrap();
    }
    let mut daemon = Daemon::start(place.directory.path(), replica_arguments(&place.images));
    assert!(daemon.terminate().success());
    let last = OpenOptions::new().write(true).open(&place.images[2]);
    last.unwrap().write_all_at(&[1], DISK_BYTES - 1).unwrap();
    assert_says(
        &place.refusal(&[]),
        &["0.raw' and ", "1.raw' are empty", "2.raw' holds data"],
    );
}
