//! A simulated replica: a disk behind a page cache that a crash empties.
//!
//! A sector has a value in the cache, which reads see, and a durable one. A write makes it dirty.
//! Writeback, at any time or because of a flush, makes a dirty sector durable, or fails to: then
//! the kernel marks the page clean all the same, reads see the new value until it drops the page,
//! and from then on the old one. The failure is reported once, to the first flush that ends (as
//! Linux's `errseq_t` does for one open file).
//!
//! Invariant: a sector that is neither dirty nor lost has the same value in the cache and on disk.
//! Sets of sectors are masks.

use super::model::Value;
use super::plan::{bits, mask_below};

/// A replica.
#[derive(Clone, Debug)]
pub struct SimReplica {
    cached: Vec<Value>,
    durable: Vec<Value>,
    dirty: u64,
    /// Clean, and yet not durable: writeback failed.
    lost: u64,
    /// Of those, and of those whose page was dropped since: no error has reported it.
    unreported: u64,
    /// A failure in the background is to be reported.
    pending_error: bool,
    /// When its file was modified last.
    modified: u64,
}

impl SimReplica {
    /// A replica of `sectors` sectors that hold the values of write 0.
    pub fn new(sectors: usize) -> Self {
        let initial: Vec<_> = (0..sectors).map(|s| Value::written(0, s)).collect();
        Self {
            cached: initial.clone(),
            durable: initial,
            dirty: 0,
            lost: 0,
            unreported: 0,
            pending_error: false,
            modified: 0,
        }
    }

    /// It has this many sectors now; the new ones hold the values of write 0, durably.
    pub fn grow(&mut self, sectors: usize) {
        let new = self.cached.len()..sectors;
        self.cached
            .extend(new.clone().map(|s| Value::written(0, s)));
        self.durable.extend(new.map(|s| Value::written(0, s)));
    }

    /// What a read of the sector sees.
    pub fn value(&self, sector: usize) -> Value {
        self.cached[sector]
    }

    /// Whether the file system has nothing stored there. It looks at what it has on disk, or is
    /// about to write: a page that it could not write back may hold something else.
    pub fn is_hole(&self, sector: usize) -> bool {
        let is_lost = self.lost >> sector & 1 == 1;
        let stored = if is_lost { &self.durable } else { &self.cached };
        stored[sector] == Value::written(0, sector)
    }

    /// What would be left of the sector after a crash now.
    pub fn durable(&self, sector: usize) -> Value {
        self.durable[sector]
    }

    /// The sectors that a flush has to write.
    pub fn dirty(&self) -> u64 {
        self.dirty
    }

    /// The sectors whose page the kernel may drop at any time, and the data with it.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// The sector is written.
    pub fn write(&mut self, sector: usize, value: Value) {
        let bit = 1 << sector;
        self.cached[sector] = value;
        self.dirty |= bit;
        self.lost &= !bit;
        self.unreported &= !bit;
    }

    /// The file is modified, at this moment.
    pub fn is_modified(&mut self, modified: u64) {
        self.modified = modified;
    }

    /// When the file was modified last.
    pub fn modified(&self) -> u64 {
        self.modified
    }

    /// Makes the sectors among these that are dirty durable.
    pub fn write_back(&mut self, sectors: u64) {
        for sector in bits(sectors & self.dirty) {
            self.durable[sector] = self.cached[sector];
        }
        self.dirty &= !sectors;
    }

    /// Fails to write these sectors back. `background`: no operation has asked for it.
    pub fn lose(&mut self, sectors: u64, background: bool) {
        let lost = sectors & self.dirty;
        self.dirty &= !lost;
        self.lost |= lost;
        self.unreported |= lost;
        self.pending_error |= background && lost != 0;
    }

    /// Drops a lost page. Returns whether no error has reported the loss yet.
    pub fn drop_page(&mut self, sector: usize) -> bool {
        let bit = 1 << sector;
        self.lost &= !bit;
        self.cached[sector] = self.durable[sector];
        self.unreported & bit != 0
    }

    /// Whether a failure is still to be reported.
    pub fn has_error(&self) -> bool {
        self.pending_error
    }

    /// Whether there is a failure to report; it is reported once.
    pub fn take_error(&mut self) -> bool {
        std::mem::take(&mut self.pending_error)
    }

    /// The sectors whose loss an error reports now.
    pub fn unreported(&self) -> u64 {
        self.unreported
    }

    /// An error has reported the loss of these sectors.
    pub fn reported(&mut self, sectors: u64) {
        self.unreported &= !sectors;
    }

    /// A sector at rest changes. Not while it is dirty: it would be written over.
    pub fn rot(&mut self, sector: usize, value: Value) -> bool {
        let at_rest = (self.dirty | self.lost) & (1 << sector) == 0;
        if at_rest {
            self.cached[sector] = value;
            self.durable[sector] = value;
        }
        at_rest
    }

    /// The host crashes; of the dirty sectors, these are written back before.
    pub fn crash(&mut self, written_back: u64) {
        self.write_back(written_back);
        self.cached.clone_from(&self.durable);
        self.dirty = 0;
        self.lost = 0;
        self.unreported = 0;
        self.pending_error = false;
    }

    /// All sectors.
    pub fn all(&self) -> u64 {
        mask_below(self.cached.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_page_is_seen_until_it_is_dropped() {
        let mut replica = SimReplica::new(2);
        let new = Value::written(1, 0);
        replica.write(0, new);
        replica.lose(1, true);
        assert_eq!(
            (replica.value(0), replica.durable(0)),
            (new, Value::written(0, 0))
        );
        assert!(replica.take_error() && !replica.take_error());
        assert!(replica.drop_page(0), "no error has reported it");
        assert_eq!(replica.value(0), Value::written(0, 0));
    }

    #[test]
    fn a_crash_leaves_what_was_written_back() {
        let mut replica = SimReplica::new(2);
        replica.write(0, Value::written(1, 0));
        replica.write(1, Value::written(1, 1));
        replica.crash(0b10);
        assert_eq!(replica.value(0), Value::written(0, 0));
        assert_eq!(replica.value(1), Value::written(1, 1));
    }
}
