//! A Linux guest uses the other features of the disk: all virtqueues at the same time, the cache
//! mode, discard and write-zeroes, and memory that is plugged while it runs.

use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::HANG_LIMIT;

use blkio::Blkio;
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::guest::{Guest, GuestBuilder};
use testkit::images::{allocated_bytes, are_identical, create_images};
use testkit::loop_device::LoopDevice;
use testkit::monitor::Monitor;

const IMAGE_BYTES: u64 = 64 << 20;

const COLD_CACHE: &str = "sync; echo 3 >/proc/sys/vm/drop_caches";

/// Limits, virtqueues, cache mode and deallocation in one guest. Its second disk is read-only.
#[test]
fn a_guest_uses_what_the_disk_offers() {
    let directory = tempfile::tempdir().expect("creating a directory");
    let replicas = MixedReplicas::create(directory.path());
    let mut arguments = replicas.arguments.clone();
    arguments.extend(["--num-queues", "2", "--serial", "mixed"].map(Into::into));
    // Nothing hangs here; the machine may be slow.
    arguments.extend(["--replica-timeout", "30000"].map(Into::into));
    let mut daemon = Daemon::start_with_records(directory.path(), arguments);
    let events = EventReader::connect(daemon.events_socket());

    let frozen_directory = directory.path().join("frozen");
    fs::create_dir(&frozen_directory).expect("creating a directory");
    let frozen_images = create_images(&frozen_directory, 2, 1 << 20);
    for image in &frozen_images {
        fs::write(image, vec![0x5a; 1 << 20]).expect("filling an image");
    }
    let frozen_before = frozen_images.iter().map(metadata).collect::<Vec<_>>();
    let mut arguments = replica_arguments(&frozen_images);
    arguments.extend(["--read-only", "--serial", "frozen"].map(Into::into));
    let mut frozen = Daemon::start_with_records(&frozen_directory, arguments);

    let limits = DiskLimits::read(daemon.socket());
    let mut guest = GuestBuilder::new(directory.path(), daemon.socket())
        .queues(2)
        .cpus(2)
        .arguments([
            "-chardev",
            &format!("socket,id=frozen,path={}", frozen.socket().display()),
            "-device",
            "vhost-user-blk-pci,chardev=frozen,num-queues=1",
        ])
        .start();
    guest.run_successfully("until [ -b /dev/vdb ]; do sleep 0.1; done");
    assert_eq!(guest.answer("cat /sys/block/vda/serial"), "mixed");
    assert_eq!(guest.answer("cat /sys/block/vdb/serial"), "frozen");

    a_read_only_disk(&mut guest);
    assert_eq!(DiskLimits::of_guest(&mut guest), limits);
    both_queues_at_the_same_time(&mut guest, &replicas.files);
    cache_mode(&mut guest);
    freed_space(&mut guest, &replicas.files);
    ranges_of_zeroes(&mut guest, &replicas.files);

    guest.poweroff();
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    assert_eq!(frozen.terminate().code(), Some(0), "{}", frozen.log());
    assert_eq!(events.all_but_jobs(), [] as [Value; 0]);
    for (image, before) in frozen_images.iter().zip(&frozen_before) {
        assert_eq!(
            fs::read(image).expect("reading an image"),
            vec![0x5a; 1 << 20]
        );
        let times = |data: &Metadata| (data.mtime(), data.mtime_nsec(), data.blocks());
        assert_eq!(times(&metadata(image)), times(before), "not even touched");
    }
}

/// Every write of the guest to `/dev/vdb` fails. The end of the test checks that none has reached
/// it.
fn a_read_only_disk(guest: &mut Guest) {
    assert_eq!(guest.answer("blockdev --getro /dev/vda"), "0");
    assert_eq!(guest.answer("blockdev --getro /dev/vdb"), "1");
    guest.run_successfully("dd if=/dev/vdb of=/dev/null bs=64k iflag=direct");
    // This makes the kernel send writes all the same.
    guest.run_successfully("blockdev --setrw /dev/vdb || true");
    for command in [
        "dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync",
        "/sbin/blkdiscard /dev/vdb",
        "/sbin/blkdiscard -z /dev/vdb",
    ] {
        assert_ne!(guest.run(command).status, 0, "{command}");
    }
}

/// The limits in the config space, in bytes.
#[derive(Debug, PartialEq, Eq)]
struct DiskLimits {
    logical_block: u64,
    physical_block: u64,
    discard_max: u64,
    write_zeroes_max: u64,
}

impl DiskLimits {
    /// As a client that knows nothing of Linux reads them.
    fn read(socket: &Path) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").expect("the driver");
        let path = socket.to_str().expect("a path in UTF-8");
        blkio.set_str("path", path).expect("setting the path");
        blkio.connect().expect("connecting");
        let number = |property| {
            let value: u64 = blkio
                .get_str(property)
                .expect(property)
                .parse()
                .expect("a number");
            assert_ne!(value, 0, "{property}");
            value
        };
        Self {
            logical_block: number("request-alignment"),
            physical_block: number("optimal-io-alignment"),
            discard_max: number("max-discard-len"),
            write_zeroes_max: number("max-write-zeroes-len"),
        }
    }

    /// As Linux understands them.
    fn of_guest(guest: &mut Guest) -> Self {
        let mut number = |name: &str| {
            let text = guest.answer(&format!("cat /sys/block/vda/queue/{name}"));
            text.parse().expect("a number")
        };
        Self {
            logical_block: number("logical_block_size"),
            physical_block: number("physical_block_size"),
            discard_max: number("discard_max_bytes"),
            write_zeroes_max: number("write_zeroes_max_bytes"),
        }
    }
}

/// Each of two processors has a queue of its own, and writes and reads back its part of the disk.
fn both_queues_at_the_same_time(guest: &mut Guest, files: &[PathBuf]) {
    const PART_MIB: u64 = 4;
    assert_eq!(
        guest.answer(
            "cd /sys/block/vda/mq && for queue in *; do echo $queue: $(cat $queue/cpu_list); done"
        ),
        "0: 0\n1: 1"
    );
    guest.run_successfully(&format!(
        "for cpu in 0 1; do dd if=/dev/urandom of=/tmp/part-$cpu bs=1M count={PART_MIB}; done"
    ));
    let sums = [0, 1].map(|part| guest.checksum(&format!("/tmp/part-{part}")));
    // Requests of a processor use its virtqueue, which has an interrupt of its own.
    let interrupts = |guest: &mut Guest| {
        let text = guest.answer("awk '/virtio[0-9]+-req/ { print $2 + $3 }' /proc/interrupts");
        text.lines()
            .map(|count| count.parse().expect("a number"))
            .collect::<Vec<u64>>()
    };
    let interrupts_before = interrupts(guest);
    let work = format!(
        "set -e; sum=$(sha512sum </tmp/part-$1); for round in 1 2 3; do \
         dd if=/tmp/part-$1 of=/dev/vda \
         bs=64k seek=$(($1 * {PART_MIB} * 16)) oflag=direct conv=notrunc; \
         dd if=/dev/vda of=/tmp/back-$1 \
         bs=64k skip=$(($1 * {PART_MIB} * 16)) count=$(({PART_MIB} * 16)) iflag=direct; \
         test \"$(sha512sum </tmp/back-$1)\" = \"$sum\"; done"
    );
    guest.run_successfully(&format!(
        "for cpu in 0 1; do taskset -c $cpu sh -c '{work}' work $cpu & \
         workers=\"$workers $!\"; done; \
         for worker in $workers; do wait $worker || exit 1; done"
    ));
    let interrupts_after = interrupts(guest);
    for queue in 0..2 {
        assert!(
            interrupts_after[queue] > interrupts_before[queue],
            "queue {queue}: {interrupts_before:?}, {interrupts_after:?}"
        );
    }
    for (part, sum) in (0..).zip(sums) {
        expect_on_disk(files, (part * PART_MIB) << 20, PART_MIB << 20, &sum);
    }
}

/// The guest sees a write-back cache, and may switch to write-through.
fn cache_mode(guest: &mut Guest) {
    let modes = |guest: &mut Guest| {
        guest.answer("cat /sys/block/vda/cache_type /sys/block/vda/queue/write_cache")
    };
    assert_eq!(modes(guest), "write back\nwrite back");
    for mode in ["write through", "write back"] {
        guest.run_successfully(&format!("echo {mode} >/sys/block/vda/cache_type"));
        assert_eq!(modes(guest), format!("{mode}\n{mode}"));
        guest.run_successfully("dd if=/tmp/part-1 of=/dev/vda bs=64k conv=fsync,notrunc");
        guest.run_successfully(COLD_CACHE);
        guest.run_successfully("cmp -n $(stat -c %s /tmp/part-1) /tmp/part-1 /dev/vda");
    }
}

/// Discarded space is deallocated on all replicas.
fn freed_space(guest: &mut Guest, files: &[PathBuf]) {
    const FILE_MIB: u64 = 24;
    let allocated = || files.iter().map(allocated_bytes).collect::<Vec<_>>();
    let allocated_before = allocated();
    // It discards the whole disk at first.
    guest.run_successfully("/sbin/mke2fs -q -t ext4 -b 4096 /dev/vda");
    let allocated_empty = allocated();
    guest.run_successfully("mount -t ext4 /dev/vda /mnt");
    guest.run_successfully(&format!(
        "dd if=/dev/urandom of=/mnt/file bs=1M count={FILE_MIB} conv=fsync"
    ));
    let allocated_full = allocated();
    guest.run_successfully("rm /mnt/file && sync && fstrim -v /mnt && umount /mnt");
    let allocated_trimmed = allocated();
    guest.run_successfully("e2fsck -fn /dev/vda");
    println!(
        "allocated: {allocated_before:?}, {allocated_empty:?}, {allocated_full:?}, \
         {allocated_trimmed:?} bytes"
    );
    for index in 0..files.len() {
        assert!(
            allocated_empty[index] + (2 << 20) < allocated_before[index],
            "replica {index}: mke2fs"
        );
        assert!(
            allocated_full[index] >= FILE_MIB << 20,
            "replica {index}: full"
        );
        assert!(
            allocated_trimmed[index] + ((FILE_MIB - 2) << 20) < allocated_full[index],
            "replica {index}: fstrim"
        );
    }
    assert!(are_identical(files), "the replicas differ");
}

/// Discarded, zeroed and punched ranges are zero on every replica, and the bytes around them are
/// unchanged.
fn ranges_of_zeroes(guest: &mut Guest, files: &[PathBuf]) {
    const MIB: usize = 1 << 20;
    let block: usize = guest
        .answer("blockdev --getss /dev/vda")
        .parse()
        .expect("a number");
    let zeroes = [
        ("/sbin/blkdiscard", 2 * MIB..6 * MIB),
        ("/sbin/blkdiscard -z", 8 * MIB..10 * MIB),
        ("/sbin/fallocate --punch-hole", 11 * MIB..13 * MIB),
        ("/sbin/fallocate --zero-range", 13 * MIB + 4096..14 * MIB),
        // As small as can be, and aligned to nothing else.
        ("/sbin/blkdiscard", 15 * MIB + block..15 * MIB + 4 * block),
        (
            "/sbin/blkdiscard -z",
            15 * MIB + 9 * block..15 * MIB + 10 * block,
        ),
        (
            "/sbin/blkdiscard -z",
            15 * MIB + 100 * block..16 * MIB - block,
        ),
    ];
    guest.run_successfully(
        "tr '\\0' '\\377' </dev/zero | \
         dd of=/dev/vda bs=1M count=16 iflag=fullblock conv=notrunc,fsync",
    );
    let allocated_before: Vec<u64> = files.iter().map(allocated_bytes).collect();
    let mut expected = vec![0xff; 16 * MIB];
    for (command, range) in zeroes {
        let (offset, len) = (range.start, range.len());
        guest.run_successfully(&format!("{command} -o {offset} -l {len} /dev/vda"));
        expected[range].fill(0);
    }
    for (file, allocated_before) in files.iter().zip(allocated_before) {
        let mut bytes = vec![0; expected.len()];
        File::open(file)
            .and_then(|file| file.read_exact_at(&mut bytes, 0))
            .expect("reading a replica");
        let wrong = bytes
            .iter()
            .zip(&expected)
            .position(|(is, should)| is != should);
        assert_eq!(wrong, None, "byte that differs in {}", file.display());
        // At least the discarded and punched blocks are deallocated.
        assert!(
            allocated_bytes(file) + (6 << 20) <= allocated_before,
            "{}",
            file.display()
        );
    }
    guest.run_successfully(COLD_CACHE);
    guest.run_successfully(&format!("head -c {} /dev/vda >/tmp/read", expected.len()));
    let sum = guest.checksum("/tmp/read");
    expect_on_disk(files, 0, expected.len() as u64, &sum);
}

/// Guest memory grows while requests are in flight; then they go to the new memory and come from
/// there.
#[test]
fn a_guest_gets_more_memory_while_it_works() {
    const DATA_MIB: u64 = 96;
    let directory = tempfile::tempdir().expect("creating a directory");
    let images = create_images(directory.path(), 3, 256 << 20);
    let mut daemon = Daemon::start_with_records(directory.path(), replica_arguments(&images));
    let mut guest = GuestBuilder::new(directory.path(), daemon.socket())
        .cpus(2)
        .memory_mib(192)
        .hot_plug(1, 512)
        .reconnect()
        .start();
    let mut monitor = guest.monitor();

    // Such memory is preferred for files and what programs hold, and can be taken away again.
    guest.run_successfully("echo online_movable >/sys/devices/system/memory/auto_online_blocks");
    let memory_kib = |guest: &mut Guest| -> u64 {
        let text = guest.answer("awk '/MemTotal/ { print $2 }' /proc/meminfo");
        text.parse().expect("a number")
    };
    let before_kib = memory_kib(&mut guest);
    assert!(before_kib < DATA_MIB << 10, "the data must not fit");

    guest.run_successfully("dd if=/dev/urandom of=/tmp/data bs=1M count=8");
    guest.begin(&format!(
        "set -e; sum=$(sha512sum </tmp/data); round=0; left=3; until [ $left = 0 ]; do \
         round=$((round + 1)); echo round $round; place=$((round % 16 * 128)); \
         dd if=/tmp/data of=/dev/vda bs=64k seek=$place oflag=direct conv=notrunc; \
         dd if=/dev/vda of=/tmp/back bs=64k skip=$place count=128 iflag=direct; \
         test \"$(sha512sum </tmp/back)\" = \"$sum\"; \
         [ $(awk '/MemTotal/ {{ print $2 }}' /proc/meminfo) = {before_kib} ] || \
         left=$((left - 1)); done"
    ));
    guest.wait_for_output("round 2\n");
    plug_memory(&mut monitor);
    let io_meanwhile = guest.finish();
    assert_eq!(io_meanwhile.status, 0, "{io_meanwhile:?}");
    assert!(memory_kib(&mut guest) >= before_kib + (256 << 10));

    guest.run_successfully("rm /tmp/back; mount -o remount,size=300M /tmp");
    guest.run_successfully(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count={DATA_MIB}"
    ));
    let sum = guest.checksum("/tmp/data");
    copy_to_disk(&mut guest, 0, DATA_MIB, &sum, &images);
    let zones = "awk '$3 == \"zone\" { movable = $4 == \"Movable\" } \
                 movable && $1 == \"managed\" { managed = $2 } \
                 movable && $1 $2 == \"pagesfree\" { free = $3 } \
                 END { print managed - free }' /proc/zoneinfo";
    let used_pages: u64 = guest.answer(zones).parse().expect("a number");
    assert!(
        used_pages * 4 > before_kib,
        "{used_pages} pages of the new memory are used"
    );

    // A new daemon gets all of the memory at once.
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    daemon = Daemon::start_with_records(directory.path(), replica_arguments(&images));
    copy_to_disk(&mut guest, DATA_MIB, DATA_MIB, &sum, &images);

    // The memory is unplugged.
    guest.run_successfully("truncate -s 8M /tmp/data; echo 3 >/proc/sys/vm/drop_caches");
    let sum = guest.checksum("/tmp/data");
    monitor.execute("device_del", json!({ "id": "memory1" }));
    let is_gone =
        |event: &Value| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == "memory1";
    let gone = monitor.wait_for_event(is_gone, HANG_LIMIT);
    assert!(gone.is_some(), "the guest keeps the memory");
    monitor.execute("object-del", json!({ "id": "memory1" }));
    assert_eq!(memory_kib(&mut guest), before_kib);
    copy_to_disk(&mut guest, 8, 8, &sum, &images);

    guest.poweroff();
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    assert!(are_identical(&images));
}

fn plug_memory(monitor: &mut Monitor) {
    monitor.execute(
        "object-add",
        json!({
            "qom-type": "memory-backend-memfd",
            "id": "memory1",
            "size": 256 << 20,
            "share": true,
        }),
    );
    monitor.execute(
        "device_add",
        json!({ "driver": "pc-dimm", "id": "memory1", "memdev": "memory1" }),
    );
}

/// Writes the guest's `/tmp/data` to the disk and reads it back, through the page cache.
fn copy_to_disk(guest: &mut Guest, offset_mib: u64, data_mib: u64, sum: &str, images: &[PathBuf]) {
    guest.run_successfully(&format!(
        "dd if=/tmp/data of=/dev/vda bs=1M seek={offset_mib} conv=notrunc,fsync"
    ));
    guest.run_successfully(COLD_CACHE);
    let read =
        format!("dd if=/dev/vda bs=1M skip={offset_mib} count={data_mib} 2>/dev/null | sha512sum");
    assert_eq!(guest.answer(&read)[..sum.len()], *sum);
    expect_on_disk(images, offset_mib << 20, data_mib << 20, sum);
}

/// Replicas of three kinds: on the file system of temporary files, behind a loop device, in memory.
struct MixedReplicas {
    /// The paths for the daemon.
    arguments: Vec<OsString>,
    /// The files that hold the bytes.
    files: Vec<PathBuf>,
    _loop_device: LoopDevice,
    _memory: TempDir,
}

impl MixedReplicas {
    fn create(directory: &Path) -> Self {
        let mut files = create_images(directory, 2, IMAGE_BYTES);
        let memory = tempfile::tempdir_in("/dev/shm").expect("creating a directory in memory");
        files.extend(create_images(memory.path(), 1, IMAGE_BYTES));
        let loop_device = LoopDevice::attach(&files[1]);
        let replicas = [
            ("file", files[0].as_path()),
            ("loop", loop_device.path()),
            ("memory", files[2].as_path()),
        ];
        let arguments = replicas.iter().flat_map(|(name, path)| {
            let replica = format!("{},node-name={name}", path.display());
            [OsString::from("--blk-file"), replica.into()]
        });
        Self {
            arguments: arguments.collect(),
            files,
            _loop_device: loop_device,
            _memory: memory,
        }
    }
}

fn metadata(path: impl AsRef<Path>) -> Metadata {
    fs::metadata(path).expect("looking at a file")
}

/// All files hold the same, and in this range something with the checksum `sum`.
fn expect_on_disk(files: &[PathBuf], offset_bytes: u64, len_bytes: u64, sum: &str) {
    assert!(are_identical(files), "the replicas differ");
    // The program is optimised, the test and what it links is not.
    let pipeline = r#"tail -c "+$2" "$1" | head -c "$3" | sha512sum"#;
    let output = Command::new("sh")
        .args(["-c", pipeline, "sh"])
        .arg(&files[0])
        .args([(offset_bytes + 1).to_string(), len_bytes.to_string()])
        .output()
        .expect("running a shell");
    assert!(
        output.stdout.starts_with(sum.as_bytes()),
        "bytes from {offset_bytes} on are wrong: {output:?}"
    );
}
