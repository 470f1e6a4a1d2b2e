//! Which frontend uses the disk: by default one at a time.
//!
//! Two guests that mount one file system destroy it. A migration on one host needs no more: the
//! destination starts its virtqueues when the source has stopped its own.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::common::NOT_POISONED;

/// The use of the disk by the frontend of one connection slot. Its virtqueues may run from
/// [`Self::begin`] to [`Self::end`].
#[derive(Clone, Debug)]
pub struct DiskUse {
    users: Arc<Users>,
    slot: usize,
}

#[derive(Debug)]
struct Users {
    /// Several frontends may use the disk at a time.
    shared: bool,
    /// By slot.
    uses: Mutex<Vec<bool>>,
    ended: Condvar,
}

impl DiskUse {
    /// For `slots` connection slots. With `shared`, several may use the disk at a time.
    pub fn of_slots(slots: usize, shared: bool) -> Vec<Self> {
        let users = Arc::new(Users {
            shared,
            uses: Mutex::new(vec![false; slots]),
            ended: Condvar::new(),
        });
        let of_slot = |slot| Self {
            users: Arc::clone(&users),
            slot,
        };
        (0..slots).map(of_slot).collect()
    }

    /// Begins to use the disk, as soon as no other frontend does. Returns whether that was so
    /// within `limit`.
    #[must_use]
    pub fn begin(&self, limit: Duration) -> bool {
        let in_use = |uses: &mut Vec<bool>| {
            let mut others = uses.iter().enumerate();
            !self.users.shared && others.any(|(slot, in_use)| *in_use && slot != self.slot)
        };
        let uses = self.users.uses.lock().expect(NOT_POISONED);
        let waited = self.users.ended.wait_timeout_while(uses, limit, in_use);
        let (mut uses, waited) = waited.expect(NOT_POISONED);
        if waited.timed_out() {
            return false;
        }
        uses[self.slot] = true;
        true
    }

    /// Ends the use: no virtqueue of the frontend runs.
    pub fn end(&self) {
        self.users.uses.lock().expect(NOT_POISONED)[self.slot] = false;
        self.users.ended.notify_all();
    }

    /// Whether the frontend uses the disk.
    pub fn is_in_use(&self) -> bool {
        self.users.uses.lock().expect(NOT_POISONED)[self.slot]
    }
}

impl Default for DiskUse {
    /// For the only slot.
    fn default() -> Self {
        Self::of_slots(1, false).remove(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_frontend_at_a_time_uses_a_disk_that_is_not_shared() {
        let at_once = Duration::ZERO;
        for shared in [false, true] {
            let uses = DiskUse::of_slots(2, shared);
            assert!(uses[0].begin(at_once));
            assert!(uses[0].begin(at_once), "it does already");
            assert_eq!(uses[1].begin(at_once), shared);
            assert_eq!(uses[1].is_in_use(), shared);
            uses[0].end();
            assert!(uses[1].begin(at_once));
        }
    }

    #[test]
    fn a_frontend_that_begins_waits_for_the_end_of_the_other() {
        let uses = DiskUse::of_slots(2, false);
        assert!(uses[0].begin(Duration::ZERO));
        let other = uses[1].clone();
        let begins = std::thread::spawn(move || other.begin(Duration::from_mins(1)));
        uses[0].end();
        assert!(begins.join().unwrap());
    }
}
