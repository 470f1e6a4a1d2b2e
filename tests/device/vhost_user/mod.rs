//! The daemon with the frontend and the driver of testkit: what QEMU's qtests expect of a
//! vhost-user-blk device, what only cloud-hypervisor does, and what neither does.

mod availability;
mod configuration;
mod connections;
mod hostile;
mod memory;
mod passed;
mod requests;

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::frontend::{Completion, Plan, Style, Vmm};
use testkit::images::{are_identical, create_images};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

const DISK_BYTES: u64 = 4 << 20;
const DISK_SECTORS: u64 = DISK_BYTES / 512;
const OK: u32 = VIRTIO_BLK_S_OK;
const IOERR: u32 = VIRTIO_BLK_S_IOERR;
const UNSUPP: u32 = VIRTIO_BLK_S_UNSUPP;

/// A daemon over three new images.
struct Setup {
    images: Vec<PathBuf>,
    daemon: Daemon,
    directory: TempDir,
}

impl Setup {
    fn new(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), 3, DISK_BYTES);
        let mut arguments = replica_arguments(&images);
        // Several frontends at a time show what one of them does to the others.
        arguments.push("--shared".into());
        arguments.extend(options.iter().map(Into::into));
        Self {
            daemon: Daemon::start(directory.path(), arguments),
            images,
            directory,
        }
    }

    fn start(&self, plan: &Plan) -> Vmm {
        Vmm::start(self.daemon.socket(), plan)
    }

    /// A new frontend is served.
    fn assert_serves(&mut self, after: &str) {
        assert!(self.daemon.is_alive(), "the daemon has ended after {after}");
        let mut vmm = Vmm::new(&Plan::default());
        let connected = vmm
            .connect(self.daemon.socket())
            .and_then(|()| vmm.activate());
        connected.unwrap_or_else(|error| panic!("after {after}: {error}"));
        vmm.queues[0].write_disk(0, &[7; 4096]);
        assert_eq!(vmm.queues[0].read_disk(0, 4096), [7; 4096], "after {after}");
    }

    /// Ends the daemon; all images hold the same.
    fn end(mut self) -> Vec<u8> {
        assert!(self.daemon.terminate().success());
        assert!(are_identical(&self.images));
        fs::read(&self.images[0]).unwrap()
    }
}

fn both_styles() -> [Plan; 2] {
    [Style::Qemu, Style::CloudHypervisor].map(|style| Plan {
        style,
        ..Plan::default()
    })
}

fn status(completion: &Completion) -> u32 {
    u32::from(completion.status)
}
