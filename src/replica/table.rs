//! The replicas that a disk has open, each in its place: its [`ReplicaIndex`].
//!
//! Invariants: a place is given to another replica only when nobody uses the one before any more,
//! and some time later ([`PLACE_RESTS`]), so that what is still to be told of the one does not go
//! by the name of the other.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::file::ReplicaFile;
use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::{PLACE_RESTS, REPLICAS_MAX};

/// The open replicas of a disk.
#[derive(Debug)]
pub struct ReplicaTable {
    places: Mutex<Vec<Place>>,
    freed: Condvar,
}

#[derive(Debug)]
enum Place {
    /// Since then, if anybody has ever had it.
    Free(Option<Instant>),
    Taken(Arc<ReplicaFile>),
    /// Removed; workers may still use it.
    Leaving(Arc<ReplicaFile>),
}

impl ReplicaTable {
    /// These replicas, in order.
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

    /// All that are open, also those that were removed and are still being used.
    pub fn open(&self) -> Vec<(ReplicaIndex, Arc<ReplicaFile>)> {
        self.list(|place| match place {
            Place::Taken(file) | Place::Leaving(file) => Some(Arc::clone(file)),
            Place::Free(_) => None,
        })
    }

    /// A place for another replica: one that nobody had yet, or that is free for the longest time.
    pub fn free_place(&self) -> Option<ReplicaIndex> {
        let places = self.places();
        let free = indexes(&places).filter_map(|(index, place)| match place {
            Place::Free(since) => Some((*since, index)),
            Place::Taken(_) | Place::Leaving(_) => None,
        });
        // `None` comes first.
        let (since, index) = free.min()?;
        let rested = since.is_none_or(|since| since.elapsed() >= PLACE_RESTS);
        rested.then_some(index)
    }

    /// Puts a replica in a place that is free.
    pub fn put(&self, index: ReplicaIndex, file: Arc<ReplicaFile>) {
        self.places()[index.as_usize()] = Place::Taken(file);
    }

    /// The replica was removed from the disk.
    pub fn leaves(&self, index: ReplicaIndex) {
        let place = &mut self.places()[index.as_usize()];
        if let Place::Taken(file) = place {
            *place = Place::Leaving(Arc::clone(file));
        }
    }

    /// Nobody uses the replica any more: it is closed.
    pub fn close(&self, index: ReplicaIndex) {
        let place = &mut self.places()[index.as_usize()];
        let closed = std::mem::replace(place, Place::Free(Some(Instant::now())));
        self.freed.notify_all();
        // Closing a file can take its time: not while anybody waits for the lock.
        drop(closed);
    }

    /// Waits until the replica is closed, for so long at most. Whether it is.
    pub fn wait_until_closed(&self, index: ReplicaIndex, limit: Duration) -> bool {
        let is_open =
            |places: &mut Vec<Place>| matches!(places[index.as_usize()], Place::Leaving(_));
        let waited = self.freed.wait_timeout_while(self.places(), limit, is_open);
        let (places, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(places);
        !timeout.timed_out()
    }

    /// Takes everything out. Those in `kept` are left open and locked until the process ends, and
    /// with it whatever the kernel still does with them.
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

    fn list(
        &self,
        wanted: impl Fn(&Place) -> Option<Arc<ReplicaFile>>,
    ) -> Vec<(ReplicaIndex, Arc<ReplicaFile>)> {
        let places = self.places();
        let listed = indexes(&places).filter_map(|(index, place)| Some((index, wanted(place)?)));
        listed.collect()
    }

    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn indexes(places: &[Place]) -> impl Iterator<Item = (ReplicaIndex, &Place)> {
    (0..).map(ReplicaIndex).zip(places)
}
