//! Guest memory as the frontend has it: files, parts of which are shared with the device, and their
//! known content. Any byte that the device changes is found.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::super::naive::{Memory, Run};

/// Lengths of the files.
pub const FILE_BYTES: [u64; 3] = [0x4000, 0x2000, 0x2000];

/// Bytes of guest memory for each bit of the log.
pub const LOG_PAGE_BYTES: u64 = 0x1000;

/// An anonymous file that can be shared.
pub fn memory_file(bytes: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("quorum-blk-fuzz", flags).expect("a memory file");
    ftruncate(&file, bytes).expect("a length for it");
    File::from(file)
}

/// A part of a file that is guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its address for the guest.
    pub guest_address: u64,
    /// Its address for the frontend.
    pub user_address: u64,
    /// Its length.
    pub bytes: u64,
    /// The index of the file.
    pub file: usize,
    /// Its offset in the file.
    pub offset: u64,
}

/// The files, their known content, and the shared parts.
pub struct Files {
    /// The files themselves.
    pub files: Vec<File>,
    /// The mappings of the files on this side.
    mappings: Vec<MmapRegion<()>>,
    /// The content at the last call of [`Self::changes`], with the writes of the driver since.
    known: Vec<Vec<u8>>,
    /// A buffer as large as the largest file.
    scratch: Vec<u8>,
    /// The parts that are shared with the device.
    pub table: Vec<Mapping>,
    /// The dirty log, while writes are logged.
    pub log: Option<File>,
}

/// A byte: the index of its file, and its offset.
pub type Place = (usize, usize);

/// A set of bytes of the files.
pub struct Marks(Vec<Vec<bool>>);

impl Marks {
    /// The empty set.
    pub fn none() -> Self {
        let files = FILE_BYTES.iter();
        Self(files.map(|&bytes| vec![false; to_usize(bytes)]).collect())
    }

    /// Marks the bytes of a run of guest memory, as far as it is shared.
    pub fn add(&mut self, files: &Files, run: Run) {
        for (file, range) in files.ranges(run) {
            self.0[file][range].fill(true);
        }
    }

    /// Whether a byte is marked.
    pub fn contains(&self, (file, offset): Place) -> bool {
        self.0[file][offset]
    }

    /// Whether any byte of a run is marked.
    pub fn overlaps(&self, files: &Files, run: Run) -> bool {
        files
            .ranges(run)
            .any(|(file, range)| self.0[file][range].contains(&true))
    }
}

impl Files {
    /// Files of zeroes, not shared.
    pub fn new() -> Self {
        let files: Vec<File> = FILE_BYTES.map(memory_file).into();
        let map = |(file, &bytes): (&File, &u64)| {
            let file = file.try_clone().expect("a descriptor");
            MmapRegion::from_file(FileOffset::new(file, 0), to_usize(bytes)).expect("room for it")
        };
        Self {
            mappings: files.iter().zip(&FILE_BYTES).map(map).collect(),
            files,
            known: FILE_BYTES
                .iter()
                .map(|&bytes| vec![0; to_usize(bytes)])
                .collect(),
            scratch: vec![
                0;
                FILE_BYTES
                    .iter()
                    .map(|&bytes| to_usize(bytes))
                    .max()
                    .unwrap_or(0)
            ],
            table: Vec::new(),
            log: None,
        }
    }

    /// The frontend's address for an address of the guest.
    pub fn user_address(&self, guest_address: u64) -> Option<u64> {
        let found = |mapping: &Mapping| {
            let offset = guest_address.checked_sub(mapping.guest_address)?;
            (offset < mapping.bytes).then(|| mapping.user_address + offset)
        };
        self.table.iter().find_map(found)
    }

    fn place(&self, guest_address: u64) -> Option<Place> {
        let found = |mapping: &Mapping| {
            let offset = guest_address.checked_sub(mapping.guest_address)?;
            (offset < mapping.bytes).then(|| (mapping.file, to_usize(mapping.offset + offset)))
        };
        self.table.iter().find_map(found)
    }

    /// The parts of the files that a run of guest memory lies in.
    fn ranges(&self, run: Run) -> impl Iterator<Item = (usize, Range<usize>)> {
        let end = u128::from(run.address) + u128::from(run.bytes);
        self.table.iter().filter_map(move |mapping| {
            let first = mapping.guest_address;
            let from = run.address.max(first);
            let to = end.min(u128::from(first) + u128::from(mapping.bytes));
            let bytes = u64::try_from(to.checked_sub(u128::from(from))?).ok()?;
            let start = to_usize(mapping.offset + (from - first));
            (bytes > 0).then(|| (mapping.file, start..start + to_usize(bytes)))
        })
    }

    /// Whether a run lies in guest memory as a whole.
    pub fn is_memory(&self, run: Run) -> bool {
        let found: usize = self.ranges(run).map(|(_, range)| range.len()).sum();
        found as u64 == run.bytes
    }

    /// Writes as the driver. Bytes outside of guest memory are dropped.
    pub fn put(&mut self, guest_address: u64, bytes: &[u8]) {
        for (offset, byte) in (0..).zip(bytes) {
            let place = guest_address
                .checked_add(offset)
                .and_then(|address| self.place(address));
            if let Some((file, at)) = place {
                self.mappings[file]
                    .as_volatile_slice()
                    .subslice(at, 1)
                    .expect("within it")
                    .copy_from(&[*byte]);
                self.known[file][at] = *byte;
            }
        }
    }

    /// The bytes that have changed since the last call, other than by [`Self::put`].
    pub fn changes(&mut self) -> Vec<Place> {
        let mut changes = Vec::new();
        for (index, (mapping, known)) in self.mappings.iter().zip(&mut self.known).enumerate() {
            let now = &mut self.scratch[..known.len()];
            mapping.as_volatile_slice().copy_to(now);
            if now != known {
                let both = known.iter().zip(&*now).enumerate();
                changes.extend(
                    both.filter(|(_, (old, new))| old != new)
                        .map(|(at, _)| (index, at)),
                );
                known.copy_from_slice(now);
            }
        }
        changes
    }

    /// Whether a write to the byte is marked in the log, under any of its addresses.
    pub fn is_logged(&self, log: &File, (file, at): Place) -> bool {
        let aliases = self
            .table
            .iter()
            .filter(|mapping| mapping.file == file)
            .filter_map(|mapping| {
                let offset = (at as u64).checked_sub(mapping.offset)?;
                (offset < mapping.bytes).then(|| mapping.guest_address + offset)
            });
        aliases.map(|address| address / LOG_PAGE_BYTES).any(|page| {
            let mut bits = [0];
            log.read_exact_at(&mut bits, page / 8).is_ok() && bits[0] & 1 << (page % 8) != 0
        })
    }
}

impl Memory for Files {
    fn byte(&self, address: u64) -> Option<u8> {
        let (file, at) = self.place(address)?;
        Some(self.known[file][at])
    }
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).expect("of a small file")
}
