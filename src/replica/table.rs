//! The open replicas of a disk. The place of a replica in this table is its [`ReplicaIndex`].
//!
//! Invariant: another replica takes a place only when no worker uses the previous one any more,
//! and [`PLACE_RESTS`] later, so that late reports about the previous one do not carry the name of
//! the new one.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::file::ReplicaFile;
pub use super::missing::MissingReplica;
use crate::common::{NOT_POISONED, ReplicaIndex, ReplicaSet};
use crate::limits::{PLACE_RESTS, REPLICAS_MAX};

/// The open replicas of a disk.
#[derive(Debug)]
pub struct ReplicaTable {
    places: Mutex<Vec<Place>>,
    freed: Condvar,
}

#[derive(Debug)]
enum Place {
    /// Free since then; `None` if no replica has ever had the place.
    Free(Option<Instant>),
    Taken(Arc<ReplicaFile>),
    /// A replica of the disk whose image is not open.
    Missing(Arc<MissingReplica>),
    /// Removed from the disk; workers may still use its file, if it has one.
    Leaving(Option<Arc<ReplicaFile>>),
}

impl Place {
    fn has(&self, file: &Arc<ReplicaFile>) -> bool {
        matches!(self, Self::Taken(present) if Arc::ptr_eq(present, file))
    }
}

/// A replica of the disk, whether its image is open or not.
#[derive(Clone, Debug)]
pub enum Member {
    /// It is.
    Open(Arc<ReplicaFile>),
    /// It is not.
    Missing(Arc<MissingReplica>),
}

impl Member {
    /// Its name in events.
    pub fn node_name(&self) -> Arc<str> {
        match self {
            Self::Open(file) => file.node_name(),
            Self::Missing(missing) => missing.node_name(),
        }
    }

    /// The path of its image, as the operator gave it.
    pub fn path(&self) -> &PathBuf {
        match self {
            Self::Open(file) => &file.path,
            Self::Missing(missing) => &missing.path,
        }
    }

    /// Gives it another name.
    pub fn rename(&self, node_name: &str) {
        match self {
            Self::Open(file) => file.rename(node_name),
            Self::Missing(missing) => missing.rename(node_name),
        }
    }

    /// Its file, if that is open.
    pub fn file(&self) -> Option<&Arc<ReplicaFile>> {
        match self {
            Self::Open(file) => Some(file),
            Self::Missing(_) => None,
        }
    }
}

impl ReplicaTable {
    /// A table of these replicas, in order.
    pub fn new(replicas: Vec<ReplicaFile>) -> Self {
        Self::with_missing(replicas.into_iter().map(Ok))
    }

    /// A table of these replicas, in order, of which some have no file.
    pub fn with_missing(
        replicas: impl IntoIterator<Item = Result<ReplicaFile, MissingReplica>>,
    ) -> Self {
        let places = replicas.into_iter().map(|replica| match replica {
            Ok(file) => Place::Taken(Arc::new(file)),
            Err(missing) => Place::Missing(Arc::new(missing)),
        });
        let mut places: Vec<_> = places.collect();
        places.resize_with(REPLICAS_MAX, || Place::Free(None));
        Self {
            places: Mutex::new(places),
            freed: Condvar::new(),
        }
    }

    /// The replicas of the disk, in order.
    pub fn members(&self) -> Vec<(ReplicaIndex, Member)> {
        self.list(|place| match place {
            Place::Taken(file) => Some(Member::Open(Arc::clone(file))),
            Place::Missing(missing) => Some(Member::Missing(Arc::clone(missing))),
            Place::Leaving(_) | Place::Free(_) => None,
        })
    }

    /// The replicas of the disk that are missing, in order.
    pub fn missing(&self) -> Vec<(ReplicaIndex, Arc<MissingReplica>)> {
        self.list(|place| match place {
            Place::Missing(missing) => Some(Arc::clone(missing)),
            Place::Taken(_) | Place::Leaving(_) | Place::Free(_) => None,
        })
    }

    /// The image of a replica cannot be used any more: `missing` takes its place, and keeps the
    /// file until no worker uses it. `false` if another file is in this place, or none.
    pub fn lost(
        &self,
        index: ReplicaIndex,
        file: &Arc<ReplicaFile>,
        missing: Arc<MissingReplica>,
    ) -> bool {
        let place = &mut self.places()[index.as_usize()];
        let is_it = place.has(file);
        if is_it {
            *place = Place::Missing(missing);
        }
        is_it
    }

    /// Whether this file is in use in this place.
    pub fn is_in_use(&self, index: ReplicaIndex, file: &Arc<ReplicaFile>) -> bool {
        self.places()[index.as_usize()].has(file)
    }

    /// The replicas of the disk whose images are open, in order.
    pub fn in_use(&self) -> Vec<(ReplicaIndex, Arc<ReplicaFile>)> {
        self.list(|place| match place {
            Place::Taken(file) => Some(Arc::clone(file)),
            Place::Missing(_) | Place::Leaving(_) | Place::Free(_) => None,
        })
    }

    /// All open replicas, including removed ones, and lost images, that workers still use.
    pub fn open(&self) -> Vec<(ReplicaIndex, Arc<ReplicaFile>)> {
        self.list(|place| match place {
            Place::Taken(file) | Place::Leaving(Some(file)) => Some(Arc::clone(file)),
            Place::Missing(missing) => missing.before(),
            Place::Leaving(None) | Place::Free(_) => None,
        })
    }

    /// A place for another replica: one that was never used, else the one that is free for longest.
    pub fn free_place(&self) -> Option<ReplicaIndex> {
        let places = self.places();
        let free = indexes(&places).filter_map(|(index, place)| match place {
            Place::Free(since) => Some((*since, index)),
            Place::Taken(_) | Place::Missing(_) | Place::Leaving(_) => None,
        });
        // `None` sorts first.
        let (since, index) = free.min()?;
        let rested = since.is_none_or(|since| since.elapsed() >= PLACE_RESTS);
        rested.then_some(index)
    }

    /// Puts a replica in a free place.
    ///
    /// # Panics
    /// If the place is taken.
    pub fn put(&self, index: ReplicaIndex, file: Arc<ReplicaFile>) {
        let place = &mut self.places()[index.as_usize()];
        assert!(
            matches!(place, Place::Free(_)),
            "place {} of a new replica is taken",
            index.0
        );
        *place = Place::Taken(file);
    }

    /// Whether `missing` is in this place.
    pub fn is_missing(&self, index: ReplicaIndex, missing: &Arc<MissingReplica>) -> bool {
        match &self.places()[index.as_usize()] {
            Place::Missing(present) => Arc::ptr_eq(present, missing),
            Place::Taken(_) | Place::Leaving(_) | Place::Free(_) => false,
        }
    }

    /// The image of a missing replica is open. `false` if none is missing in this place any more:
    /// then it is closed.
    pub fn found(&self, index: ReplicaIndex, file: Arc<ReplicaFile>) -> bool {
        let place = &mut self.places()[index.as_usize()];
        let is_missing = matches!(place, Place::Missing(_));
        if is_missing {
            *place = Place::Taken(file);
        }
        is_missing
    }

    /// Marks a replica as removed from the disk.
    pub fn leaves(&self, index: ReplicaIndex) {
        let place = &mut self.places()[index.as_usize()];
        match place {
            Place::Taken(file) => *place = Place::Leaving(Some(Arc::clone(file))),
            Place::Missing(missing) => *place = Place::Leaving(missing.before()),
            Place::Leaving(_) | Place::Free(_) => {}
        }
    }

    /// Closes a removed replica that no worker uses any more.
    pub fn close(&self, index: ReplicaIndex) {
        let place = &mut self.places()[index.as_usize()];
        let closed = std::mem::replace(place, Place::Free(Some(Instant::now())));
        self.freed.notify_all();
        // Closing a file can take long, so not under the lock.
        drop(closed);
    }

    /// Waits until the replica is closed, for at most `limit`. Returns whether it is.
    pub fn wait_until_closed(&self, index: ReplicaIndex, limit: Duration) -> bool {
        let is_open =
            |places: &mut Vec<Place>| matches!(places[index.as_usize()], Place::Leaving(_));
        let waited = self.freed.wait_timeout_while(self.places(), limit, is_open);
        let (places, timeout) = waited.expect(NOT_POISONED);
        drop(places);
        !timeout.timed_out()
    }

    /// Empties the table and closes all replicas but those in `kept`. They stay open and locked
    /// until the process ends and the kernel has ended their operations. Returns them.
    pub fn close_all(&self, kept: ReplicaSet) -> Vec<Arc<ReplicaFile>> {
        let open = self.open();
        let mut still_open = Vec::new();
        self.places().fill_with(|| Place::Free(None));
        for (index, file) in open {
            if kept.contains(index) {
                std::mem::forget(Arc::clone(&file));
                still_open.push(file);
            }
        }
        still_open
    }

    /// What `wanted` returns of the places, with these.
    fn list<T>(&self, wanted: impl Fn(&Place) -> Option<T>) -> Vec<(ReplicaIndex, T)> {
        let places = self.places();
        let listed = indexes(&places).filter_map(|(index, place)| Some((index, wanted(place)?)));
        listed.collect()
    }

    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().expect(NOT_POISONED)
    }
}

fn indexes(places: &[Place]) -> impl Iterator<Item = (ReplicaIndex, &Place)> {
    (0..).map(ReplicaIndex).zip(places)
}
