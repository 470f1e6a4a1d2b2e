//! How many virtqueues a guest has, and of which size.

use std::ffi::OsString;
use std::thread;

use tempfile::TempDir;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::guest::{Guest, GuestBuilder};
use testkit::images::create_images;

/// A guest on a disk with these options of the daemon, and options of QEMU for the device.
fn boot(cpus: u16, options: &[&str], device: &[&str]) -> (TempDir, Daemon, Guest) {
    let directory = tempfile::tempdir().expect("creating a directory");
    let mut arguments = replica_arguments(&create_images(directory.path(), 3, 16 << 20));
    arguments.extend(options.iter().map(OsString::from));
    let daemon = Daemon::start_with_records(directory.path(), arguments);
    let global = |option: &&str| ["-global".to_owned(), format!("vhost-user-blk-pci.{option}")];
    let device: Vec<_> = device.iter().flat_map(global).collect();
    let guest = GuestBuilder::new(directory.path(), daemon.socket())
        .cpus(cpus)
        .arguments(device.iter().map(String::as_str))
        .start();
    (directory, daemon, guest)
}

fn end((_directory, mut daemon, guest): (TempDir, Daemon, Guest)) {
    guest.poweroff();
    assert!(daemon.terminate().success(), "{}", daemon.log());
}

/// QEMU without `num-queues` asks for a queue for each processor of the guest.
#[test]
fn a_guest_has_a_queue_for_each_processor() {
    thread::scope(|scope| {
        for cpus in [1, 2, 4] {
            scope.spawn(move || {
                let mut parts = boot(cpus, &[], &[]);
                let queues = parts.2.answer("ls /sys/block/vda/mq | wc -l");
                assert_eq!(queues, cpus.to_string());
                let write = "dd if=/dev/zero of=/dev/vda bs=1M count=16 conv=fsync";
                parts.2.run_successfully(write);
                end(parts);
            });
        }
    });
}

/// Also the smallest and the largest, and with a descriptor of the queue for each segment.
#[test]
fn queues_of_every_size_serve_long_requests() {
    thread::scope(|scope| {
        let sizes = [
            (4, "off"),
            (4, "on"),
            (16, "on"),
            (1024, "off"),
            (1024, "on"),
        ];
        for (size, indirect) in sizes {
            scope.spawn(move || {
                let number = size.to_string();
                let size = format!("queue-size={number}");
                let indirect = format!("indirect_desc={indirect}");
                let mut parts = boot(1, &["--queue-size", &number], &[&size, &indirect]);
                for copy in ["if=/dev/zero of=/dev/vda", "if=/dev/vda of=/dev/null"] {
                    let dd = format!("dd {copy} bs=1M count=16");
                    parts.2.run_successfully(&dd);
                }
                end(parts);
            });
        }
    });
}

/// The daemon cannot know the size that the frontend will choose when it says how many segments a
/// request may have.
#[test]
fn a_queue_that_is_too_small_is_reported() {
    let parts = boot(1, &[], &["queue-size=64", "indirect_desc=off"]);
    let log = parts.1.log();
    assert!(log.contains("a virtqueue is too small"), "{log}");
    assert!(log.contains("--queue-size"), "{log}");
    end(parts);
}
