//! The guests of all connections, as one worker sees them: served in turn, and skipped while their
//! connection is not in use.

use crate::device::guest::Guest;
use crate::device::inflight::QueueRegion;
use crate::engine::{Failed, FragmentId, GuestRequest, Mark, Tag};

/// The guests of all connections, with the virtqueues of one worker.
pub(super) struct Guests {
    /// By connection slot.
    guests: Vec<Guest>,
    /// The slots whose guest may have work.
    in_use: Vec<usize>,
    /// Where in `in_use` the search for the next request starts, so that no guest starves another.
    next: usize,
}

impl Guests {
    pub(super) fn new(guests: Vec<Guest>) -> Self {
        Self {
            guests,
            in_use: Vec::new(),
            next: 0,
        }
    }

    /// See [`Guest::set_region`] and [`Guest::refresh`].
    pub(super) fn refresh(
        &mut self,
        slot: usize,
        queue: usize,
        region: Option<QueueRegion>,
        durable_writes: bool,
    ) -> bool {
        if !self.in_use.contains(&slot) {
            self.in_use.push(slot);
        }
        let guest = &mut self.guests[slot];
        guest.set_region(queue, region);
        guest.refresh(queue, durable_writes)
    }

    /// See [`Guest::held_request`].
    pub(super) fn held_request(
        &mut self,
        connection: u8,
        fragment: FragmentId,
    ) -> Option<GuestRequest> {
        self.guests[usize::from(connection)].held_request(fragment)
    }

    /// See [`Guest::abandon`].
    pub(super) fn abandon(&mut self, slot: usize, queue: usize) {
        self.guests[slot].abandon(queue);
    }

    /// Skips guests without work from now on, until their next [`Self::refresh`].
    pub(super) fn forget_idle(&mut self) {
        self.in_use.retain(|slot| !self.guests[*slot].is_idle());
    }

    /// See [`Guest::is_drained`].
    pub(super) fn is_drained(&self, slot: usize, queue: usize) -> bool {
        self.guests[slot].is_drained(queue)
    }

    /// The next request, taken from each guest in turn.
    pub(super) fn next_request(&mut self) -> Option<(Tag, GuestRequest)> {
        for step in 0..self.in_use.len() {
            let index = (self.next + step) % self.in_use.len();
            let slot = self.in_use[index];
            if let Some((fragment, request)) = self.guests[slot].next_request() {
                self.next = index + 1;
                let connection = u8::try_from(slot).expect("connections are few");
                return Some((
                    Tag::Guest {
                        connection,
                        fragment,
                    },
                    request,
                ));
            }
        }
        None
    }

    /// See [`Guest::answered`].
    pub(super) fn answered(
        &mut self,
        connection: u8,
        fragment: FragmentId,
        result: Result<&[u8], Failed>,
    ) -> bool {
        self.guests[usize::from(connection)].answered(fragment, result)
    }

    /// See [`Guest::flushed`].
    pub(super) fn flushed(&mut self, connection: u8, fragment: FragmentId, written: Mark) -> bool {
        self.guests[usize::from(connection)].flushed(fragment, written)
    }

    /// See [`Guest::awaits_resubmission`].
    pub(super) fn awaits_resubmission(&self) -> bool {
        self.in_use
            .iter()
            .any(|slot| self.guests[*slot].awaits_resubmission())
    }

    /// See [`Guest::has_more`].
    pub(super) fn has_more(&self) -> bool {
        self.in_use.iter().any(|slot| self.guests[*slot].has_more())
    }

    /// See [`Guest::signal`].
    pub(super) fn signal(&mut self) {
        for &slot in &self.in_use {
            self.guests[slot].signal();
        }
    }

    /// Asks all drivers for kicks. Returns whether a request arrived before that took effect.
    pub(super) fn enable_kicks(&mut self) -> bool {
        let mut more = false;
        for &slot in &self.in_use {
            more |= self.guests[slot].enable_kicks();
        }
        more
    }
}
