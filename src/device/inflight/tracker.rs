//! Keeps the region of a running virtqueue up to date.

use super::QueueRegion;

/// Tracks the chains of a running virtqueue in its region. Heads out of the table are not stored:
/// recovery could not use them.
#[derive(Debug)]
pub struct Tracker {
    region: QueueRegion,
    /// Of the next chain.
    counter: u64,
    /// Chains accepted by this process and not completed. Counted here, as the frontend can write
    /// to the region.
    in_flight: usize,
}

impl Tracker {
    pub(super) fn new(region: QueueRegion, counter: u64) -> Self {
        Self {
            region,
            counter,
            in_flight: 0,
        }
    }

    /// Whether it tracks chains in this region, as mapped at this time.
    pub fn is_of(&self, region: &QueueRegion) -> bool {
        self.region.is_same_mapping(region)
    }

    /// Chains accepted, or accepted again, and neither completed nor left.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// A chain was accepted from the available ring. To be called before the chain has any effect.
    pub fn accepted(&mut self, head: u16) {
        self.in_flight += 1;
        if self.region.has(head) {
            self.region.set_counter(head, self.counter);
            self.counter = self.counter.wrapping_add(1);
            self.region.set_accepted(head);
        }
    }

    /// A chain that another process accepted is submitted again. The region has it already.
    pub fn resubmitted(&mut self) {
        self.in_flight += 1;
    }

    /// A chain is about to be put on the used ring.
    pub fn completing(&self, head: u16) {
        if self.region.has(head) {
            self.region.set_last_batch(head);
        }
    }

    /// The chain is on the used ring, whose index is `used_idx` now.
    pub fn completed(&mut self, head: u16, used_idx: u16) {
        self.left();
        if self.region.has(head) {
            self.region.set_completed(head, used_idx);
        }
    }

    /// A chain stays in flight in the region, for the next start.
    pub fn left(&mut self) {
        let in_flight = self.in_flight.checked_sub(1);
        self.in_flight = in_flight.expect("each chain was accepted");
    }
}
