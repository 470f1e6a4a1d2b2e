//! The life of a guest request: [`Request`] → [`InFlight`] → [`Finished`].
//!
//! Invariants, asserted in release builds too, since no guest and no frontend can break them:
//! every [`AcceptedChain`] is completed once, by this process or by the next one; fragments cover
//! the request once, in order; guest memory is written by an [`InFlight`] only, and finishing
//! consumes it.

use crate::common::buffer::BufferPool;
use crate::common::operation::OperationType;
use crate::common::{SECTOR_BYTES, SectorRange};
use crate::device::View;
use crate::device::hold::Ticket;
use crate::device::request::{Kind, OutsideMemory, Request, Status, Zeroed};
use crate::engine::GuestRequest;
use crate::limits::{FRAGMENT_BYTES_MAX, ZERO_BYTES_MAX, ZERO_FRAGMENTS_IN_FLIGHT_MAX};
use crate::statistics::{RequestKind, Since};

const FRAGMENT_SECTORS: u64 = FRAGMENT_BYTES_MAX / SECTOR_BYTES;
const ZERO_FRAGMENT_SECTORS: u64 = ZERO_BYTES_MAX / SECTOR_BYTES;

/// The obligation to complete a chain that was accepted from a virtqueue. A chain that is dropped
/// while it is owed to the driver is a bug that would leave a guest waiting for ever, so dropping
/// panics.
#[derive(Debug)]
#[must_use]
pub(super) struct AcceptedChain {
    queue: usize,
    head: u16,
}

impl AcceptedChain {
    pub(super) fn new(queue: usize, head: u16) -> Self {
        Self { queue, head }
    }

    /// The virtqueue it was accepted from, as the worker numbers them.
    pub(super) fn queue(&self) -> usize {
        self.queue
    }

    /// The index of its first descriptor.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// The chain is on the used ring, or its virtqueue is broken.
    pub(super) fn complete(self) {
        std::mem::forget(self);
    }

    /// The chain stays in flight: the next start of its virtqueue resubmits it.
    pub(super) fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for AcceptedChain {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let Self { queue, head } = self;
            panic!("chain {head} of virtqueue {queue} is dropped without completion");
        }
    }
}

/// How far the fragments of a request are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Fragments are still to be submitted to the engine.
    Submitting,
    /// As many fragments are in flight as may be; the next answer leads back to `Submitting`.
    Parked,
    /// The engine has all fragments, or has answered them.
    Submitted,
    /// A fragment failed. No further one is submitted.
    Failed,
}

/// A request whose chain was accepted and not completed.
#[derive(Debug)]
pub(super) struct InFlight {
    chain: AcceptedChain,
    request: Request,
    stage: Stage,
    submitted_sectors: u64,
    /// Fragments that the engine has not answered.
    outstanding: usize,
    /// Fragments that are held (W9). The engine may have them again.
    held: Vec<HeldFragment>,
    /// The kind that it is counted as, and its begin.
    counted: Option<(RequestKind, Since)>,
}

#[derive(Clone, Copy, Debug)]
struct HeldFragment {
    offset_sectors: u64,
    ticket: Ticket,
}

/// How a fragment has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FragmentEnd<'a> {
    /// It is done. The data of a read goes to guest memory.
    Done(&'a [u8]),
    /// The guest gets an I/O error.
    Failed,
    /// It is held, and is to be submitted again.
    Held(Ticket),
}

impl InFlight {
    pub(super) fn new(
        chain: AcceptedChain,
        request: Request,
        counted: Option<(RequestKind, Since)>,
    ) -> Self {
        let stage = match request.kind {
            Kind::Flush => Stage::Submitting,
            _ if request.sectors() > 0 => Stage::Submitting,
            _ => Stage::Submitted,
        };
        Self {
            chain,
            request,
            stage,
            submitted_sectors: 0,
            outstanding: 0,
            held: Vec::new(),
            counted,
        }
    }

    pub(super) fn queue(&self) -> usize {
        self.chain.queue()
    }

    pub(super) fn stage(&self) -> Stage {
        self.stage
    }

    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }

    pub(super) fn counted(&self) -> Option<(RequestKind, Since)> {
        self.counted
    }

    /// The sectors that statistics count, see [`Request::extent`].
    pub(super) fn extent(&self) -> SectorRange {
        self.request.extent()
    }

    /// The status of a request that needs no replica.
    pub(super) fn answer_at_once(&self, memory: View<'_>, serial: &str) -> Option<Status> {
        match self.request.kind {
            Kind::Rejected(status) => Some(status),
            Kind::GetId => Some(self.request.write_id(memory, serial)),
            _ if self.stage == Stage::Submitted => Some(Status::Ok),
            _ => None,
        }
    }

    /// The status of the request, once no fragment is left to be submitted or answered.
    pub(super) fn status(&self) -> Option<Status> {
        match self.stage {
            _ if self.outstanding > 0 || !self.held.is_empty() => None,
            Stage::Submitting => None,
            Stage::Parked => unreachable!("fragments are in flight"),
            Stage::Submitted => Some(Status::Ok),
            Stage::Failed => Some(Status::IoError),
        }
    }

    /// The next fragment, and how many sectors into the request it begins. It counts as submitted.
    ///
    /// # Errors
    /// If the data to write does not lie in guest memory. Then the request has failed.
    pub(super) fn next_fragment(
        &mut self,
        memory: View<'_>,
        pool: &mut BufferPool,
        durable: bool,
    ) -> Result<(u64, GuestRequest), OutsideMemory> {
        assert_eq!(self.stage, Stage::Submitting);
        let offset = self.submitted_sectors;
        let (fragment, sectors) = self
            .fragment(offset, memory, pool, durable)
            .inspect_err(|OutsideMemory| self.stage = Stage::Failed)?;
        self.submitted_sectors += sectors;
        self.outstanding += 1;
        let sectors = self.request.sectors();
        assert!(self.submitted_sectors <= sectors);
        let is_zero = self.request.kind == Kind::Zero;
        if self.submitted_sectors == sectors {
            self.stage = Stage::Submitted;
        } else if is_zero && self.outstanding == ZERO_FRAGMENTS_IN_FLIGHT_MAX {
            self.stage = Stage::Parked;
        }
        Ok((offset, fragment))
    }

    /// The held fragment that begins `offset_sectors` into the request, to be submitted again.
    ///
    /// # Errors
    /// If the data to write does not lie in guest memory any more. Then the request has failed.
    pub(super) fn held_fragment(
        &mut self,
        memory: View<'_>,
        pool: &mut BufferPool,
        (offset_sectors, durable): (u64, bool),
    ) -> Result<GuestRequest, OutsideMemory> {
        assert!(self.ticket(offset_sectors).is_some(), "a fragment is held");
        let (fragment, _) = self
            .fragment(offset_sectors, memory, pool, durable)
            .inspect_err(|OutsideMemory| self.stage = Stage::Failed)?;
        self.outstanding += 1;
        Ok(fragment)
    }

    /// What the fragment that begins `offset` sectors into the request does, and where.
    pub(super) fn describe(&self, offset: u64) -> (OperationType, SectorRange) {
        let left = self.request.sectors() - offset;
        let cut =
            |range: SectorRange| SectorRange::new(range.start + offset, left.min(FRAGMENT_SECTORS));
        match self.request.kind {
            Kind::In(range) => (OperationType::Read, cut(range)),
            Kind::Out(range) => (OperationType::Write, cut(range)),
            Kind::Zero => {
                let zeroed = self.request.zeroed_from(offset);
                let Zeroed { range, .. } = zeroed.expect("a fragment has sectors");
                let range = SectorRange::new(range.start, range.count.min(ZERO_FRAGMENT_SECTORS));
                (OperationType::Write, range)
            }
            Kind::Flush => (OperationType::Flush, SectorRange::new(0, 0)),
            Kind::GetId | Kind::Rejected(_) => unreachable!("has no fragments"),
        }
    }

    /// The ticket of the fragment, if it has one.
    pub(super) fn ticket(&self, offset_sectors: u64) -> Option<Ticket> {
        let mut held = self.held.iter();
        let held = held.find(|held| held.offset_sectors == offset_sectors);
        held.map(|held| held.ticket)
    }

    /// Whether a fragment is held.
    pub(super) fn is_held(&self) -> bool {
        !self.held.is_empty()
    }

    /// Takes the tickets of all fragments that are held.
    pub(super) fn take_tickets(&mut self) -> impl Iterator<Item = Ticket> + use<> {
        let held = std::mem::take(&mut self.held);
        held.into_iter().map(|held| held.ticket)
    }

    fn fragment(
        &self,
        offset: u64,
        memory: View<'_>,
        pool: &mut BufferPool,
        durable: bool,
    ) -> Result<(GuestRequest, u64), OutsideMemory> {
        let (_, range) = self.describe(offset);
        let fragment = match self.request.kind {
            Kind::In(_) => (GuestRequest::Read(range), range.count),
            Kind::Out(_) => {
                let write = match pool.try_take(bytes(range.count)) {
                    None => GuestRequest::WriteWithoutMemory(range),
                    Some(mut data) => {
                        self.request.data.read(memory, bytes(offset), &mut data)?;
                        GuestRequest::Write {
                            range,
                            data,
                            durable,
                        }
                    }
                };
                (write, range.count)
            }
            Kind::Zero => {
                let zeroed = self.request.zeroed_from(offset);
                let zero = GuestRequest::Zero {
                    range,
                    unmap: zeroed.is_some_and(|zeroed| zeroed.unmap),
                    durable,
                };
                (zero, range.count)
            }
            Kind::Flush => (GuestRequest::Flush, 0),
            Kind::GetId | Kind::Rejected(_) => unreachable!("has no fragments"),
        };
        Ok(fragment)
    }

    /// The engine has answered the fragment that begins `offset_sectors` into the request. Data
    /// that was read goes to guest memory.
    pub(super) fn fragment_answered(
        &mut self,
        memory: View<'_>,
        offset_sectors: u64,
        end: FragmentEnd<'_>,
    ) {
        let outstanding = self.outstanding.checked_sub(1);
        self.outstanding = outstanding.expect("the engine answers each fragment once");
        if let FragmentEnd::Held(ticket) = end {
            if self.ticket(offset_sectors).is_none() {
                self.held.push(HeldFragment {
                    offset_sectors,
                    ticket,
                });
            }
        } else if !self.held.is_empty() {
            let is_other = |held: &HeldFragment| held.offset_sectors != offset_sectors;
            self.held.retain(is_other);
        }
        let outcome = match (end, self.request.kind) {
            (FragmentEnd::Failed, _) => Err(OutsideMemory),
            (FragmentEnd::Done(data), Kind::In(_)) => {
                self.request.data.write(memory, bytes(offset_sectors), data)
            }
            (FragmentEnd::Done(_) | FragmentEnd::Held(_), _) => Ok(()),
        };
        match (outcome, self.stage) {
            (Err(OutsideMemory), _) => self.stage = Stage::Failed,
            (Ok(()), Stage::Parked) => self.stage = Stage::Submitting,
            (Ok(()), _) => {}
        }
    }

    /// Writes the status: the last write to guest memory for this request.
    pub(super) fn finish(self, memory: View<'_>, status: Status) -> Finished {
        assert!(
            status != Status::Ok || self.status() == Some(Status::Ok),
            "success before all fragments are answered"
        );
        let written_bytes = self.request.answer(memory, status);
        Finished {
            chain: self.chain,
            written_bytes,
        }
    }

    /// Leaves the chain to the next start of its virtqueue, unanswered.
    pub(super) fn leave(self) -> AcceptedChain {
        self.chain
    }
}

/// A request with its status in guest memory, to be put on the used ring.
#[derive(Debug)]
#[must_use]
pub(super) struct Finished {
    pub(super) chain: AcceptedChain,
    /// For the used ring, see [`Request::answer`].
    pub(super) written_bytes: u32,
}

fn bytes(sectors: u64) -> usize {
    usize::try_from(sectors * SECTOR_BYTES).expect("a chain is below 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "chain 7 of virtqueue 1 is dropped without completion")]
    fn a_chain_that_is_dropped_without_completion_panics() {
        drop(AcceptedChain::new(1, 7));
    }

    #[test]
    fn a_chain_that_is_completed_or_left_is_no_obligation() {
        AcceptedChain::new(0, 0).complete();
        AcceptedChain::new(0, 0).leave();
    }
}
