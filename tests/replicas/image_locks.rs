//! Image locks together with the real QEMU: its tools refuse an image that this daemon uses, and
//! this daemon refuses an image that QEMU has open.
//!
//! Needs `qemu-img`, `qemu-io` and `qemu-storage-daemon` (Debian: qemu-utils and
//! qemu-system-common).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use testkit::process::wait_until;
use testkit::{HANG_LIMIT, machine};

use quorum_blk::replica::file::{self, OpenError, OpenOptions, ReplicaFile};

pub(crate) const WRITABLE: OpenOptions = OpenOptions {
    read_only: false,
    direct: false,
    raw_anyway: false,
    block_bytes: 512,
};
const READ_ONLY: OpenOptions = OpenOptions {
    read_only: true,
    direct: false,
    raw_anyway: false,
    block_bytes: 512,
};

struct Image {
    directory: tempfile::TempDir,
    path: PathBuf,
}

impl Image {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("1.raw");
        std::fs::File::create(&path)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        Self { directory, path }
    }

    fn open(&self, options: OpenOptions) -> Result<ReplicaFile, OpenError> {
        file::open(&self.path, "1.raw", options)
    }

    fn assert_busy(&self, options: OpenOptions) {
        let error = self.open(options).expect_err("QEMU has the image open");
        assert!(
            matches!(&error, OpenError::Locked { source, .. } if source.is_busy()),
            "{error}"
        );
        assert!(
            error.to_string().contains("in use by another process"),
            "{error}"
        );
    }
}

/// A qemu-storage-daemon that has an image open; it ends with this value.
pub(crate) struct StorageDaemon(Child);

impl StorageDaemon {
    /// Exports the image with the locks of a virtual machine, and waits until it has them.
    pub(crate) fn serve(image: &Path, writable: bool) -> Self {
        let on = |yes| if yes { "on" } else { "off" };
        let path = image.display();
        let directory = image.parent().unwrap();
        let pid_file = directory.join("pid");
        let child = program("qemu-storage-daemon")
            .args([
                "--blockdev",
                &format!(
                    "driver=file,filename={path},node-name=file,read-only={}",
                    on(!writable)
                ),
            ])
            .args([
                "--blockdev",
                &format!(
                    "driver=raw,file=file,node-name=disk,read-only={}",
                    on(!writable)
                ),
            ])
            .args([
                "--nbd-server",
                &format!(
                    "addr.type=unix,addr.path={}",
                    directory.join("nbd").display()
                ),
            ])
            .args([
                "--export",
                &format!(
                    "type=nbd,id=export,node-name=disk,writable={}",
                    on(writable)
                ),
            ])
            .args(["--pidfile", &pid_file.display().to_string()])
            .stdin(Stdio::null())
            .spawn();
        let mut daemon = Self(started("qemu-storage-daemon", child));
        // It writes its pid when all exports are up.
        let has_ended = |daemon: &mut Self| daemon.0.try_wait().unwrap().is_some();
        wait_until(HANG_LIMIT, || pid_file.exists() || has_ended(&mut daemon));
        assert!(pid_file.exists(), "qemu-storage-daemon serves nothing");
        daemon
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    // The texts compared below are those of the C locale.
    command.env("LC_ALL", "C");
    command
}

fn started<T>(name: &str, result: std::io::Result<T>) -> T {
    result.unwrap_or_else(|error| {
        panic!(
            "{name} is needed for this test and can not be run ({error}); on Debian: apt-get \
                install qemu-utils qemu-system-common"
        )
    })
}

/// Runs qemu-img with PATH standing for the image and COPY for another file beside it.
fn qemu_img(arguments: &[&str], image: &Image) -> Output {
    let copy = image.directory.path().join("copy.raw");
    let arguments = arguments.iter().map(|&argument| match argument {
        "PATH" => image.path.as_os_str(),
        "COPY" => copy.as_os_str(),
        other => other.as_ref(),
    });
    started("qemu-img", program("qemu-img").args(arguments).output())
}

fn qemu_write(image: &Image) -> Output {
    let mut command = program("qemu-io");
    command
        .args(["-f", "raw", "-c", "write 0 512"])
        .arg(&image.path);
    started("qemu-io", command.output())
}

fn assert_refused(output: &Output) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success(),
        "QEMU took an image that is in use here"
    );
    assert!(
        text.contains("lock") && text.contains("Is another process using the image"),
        "{text}"
    );
}

fn assert_done(output: &Output) {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn qemu_refuses_an_image_that_is_written_here() {
    let _machine = machine::shared();
    let image = Image::new();
    let replica = image.open(WRITABLE).unwrap();
    assert_refused(&qemu_write(&image));
    for arguments in [
        &["create", "-q", "-f", "raw", "PATH", "1M"][..],
        &["resize", "-q", "-f", "raw", "PATH", "2M"],
        &["convert", "-f", "raw", "-O", "raw", "PATH", "COPY"],
    ] {
        assert_refused(&qemu_img(arguments, &image));
    }
    // `qemu-img info` of a raw image shares it with writers.
    assert_done(&qemu_img(&["info", "PATH"], &image));

    drop(replica);
    assert_done(&qemu_write(&image));
}

#[test]
fn qemu_reads_but_does_not_write_an_image_that_is_read_here() {
    let _machine = machine::shared();
    let image = Image::new();
    let _replica = image.open(READ_ONLY).unwrap();
    assert_done(&qemu_img(
        &["convert", "-f", "raw", "-O", "raw", "PATH", "COPY"],
        &image,
    ));
    assert_refused(&qemu_write(&image));
}

#[test]
fn an_image_that_qemu_writes_is_refused_until_qemu_closes_it() {
    let _machine = machine::shared();
    let image = Image::new();
    let daemon = StorageDaemon::serve(&image.path, true);
    image.assert_busy(WRITABLE);
    image.assert_busy(READ_ONLY);
    drop(daemon);
    image.open(WRITABLE).unwrap();
}

#[test]
fn an_image_that_qemu_reads_is_accepted() {
    let _machine = machine::shared();
    let image = Image::new();
    let _daemon = StorageDaemon::serve(&image.path, false);
    image.open(READ_ONLY).unwrap();
}
