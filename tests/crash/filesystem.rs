//! A file system of the host on the voted disk, with programs that sync what they write.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::thread;

use testkit::fuse::logged::Clock;
use testkit::fuse::voted::VotedFile;
use testkit::images::Random;
use testkit::mounts::Mounted;
use testkit::process::{run, text};
use testkit::size;

use crate::files::{self, FileHistory, PAGE, Promises, SCRIPT, entry, page};
use crate::judge::scratch;

/// Pages of the file that is written in place.
const PAGES: usize = 16;
/// Transactions of each database.
const TRANSACTIONS: u64 = 12;

/// The bytes of a disk with a new file system of this kind.
pub(crate) fn make(kind: &str) -> Vec<u8> {
    let directory = scratch();
    let path = directory.path().join("disk");
    let file = File::create(&path).expect("creating a file");
    // As small as they can be: the larger the disk, the fewer states are tried.
    let megabytes = if kind == "xfs" { 32 } else { 8 };
    file.set_len(megabytes << 20).expect("sizing a file");
    match kind {
        "xfs" => run("mkfs.xfs", &["-q", "--unsupported", text(&path)]),
        _ => run("mkfs.ext4", &["-q", "-J", "size=1", text(&path)]),
    }
    fs::read(path).expect("reading a file")
}

/// Mounts the disk that a daemon serves, and does nothing but that: what a journal holds is
/// written to its place.
pub(crate) fn replay(socket: &Path, kind: &str) {
    let disk = VotedFile::mount(socket);
    drop(Mounted::mount(&disk.path(), kind).expect("mounting a file system"));
}

/// Has programs work on the disk that a daemon serves, for so many steps. `between` is called
/// before each of them, with its number.
pub(crate) fn work(
    socket: &Path,
    clock: &Clock,
    kind: &str,
    steps: u64,
    random: &mut Random,
    between: &mut dyn FnMut(u64) -> u64,
) -> FileHistory {
    let disk = VotedFile::mount(socket);
    let options = match random.within(0..2) {
        0 => "noatime",
        _ => "noatime,discard",
    };
    let mounted = Mounted::mount_with(&disk.path(), kind, options);
    let mounted = mounted.expect("mounting a file system");
    let history = Mutex::new(FileHistory::default());
    let mut programs = Programs {
        root: mounted.path(),
        clock,
        history: &history,
        random,
        counts: [0; 3],
        pages: [0; PAGES],
        mapped: [0; PAGES],
        mails: Vec::new(),
    };
    thread::scope(|scope| {
        let databases = [("delete.db", "delete"), ("wal.db", "wal")];
        let databases = databases.map(|(name, mode)| {
            let child = start_database(&mounted.path().join(name), mode);
            scope.spawn(|| follow_database(child, name, clock, &history))
        });
        programs.work(steps, between);
        for database in databases {
            database.join().expect("a database failed");
        }
    });
    drop(mounted);
    history.into_inner().expect("a program failed")
}

/// Checks the file system in an image, and what its files hold.
pub(crate) fn check(image: &Path, kind: &str, promises: &Promises) -> Vec<String> {
    let directory = scratch();
    let copy = directory.path().join("disk");
    fs::copy(image, &copy).expect("copying an image");
    let mounted = match Mounted::mount(&copy, kind) {
        Ok(mounted) => mounted,
        Err(message) => return vec![format!("it cannot be mounted: {message}")],
    };
    let mut problems = files::check(mounted.path(), promises);
    drop(mounted);
    let (program, options): (_, &[&str]) = match kind {
        "xfs" => ("xfs_repair", &["-n"]),
        _ => ("e2fsck", &["-f", "-n"]),
    };
    let output = Command::new(program).args(options).arg(&copy).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    if !output.status.success() {
        let [stdout, stderr] = [output.stdout, output.stderr]
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        problems.push(format!("{program}: {stdout}{stderr}"));
    }
    problems
}

fn start_database(path: &Path, mode: &str) -> Child {
    let mut command = Command::new("python3");
    command.arg(SCRIPT).arg("work").arg(path).arg(mode);
    command.arg(TRANSACTIONS.to_string()).stdout(Stdio::piped());
    command.spawn().expect("running python3")
}

/// Notes what the database says is durable, until it ends.
fn follow_database(mut child: Child, name: &str, clock: &Clock, history: &Mutex<FileHistory>) {
    let name = format!("database {name}");
    let lock = || history.lock().expect("a program failed");
    lock().begun(0, &name, TRANSACTIONS);
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    for line in lines.map_while(Result::ok) {
        if let Some(number) = line.strip_prefix("durable ") {
            let number = number.parse().expect("a number");
            lock().durable(clock.tick(), &name, number);
        }
    }
    let status = child.wait().expect("waiting for python3");
    assert!(status.success(), "the database ended with {status}");
}

/// Programs that sync what they write.
struct Programs<'a> {
    root: &'a Path,
    clock: &'a Clock,
    history: &'a Mutex<FileHistory>,
    random: &'a mut Random,
    /// Of log entries, configurations and messages so far.
    counts: [u64; 3],
    /// Versions of the pages.
    pages: [u64; PAGES],
    /// Versions of the pages that are written through memory.
    mapped: [u64; PAGES],
    /// Messages that were delivered and not removed.
    mails: Vec<u64>,
}

/// For direct I/O.
#[repr(align(4096))]
struct Aligned([u8; PAGE]);

impl Programs<'_> {
    fn work(&mut self, steps: u64, between: &mut dyn FnMut(u64) -> u64) {
        let first: Vec<u8> = (0..PAGES).flat_map(|place| page(place as u64, 0)).collect();
        self.put("pages", &first);
        self.put("mapped", &first);
        fs::create_dir(self.root.join("mail")).expect("creating a directory");
        sync_directory(self.root);
        for place in 0..PAGES {
            self.durable(&format!("page {place}"), 0);
            self.durable(&format!("mapped {place}"), 0);
        }
        for step in 0..steps {
            between(step);
            match self.random.within(0..13) {
                0..2 => self.append(),
                2..4 => self.configure(),
                4..6 => self.deliver(),
                6..8 => self.remove_mail(),
                8..10 => self.write_mapped(),
                10 => run("fstrim", &[text(self.root)]),
                _ => self.write_page(),
            }
        }
    }

    fn history(&self) -> MutexGuard<'_, FileHistory> {
        self.history.lock().expect("a program failed")
    }

    fn begun(&self, name: &str, number: u64) {
        let now = self.clock.tick();
        self.history().begun(now, name, number);
    }

    fn durable(&self, name: &str, number: u64) {
        let now = self.clock.tick();
        self.history().durable(now, name, number);
    }

    fn count(&mut self, which: usize) -> u64 {
        self.counts[which] += 1;
        self.counts[which]
    }

    /// Writes a file and syncs it.
    fn put(&self, name: &str, content: &[u8]) {
        let mut file = File::create(self.root.join(name)).expect("creating a file");
        file.write_all(content).expect("writing a file");
        file.sync_all().expect("syncing a file");
    }

    fn append(&mut self) {
        let number = self.count(0);
        self.begun("log", number);
        let path = self.root.join("log");
        let opened = OpenOptions::new().create(true).append(true).open(path);
        let mut file = opened.expect("opening a log");
        file.write_all(&entry("log", number))
            .expect("writing a log");
        let synced = match number % 2 {
            0 => file.sync_data(),
            _ => file.sync_all(),
        };
        synced.expect("syncing a log");
        if number == 1 {
            sync_directory(self.root);
        }
        self.durable("log", number);
    }

    /// A new version takes the name of the old one when it is complete.
    fn configure(&mut self) {
        let number = self.count(1);
        self.begun("config", number);
        self.put("config.new", &entry("config", number));
        let [new, old] = ["config.new", "config"].map(|name| self.root.join(name));
        fs::rename(new, old).expect("renaming a file");
        sync_directory(self.root);
        self.durable("config", number);
    }

    fn deliver(&mut self) {
        let number = self.count(2);
        self.begun(&format!("mail {number}"), 1);
        self.put(&format!("mail/{number}"), &entry("mail", number));
        sync_directory(&self.root.join("mail"));
        self.durable(&format!("mail {number}"), 1);
        self.mails.push(number);
    }

    fn remove_mail(&mut self) {
        let Some(number) = self.mails.pop() else {
            return;
        };
        let directory = self.root.join("mail");
        self.begun(&format!("mail {number}"), 2);
        fs::remove_file(directory.join(number.to_string())).expect("removing a file");
        sync_directory(&directory);
        self.durable(&format!("mail {number}"), 2);
    }

    /// As a program does that maps its file into memory.
    fn write_mapped(&mut self) {
        let mut pages = BTreeMap::new();
        for _ in 0..self.random.within(1..5) {
            let place = self.random.within(0..PAGES as u64);
            let version = &mut self.mapped[size(place)];
            *version += 1;
            pages.insert(place, *version);
        }
        for (place, version) in &pages {
            self.begun(&format!("mapped {place}"), *version);
        }
        let mut options = OpenOptions::new();
        let opened = options
            .read(true)
            .write(true)
            .open(self.root.join("mapped"));
        let contents = pages.iter();
        let contents = contents.map(|(place, version)| (size(*place), page(*place, *version)));
        let contents: Vec<(usize, Vec<u8>)> = contents.collect();
        write_through_memory(&opened.expect("opening pages"), &contents).expect("writing pages");
        for (place, version) in &pages {
            self.durable(&format!("mapped {place}"), *version);
        }
    }

    /// As a database does that writes in place.
    fn write_page(&mut self) {
        let place = self.random.within(0..PAGES as u64);
        let version = &mut self.pages[size(place)];
        *version += 1;
        let (name, version) = (format!("page {place}"), *version);
        let mut bytes = Aligned([0; PAGE]);
        bytes.0.copy_from_slice(&page(place, version));
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_DIRECT);
        let file = options
            .open(self.root.join("pages"))
            .expect("opening pages");
        self.begun(&name, version);
        file.write_all_at(&bytes.0, place * PAGE as u64)
            .expect("writing a page");
        file.sync_data().expect("syncing pages");
        self.durable(&name, version);
    }
}

/// Writes pages of a file through memory that is mapped, and syncs all of it.
fn write_through_memory(file: &File, pages: &[(usize, Vec<u8>)]) -> io::Result<()> {
    const BYTES: usize = PAGES * PAGE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let fd = file.as_raw_fd();
    let hint = std::ptr::null_mut();
    // SAFETY: the file is open and as long; the kernel chooses where it is mapped.
    let start = unsafe { libc::mmap(hint, BYTES, access, libc::MAP_SHARED, fd, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    for (place, page) in pages {
        assert!(*place < PAGES && page.len() == PAGE, "a page of the file");
        let target = start.cast::<u8>().wrapping_add(place * PAGE);
        // SAFETY: the page is within the memory that is mapped, and nothing else refers to that.
        unsafe { std::ptr::copy_nonoverlapping(page.as_ptr(), target, PAGE) };
    }
    // SAFETY: this memory is mapped.
    let synced = unsafe { libc::msync(start, BYTES, libc::MS_SYNC) };
    let synced = if synced == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    };
    // SAFETY: this memory is mapped, and nothing refers to it any more.
    unsafe { libc::munmap(start, BYTES) };
    synced
}

fn sync_directory(path: &Path) {
    let directory = File::open(path).expect("opening a directory");
    directory.sync_all().expect("syncing a directory");
}
