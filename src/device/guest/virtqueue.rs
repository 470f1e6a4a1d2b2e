//! One virtqueue as its worker sees it: accepts chains and completes them.
//!
//! Invariants, asserted in release builds too: `in_flight` counts the chains that were accepted and
//! neither completed nor left to the next start; a tracker counts the same ones; the virtqueue
//! starts from a region only while none is in flight.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Duration;

use log::{error, info};
use vhost_user_backend::VringT;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::in_flight::{AcceptedChain, Finished};
use crate::device::chain::Chain;
use crate::device::inflight::{self, Begun, QueueRegion, Tracker, VirtqueueState};
use crate::device::request::{Kind, Request};
use crate::device::{DiskInfo, View, Vring};
use crate::limits::RESUBMIT_LIMIT;
use crate::untrusted::signal;

/// One virtqueue as its worker sees it.
pub(super) struct Virtqueue {
    /// Its index in the [`Guest`](super::Guest).
    index: usize,
    vring: Vring,
    state: State,
    /// The driver is asked to kick.
    kicks_enabled: bool,
    /// The used ring has entries that the driver may have to be notified of.
    signal_pending: bool,
    /// Chains accepted and not completed.
    in_flight: usize,
    /// Where chains are tracked from the next start on.
    region: Option<QueueRegion>,
    /// Tracks chains since this start.
    tracker: Option<Tracker>,
    /// Resubmitted chains that change nothing on the disk. They wait until those that do are
    /// submitted again on all virtqueues. By their heads: there may be many, and a guest must not
    /// make them take memory meanwhile.
    deferred: VecDeque<u16>,
}

enum State {
    /// Not started, stopped by the frontend, or broken by the driver.
    Stopped,
    /// Submits again what another process had in flight, and accepts nothing new until all
    /// virtqueues of the region have done so.
    Resubmitting(Resubmission),
    /// Accepts new chains.
    Serving,
}

struct Resubmission {
    region: QueueRegion,
    /// Chains that another process accepted and did not complete.
    heads: VecDeque<u16>,
    /// The region knows that this virtqueue has submitted its own.
    reported: bool,
    /// When the virtqueue stops waiting for the others.
    until: Duration,
}

/// Why a virtqueue cannot go on from a region.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Region(#[from] inflight::BeginError),
    #[error("{0}")]
    Virtqueue(#[from] virtio_queue::Error),
}

impl Virtqueue {
    pub(super) fn new(index: usize, vring: Vring) -> Self {
        Self {
            index,
            vring,
            state: State::Stopped,
            kicks_enabled: true,
            signal_pending: false,
            in_flight: 0,
            region: None,
            tracker: None,
            deferred: VecDeque::new(),
        }
    }

    pub(super) fn set_region(&mut self, region: Option<QueueRegion>) {
        self.region = region;
    }

    /// Where chains are tracked from the next start on.
    pub(super) fn region(&self) -> Option<&QueueRegion> {
        self.region.as_ref()
    }

    pub(super) fn is_tracked(&self) -> bool {
        self.tracker.is_some()
    }

    /// Whether chains are tracked in another region than the one for the next start.
    pub(super) fn changes_region(&self) -> bool {
        match (&self.tracker, &self.region) {
            (Some(tracker), Some(region)) => !tracker.is_of(region),
            _ => false,
        }
    }

    pub(super) fn is_active(&self) -> bool {
        !matches!(self.state, State::Stopped)
    }

    /// Chains accepted and not completed.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(super) fn is_idle(&self) -> bool {
        !self.is_active() && !self.signal_pending && self.in_flight == 0
    }

    /// Whether it waits until other virtqueues have submitted again what was in flight there.
    pub(super) fn is_resubmitting(&self) -> bool {
        matches!(self.state, State::Resubmitting(_))
    }

    /// Whether it has chains of another process to submit again.
    pub(super) fn has_resubmissions(&self) -> bool {
        matches!(&self.state, State::Resubmitting(resubmission) if !resubmission.heads.is_empty())
    }

    /// Whether the frontend has it started and enabled, at addresses within guest memory.
    pub(super) fn is_startable(&self, memory: View<'_>) -> bool {
        let vring = self.vring.get_ref();
        let queue = vring.get_queue();
        if !vring.is_enabled() || !queue.ready() {
            return false;
        }
        let valid = queue.is_valid(&memory);
        if !valid {
            error!("a started virtqueue does not lie within guest memory; it is not served");
        }
        valid
    }

    /// Starts where the frontend says.
    pub(super) fn start_untracked(&mut self) {
        self.tracker = None;
        self.state = State::Serving;
    }

    /// Starts where `region` says that the virtqueue stands. On an error it stays stopped.
    pub(super) fn start_tracked(&mut self, region: QueueRegion, memory: View<'_>, now: Duration) {
        assert_eq!(self.in_flight, 0, "the region tracks all chains in flight");
        if let Err(error) = self.resume(region, memory, now) {
            error!(error:%; "a virtqueue is not served");
        }
    }

    fn resume(
        &mut self,
        region: QueueRegion,
        memory: View<'_>,
        now: Duration,
    ) -> Result<(), StartError> {
        let mut vring = self.vring.get_mut();
        let queue = vring.get_queue_mut();
        let used_idx = queue.used_idx(&memory, Ordering::Acquire)?.0;
        let available_idx = queue.avail_idx(&memory, Ordering::Acquire)?.0;
        let (tracker, begun) = region.clone().begin(VirtqueueState {
            size: queue.size(),
            used_idx,
            available_idx,
        })?;
        self.tracker = Some(tracker);
        queue.set_next_used(used_idx);
        let mut heads = VecDeque::new();
        if let Begun::Resumed(in_flight) = begun {
            // Some frontends send the available index as the base, others the used index.
            let count = u16::try_from(in_flight.len()).expect("at most one for each entry");
            queue.set_next_avail(used_idx.wrapping_add(count));
            if count > 0 {
                info!(count; "requests in flight are submitted again");
            }
            heads = in_flight.into();
        }
        self.state = State::Resubmitting(Resubmission {
            region,
            heads,
            reported: false,
            until: now + RESUBMIT_LIMIT,
        });
        Ok(())
    }

    /// Asks the driver to kick, even if it was asked before.
    pub(super) fn renew_kicks(&mut self) {
        self.kicks_enabled = false;
    }

    /// Accepts no more chains. Tracked chains that were not submitted again stay in flight for the
    /// next start.
    pub(super) fn stop(&mut self) {
        self.deferred.clear();
        self.state = State::Stopped;
        self.release_region();
    }

    /// Unmaps the frontend's file once nothing is in flight: the virtqueue may never start again.
    fn release_region(&mut self) {
        if !self.is_active() && self.in_flight == 0 {
            self.tracker = None;
        }
    }

    /// The driver broke its virtqueue, which is left alone until the frontend starts it anew.
    fn give_up(&mut self, error: &virtio_queue::Error) {
        self.deferred.clear();
        if self.is_active() {
            self.state = State::Stopped;
            error!(
                error:%;
                "the driver broke a virtqueue, which is not served until it is started again"
            );
        }
    }

    /// Accepts new chains if all virtqueues of the region have submitted their own again, or the
    /// limit for that has passed. To be called when the engine has all that was submitted.
    pub(super) fn end_resubmission(&mut self, now: Duration) {
        let State::Resubmitting(resubmission) = &mut self.state else {
            return;
        };
        if !resubmission.reported && resubmission.heads.is_empty() {
            resubmission.reported = true;
            resubmission.region.resubmitted();
        }
        let others_done = || resubmission.region.is_all_resubmitted();
        if resubmission.reported && (others_done() || now >= resubmission.until) {
            self.state = State::Serving;
        }
    }

    /// Accepts the next chain, if there is one.
    pub(super) fn accept(
        &mut self,
        memory: View<'_>,
        info: &DiskInfo,
    ) -> Option<(AcceptedChain, Request)> {
        let request = self.next_chain(memory, info)?;
        self.in_flight += 1;
        self.check();
        Some((AcceptedChain::new(self.index, request.head), request))
    }

    fn next_chain(&mut self, memory: View<'_>, info: &DiskInfo) -> Option<Request> {
        let mut vring = self.vring.get_mut();
        // The frontend stops a virtqueue by taking its readiness away; this notices it at once.
        if !vring.is_enabled() || !vring.get_queue().ready() || memory.is_lost() {
            return None;
        }
        let parse = |queue: &Queue, head| Request::parse(Chain::new(memory, queue, head), info);
        let mut resubmit = || {
            if let Some(tracker) = &mut self.tracker {
                tracker.resubmitted();
            }
        };
        match &mut self.state {
            State::Stopped => return None,
            State::Resubmitting(Resubmission { heads, .. }) => {
                while let Some(head) = heads.pop_front() {
                    let request = parse(vring.get_queue(), head);
                    if !matches!(request.kind, Kind::In(_) | Kind::Flush) {
                        resubmit();
                        return Some(request);
                    }
                    self.deferred.push_back(head);
                }
                return None;
            }
            State::Serving => {}
        }
        if let Some(head) = self.deferred.pop_front() {
            resubmit();
            return Some(parse(vring.get_queue(), head));
        }
        let head = match vring.get_queue_mut().iter(&memory) {
            Ok(mut chains) => chains.next()?.head_index(),
            Err(error) => {
                drop(vring);
                self.give_up(&error);
                return None;
            }
        };
        if let Some(tracker) = &mut self.tracker {
            tracker.accepted(head);
        }
        if self.kicks_enabled {
            self.kicks_enabled = false;
            // Only a hint; a failure shows again when the virtqueue is used.
            let _ = vring.get_queue_mut().disable_notification(&memory);
        }
        Some(parse(vring.get_queue(), head))
    }

    /// Puts a chain on the used ring.
    pub(super) fn complete(&mut self, finished: Finished, memory: View<'_>) {
        let Finished {
            chain,
            written_bytes,
        } = finished;
        let head = chain.head();
        // The used ring may be lost, or the data. The next start with the region finds the
        // chain there.
        if memory.is_lost() && self.tracker.is_some() {
            return self.leave(chain);
        }
        self.signal_pending = true;
        if let Some(tracker) = &mut self.tracker {
            tracker.completing(head);
        }
        let mut vring = self.vring.get_mut();
        let added = vring.get_queue_mut().add_used(&memory, head, written_bytes);
        let used_idx = vring.get_queue().next_used();
        drop(vring);
        if let Some(tracker) = &mut self.tracker {
            match added {
                Ok(()) => tracker.completed(head, used_idx),
                // Its flag stays: the used ring does not have it.
                Err(_) => tracker.left(),
            }
        }
        if let Err(error) = added {
            self.give_up(&error);
        }
        chain.complete();
        self.forget_chain();
    }

    /// Leaves a chain in flight in the region, for the next start.
    pub(super) fn leave(&mut self, chain: AcceptedChain) {
        let tracker = self.tracker.as_mut();
        tracker.expect("a region has the chain").left();
        chain.leave();
        self.forget_chain();
    }

    fn forget_chain(&mut self) {
        let in_flight = self.in_flight.checked_sub(1);
        self.in_flight = in_flight.expect("each chain was accepted");
        self.check();
        self.release_region();
    }

    /// Asserts that the region and the virtqueue account for the same chains.
    fn check(&self) {
        if let Some(tracker) = &self.tracker {
            assert_eq!(
                tracker.in_flight(),
                self.in_flight,
                "chains in flight on virtqueue {} and in its region",
                self.index
            );
        }
    }

    /// Notifies the driver of new entries in the used ring, if it wants that.
    pub(super) fn signal(&mut self, memory: View<'_>) {
        if !std::mem::take(&mut self.signal_pending) {
            return;
        }
        let mut vring = self.vring.get_mut();
        let queue = vring.get_queue_mut();
        // When in doubt, notify.
        if queue.needs_notification(&memory).unwrap_or(true)
            && !forbids_interrupts(queue, memory)
            && let Some(call) = vring.get_call()
            && let Err(error) = signal::signal(call)
        {
            // It was an eventfd when the frontend passed it.
            error!(error:%; "the kernel has no memory to notify a driver, which may hang");
        }
    }

    /// Asks the driver to kick from now on. Returns whether chains were made available meanwhile,
    /// for which no kick comes.
    pub(super) fn enable_kicks(&mut self, memory: View<'_>) -> bool {
        if !matches!(self.state, State::Serving) || self.kicks_enabled {
            return false;
        }
        self.kicks_enabled = true;
        let enabled = self
            .vring
            .get_mut()
            .get_queue_mut()
            .enable_notification(&memory);
        enabled.unwrap_or_else(|error| {
            self.give_up(&error);
            false
        })
    }

    /// Whether the available ring has chains that were not accepted, without looking at them.
    pub(super) fn has_available(&self, memory: View<'_>) -> bool {
        let vring = self.vring.get_ref();
        let queue = vring.get_queue();
        let available = queue.avail_idx(&memory, Ordering::Relaxed);
        self.is_active() && available.is_ok_and(|index| index.0 != queue.next_avail())
    }
}

/// Whether the driver, without EVENT_IDX, wants no interrupts now (virtio 1.3, 2.7.7);
/// `virtio-queue` does not check this.
fn forbids_interrupts(queue: &Queue, memory: View<'_>) -> bool {
    let flags = GuestAddress(queue.avail_ring());
    let forbidden = |flags: u16| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0;
    !queue.event_idx_enabled() && memory.load(flags, Ordering::Acquire).is_ok_and(forbidden)
}
