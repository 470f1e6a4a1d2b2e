//! Requests that fail are held until the operator continues (W9), however long that takes and
//! whatever happens to the virtual machine and the daemon meanwhile.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::disk::Disk;
use testkit::disk::Plan as DiskPlan;
use testkit::frontend::{Layout, Plan, Queue, Request, Style, Vmm};
use testkit::fuse::{Fault, Operation};
use testkit::images::{are_identical, create_images};
use testkit::monitor::Monitor;
use testkit::process::wait_until;
use testkit::small_disk::SmallDisk;
use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

const MEBIBYTE: u64 = 1 << 20;

/// Three images on one file system that has no space left.
struct FullHost {
    images: Vec<PathBuf>,
    ballast: PathBuf,
    _small: SmallDisk,
}

impl FullHost {
    fn new() -> Self {
        Self::with(8 * MEBIBYTE, 4 * MEBIBYTE)
    }

    fn with(bytes: u64, image_bytes: u64) -> Self {
        let small = SmallDisk::mount(bytes);
        let images = create_images(&small.path(), 3, image_bytes);
        let ballast = small.path().join("ballast");
        let file = File::create_new(&ballast).unwrap();
        let full = (0..).find(|page| file.write_all_at(&[1; 4096], page * 4096).is_err());
        assert!(full.is_some());
        Self {
            images,
            ballast,
            _small: small,
        }
    }

    fn make_room(&self) {
        fs::remove_file(&self.ballast).unwrap();
    }
}

/// How a daemon ends.
#[derive(Clone, Copy)]
enum End {
    Kill,
    Terminate,
    Quit,
}

fn plan(more: &[&'static str]) -> DiskPlan {
    DiskPlan {
        queues: 2,
        direct: false,
        more: more.to_vec(),
        ..DiskPlan::default()
    }
}

fn vmm(style: Style) -> Plan {
    Plan {
        style,
        queues: 2,
        ..Plan::default()
    }
}

fn write(fill: u8) -> Request {
    Request::write(0, vec![fill; 4096])
}

fn status_of(monitor: &mut Monitor) -> Value {
    monitor.execute("query-status", json!({}))
}

/// Waits until this many requests are held.
fn wait_for_held(disk: &Disk, count: u64) {
    disk.state_when(|state| state["held-requests"] == count);
}

fn wait_for_success(queue: &mut Queue) {
    assert_eq!(u32::from(queue.wait().status), VIRTIO_BLK_S_OK);
}

#[test]
fn a_write_without_space_waits_until_there_is_some() {
    let host = FullHost::new();
    let disk = Disk::over(&plan(&["--werror", "enospc"]), host.images.clone());
    let mut vmm = Vmm::start(disk.socket(), &vmm(Style::Qemu));
    vmm.queues[0].submit(&write(7), Layout::DIRECT);
    let event = disk.wait_for("BLOCK_IO_ERROR", None);
    assert_eq!(
        event["data"],
        json!({
            "device": "quorum0", "node-name": "quorum0", "operation": "write", "action": "stop",
            "nospace": true, "reason": "No space left on device",
            "sector-num": 0, "sector-count": 8, "type": "write",
        })
    );
    let mut monitor = disk.monitor();
    let stopped = json!({ "running": false, "status": "io-error" });
    wait_for_held(&disk, 1);
    assert_eq!(status_of(&mut monitor), stopped);
    assert_eq!(disk.state()["conditions"], json!(["io-error"]));
    let (code, text) = disk.blkctl(&["status"]);
    let shown = "it holds 1 request that failed";
    assert!(code == 1 && text.contains(shown), "{code}: {text}");

    // Nothing else is served meanwhile, and there is no space yet.
    vmm.queues[1].submit(&Request::read(64, 4096), Layout::DIRECT);
    assert_eq!(disk.blkctl(&["cont"]).0, 0);
    let again = |state: &Value| state["failures"]["write"] == 2 && state["held-requests"] == 1;
    disk.state_when(again);
    assert_eq!(vmm.queues.iter().map(Queue::outstanding).sum::<usize>(), 2);
    assert!(vmm.queues.iter().all(|queue| !queue.has_used()));

    host.make_room();
    let (code, text) = disk.blkctl(&["cont"]);
    assert!(
        code == 0 && text.contains("quorum0 submits 1 request again"),
        "{text}"
    );
    wait_for_success(&mut vmm.queues[0]);
    wait_for_success(&mut vmm.queues[1]);
    assert_eq!(vmm.queues[1].read_disk(0, 4096), [7; 4096]);
    assert_eq!(
        status_of(&mut monitor),
        json!({ "running": true, "status": "running" })
    );
    drop(vmm);
    disk.end();
    assert!(are_identical(&disk.images));
}

#[test]
fn long_requests_are_continued_in_parts() {
    const COUNT: usize = 6;
    const BYTES: usize = 5 << 18;
    let host = FullHost::with(64 * MEBIBYTE, 16 * MEBIBYTE);
    let disk = Disk::over(&plan(&["--werror", "enospc"]), host.images.clone());
    let long = Plan {
        data_bytes: BYTES,
        slots: COUNT,
        ..vmm(Style::Qemu)
    };
    let mut vmm = Vmm::start(disk.socket(), &long);
    let sector = |index: usize| (index * BYTES / 512) as u64;
    for index in 0..COUNT {
        let fill = u8::try_from(index + 1).unwrap();
        let request = Request::write(sector(index), vec![fill; BYTES]);
        vmm.queues[0].submit(&request, Layout::DIRECT);
    }
    disk.state_when(|state| state["held-requests"].as_u64() >= Some(1));
    host.make_room();
    disk.monitor().execute("cont", json!({}));
    for _ in 0..COUNT {
        wait_for_success(&mut vmm.queues[0]);
    }
    for index in 0..COUNT {
        let fill = u8::try_from(index + 1).unwrap();
        assert_eq!(vmm.queues[1].read_disk(sector(index), 4096), [fill; 4096]);
    }
    drop(vmm);
    disk.end();
    assert!(are_identical(&disk.images));
}

#[test]
fn a_read_without_a_quorum_waits_until_there_is_one() {
    let disk = Disk::start(
        testkit::disk::System::Ours,
        &DiskPlan {
            faulty: vec![1, 2],
            ..plan(&["--rerror", "stop", "--werror", "enospc"])
        },
    );
    let mut vmm = Vmm::start(disk.socket(), &vmm(Style::CloudHypervisor));
    vmm.queues[1].write_disk(0, &[3; 4096]);
    for replica in [1, 2] {
        disk.faulty(replica)
            .inject(Operation::Read, Fault::Fail(libc::EIO));
        disk.faulty(replica)
            .inject(Operation::Write, Fault::Fail(libc::EIO));
    }
    // Not for want of space: the guest gets the error.
    let failed = vmm.queues[0].run(&write(4), Layout::DIRECT);
    assert_eq!(u32::from(failed.status), VIRTIO_BLK_S_IOERR);
    vmm.queues[0].submit(&Request::read(64, 4096), Layout::DIRECT);
    wait_for_held(&disk, 1);
    let event = disk.wait_for("BLOCK_IO_ERROR", None);
    assert_eq!(
        (&event["data"]["operation"], &event["data"]["nospace"]),
        (&json!("read"), &json!(false))
    );
    for replica in [1, 2] {
        disk.faulty(replica).clear_faults();
    }
    disk.monitor().execute("cont", json!({}));
    wait_for_success(&mut vmm.queues[0]);
    drop(vmm);
    disk.end();
}

#[test]
fn a_flush_that_failed_is_reported_at_once() {
    let disk = Disk::start(
        testkit::disk::System::Ours,
        &DiskPlan {
            faulty: vec![1, 2],
            ..plan(&["--rerror", "stop", "--werror", "stop"])
        },
    );
    let mut vmm = Vmm::start(disk.socket(), &vmm(Style::Qemu));
    vmm.queues[0].write_disk(0, &[3; 4096]);
    for replica in [1, 2] {
        let fails = Fault::Fail(libc::EIO);
        disk.faulty(replica).inject(Operation::Sync, fails);
    }
    let failed = vmm.queues[0].run(&Request::flush(), Layout::DIRECT);
    assert_eq!(u32::from(failed.status), VIRTIO_BLK_S_IOERR);
    let state = disk.state();
    assert_eq!(
        (&state["held-requests"], &state["failures"]["flush"]),
        (&json!(0), &json!(1))
    );
    // The disk goes on.
    assert_eq!(vmm.queues[1].read_disk(64, 4096), [0; 4096]);
    for replica in [1, 2] {
        disk.faulty(replica).clear_faults();
    }
    drop(vmm);
    disk.end_even_unflushed();
}

#[test]
fn the_operator_changes_the_disk_while_a_request_is_held() {
    let host = FullHost::new();
    let disk = Disk::over(&plan(&["--werror", "enospc"]), host.images.clone());
    let mut vmm = Vmm::start(disk.socket(), &vmm(Style::Qemu));
    vmm.queues[0].submit(&write(7), Layout::DIRECT);
    wait_for_held(&disk, 1);
    let mut monitor = disk.monitor();
    let larger = json!({ "node-name": "quorum0", "size": 6 * MEBIBYTE });
    monitor.execute("block_resize", larger);
    // It may be needed to decide what the write has left.
    let remove = json!({ "parent": "quorum0", "child": "children.2" });
    let refused = monitor.try_execute("x-blockdev-change", remove.clone());
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!(disk.state()["held-requests"], 1);
    assert!(!vmm.queues[0].has_used());

    host.make_room();
    monitor.execute("cont", json!({}));
    wait_for_success(&mut vmm.queues[0]);
    monitor.execute("x-blockdev-change", remove);
    let last = 6 * MEBIBYTE / 512 - 8;
    vmm.queues[1].write_disk(last, &[9; 4096]);
    assert_eq!(vmm.queues[0].read_disk(last, 4096), [9; 4096]);
    assert_eq!(vmm.queues[0].read_disk(0, 4096), [7; 4096]);
    drop(vmm);
    disk.end();
    assert!(are_identical(&disk.images[..2]));
}

#[test]
fn the_virtual_machine_stops_while_a_request_is_held() {
    for style in [Style::Qemu, Style::CloudHypervisor] {
        let host = FullHost::new();
        let disk = Disk::over(&plan(&["--werror", "stop"]), host.images.clone());
        let mut vmm = Vmm::start(disk.socket(), &vmm(style));
        vmm.queues[0].submit(&write(7), Layout::DIRECT);
        vmm.queues[1].submit(&write(8), Layout::DIRECT);
        // The second write may have been taken before the disk stopped.
        disk.state_when(|state| state["held-requests"].as_u64() >= Some(1));
        vmm.stop_virtqueues().expect("stopping the virtqueues");
        wait_for_held(&disk, 0);
        assert!(vmm.inflight_chains() >= Some(1), "{style:?}");
        host.make_room();
        vmm.disconnect();
        assert!(vmm.reconnect(disk.socket(), || false));
        wait_for_success(&mut vmm.queues[0]);
        wait_for_success(&mut vmm.queues[1]);
        drop(vmm);
        disk.end();
    }
}

#[test]
fn without_an_inflight_region_a_held_request_fails_when_the_virtual_machine_stops() {
    let host = FullHost::new();
    let disk = Disk::over(&plan(&["--werror", "stop"]), host.images.clone());
    let mut plan = vmm(Style::Qemu);
    plan.protocol_features
        .remove(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    let mut vmm = Vmm::start(disk.socket(), &plan);
    vmm.queues[0].submit(&write(7), Layout::DIRECT);
    wait_for_held(&disk, 1);
    vmm.stop_virtqueues().expect("stopping the virtqueues");
    assert_eq!(u32::from(vmm.queues[0].wait().status), VIRTIO_BLK_S_IOERR);
    wait_for_held(&disk, 0);
    drop(vmm);
    disk.end();
}

#[test]
fn the_next_daemon_does_what_was_held_when_one_has_ended() {
    for style in [Style::Qemu, Style::CloudHypervisor] {
        for end in [End::Kill, End::Terminate, End::Quit] {
            let host = FullHost::new();
            let directory = tempfile::tempdir().unwrap();
            let qmp = directory.path().join("qmp.sock");
            let mut arguments = replica_arguments(&host.images);
            let options = ["--cache", "writeback", "--werror", "stop", "--qmp"];
            arguments.extend(options.map(Into::into));
            arguments.push(qmp.clone().into());
            let mut daemon = Daemon::start(directory.path(), arguments);
            let events = EventReader::connect(daemon.events_socket());
            let mut vmm = Vmm::start(daemon.socket(), &vmm(style));
            vmm.queues[0].submit(&write(7), Layout::DIRECT);
            let is_held = |event: &Value| event["event"] == "BLOCK_IO_ERROR";
            assert!(events.wait_for(is_held, HANG_LIMIT).is_some());
            match end {
                End::Kill => daemon.signal(libc::SIGKILL),
                End::Terminate => daemon.signal(libc::SIGTERM),
                End::Quit => drop(Monitor::connect(&qmp).execute("quit", json!({}))),
            }
            let status = daemon.wait();
            match end {
                End::Kill => assert_eq!(status.signal(), Some(libc::SIGKILL)),
                End::Terminate | End::Quit => {
                    assert_eq!(status.code(), Some(0), "{}", daemon.log());
                }
            }
            host.make_room();
            daemon.start_again();
            assert!(wait_until(HANG_LIMIT, || vmm.reconnect(daemon.socket(), || false)));
            wait_for_success(&mut vmm.queues[0]);
            assert_eq!(vmm.queues[1].read_disk(0, 4096), [7; 4096]);
            drop(vmm);
            assert!(daemon.terminate().success());
            assert!(are_identical(&host.images));
        }
    }
}
