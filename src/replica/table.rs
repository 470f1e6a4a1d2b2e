//! The open replicas of a disk. The place of a replica in this table is its [`ReplicaIndex`].
//!
//! Invariant: another replica takes a place only when no worker uses the previous one any more,
//! and [`PLACE_RESTS`] later, so that late reports about the previous one do not carry the name of
//! the new one.

#![forbid(unsafe_code)]

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::file::ReplicaFile;
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
    /// Removed from the disk; workers may still use it.
    Leaving(Arc<ReplicaFile>),
}

impl ReplicaTable {
    /// A table of these replicas, in order.
    pub fn new(replicas: Vec<ReplicaFile>) -> Self {
        let taken = replicas
            .into_iter()
            .map(|replica| Place::Taken(Arc::new(replica)));
        let mut places: Vec<_> = taken.collect();
        places.resize_with(REPLICAS_MAX, || Place::Free(None));
        Self {
            places: Mutex::new(places),
            freed: Condvar::new(),
        }
    }

    /// The replicas in use, in order.
    pub fn in_use(&self) -> Vec<(ReplicaIndex, Arc<ReplicaFile>)> {
        self.list(|place| match place {
            Place::Taken(file) => Some(Arc::clone(file)),
            Place::Leaving(_) | Place::Free(_) => None,
        })
    }

    /// All open replicas, including removed ones that workers still use.
    pub fn open(&self) -> Vec<(ReplicaIndex, Arc<ReplicaFile>)> {
        self.list(|place| match place {
            Place::Taken(file) | Place::Leaving(file) => Some(Arc::clone(file)),
            Place::Free(_) => None,
        })
    }

    /// A place for another replica: one that was never used, else the one that is free for longest.
    pub fn free_place(&self) -> Option<ReplicaIndex> {
        let places = self.places();
        let free = indexes(&places).filter_map(|(index, place)| match place {
            Place::Free(since) => Some((*since, index)),
            Place::Taken(_) | Place::Leaving(_) => None,
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

    /// Marks a replica as removed from the disk.
    pub fn leaves(&self, index: ReplicaIndex) {
        let place = &mut self.places()[index.as_usize()];
        if let Place::Taken(file) = place {
            *place = Place::Leaving(Arc::clone(file));
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

    /// The replicas for which `wanted` returns a file, with their places.
    fn list(
        &self,
        wanted: impl Fn(&Place) -> Option<Arc<ReplicaFile>>,
    ) -> Vec<(ReplicaIndex, Arc<ReplicaFile>)> {
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
