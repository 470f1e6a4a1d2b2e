//! Unit tests: which images are opened and which are refused.

use super::alignment::{probed_alignment, reads_with_alignment};
use super::*;
use crate::common::message::Quoted;
use std::io;
use std::os::unix::fs::{FileExt as _, symlink};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::Mode;

const SIZE: u64 = 1 << 20;
const BUFFERED: OpenOptions = OpenOptions {
    read_only: false,
    direct: false,
    raw_anyway: false,
    block_bytes: 512,
};
const DIRECT: OpenOptions = OpenOptions {
    read_only: false,
    direct: true,
    raw_anyway: false,
    block_bytes: 512,
};
const READ_ONLY: OpenOptions = OpenOptions {
    read_only: true,
    direct: false,
    raw_anyway: false,
    block_bytes: 512,
};

struct Directory(tempfile::TempDir);

impl Directory {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn image(&self, name: &str, size_bytes: u64) -> ReplicaSource {
        File::create(self.path(name))
            .unwrap()
            .set_len(size_bytes)
            .unwrap();
        self.source(name)
    }

    fn source(&self, name: &str) -> ReplicaSource {
        ReplicaSource {
            path: self.path(name),
            node_name: name.to_owned(),
        }
    }
}

/// The error line for an image, which must name the image.
fn refusal(source: &ReplicaSource, options: OpenOptions) -> String {
    let line = open(&source.path, &source.node_name, options)
        .unwrap_err()
        .to_string();
    assert_line(&line, source);
    line
}

fn refusal_of_all(sources: &[ReplicaSource]) -> String {
    let line = open_all(sources, BUFFERED, Opening::Here, EmptyImages::Refused)
        .unwrap_err()
        .to_string();
    for source in sources {
        assert_line(&line, source);
    }
    line
}

fn assert_line(line: &str, source: &ReplicaSource) {
    assert!(
        !line.contains(char::is_control) && !line.contains("os error"),
        "{line}"
    );
    assert!(line.contains(&Quoted(&source.path).to_string()), "{line}");
}

#[test]
fn opens_a_file_and_reports_its_properties() {
    let directory = Directory::new();
    let source = directory.image("1.raw", SIZE);
    let replica = open(&source.path, "one", BUFFERED).unwrap();
    assert_eq!((&*replica.node_name(), replica.size_bytes), ("one", SIZE));
    assert!(!replica.is_direct && !replica.is_block_device);
}

#[test]
fn every_image_can_be_accessed_by_the_sector() {
    let directory = Directory::new();
    for (name, content) in [("hole", None), ("data", Some(vec![7; 8192]))] {
        let source = directory.image(name, SIZE);
        if let Some(content) = content {
            File::options()
                .write(true)
                .open(&source.path)
                .unwrap()
                .write_all_at(&content, 0)
                .unwrap();
        }
        let replica = match open(&source.path, name, DIRECT) {
            Ok(replica) => replica,
            // The file system of the temporary directory may have no direct I/O.
            Err(OpenError::NoDirectIo { .. }) => continue,
            Err(error) => panic!("{error}"),
        };
        // Whether or not direct I/O accepts a sector, the replica does.
        assert!(reads_with_alignment(&replica.file, 512, 512));
        let probed = probed_alignment(&replica.file, SIZE);
        assert!(
            (512..=4096).contains(&probed) && probed.is_power_of_two(),
            "{probed}"
        );
        assert!(reads_with_alignment(&replica.file, 0, probed));
    }
}

#[test]
fn probing_relies_on_a_read_of_data_not_of_a_hole() {
    // Without O_DIRECT every read succeeds, as on a file system that does not check alignments.
    let directory = Directory::new();
    let hole = directory.image("hole", SIZE);
    let file = File::open(&hole.path).unwrap();
    assert_eq!(probed_alignment(&file, SIZE), 4096);
    assert_eq!(probed_alignment(&file, SIZE + 512), 512);
    std::fs::write(directory.path("data"), vec![1; 8192]).unwrap();
    let file = File::open(directory.path("data")).unwrap();
    assert_eq!(probed_alignment(&file, 8192), 512);
}

#[test]
fn refuses_what_is_not_an_image() {
    let directory = Directory::new();
    let line = refusal(&directory.source("missing"), BUFFERED);
    assert!(
        line.contains("No such file or directory; if the disk has data, start without it"),
        "{line}"
    );

    std::fs::create_dir(directory.path("dir")).unwrap();
    assert!(refusal(&directory.source("dir"), BUFFERED).contains("is a directory;"));
    let device = ReplicaSource {
        path: "/dev/null".into(),
        node_name: "null".into(),
    };
    assert!(refusal(&device, BUFFERED).contains("is a character device;"));
    let _listener = std::os::unix::net::UnixListener::bind(directory.path("socket")).unwrap();
    assert!(refusal(&directory.source("socket"), BUFFERED).contains("is a socket;"));
    // Not by mkfifo(1): between fork and exec a child process would keep the locks of other tests.
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        directory.path("fifo"),
        Mode::RUSR | Mode::WUSR,
    )
    .unwrap();
    assert!(refusal(&directory.source("fifo"), READ_ONLY).contains("is a FIFO;"));
}

#[test]
fn refuses_sizes_that_no_disk_has() {
    let directory = Directory::new();
    assert!(refusal(&directory.image("empty", 0), BUFFERED).contains("is empty;"));
    let line = refusal(&directory.image("odd", 1000), BUFFERED);
    assert!(
        line.contains("1000 bytes: it is not a multiple of 512 (the size of a sector)"),
        "{line}"
    );
    assert!(
        line.ends_with("add a new image (quorum-blkctl add --create)"),
        "{line}"
    );
    let line = OpenError::Misaligned {
        path: "/x".into(),
        disk_bytes: 512,
        block_bytes: 4096,
    }
    .to_string();
    assert!(
        line.contains("the block size; use --block-size 512 unless"),
        "{line}"
    );
}

#[test]
fn an_error_is_one_line_even_if_the_path_has_two() {
    let directory = Directory::new();
    let line = refusal(&directory.source("two\nlines"), BUFFERED);
    assert!(line.contains("two\\nlines"), "{line}");
}

#[test]
fn refuses_an_image_in_use_but_lets_readers_share_it() {
    let directory = Directory::new();
    let source = directory.image("1.raw", SIZE);
    let first = open(&source.path, "1.raw", BUFFERED).unwrap();
    assert!(refusal(&source, BUFFERED).contains("in use by another process"));
    assert!(refusal(&source, READ_ONLY).contains("in use by another process"));
    drop(first);
    let _readers =
        [READ_ONLY, READ_ONLY].map(|options| open(&source.path, "1.raw", options).unwrap());
    assert!(refusal(&source, BUFFERED).ends_with("; stop that process first"));
}

#[test]
fn the_stamp_is_that_of_an_image_that_no_other_process_changes_any_more() {
    let directory = Directory::new();
    let source = directory.image("1.raw", SIZE);
    let first = open(&source.path, "1.raw", BUFFERED).unwrap();
    let before = first.stamp.unwrap();
    assert_eq!(before.bytes, SIZE);
    std::thread::scope(|scope| {
        // It waits for the lock, and has looked at the image before.
        let second = scope.spawn(|| open(&source.path, "1.raw", BUFFERED).unwrap());
        let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_nanos(1_000_007);
        first.file.set_modified(time).unwrap();
        let last = ImageStamp::synced(&first.file).unwrap();
        assert_ne!(last, Some(before));
        assert_eq!(last.unwrap().modified_ns, 1_000_007);
        drop(first);
        assert_eq!(second.join().unwrap().stamp, last);
    });
}

#[test]
fn refuses_an_image_that_is_not_raw() {
    let directory = Directory::new();
    let source = directory.image("disk.qcow2", SIZE);
    let file = File::options().write(true).open(&source.path).unwrap();
    file.write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
    let line = refusal(&source, BUFFERED);
    assert!(
        line.contains("is a qcow2 image") && line.contains(" NEW.raw;"),
        "{line}"
    );
    let raw_anyway = OpenOptions {
        raw_anyway: true,
        ..BUFFERED
    };
    open(&source.path, "1", raw_anyway).unwrap();
    file.write_all_at(b"LUKS\xba\xbe", 0).unwrap();
    assert!(refusal(&source, BUFFERED).contains("if the guest has encrypted this disk"));
}

#[test]
fn opens_all_in_order() {
    let directory = Directory::new();
    let sources = ["b", "a", "c"].map(|name| directory.image(name, SIZE));
    let replicas = open_all(&sources, BUFFERED, Opening::Here, EmptyImages::Refused).unwrap();
    let names: Vec<_> = replicas.iter().map(ReplicaFile::node_name).collect();
    assert_eq!(names, ["b", "a", "c"].map(Into::into));
}

#[test]
fn refuses_one_image_under_two_names() {
    let directory = Directory::new();
    let source = directory.image("1.raw", SIZE);
    symlink(&source.path, directory.path("symlink")).unwrap();
    std::fs::hard_link(&source.path, directory.path("hardlink")).unwrap();
    for name in ["1.raw", "symlink", "hardlink"] {
        let line = refusal_of_all(&[source.clone(), directory.source(name)]);
        assert!(line.contains("are the same image"), "{line}");
    }
    // Nothing stays locked after a refusal.
    open(&source.path, "1.raw", BUFFERED).unwrap();
}

#[test]
fn refuses_replicas_of_different_sizes() {
    let directory = Directory::new();
    let line = refusal_of_all(&[
        directory.image("1.raw", SIZE),
        directory.image("2.raw", SIZE + 512),
    ]);
    assert!(
        line.contains("1048576 bytes") && line.contains("1049088"),
        "{line}"
    );
}

#[test]
fn accepts_an_image_that_is_larger_than_the_disk() {
    let directory = Directory::new();
    let sizes = [("1.raw", SIZE), ("2.raw", SIZE + 5000), ("3.raw", SIZE)];
    let sources = sizes.map(|(name, bytes)| directory.image(name, bytes));
    let replicas = open_all(&sources, BUFFERED, Opening::Here, EmptyImages::Refused).unwrap();
    assert_eq!(
        disk_size(&replicas.iter().collect::<Vec<_>>()).unwrap(),
        SIZE
    );
    let beside = |size_bytes| {
        let source = directory.image("4.raw", SIZE + 100);
        let opening = (BUFFERED, Opening::Here);
        let file = open_beside(&[], &source, opening, size_bytes, Overwrite::Never, None);
        file.map(|_| ()).map_err(|error| error.to_string())
    };
    beside(SIZE).unwrap();
    assert!(beside(2 * SIZE).unwrap_err().contains("less than the disk"));
}

#[test]
fn refuses_to_overwrite_data() {
    let directory = Directory::new();
    let source = directory.image("new.raw", SIZE);
    let file = File::options().write(true).open(&source.path).unwrap();
    let beside = |overwrite| {
        let file = open_beside(
            &[],
            &source,
            (BUFFERED, Opening::Here),
            SIZE,
            overwrite,
            None,
        );
        file.map(|_| ()).map_err(|error| error.to_string())
    };
    beside(Overwrite::Never).unwrap();
    file.write_all_at(b"x", SIZE - 1).unwrap();
    let line = beside(Overwrite::Never).unwrap_err();
    assert_line(&line, &source);
    assert!(
        line.contains("holds data") && line.contains("--force"),
        "{line}"
    );
    beside(Overwrite::Allowed).unwrap();
}

#[test]
fn refuses_one_name_for_two_images() {
    let directory = Directory::new();
    let mut sources = [
        directory.image("1.raw", SIZE),
        directory.image("2.raw", SIZE),
    ];
    sources[1].node_name = "1.raw".to_owned();
    assert!(refusal_of_all(&sources).contains("the same node-name '1.raw'"));
}

#[test]
fn hints_fit_the_error() {
    let error = |errno, read_only| {
        let source = io::Error::from_raw_os_error(errno);
        OpenError::Open {
            path: "/x".into(),
            read_only,
            source,
        }
        .to_string()
    };
    assert!(error(libc::EROFS, false).ends_with("or use --read-only"));
    assert!(error(libc::EACCES, true).ends_with("make it readable for this user"));
    assert_eq!(
        error(libc::EIO, true),
        "cannot open '/x': Input/output error"
    );
    let line = OpenError::NoDirectIo { path: "/x".into() }.to_string();
    assert!(
        line.contains("does not support O_DIRECT; use --cache writeback"),
        "{line}"
    );
}

/// Which images hold data; whether they are served as one disk.
fn served(directory: &Directory, holding: &[(&str, u64)], empty: EmptyImages) -> bool {
    let sources = holding.iter().map(|(name, at)| {
        let source = directory.image(name, SIZE);
        let file = File::options().write(true).open(&source.path).unwrap();
        if *at < SIZE {
            file.write_all_at(&[7], *at).unwrap();
        }
        source
    });
    let sources: Vec<_> = sources.collect();
    match open_all(&sources, BUFFERED, Opening::Here, empty) {
        Ok(_) => true,
        Err(error) => {
            let line = error.to_string();
            for source in &sources {
                assert_line(&line, source);
            }
            assert!(matches!(error, OpenError::EmptyBesideData { .. }), "{line}");
            assert!(line.contains("quorum-blkctl add"), "{line}");
            false
        }
    }
}

#[test]
fn empty_images_beside_others_that_hold_data_are_refused() {
    let last = SIZE - 1;
    for (holding, is_served) in [
        (&[("a", 0)][..], true),
        (&[("a", SIZE), ("b", SIZE), ("c", SIZE)], true),
        // Different data in different places: the vote is for that.
        (&[("a", 0), ("b", 4096), ("c", last)], true),
        (&[("a", 0), ("b", SIZE), ("c", SIZE)], false),
        (&[("a", SIZE), ("b", SIZE), ("c", last)], false),
        (&[("a", 0), ("b", SIZE), ("c", 0)], false),
        (&[("a", SIZE), ("b", last)], false),
    ] {
        let served = |empty| served(&Directory::new(), holding, empty);
        assert_eq!(served(EmptyImages::Refused), is_served, "{holding:?}");
        assert!(served(EmptyImages::Accepted), "{holding:?}");
    }
}

/// What lies behind the end of the disk does not count.
#[test]
fn data_behind_the_end_of_the_disk_is_none() {
    let directory = Directory::new();
    let sources = [
        directory.image("a", SIZE),
        directory.image("b", SIZE),
        directory.image("c", 2 * SIZE),
    ];
    let file = File::options().write(true).open(&sources[2].path).unwrap();
    file.write_all_at(&[7], SIZE).unwrap();
    open_all(&sources, BUFFERED, Opening::Here, EmptyImages::Refused).unwrap();
}

/// For each image whether it is open, without those that cannot be opened.
fn without_unopenable(sources: &[ReplicaSource]) -> Result<Vec<bool>, OpenError> {
    let (empty, unopenable) = (EmptyImages::Refused, Unopenable::LeftOut);
    let opened = open_all_with_records(sources, BUFFERED, Opening::Here, empty, unopenable)?;
    for (image, source) in opened.iter().zip(sources) {
        if let Err(error) = image {
            assert_line(&error.to_string(), source);
        }
    }
    Ok(opened.iter().map(Result::is_ok).collect())
}

#[test]
fn an_image_that_cannot_be_opened_is_left_out() {
    let directory = Directory::new();
    let (a, b) = (directory.image("a", SIZE), directory.image("b", SIZE));
    std::fs::create_dir(directory.path("directory")).unwrap();
    let qcow = directory.image("qcow", SIZE);
    std::fs::write(
        &qcow.path,
        [b"QFI\xfb\0\0\0\x03".as_slice(), &[0; 504]].concat(),
    )
    .unwrap();
    File::options()
        .write(true)
        .open(&qcow.path)
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    let held = directory.image("held", SIZE);
    let _held = open(&held.path, "held", BUFFERED).unwrap();
    let others = [
        directory.source("missing"),
        directory.source("directory"),
        qcow,
        held,
    ];
    for other in others {
        let sources = [a.clone(), other.clone(), b.clone()];
        assert!(open_all(&sources, BUFFERED, Opening::Here, EmptyImages::Refused).is_err());
        let opened = without_unopenable(&sources).unwrap();
        assert_eq!(opened, [true, false, true], "{}", other.node_name);
    }
}

#[test]
fn what_concerns_several_images_is_an_error_of_all() {
    let directory = Directory::new();
    let (a, b) = (directory.image("a", SIZE), directory.image("b", SIZE));
    let (missing, gone) = (directory.source("missing"), directory.source("gone"));
    let line = |sources: &[&ReplicaSource]| {
        let sources: Vec<_> = sources.iter().copied().cloned().collect();
        without_unopenable(&sources).unwrap_err().to_string()
    };
    assert_eq!(
        without_unopenable(&[a.clone(), gone.clone(), b.clone()])
            .unwrap()
            .len(),
        3
    );
    let named = |path: &ReplicaSource, name: &ReplicaSource| ReplicaSource {
        path: path.path.clone(),
        node_name: name.node_name.clone(),
    };
    // None is left.
    assert!(line(&[&missing, &gone]).contains("/missing'"));
    assert!(line(&[&a, &named(&a, &b), &missing]).contains("are the same image"));
    for sources in [
        [&a, &missing, &named(&missing, &b)],
        [&missing, &a, &named(&missing, &b)],
    ] {
        assert!(line(&sources).contains("are the same image"));
    }
    for sources in [
        [&a, &missing, &named(&gone, &a)],
        [&named(&gone, &b), &a, &b],
        [&b, &missing, &named(&gone, &missing)],
    ] {
        assert!(line(&sources).contains("the same node-name"));
    }
    let short = directory.image("short", SIZE / 2);
    assert!(line(&[&a, &short, &missing]).contains("differ in size"));
}

/// Whether the first bytes of the file are in the page cache.
fn is_cached(file: &File) -> bool {
    let mut bytes = [0; 512];
    let mut into = [io::IoSliceMut::new(&mut bytes)];
    let flags = rustix::io::ReadWriteFlags::NOWAIT;
    rustix::io::preadv2(file, &mut into, 0, flags).is_ok()
}

#[test]
fn what_the_page_cache_has_of_an_image_is_not_believed_when_it_is_opened() {
    let directory = Directory::new();
    let source = directory.image("a", SIZE);
    let file = File::options()
        .read(true)
        .write(true)
        .open(&source.path)
        .unwrap();
    let write = || {
        file.write_all_at(&[1; 4096], 0).unwrap();
        file.sync_all().unwrap();
    };
    write();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    if is_cached(&file) {
        eprintln!("skipped: the file system has nothing but its cache");
        return;
    }
    // The kernel may need the memory at any time.
    assert!((0..100).any(|_| {
        write();
        is_cached(&file)
    }));
    let _opened = open(&source.path, "a", BUFFERED).unwrap();
    // On a busy host the opening does not wait for the thread that forgets (FORGET_LIMIT).
    let begin = Instant::now();
    while is_cached(&file) {
        assert!(begin.elapsed() < Duration::from_secs(60), "still cached");
        thread::sleep(Duration::from_millis(10));
    }
}
