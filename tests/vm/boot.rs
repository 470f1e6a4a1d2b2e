//! Firmware boots from a voted disk that was partitioned in sectors of 512 bytes, although one of
//! the replicas is a device with blocks of 4096 bytes. Firmware is less tolerant than Linux:
//! SeaBIOS serves only disks with sectors of 512 bytes, and OVMF searches for a partition table at
//! the sector size of the disk.
//!
//! Takes the right to attach loop devices (root). `make firmware` prepares the disks.

use std::fs;

use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::firmware::Firmware;
use testkit::guest::GuestBuilder;
use testkit::images::{are_identical, corrupt_sectors};
use testkit::loop_device::LoopDevice;

/// Boots, and returns the first console's output and what the guest answers to `question`.
fn boot(firmware: Firmware, question: &str) -> (String, String) {
    let directory = tempfile::tempdir().expect("creating a directory");
    let images = [0, 1, 2].map(|index| directory.path().join(format!("{index}.raw")));
    for image in &images {
        fs::copy(firmware.disk(), image).expect("copying the disk");
    }
    let device = LoopDevice::attach_with_blocks(&images[2], 4096);
    let mut replicas = images.to_vec();
    replicas[2] = device.path().to_owned();
    let mut arguments = replica_arguments(&replicas);
    arguments.push("--rewrite-corrupted".into());
    let mut daemon = Daemon::start_with_records(directory.path(), arguments);
    let events = EventReader::connect(daemon.events_socket());
    // The firmware gets the sector with the boot loader, or with the partition table, from a vote.
    corrupt_sectors(&images[0], 0..2, 0xff);

    let mut guest = GuestBuilder::new(directory.path(), daemon.socket())
        .firmware(firmware)
        .start();
    let answer = guest.answer(question);
    // As the partition table has it, and in sectors that no block of the device is aligned to.
    assert_eq!(guest.answer("cat /sys/block/vda/vda1/start"), "2048");
    assert_eq!(guest.answer("blockdev --getss /dev/vda"), "512");
    guest.run_successfully(
        "dd if=/dev/urandom of=/tmp/data bs=512 count=3 && \
         dd if=/tmp/data of=/dev/vda1 bs=512 seek=1000 oflag=direct conv=notrunc,fsync && \
         dd if=/dev/vda1 bs=512 skip=1000 count=3 iflag=direct | cmp - /tmp/data",
    );
    let console = guest.console_log();
    guest.poweroff();
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    let voted = events.all_but_jobs();
    assert!(!voted.is_empty());
    for event in voted {
        assert_eq!(event["event"], "QUORUM_REPORT_BAD", "{event}");
        let sector = event["data"]["sector-num"].as_u64().expect("a number");
        assert!(sector < 2, "{event}");
    }
    drop(device);
    assert!(are_identical(&images));
    (console, answer)
}

#[test]
fn seabios_boots_from_a_voted_disk() {
    let (console, command_line) = boot(Firmware::SeaBios, "cat /proc/cmdline");
    assert!(console.contains("SYSLINUX"), "{console}");
    assert!(
        command_line.contains("BOOT_IMAGE=/vmlinuz"),
        "{command_line}"
    );
}

#[test]
fn ovmf_boots_from_a_voted_disk() {
    let (console, loader) = boot(
        Firmware::Ovmf,
        "cat /sys/firmware/efi/fw_platform_size && ls /sys/block/vda",
    );
    assert!(console.contains("EFI stub: Loaded initrd"), "{console}");
    assert!(loader.starts_with("64\n"), "{loader}");
}
