//! A Linux guest moves to another QEMU on the same host while it works on a voted disk. One daemon
//! serves both. No write of the guest or of the daemon is lost, and a migration that is cancelled
//! or fails changes nothing.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::FileExt;
use std::panic;
use std::path::{Path, PathBuf};
use testkit::HANG_LIMIT;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::guest::{Guest, GuestBuilder};
use testkit::guest_load::{expect_end, expect_progress};
use testkit::images::{Random, are_identical, create_images};
use testkit::monitor::Monitor;
use testkit::process::wait_until;

const MIB: u64 = 1 << 20;
const IMAGE_BYTES: u64 = 64 * MIB;

/// A migration at this speed, and with this little time to stop the guest for, does not complete
/// while the guest writes, also on a machine on which the guest is slow.
const SLOW: Pace = Pace {
    bytes_per_second: 24 * MIB,
    downtime_ms: 1,
};

/// A migration that completes as soon as it can. QEMU's default is this downtime.
const FAST: Pace = Pace {
    bytes_per_second: 1 << 40,
    downtime_ms: 300,
};

/// How fast QEMU migrates, and for how long it may stop the guest in the end.
struct Pace {
    bytes_per_second: u64,
    downtime_ms: u64,
}

/// The writer writes a text to this many places of this size in turn, from the start of the disk
/// on: numbers from that of the write on, one a line.
const PLACES: u64 = 256;
const TEXT_BYTES: u64 = 16 << 10;

/// The range that the reader reads again and again. It is filled before the guest boots.
const READ_FROM: u64 = 16 * MIB;
const READ_BYTES: u64 = 16 * MIB;

/// The range that the guest reads once, during the migration.
const CACHED_FROM: u64 = 48 * MIB;
const CACHED_BYTES: u64 = 8 * MIB;

/// Log lines of the daemon.
const LOGGED: &str = "the dirty log of a migration is switched log=on";
const NOT_LOGGED: &str = "the dirty log of a migration is switched log=off";

/// Writes past the guest's page cache, reads back, compares.
const WRITER: &str = "n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); place=$((n % 256)); \
    seq $n $((n + 16384)) | head -c 16384 >/tmp/text; \
    dd if=/tmp/text of=/dev/vda bs=16k seek=$place oflag=direct conv=notrunc,fsync status=none && \
    dd if=/dev/vda bs=16k skip=$place count=1 iflag=direct status=none | \
    cmp - /tmp/text || echo write $n; \
    echo $n >/tmp/written; mv /tmp/written /tmp/writes; done; touch /tmp/writer-ended";

/// Reads through the page cache, which it empties before unless `/tmp/keep` exists, and checks the
/// sum.
const READER: &str = "n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); \
    [ -e /tmp/keep ] || echo 1 >/proc/sys/vm/drop_caches; \
    dd if=/dev/vda of=/dev/null bs=1M skip=16 count=16 status=none; \
    dd if=/dev/vda bs=1M skip=16 count=16 status=none | sha256sum | \
    cmp - /tmp/sum || echo read $n; \
    echo $n >/tmp/read; mv /tmp/read /tmp/reads; done; touch /tmp/reader-ended";

const READ_ONCE: &str = "dd if=/dev/vda bs=1M skip=48 count=8 status=none";

/// How often the migration is tried while TCG breaks the guest.
const ATTEMPTS: usize = 4;

/// What the kernel prints then, and what the shell says of a process, or of a command of which it
/// has lost a part.
const BROKEN_KERNEL: [&str; 4] = ["Kernel panic", "Oops", "general protection fault", "BUG: "];
const BROKEN_PROCESS: [&str; 3] = ["Segmentation fault", "Illegal instruction", ": not found"];

/// TCG can lose a store of the guest's processor during a migration: QEMU clears the dirty bit of a
/// page and sends the page, while the thread of the processor is preempted between its look at that
/// bit and its store. On a loaded machine this is likely, and the guest's kernel or one of its
/// processes fails in the destination, over memory to which no disk writes. Such an attempt says
/// nothing about the daemon. A store of the daemon that its dirty log misses does neither: the sums
/// of what the guest has read differ then.
#[test]
fn a_guest_under_load_moves_to_another_qemu() {
    for attempt in 1..=ATTEMPTS {
        let directory = tempfile::tempdir().expect("creating a directory");
        let migrated = panic::catch_unwind(|| migrate_under_load(directory.path()));
        let Err(failure) = migrated else {
            return;
        };
        let console = directory.path().join("destination/console.log");
        let console = fs::read(console).unwrap_or_default();
        let is_broken = BROKEN_KERNEL.iter().any(|text| contains(&console, text))
            || failure
                .downcast_ref::<String>()
                .is_some_and(|said| BROKEN_PROCESS.iter().any(|text| said.contains(text)));
        if !is_broken || attempt == ATTEMPTS {
            panic::resume_unwind(failure);
        }
        println!("attempt {attempt} of {ATTEMPTS}: the guest is broken in the destination");
    }
}

fn contains(console: &[u8], text: &str) -> bool {
    String::from_utf8_lossy(console).contains(text)
}

fn migrate_under_load(directory: &Path) {
    let images = create_images(directory, 3, IMAGE_BYTES);
    let [read, cached] = fill(&images);
    let mut arguments = replica_arguments(&images);
    // No replica is slow here, but the machine may be.
    arguments.extend(["--num-queues", "2", "--replica-timeout", "60000"].map(Into::into));
    let mut daemon = Daemon::start_with_records(directory, arguments);
    let events = EventReader::connect(daemon.events_socket());
    let start = |name: &str, incoming: Option<&str>| {
        let directory = directory.join(name);
        fs::create_dir(&directory).expect("creating a directory");
        let guest = GuestBuilder::new(&directory, daemon.socket())
            .queues(2)
            .cpus(2);
        // The guest would clear a page before the daemon writes to it, and QEMU would send the page
        // for that, even if the daemon did not log its write.
        let guest = guest.kernel_arguments("init_on_alloc=0");
        match incoming {
            Some(uri) => guest.incoming(uri).start(),
            None => guest.start(),
        }
    };

    let mut source = start("source", None);
    source.run_successfully(&format!("echo '{read}  -' >/tmp/sum"));
    source.run_successfully(&format!("({WRITER}) >/tmp/writer 2>&1 &"));
    // The kernel empties the page cache of a disk when its last user closes it. The reader keeps it
    // open.
    source.run_successfully(&format!("({READER}) >/tmp/reader 2>&1 3</dev/vda &"));
    expect_progress(&mut source);
    assert!(!daemon.log().contains(LOGGED));

    let mut monitor = source.monitor();
    let uri = |name: &str| format!("unix:{}", directory.join(name).display());
    for (name, status) in [("cancelled", "cancelled"), ("killed", "failed")] {
        let destination = start(name, Some(&uri(&format!("{name}.sock"))));
        migrate_slowly(&mut monitor, &destination, &uri(&format!("{name}.sock")));
        assert_eq!(
            occurrences(&daemon, LOGGED),
            occurrences(&daemon, NOT_LOGGED) + 1
        );
        if status == "cancelled" {
            monitor.execute("migrate_cancel", json!({}));
        } else {
            drop(destination);
        }
        wait_for_migration(&mut monitor, |migration| migration["status"] == status);
        let is_off = wait_until(HANG_LIMIT, || {
            occurrences(&daemon, LOGGED) == occurrences(&daemon, NOT_LOGGED)
        });
        assert!(is_off, "{}", daemon.log());
        assert_eq!(
            monitor.execute("query-status", json!({}))["status"],
            "running"
        );
        expect_progress(&mut source);
    }

    let mut destination = start("destination", Some(&uri("destination.sock")));
    // From here on the reader does not empty the page cache.
    source.run_successfully("touch /tmp/keep");
    expect_progress(&mut source);
    migrate_slowly(&mut monitor, &destination, &uri("destination.sock"));
    // All memory was sent once. A page that the daemon writes now is sent again only because it is
    // in the log.
    source.run_successfully(&format!("{READ_ONCE} of=/dev/null"));
    set_pace(&mut monitor, &FAST);
    let migration =
        wait_for_migration(&mut monitor, |migration| migration["status"] == "completed");
    println!("{migration}");
    drop(monitor);
    let mut monitor = destination.monitor();
    let is_running = wait_until(HANG_LIMIT, || {
        monitor.execute("query-status", json!({}))["status"] == "running"
    });
    assert!(is_running, "the guest does not run in the destination");
    drop(monitor);
    source.quit();

    let sum = destination.run_successfully(&format!("{READ_ONCE} | sha256sum"));
    assert_eq!(
        sum.trim(),
        format!("{cached}  -"),
        "what was read during the migration"
    );
    destination.run_successfully("rm /tmp/keep");
    expect_progress(&mut destination);
    expect_end(&mut destination);
    let writes = destination.run_successfully("cat /tmp/writes");
    let writes = writes.trim().parse().expect("a number");
    destination.run_successfully("sync");
    assert!(
        !destination.console_log().contains("I/O error"),
        "the kernel complained"
    );
    destination.poweroff();

    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    assert_eq!(events.all_but_jobs(), [] as [Value; 0]);
    assert!(are_identical(&images));
    expect_all_writes(&images[0], writes);
}

/// Fills the parts of the disk that are only read with random data, and returns their sums.
fn fill(images: &[PathBuf]) -> [String; 2] {
    let mut random = Random::from_environment();
    [(READ_FROM, READ_BYTES), (CACHED_FROM, CACHED_BYTES)].map(|(from, bytes)| {
        let data: Vec<u8> = (0..bytes / 8)
            .flat_map(|_| random.number().to_le_bytes())
            .collect();
        for image in images {
            let image = fs::OpenOptions::new().write(true).open(image);
            let image = image.expect("opening an image");
            image
                .write_all_at(&data, from)
                .expect("writing to an image");
        }
        let mut sum = String::new();
        for byte in Sha256::digest(&data) {
            write!(sum, "{byte:02x}").expect("writing to a string");
        }
        sum
    })
}

/// How often the log contains the words.
fn occurrences(daemon: &Daemon, words: &str) -> usize {
    daemon.log().matches(words).count()
}

fn set_pace(monitor: &mut Monitor, pace: &Pace) {
    let Pace {
        bytes_per_second,
        downtime_ms,
    } = pace;
    monitor.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": bytes_per_second, "downtime-limit": downtime_ms }),
    );
}

/// Begins a migration and waits until all of the guest's memory was sent once.
fn migrate_slowly(monitor: &mut Monitor, destination: &Guest, uri: &str) {
    let status = destination.monitor().execute("query-status", json!({}));
    assert_eq!(status["status"], "inmigrate");
    set_pace(monitor, &SLOW);
    monitor.execute("migrate", json!({ "uri": uri }));
    wait_for_migration(monitor, |migration| {
        assert_ne!(migration["status"], "completed", "{migration}");
        // Counted when a round begins.
        migration["ram"]["dirty-sync-count"].as_u64() >= Some(2)
    });
}

/// Waits until the migration `is_wanted`, and returns its state.
fn wait_for_migration(monitor: &mut Monitor, is_wanted: impl Fn(&Value) -> bool) -> Value {
    let mut migration = Value::Null;
    let came = wait_until(HANG_LIMIT, || {
        migration = monitor.execute("query-migrate", json!({}));
        is_wanted(&migration)
    });
    assert!(came, "{migration}");
    migration
}

/// Asserts that each place has the last text that was written to it.
fn expect_all_writes(image: &Path, writes: u64) {
    let image = fs::File::open(image).expect("opening an image");
    for number in writes.saturating_sub(PLACES - 1).max(1)..=writes {
        let mut expected: Vec<u8> = (number..number + TEXT_BYTES)
            .flat_map(|number| format!("{number}\n").into_bytes())
            .collect();
        expected.truncate(usize::try_from(TEXT_BYTES).expect("a small number"));
        let mut text = vec![0; expected.len()];
        image
            .read_exact_at(&mut text, number % PLACES * TEXT_BYTES)
            .expect("reading an image");
        assert!(text == expected, "write {number} of {writes} is lost");
    }
}
