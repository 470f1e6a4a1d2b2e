//! The requests of this worker's guest that are held (W9): how fragments get their tickets, and how
//! requests lose them again.

use std::sync::Arc;

use log::warn;
use vm_memory::GuestAddressSpace as _;

use super::in_flight::{FragmentEnd, InFlight, Stage};
use super::{Entry, Guest, place};
use crate::device::View;
use crate::device::hold::{Fragment, Hold};
use crate::device::request::OutsideMemory;
use crate::engine::{Failed, FragmentId, GuestRequest, Mark, Tag, WorkerIndex};

/// A guest's way to what the disk holds.
#[derive(Clone, Debug)]
pub struct Holder {
    hold: Arc<Hold>,
    worker: WorkerIndex,
    connection: u8,
}

impl Default for Holder {
    /// Holds nothing.
    fn default() -> Self {
        Self::new(Arc::default(), WorkerIndex(0), 0)
    }
}

impl Holder {
    /// Of a guest on this worker and connection.
    pub fn new(hold: Arc<Hold>, worker: WorkerIndex, connection: u8) -> Self {
        Self {
            hold,
            worker,
            connection,
        }
    }

    #[inline]
    pub(super) fn is_holding(&self) -> bool {
        self.hold.is_holding()
    }

    /// How a fragment ends that has failed, or that was answered while something is held.
    /// `written`: it has waited for a flush since.
    #[cold]
    pub(super) fn ended<'a>(
        &self,
        in_flight: &InFlight,
        fragment: FragmentId,
        result: Result<&'a [u8], Failed>,
        written: Option<Mark>,
    ) -> FragmentEnd<'a> {
        let (_, offset_sectors) = place(fragment);
        let ticket = in_flight.ticket(offset_sectors);
        let (operation, range) = in_flight.describe(offset_sectors);
        let fragment = Fragment {
            worker: self.worker,
            tag: Tag::Guest {
                connection: self.connection,
                fragment,
            },
            operation,
            range,
        };
        match result {
            // Another one has failed already.
            Err(_) if in_flight.stage() == Stage::Failed => FragmentEnd::Failed,
            Err(failed) => match self.hold.failed(fragment, failed, ticket) {
                Some(ticket) => FragmentEnd::Held(ticket),
                None => FragmentEnd::Failed,
            },
            Ok(data) => match self.hold.succeeded(fragment, written, ticket) {
                Some(ticket) => FragmentEnd::Held(ticket),
                None => FragmentEnd::Done(data),
            },
        }
    }

    /// Nothing of the request is held any more.
    pub(super) fn forget(&self, in_flight: &mut InFlight) {
        if in_flight.is_held() {
            for ticket in in_flight.take_tickets() {
                self.hold.give_up(ticket);
            }
        }
    }
}

impl Guest {
    /// Holds requests in what `holder` leads to, from now on.
    pub fn set_holder(&mut self, holder: Holder) {
        self.holder = holder;
    }

    /// A held fragment, for the engine again. `None` if the request has failed: the data that it
    /// writes is no longer in guest memory.
    pub fn held_request(&mut self, fragment: FragmentId) -> Option<GuestRequest> {
        let (key, offset_sectors) = place(fragment);
        let Entry::InFlight(in_flight) = &mut self.entries[key] else {
            unreachable!("an abandoned request is not held");
        };
        let memory = self.memory.memory();
        let options = (offset_sectors, self.durable_writes);
        match in_flight.held_fragment(View(&memory), &mut self.pool, options) {
            Ok(request) => Some(request),
            Err(OutsideMemory) => {
                self.holder.forget(in_flight);
                if let Some(status) = in_flight.status() {
                    self.complete(key, status);
                }
                None
            }
        }
    }

    /// Gives up the requests of a stopped virtqueue that would keep it from being drained: those
    /// that are held, and those that wait behind them to be submitted.
    pub(super) fn give_up_held(&mut self, queue: usize) {
        let held = self.take_stuck(queue, InFlight::is_held);
        let mut count = held.len();
        self.give_up(queue, held);
        if self.holder.is_holding() {
            let behind = self.take_stuck(queue, |_| true);
            count += behind.len();
            self.give_up(queue, behind);
        }
        if count > 0 {
            let tracked = self.queues[queue].is_tracked();
            let fate = if tracked { "resubmit" } else { "fail" };
            warn!(count, fate; "a virtqueue stops while requests are held");
        }
    }

    /// The requests of a virtqueue for which the engine does nothing, of which no more fragments
    /// are submitted.
    fn take_stuck(&mut self, queue: usize, is_chosen: impl Fn(&InFlight) -> bool) -> Vec<usize> {
        let entries = self.entries.iter();
        let keys: Vec<usize> = entries
            .filter(|(_, entry)| match entry {
                Entry::InFlight(in_flight) => {
                    let is_stuck = in_flight.queue() == queue && in_flight.outstanding() == 0;
                    is_stuck && is_chosen(in_flight)
                }
                Entry::Abandoned { .. } => false,
            })
            .map(|(key, _)| key)
            .collect();
        self.submitting.retain(|key| !keys.contains(key));
        keys
    }
}
