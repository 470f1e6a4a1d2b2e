//! The driver's side of a split virtqueue: the chains that the device returns, and its calls.

use crate::HANG_LIMIT;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use vm_memory::{Bytes, GuestAddress};

use super::calls::wait_for;
use super::queue::{Queue, flag};
use super::request::{Completion, Layout, Request};
use crate::process::wait_until;

impl Queue {
    /// The used index: chains that the device has returned, modulo 2^16.
    pub fn used_index(&self) -> u16 {
        self.memory
            .load(GuestAddress(self.used + 2), Ordering::Acquire)
            .expect("within guest memory")
    }

    /// Whether the device has returned chains that were not popped.
    pub fn has_used(&self) -> bool {
        self.used_index() != self.next_used
    }

    /// The next chain that the device has returned. Panics if the device did not have it.
    pub fn pop(&mut self) -> Option<Completion> {
        let given_back = self.used_index().wrapping_sub(self.next_used);
        if given_back == 0 {
            return None;
        }
        assert!(
            usize::from(given_back) <= self.outstanding(),
            "{given_back} chains came back, {} were with the device",
            self.outstanding()
        );
        let place = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let [id, written]: [u32; 2] = [place, place + 4].map(|place| {
            let value = self.memory.read_obj::<u32>(GuestAddress(place));
            u32::from_le(value.expect("within guest memory"))
        });
        let outstanding = usize::try_from(id)
            .ok()
            .and_then(|head| self.outstanding.get_mut(head))
            .and_then(Option::take);
        let outstanding =
            outstanding.unwrap_or_else(|| panic!("chain {id} came back and was not outstanding"));
        self.next_used = self.next_used.wrapping_add(1);
        self.completed += 1;
        self.free_descriptors.extend(outstanding.descriptors);
        let head = u16::try_from(id).expect("a head");
        let Some(slot) = outstanding.slot else {
            return Some(Completion {
                head,
                status: 0,
                written,
                data: Vec::new(),
            });
        };
        let mut data = self.read(slot.data, slot.bytes + 1);
        let status = data.pop().expect("at least the status");
        self.free_slots.push(slot.index);
        Some(Completion {
            head,
            status,
            written,
            data,
        })
    }

    /// Asks for a call when the next chain returns. Returns whether one has returned already: for
    /// it no call comes.
    pub fn ask_for_calls(&self) -> bool {
        self.ask_for_call_after(0)
    }

    /// With EVENT_IDX, asks for a call when one more than `further` chains have returned; without,
    /// for a call for each. Returns whether more than `further` have returned already.
    pub fn ask_for_call_after(&self, further: u16) -> bool {
        let event = self.next_used.wrapping_add(further);
        if self.event_idx {
            self.store(self.used_event(), event);
        } else {
            self.store(self.available, 0);
        }
        fence(Ordering::SeqCst);
        let come = self.used_index().wrapping_sub(self.next_used);
        come > further
    }

    /// Suppresses calls.
    pub fn refuse_calls(&self) {
        if self.event_idx {
            // As far away as possible.
            self.store(self.used_event(), self.next_used.wrapping_add(1 << 15));
        } else {
            self.store(self.available, flag(VRING_AVAIL_F_NO_INTERRUPT));
        }
        fence(Ordering::SeqCst);
    }

    pub(super) fn used_event(&self) -> u64 {
        self.available + 4 + 2 * u64::from(self.size)
    }

    /// How many calls came since this was last called.
    pub fn take_calls(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }

    /// Discards the calls of earlier requests: when another request is served, they have come.
    pub fn run_dry(&mut self) {
        self.submit(&Request::get_id(), Layout::DIRECT);
        assert!(wait_until(HANG_LIMIT, || self.has_used()), "no answer");
        self.pop();
        self.take_calls();
    }

    /// Waits for a call. Returns whether there was one.
    pub fn wait_for_call(&self, limit: Duration) -> bool {
        wait_for(&self.epoll, limit) && self.take_calls() > 0
    }

    /// Waits for the next chain to return, with a call. Panics if none returns, or one without a
    /// call.
    pub fn wait(&mut self) -> Completion {
        loop {
            if let Some(completion) = self.pop() {
                return completion;
            }
            if !self.ask_for_calls() && !self.wait_for_call(HANG_LIMIT) {
                let came = self.has_used();
                panic!("no call within {HANG_LIMIT:?}; has a chain returned: {came}");
            }
        }
    }

    /// Submits a request and waits for it.
    pub fn run(&mut self, request: &Request, layout: Layout) -> Completion {
        let head = self.submit(request, layout);
        let completion = self.wait();
        assert_eq!(completion.head, head, "another chain came back");
        completion
    }

    /// Reads, which must succeed.
    pub fn read_disk(&mut self, sector: u64, bytes: usize) -> Vec<u8> {
        let completion = self.run(&Request::read(sector, bytes), Layout::DIRECT);
        assert_eq!(u32::from(completion.status), VIRTIO_BLK_S_OK);
        completion.data
    }

    /// Writes, which must succeed.
    pub fn write_disk(&mut self, sector: u64, data: &[u8]) {
        let completion = self.run(&Request::write(sector, data.to_vec()), Layout::DIRECT);
        assert_eq!(u32::from(completion.status), VIRTIO_BLK_S_OK);
    }
}
