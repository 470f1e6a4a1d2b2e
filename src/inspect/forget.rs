//! Takes images out of their disk, without a daemon: their records are put aside.

use std::path::PathBuf;

use super::{ReplicaSource, Stale, sectors, shown, state_directory};
use crate::record::format::read_by;
use crate::replica::file::{OfflineImage, OpenError, Sharing, open_offline};
use crate::replica::record_file::{RecordAccess, RecordError};
use uuid::Uuid;

/// Why nothing was forgotten, or not all. Each displays as one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForgetError {
    /// An image cannot be opened, or is in use.
    #[error(transparent)]
    Image(#[from] OpenError),
    /// A record cannot be opened or renamed.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// An image that is part of no disk any more.
#[derive(Debug)]
pub struct Forgotten {
    /// Its path.
    pub path: String,
    /// Where its record was, and where it is now. `None`: it had none.
    pub record: Option<[String; 2]>,
    /// What the record said, if it could be used.
    pub replica: Option<Replica>,
}

/// A replica that an image was.
#[derive(Debug)]
pub struct Replica {
    /// Its node-name.
    pub node_name: String,
    /// Its disk.
    pub disk: Uuid,
    /// How many replicas the disk has.
    pub members: usize,
    /// Sectors in which it was stale, as far as its own record says.
    pub stale_sectors: u64,
}

/// Puts the records of images aside. None of them if one image is in use.
///
/// # Errors
/// If an image or a record cannot be opened, or a record cannot be renamed. Those before it in the
/// list are forgotten then.
pub fn forget(
    images: &[ReplicaSource],
    state: Option<PathBuf>,
    mut done: impl FnMut(Forgotten),
) -> Result<(), ForgetError> {
    let state = state_directory(state);
    let mut opened: Vec<(OfflineImage, RecordAccess)> = Vec::new();
    for source in images {
        let mut image = open_offline(&source.path)?;
        image.lock(Sharing::None)?;
        let record = image.record();
        opened.push((image, record));
    }
    let mut found = Vec::new();
    for (_, record) in &mut opened {
        found.push(record.find(&state)?);
    }
    for ((source, (_, access)), found) in images.iter().zip(&mut opened).zip(found) {
        let mut forgotten = Forgotten {
            path: shown(&source.path),
            record: None,
            replica: None,
        };
        if let Some((file, content)) = found {
            let read = read_by(|offset, length| content.part(offset, length))?;
            let kept = access.forget()?;
            forgotten.record = Some([shown(&file.path), shown(&kept)]);
            forgotten.replica = read.ok().and_then(|read| {
                let layout = read.record.layout();
                let own = read.record.member(read.record.replica)?;
                let mut stale = own.stale.clone();
                if own.stale_where_changed {
                    stale = stale.union(&Stale::of_extents(&read.intent, layout), layout);
                }
                Some(Replica {
                    node_name: own.node_name.clone(),
                    disk: read.record.disk,
                    members: read.record.members.len(),
                    stale_sectors: sectors(&stale, layout.capacity()),
                })
            });
        }
        done(forgotten);
    }
    Ok(())
}
