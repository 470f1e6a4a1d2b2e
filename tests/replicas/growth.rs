//! A disk grows under its guest: all replicas or none, and the guest gets the new size.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use testkit::HANG_LIMIT;
use testkit::machine;

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::frontend::{Cut, Layout, Plan, Request, Vmm};
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::{are_identical, create_images};
use testkit::loop_device::LoopDevice;
use testkit::monitor::Monitor;
use testkit::process::wait_until;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

const SIZE_BYTES: u64 = 4 << 20;
const NEW_BYTES: u64 = 10 << 20;
/// Header of VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: request, version and flags, size.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// A daemon over these images, and its monitor.
struct Setup {
    daemon: Daemon,
    monitor: Monitor,
    directory: TempDir,
}

impl Setup {
    fn new(images: &[PathBuf], options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut arguments = replica_arguments(images);
        let socket = directory.path().join("qmp.sock");
        arguments.extend(["--qmp".into(), socket.clone().into()]);
        arguments.push("--shared".into());
        arguments.extend(options.iter().map(Into::into));
        Self {
            daemon: Daemon::start(directory.path(), arguments),
            monitor: Monitor::connect(&socket),
            directory,
        }
    }

    /// A new frontend. The daemon refuses it while earlier ones, up to the limit, still disconnect.
    fn vmm(&self) -> Vmm {
        let mut vmm = Vmm::new(&with_back_channel());
        let connected = wait_until(HANG_LIMIT, || vmm.connect(self.daemon.socket()).is_ok());
        assert!(connected, "no connection");
        vmm.activate().expect("activating the device");
        vmm
    }

    fn resize(&mut self, size: u64) -> Result<Value, String> {
        let arguments = json!({ "node-name": "quorum0", "size": size });
        let resized = self.monitor.try_execute("block_resize", arguments);
        resized.map_err(|error| {
            assert_eq!(error["class"], "GenericError");
            error["desc"].as_str().unwrap().to_owned()
        })
    }

    /// The size that all interfaces show.
    fn size(&mut self) -> u64 {
        let mut ask = |command: &str| self.monitor.execute(command, json!({}));
        let size = ask("query-quorum")["size"].as_u64().unwrap();
        let image = &ask("query-block")[0]["inserted"]["image"];
        assert_eq!(image["virtual-size"], size);
        for node in ask("query-named-block-nodes").as_array().unwrap() {
            assert_eq!(node["image"]["virtual-size"], size);
        }
        size
    }
}

fn with_back_channel() -> Plan {
    let plan = Plan::default();
    Plan {
        protocol_features: plan.protocol_features | VhostUserProtocolFeatures::BACKEND_REQ,
        ..plan
    }
}

/// Passes one end of a socket as the back channel, and returns the other.
fn back_channel(vmm: &mut Vmm) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    pass(vmm, &theirs);
    ours.set_read_timeout(Some(HANG_LIMIT)).unwrap();
    ours
}

fn pass(vmm: &mut Vmm, channel: &UnixStream) {
    vmm.frontend().set_backend_request_fd(channel).unwrap();
    // The reply to this shows that the message before was handled.
    capacity_bytes(vmm);
}

fn assert_told_once(channel: &mut UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message, CONFIG_CHANGE.map(u32::to_ne_bytes).concat()[..]);
    assert_told_nothing(channel);
}

fn assert_told_nothing(channel: &mut UnixStream) {
    channel.set_nonblocking(true).unwrap();
    let nothing = channel.read(&mut [0]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    channel.set_nonblocking(false).unwrap();
}

/// The capacity in the configuration space, as a frontend reads it.
fn capacity_bytes(vmm: &mut Vmm) -> u64 {
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::empty();
    let (_, config) = vmm.frontend().get_config(0, 60, flags, &[0; 60]).unwrap();
    u64::from_le_bytes(config[..8].try_into().unwrap()) * 512
}

fn status(vmm: &mut Vmm, request: &Request) -> u32 {
    let layout = Layout {
        cut: Cut::Fields,
        indirect: false,
    };
    u32::from(vmm.queues[0].run(request, layout).status)
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

fn set_length(path: &Path, bytes: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
}

#[test]
fn a_disk_grows_and_is_used_up_to_its_new_end() {
    let _machine = machine::shared();
    let place = tempfile::tempdir().unwrap();
    let images = create_images(place.path(), 3, SIZE_BYTES);
    let mut setup = Setup::new(&images, &[]);
    let mut vmm = setup.vmm();
    let mut channel = back_channel(&mut vmm);
    let (end, new_end) = (SIZE_BYTES / 512, NEW_BYTES / 512);
    vmm.queues[0].write_disk(end - 8, &[1; 4096]);
    assert_eq!(
        status(&mut vmm, &Request::write(end, vec![2; 4096])),
        VIRTIO_BLK_S_IOERR
    );
    assert_told_nothing(&mut channel);

    assert_eq!(setup.resize(NEW_BYTES), Ok(json!({})));
    assert_told_once(&mut channel);
    assert_eq!(
        (setup.size(), capacity_bytes(&mut vmm)),
        (NEW_BYTES, NEW_BYTES)
    );
    let zeroes = vmm.queues[0].read_disk(end, 64 << 10);
    assert!(zeroes.iter().all(|byte| *byte == 0));
    // Over the old end, and up to the new one.
    vmm.queues[0].write_disk(end - 4, &[3; 4096]);
    vmm.queues[0].write_disk(new_end - 8, &[4; 4096]);
    assert_eq!(vmm.queues[0].read_disk(end - 8, 2048), [1; 2048]);
    assert_eq!(vmm.queues[0].read_disk(end - 4, 4096), [3; 4096]);
    assert_eq!(vmm.queues[0].read_disk(new_end - 8, 4096), [4; 4096]);
    assert_eq!(
        status(&mut vmm, &Request::read(new_end - 4, 4096)),
        VIRTIO_BLK_S_IOERR
    );
    assert_eq!(status(&mut vmm, &Request::flush()), VIRTIO_BLK_S_OK);

    // The present size: only the message is sent.
    assert_eq!(setup.resize(NEW_BYTES), Ok(json!({})));
    assert_told_once(&mut channel);
    // An image of the old size is refused as a replica, one of the new size is accepted.
    let fourth = place.path().join("fourth.raw");
    File::create(&fourth).unwrap().set_len(SIZE_BYTES).unwrap();
    let node = json!({ "driver": "file", "node-name": "fourth", "filename": fourth });
    setup.monitor.execute("blockdev-add", node);
    let add = json!({ "parent": "quorum0", "node": "fourth" });
    let refused = setup.monitor.try_execute("x-blockdev-change", add.clone());
    let refused = refused.unwrap_err()["desc"].as_str().unwrap().to_owned();
    assert!(
        refused.contains("4194304 bytes, less than the disk, which has 10485760"),
        "{refused}"
    );
    set_length(&fourth, NEW_BYTES);
    setup.monitor.execute("x-blockdev-change", add);
    let no_jobs = || setup.monitor.execute("query-jobs", json!({})) == json!([]);
    assert!(wait_until(HANG_LIMIT, no_jobs));

    assert!(setup.daemon.terminate().success());
    let all: Vec<_> = images.iter().cloned().chain([fourth]).collect();
    assert!(are_identical(&all));
    assert_eq!(length(&images[0]), NEW_BYTES);
    let mut again = Setup::new(&all, &[]);
    assert_eq!(again.size(), NEW_BYTES);
}

#[test]
fn a_size_that_is_not_larger_is_refused() {
    let _machine = machine::shared();
    let place = tempfile::tempdir().unwrap();
    let images = create_images(place.path(), 3, SIZE_BYTES);
    let mut setup = Setup::new(&images, &[]);
    for (size, says) in [
        (0, "cannot shrink"),
        (SIZE_BYTES - 4096, "cannot shrink"),
        (SIZE_BYTES + 1, "must be a multiple of"),
        (1 << 63, "less than 8 EiB"),
    ] {
        let error = setup.resize(size).unwrap_err();
        assert!(error.contains(says), "{size}: {error}");
    }
    for arguments in [
        json!({ "size": NEW_BYTES }),
        json!({ "device": "other", "size": NEW_BYTES }),
        json!({ "device": "quorum0", "node-name": "0.raw", "size": NEW_BYTES }),
        json!({ "node-name": "quorum0" }),
        json!({ "node-name": "quorum0", "size": -1 }),
        json!({ "node-name": "quorum0", "size": "1G" }),
    ] {
        let refused = setup.monitor.try_execute("block_resize", arguments.clone());
        assert_eq!(refused.unwrap_err()["class"], "GenericError", "{arguments}");
    }
    let device = json!({ "device": "quorum0", "size": SIZE_BYTES });
    setup.monitor.execute("block_resize", device);
    assert_eq!(setup.size(), SIZE_BYTES);
    assert!(images.iter().all(|image| length(image) == SIZE_BYTES));
    assert!(setup.daemon.terminate().success());

    let mut read_only = Setup::new(&images, &["--read-only"]);
    let error = read_only.resize(NEW_BYTES).unwrap_err();
    assert_eq!(error, "the disk is read-only");
}

/// Resizes it, which must fail and change nothing.
fn assert_put_back(setup: &mut Setup, images: &[PathBuf], says: &[&str]) {
    let mut vmm = setup.vmm();
    let mut channel = back_channel(&mut vmm);
    let error = setup.resize(NEW_BYTES).unwrap_err();
    for part in says {
        assert!(error.contains(part), "no {part:?} in {error:?}");
    }
    assert_told_nothing(&mut channel);
    assert_eq!(
        (setup.size(), capacity_bytes(&mut vmm)),
        (SIZE_BYTES, SIZE_BYTES)
    );
    let beyond = Request::write(SIZE_BYTES / 512, vec![2; 4096]);
    assert_eq!(status(&mut vmm, &beyond), VIRTIO_BLK_S_IOERR);
    for image in images {
        assert_eq!(length(image), SIZE_BYTES, "{}", image.display());
    }
}

#[test]
fn a_replica_that_cannot_grow_leaves_all_at_their_size() {
    let _machine = machine::shared();
    let place = tempfile::tempdir().unwrap();
    let images = create_images(place.path(), 3, SIZE_BYTES);
    let fuse = FuseImage::serve(&images[2]);
    let served = [images[0].clone(), images[1].clone(), fuse.path()];
    let _fault_guard = fuse.fault_guard();
    let name = |setup: &mut Setup| {
        let state = setup.monitor.execute("query-quorum", json!({}));
        state["replicas"][2]["node-name"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let mut setup = Setup::new(&served, &[]);
    let third = format!("'{}'", name(&mut setup));
    for (operation, errno, says) in [
        (Operation::Resize, libc::EIO, "truncate: Input/output error"),
        (
            Operation::Resize,
            libc::ENOSPC,
            "truncate: No space left on device",
        ),
        (Operation::Sync, libc::EIO, "fsync: Input/output error"),
    ] {
        fuse.inject(operation, Fault::Fail(errno));
        // A size that cannot be synced cannot be restored durably either; the error says so.
        assert_put_back(&mut setup, &images, &[&third, "cannot be grown", says]);
        fuse.clear_faults();
    }
    assert_eq!(setup.resize(NEW_BYTES), Ok(json!({})));
    assert!(images.iter().all(|image| length(image) == NEW_BYTES));
    assert!(setup.daemon.terminate().success());
}

#[test]
fn a_replica_that_hangs_while_growing_delays_no_request_and_is_shrunk_again() {
    let _machine = machine::shared();
    let place = tempfile::tempdir().unwrap();
    let images = create_images(place.path(), 3, SIZE_BYTES);
    let fuse = FuseImage::serve(&images[2]);
    let served = [images[0].clone(), images[1].clone(), fuse.path()];
    let _fault_guard = fuse.fault_guard();
    let mut setup = Setup::new(&served, &["--replica-timeout", "200"]);
    fuse.inject(Operation::Resize, Fault::Hang);
    assert_put_back(
        &mut setup,
        &images,
        &[
            "it does not answer",
            "gets its old size back when it answers",
        ],
    );
    let unsettled = setup.resize(NEW_BYTES).unwrap_err();
    assert!(
        unsettled.contains("has not got its old size back"),
        "{unsettled}"
    );
    assert_eq!(length(&images[0]), SIZE_BYTES);
    // It grows late, and is shrunk then.
    fuse.clear_faults();
    let settled = || fuse.done(Operation::Resize) == 2 && length(&images[2]) == SIZE_BYTES;
    assert!(wait_until(HANG_LIMIT, settled));
    assert!(wait_until(HANG_LIMIT, || setup.resize(NEW_BYTES).is_ok()));
    assert_eq!(length(&images[2]), NEW_BYTES);
    assert!(setup.daemon.terminate().success());
    assert!(are_identical(&images));
}

#[test]
fn a_replica_that_hangs_while_growing_can_be_removed() {
    let _machine = machine::shared();
    let place = tempfile::tempdir().unwrap();
    let images = create_images(place.path(), 3, SIZE_BYTES);
    let fuse = FuseImage::serve(&images[2]);
    let served = [images[0].clone(), images[1].clone(), fuse.path()];
    let _fault_guard = fuse.fault_guard();
    let mut setup = Setup::new(&served, &["--replica-timeout", "200"]);
    fuse.inject(Operation::Resize, Fault::Hang);
    assert!(
        setup
            .resize(NEW_BYTES)
            .unwrap_err()
            .contains("does not answer")
    );
    let remove = json!({ "parent": "quorum0", "child": "children.2" });
    setup.monitor.execute("x-blockdev-change", remove);
    assert_eq!(setup.resize(NEW_BYTES), Ok(json!({})));
    fuse.clear_faults();
    let settled = || fuse.done(Operation::Resize) == 2 && length(&images[2]) == SIZE_BYTES;
    assert!(wait_until(HANG_LIMIT, settled));
    assert_eq!([0, 1].map(|index| length(&images[index])), [NEW_BYTES; 2]);
    assert!(setup.daemon.terminate().success());
}

/// The file size limit of the daemon ends the growth, not the daemon.
#[test]
fn a_file_size_limit_is_an_error_like_any_other() {
    let _machine = machine::shared();
    let place = tempfile::tempdir().unwrap();
    let images = create_images(place.path(), 3, SIZE_BYTES);
    let mut setup = Setup::new(&images, &[]);
    let limit = libc::rlimit {
        rlim_cur: SIZE_BYTES,
        rlim_max: libc::RLIM_INFINITY,
    };
    let id = libc::pid_t::try_from(setup.daemon.id()).unwrap();
    // SAFETY: the limit is valid for reads; no old one is asked for.
    let set = unsafe {
        libc::prlimit(
            id,
            libc::RLIMIT_FSIZE,
            &raw const limit,
            std::ptr::null_mut(),
        )
    };
    assert_eq!(set, 0);
    assert_put_back(
        &mut setup,
        &images,
        &["cannot be grown", "truncate: File too large"],
    );
    assert!(setup.daemon.terminate().success());
}

/// What a file has behind the end of the disk does not become part of it.
#[test]
fn a_file_that_is_longer_already_is_zeroed_there() {
    let _machine = machine::shared();
    let place = tempfile::tempdir().unwrap();
    let images = create_images(place.path(), 3, SIZE_BYTES);
    for (index, surplus) in [(0, 4096), (1, 10_000_000)] {
        let file = OpenOptions::new().write(true).open(&images[index]).unwrap();
        let left_over = vec![9; surplus];
        file.write_all_at(&left_over, SIZE_BYTES).unwrap();
    }
    let mut images = images;
    images.push(place.path().join("3.raw"));
    std::fs::copy(&images[2], &images[3]).unwrap();
    images.push(place.path().join("4.raw"));
    std::fs::copy(&images[2], &images[4]).unwrap();
    let mut setup = Setup::new(&images, &[]);
    assert_eq!(setup.size(), SIZE_BYTES);
    assert_eq!(setup.resize(NEW_BYTES), Ok(json!({})));
    let mut vmm = setup.vmm();
    let zeroes = vmm.queues[0].read_disk(SIZE_BYTES / 512, 64 << 10);
    assert!(zeroes.iter().all(|byte| *byte == 0));
    assert!(setup.daemon.terminate().success());
    set_length(&images[1], NEW_BYTES);
    assert!(are_identical(&images));
}

/// The state after the daemon was killed before all replicas had grown: the disk still has its old
/// size as long as most images have it.
#[test]
fn an_interrupted_growth_is_repeated() {
    let _machine = machine::shared();
    let place = tempfile::tempdir().unwrap();
    let images = create_images(place.path(), 3, SIZE_BYTES);
    set_length(&images[1], NEW_BYTES);
    let mut setup = Setup::new(&images, &[]);
    assert_eq!(setup.size(), SIZE_BYTES);
    assert_eq!(setup.resize(NEW_BYTES), Ok(json!({})));
    assert_eq!(setup.size(), NEW_BYTES);
    assert!(setup.daemon.terminate().success());
    assert!(are_identical(&images));
}

/// As above, after most replicas had grown.
#[test]
fn an_interrupted_growth_is_completed_as_the_next_start_says() {
    let _machine = machine::shared();
    let place = tempfile::tempdir().unwrap();
    let images = create_images(place.path(), 3, SIZE_BYTES);
    set_length(&images[1], NEW_BYTES);
    set_length(&images[2], NEW_BYTES);
    let socket = place.path().join("never.sock");
    let mut arguments = replica_arguments(&images);
    arguments.extend(["--socket-path".into(), socket.into()]);
    let refused = Daemon::run_to_end(&arguments);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("start with those of the right size"),
        "{said}"
    );
    assert!(said.contains("and add a new image"), "{said}");
    let grown = [images[1].clone(), images[2].clone()];
    let mut setup = Setup::new(&grown, &["--vote-threshold", "2", "--image-dir", "/"]);
    assert_eq!(setup.size(), NEW_BYTES);
    let other = tempfile::tempdir().unwrap();
    let new = create_images(other.path(), 1, NEW_BYTES).remove(0);
    let node = json!({ "driver": "file", "node-name": "new", "filename": new });
    setup.monitor.execute("blockdev-add", node);
    let change = json!({ "parent": "quorum0", "node": "new" });
    setup.monitor.execute("x-blockdev-change", change);
    assert_eq!(setup.size(), NEW_BYTES);
    assert!(setup.daemon.terminate().success());
}

/// A block device has to be large enough, and the new space is overwritten with zeroes.
#[test]
fn new_space_of_block_devices_is_zeroed() {
    let _machine = machine::shared();
    let place = tempfile::tempdir().unwrap();
    let images = create_images(place.path(), 3, SIZE_BYTES);
    let devices = [0, 1].map(|index: usize| LoopDevice::attach(&images[index]));
    let served = [
        devices[0].path().to_owned(),
        devices[1].path().to_owned(),
        images[2].clone(),
    ];
    let mut setup = Setup::new(&served, &[]);
    let mut vmm = setup.vmm();
    let error = setup.resize(NEW_BYTES).unwrap_err();
    assert!(
        error.contains("is a block device of 4194304 bytes; give it the new size"),
        "{error}"
    );
    assert_eq!(length(&images[2]), SIZE_BYTES);
    for (index, device) in devices.iter().enumerate() {
        set_length(&images[index], NEW_BYTES);
        let file = OpenOptions::new().write(true).open(&images[index]).unwrap();
        let left_over = vec![0xa0 + u8::try_from(index).unwrap(); 6 << 20];
        file.write_all_at(&left_over, SIZE_BYTES).unwrap();
        file.sync_all().unwrap();
        let looked = std::process::Command::new("losetup")
            .arg("--set-capacity")
            .arg(device.path())
            .status();
        assert!(looked.unwrap().success());
    }
    assert_eq!(setup.resize(NEW_BYTES), Ok(json!({})));
    let zeroes = vmm.queues[0].read_disk(SIZE_BYTES / 512, 64 << 10);
    assert!(zeroes.iter().all(|byte| *byte == 0));
    vmm.queues[0].write_disk(NEW_BYTES / 512 - 8, &[4; 4096]);
    assert!(setup.daemon.terminate().success());
    drop(devices);
    assert!(are_identical(&images));
    assert!(setup.directory.path().exists());
}

/// The disk grows, also if a frontend misuses its back channel.
#[test]
fn a_frontend_that_ignores_its_back_channel_harms_itself_only() {
    let _machine = machine::shared();
    let place = tempfile::tempdir().unwrap();
    let images = create_images(place.path(), 3, SIZE_BYTES);
    let mut setup = Setup::new(&images, &[]);
    // One never reads, one has closed its end, one has none, and one passes another channel.
    let (mut full, mut closed, mut without, mut twice) =
        (setup.vmm(), setup.vmm(), setup.vmm(), setup.vmm());
    let (mut unread, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    while (&theirs).write(&[0; 4096]).is_ok() {}
    theirs.set_nonblocking(false).unwrap();
    pass(&mut full, &theirs);
    drop(back_channel(&mut closed));
    let mut first = back_channel(&mut twice);
    let mut second = back_channel(&mut twice);
    for step in 1..=3 {
        let size = SIZE_BYTES + step * 4096;
        assert_eq!(setup.resize(size), Ok(json!({})));
        assert_told_once(&mut second);
        for vmm in [&mut full, &mut closed, &mut without, &mut twice] {
            assert_eq!(capacity_bytes(vmm), size);
        }
    }
    // The other end of the first one is closed.
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
    let mut received = [0; 4096];
    assert!(unread.read(&mut received).unwrap() > 0);
    drop((full, closed, without, twice));

    // A descriptor that is no stream socket ends the connection.
    let (datagram, _peer) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    let (reader, _writer) = std::io::pipe().unwrap();
    for descriptor in [OwnedFd::from(datagram), file, OwnedFd::from(reader)] {
        let mut vmm = setup.vmm();
        let _ = vmm.frontend().set_backend_request_fd(&descriptor);
        assert!(setup.daemon.is_alive());
        let mut next = setup.vmm();
        next.queues[0].write_disk(0, &[7; 4096]);
        assert_eq!(setup.resize(SIZE_BYTES + 3 * 4096), Ok(json!({})));
    }
    assert!(setup.daemon.terminate().success());
    assert!(are_identical(&images));
}
