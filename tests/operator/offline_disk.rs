//! A disk that is not served, with records as the daemon makes them, and quorum-blkctl on it.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use quorum_blk::common::SectorRange;
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::record::format::pages;
use quorum_blk::record::{Creation, Extents, Fingerprint, Layout, Record, Stale, Threshold};
use quorum_blk::replica::file::{
    EmptyImages, ImageStamp, OpenOptions, Opening, ReplicaSource, Unopenable, open_all_with_records,
};
use quorum_blk::replica::record_file::StateDirectory;
use testkit::images::create_images;
use uuid::Uuid;

pub(crate) const SIZE_BYTES: u64 = 64 << 20;

/// The images 0.raw and so on of a disk, with records.
pub(crate) struct Disk {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) images: Vec<PathBuf>,
    pub(crate) record: Record,
    pub(crate) intent: Extents,
}

impl Disk {
    pub(crate) fn new() -> Self {
        Self::of(SIZE_BYTES)
    }

    /// A disk of this size.
    pub(crate) fn of(size_bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), 3, size_bytes);
        let id = |number: usize| Uuid::from_u128(number as u128 + 1);
        let mut record = Record::create(&Creation {
            disk: id(0xd),
            branch: id(0xb),
            run: id(0x50),
            layout: Layout::new(size_bytes / 512),
            threshold: Threshold::majority(3),
            members: (0..3)
                .map(|place| (id(place), format!("{place}.raw")))
                .collect(),
        });
        record.agree();
        Self {
            directory,
            images,
            intent: Extents::new(record.layout()),
            record,
        }
    }

    /// The content of the record of a replica.
    pub(crate) fn content(&self, place: usize) -> Vec<u8> {
        let id = self.record.members[place].id;
        let mut record = self.record.for_replica(id, 2);
        if record.clean {
            let image = File::open(&self.images[place]).unwrap();
            let stamp = ImageStamp::synced(&image).unwrap().unwrap();
            record.image = Some(Fingerprint {
                bytes: stamp.bytes,
                modified_ns: stamp.modified_ns,
            });
        }
        let layout = record.layout();
        let mut file = vec![0; usize::try_from(layout.file_bytes()).unwrap()];
        let mut put = |offset: u64, bytes: &[u8]| {
            let offset = usize::try_from(offset).unwrap();
            file[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        let slot = record.slot();
        put(slot.offset, &slot.bytes);
        let pages = pages(record.disk, id, &self.intent, 0..layout.pages());
        put(Layout::page_offset(0), &pages);
        file
    }

    /// Makes the records of these replicas, as the daemon does.
    pub(crate) fn keep(&self, places: &[usize], state: &StateDirectory) {
        let sources = places.iter().map(|place| ReplicaSource {
            path: self.images[*place].clone(),
            node_name: format!("{place}.raw"),
        });
        let options = OpenOptions {
            read_only: false,
            direct: false,
            raw_anyway: true,
            block_bytes: 512,
        };
        let opened = open_all_with_records(
            &sources.collect::<Vec<_>>(),
            options,
            Opening::Here,
            EmptyImages::Accepted,
            Unopenable::Refused,
        );
        for (opened, place) in opened.unwrap().into_iter().zip(places) {
            let (_image, mut access) = opened.unwrap();
            access.make(state, &self.content(*place)).unwrap();
        }
    }

    /// The third replica is evicted, and something has changed since. The second one has missed a
    /// write, and may have lost another one.
    pub(crate) fn disturb(&mut self) {
        let of = |start, count| {
            let mut ranges = RangeSet::default();
            ranges.insert(SectorRange::new(start, count));
            ranges
        };
        let layout = self.record.layout();
        self.record.propose();
        self.record.deactivate(self.record.members[2].id, None);
        self.record.agree();
        self.record.members[1].stale = Stale::of(&of(4096, 8), layout);
        self.record.members[1].doubtful = Stale::of(&of(8192, 1), layout);
        self.intent.insert(SectorRange::new(0, 4096));
    }

    pub(crate) fn run(&self, command: &str, arguments: &[impl AsRef<OsStr>]) -> Output {
        run(self.directory.path(), command, arguments)
    }
}

/// Runs a command that needs no daemon.
pub(crate) fn run(directory: &Path, command: &str, arguments: &[impl AsRef<OsStr>]) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_quorum-blkctl"));
    program.env_clear().current_dir(directory);
    program.arg(command).args(arguments).output().unwrap()
}

/// Records are beside their images.
pub(crate) fn usual() -> StateDirectory {
    StateDirectory::usual(Some(OsStr::new("/nowhere/quorum-blk")))
}
