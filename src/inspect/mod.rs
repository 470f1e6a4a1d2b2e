//! What the records of images say, and what a start would make of them, without a daemon.
//!
//! Nothing is written or locked, so a daemon may have the images open. What is read then may be of
//! different moments.

#![forbid(unsafe_code)]

pub mod forget;
pub mod verify;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use crate::common::SECTOR_BYTES;
use crate::config::parse_blk_file;
use crate::record::format::{SlotFault, Unusable, read_by};
use crate::record::start::{
    Candidate, Decision, Found, Kept, Options, Refusal, Start, Why, decide,
};
use crate::record::{Extents, Fingerprint, Record, Stale};
pub use crate::replica::file::ReplicaSource;
use crate::replica::file::{ImageStamp, OfflineImage, OpenError, open_offline};
use crate::replica::record_file::StateDirectory;

/// The version of [`Inspection`] as JSON.
const VERSION: u32 = 1;

/// What was found.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Inspection {
    version: u32,
    /// The images in the order given.
    pub images: Vec<Image>,
    /// What would happen if exactly these were started now.
    pub start: Outcome,
}

/// An image.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Image {
    /// Its path.
    pub path: String,
    /// The name that its replica would have.
    pub node_name: String,
    /// Its size, unless it cannot be opened.
    pub size: Option<u64>,
    /// Another process has it open for writing.
    pub in_use: bool,
    /// Why it cannot be opened.
    pub error: Option<String>,
    /// Why its record cannot be used.
    pub unusable: Option<String>,
    /// Its record, if there is one that can be used.
    pub kept: Option<Box<KeptRecord>>,
}

/// A record.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct KeptRecord {
    /// Where it is.
    pub file: String,
    /// What it says.
    pub record: Record,
    /// Where replicas may differ after an unclean end, as sectors.
    pub marked: Stale,
    /// How many extents that is.
    pub marked_extents: u64,
    /// The size of an extent.
    pub extent_sectors: u64,
    /// The last table in it that was agreed upon.
    pub agreed_epoch: u64,
    /// Why a slot does not count.
    pub slots: [Option<SlotFault>; 2],
    /// Pages of the intent map that do not verify.
    pub unverified_pages: Vec<u32>,
}

/// What a start would be.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case", tag = "decision")]
pub enum Outcome {
    /// A new disk would be made.
    Create,
    /// The disk would be served.
    Serve(Box<Start>),
    /// It would be refused.
    Refuse {
        /// The line that would say why.
        reason: String,
    },
}

impl Outcome {
    /// Whether the disk would be served by all of its members, each of them fresh, and was ended
    /// cleanly; or would be a new one.
    pub fn is_good(&self) -> bool {
        match self {
            Self::Create => true,
            Self::Serve(start) => {
                let mut images = start.images.iter();
                let are_fresh = images.all(|image| image.why == Why::Fresh);
                start.was_clean && start.absent.is_empty() && are_fresh
            }
            Self::Refuse { .. } => false,
        }
    }
}

/// An image as an operator names it: `PATH[,node-name=NAME]`.
///
/// # Errors
/// Why it is none.
pub fn parse_image(value: &OsStr) -> Result<ReplicaSource, String> {
    parse_blk_file(value)
}

/// Looks at images. `state_directory` is that of `--state-dir`.
pub fn inspect(images: &[ReplicaSource], state_directory: Option<PathBuf>) -> Inspection {
    let state = self::state_directory(state_directory);
    let looked = images.iter().map(|source| {
        let opened = open_offline(&source.path);
        look_at(source, opened.as_ref(), &state)
    });
    let (mut images, mut candidates): (Vec<Image>, Vec<Candidate>) = looked.unzip();
    // Each time that an image is left out, it is decided again.
    let decided = loop {
        let decided = decide(&candidates, &options());
        let capacity = match &decided {
            Ok(Decision::Start(start)) => start.record.capacity,
            Ok(Decision::Create) | Err(_) => break decided,
        };
        let disk_bytes = capacity * SECTOR_BYTES;
        if !leave_out_short(images.iter_mut().zip(&mut candidates), disk_bytes) {
            break decided;
        }
    };
    Inspection {
        version: VERSION,
        start: Outcome::of(decided),
        images,
    }
}

/// Leaves out images that are shorter than the disk, as a start does. Returns whether there is one.
fn leave_out_short<'a>(
    images: impl Iterator<Item = (&'a mut Image, &'a mut Candidate)>,
    disk_bytes: u64,
) -> bool {
    let mut is_any_short = false;
    for (image, candidate) in images {
        let size_bytes = image.size.unwrap_or(u64::MAX);
        if candidate.image.is_err() || size_bytes >= disk_bytes {
            continue;
        }
        let error = OpenError::ShorterThanDisk {
            path: candidate.path.clone(),
            size_bytes,
            disk_bytes,
        };
        let line = error.of_missing();
        image.error = Some(line.clone());
        candidate.image = Err(line);
        is_any_short = true;
    }
    is_any_short
}

impl Outcome {
    fn of(decided: Result<Decision, Refusal>) -> Self {
        match decided {
            Ok(Decision::Create) => Self::Create,
            Ok(Decision::Start(start)) => Self::Serve(start),
            Err(refusal) => Self::Refuse {
                reason: refusal.to_string(),
            },
        }
    }
}

/// What is known of an image, and what a start is to decide on.
fn look_at(
    source: &ReplicaSource,
    opened: Result<&OfflineImage, &OpenError>,
    state: &StateDirectory,
) -> (Image, Candidate) {
    let mut image = Image {
        path: shown(&source.path),
        node_name: source.node_name.clone(),
        size: None,
        in_use: false,
        error: None,
        unusable: None,
        kept: None,
    };
    let found = match opened {
        Ok(opened) => {
            image.size = Some(opened.size_bytes);
            image.in_use = opened.is_in_use;
            Ok(Found {
                fingerprint: opened.stamp.map(fingerprint),
                kept: look_at_record(&mut image, opened, state),
            })
        }
        Err(error) => {
            let line = error.to_string();
            image.error = Some(line.clone());
            Err(line)
        }
    };
    let candidate = Candidate {
        node_name: source.node_name.clone(),
        path: source.path.clone(),
        image: found,
    };
    (image, candidate)
}

fn look_at_record(image: &mut Image, opened: &OfflineImage, state: &StateDirectory) -> Kept {
    let found = opened.record().find(state).and_then(|found| {
        let Some((file, content)) = found else {
            return Ok(None);
        };
        let read = read_by(|offset, length| content.part(offset, length))?;
        Ok(Some((file, read)))
    });
    let unusable = match found {
        Ok(None) => return Kept::Absent,
        Err(error) => Unusable::Unread(error.to_string()),
        Ok(Some((file, read))) => match read {
            Err(unusable) => unusable,
            Ok(read) => {
                image.kept = Some(Box::new(KeptRecord {
                    file: shown(&file.path),
                    record: read.record.clone(),
                    marked: Stale::of_extents(&read.intent, read.record.layout()),
                    marked_extents: read.intent.count(),
                    extent_sectors: read.record.layout().extent_sectors(),
                    agreed_epoch: read.record.agreed().number,
                    slots: read.slots.clone(),
                    unverified_pages: read.unverified_pages.clone(),
                }));
                return Kept::Read(Box::new(read));
            }
        },
    };
    image.unusable = Some(unusable.to_string());
    Kept::Unusable(unusable)
}

/// What an operator wants who gives no options.
fn options() -> Options {
    Options {
        force: false,
        adopt: None,
        votes: None,
        run: Uuid::new_v4(),
        branch: Uuid::new_v4(),
    }
}

fn state_directory(given: Option<PathBuf>) -> StateDirectory {
    let usual = || StateDirectory::usual(std::env::var_os("STATE_DIRECTORY").as_deref());
    given.map_or_else(usual, StateDirectory::Given)
}

fn shown(path: &Path) -> String {
    let path = path.strip_prefix(".").unwrap_or(path);
    path.to_string_lossy().into_owned()
}

fn fingerprint(stamp: ImageStamp) -> Fingerprint {
    Fingerprint {
        bytes: stamp.bytes,
        modified_ns: stamp.modified_ns,
    }
}

/// How many sectors of a disk of `capacity` sectors a set has.
pub fn sectors(set: &Stale, capacity: u64) -> u64 {
    match set {
        Stale::None => 0,
        Stale::All => capacity,
        Stale::Runs(runs) => runs.sectors(),
        Stale::Extents(extents) => sectors_of(extents),
    }
}

fn sectors_of(extents: &Extents) -> u64 {
    extents.iter().map(|range| range.count).sum()
}
