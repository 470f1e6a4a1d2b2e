//! Worker threads: each moves requests between its virtqueues, its engine and its ring.
//!
//! The virtqueues of every connection are distributed over the workers. A worker skips connections
//! that are not in use.

#![forbid(unsafe_code)]

mod clock;
pub mod control;
mod draining;
mod effects;
mod event_loop;
mod guests;
mod mailbox;
mod polled;
mod spin;
mod threads;

use std::sync::Arc;
use std::sync::mpsc::Sender;

pub use self::threads::Workers;
use crate::common::{ReplicaIndex, SectorRange};
use crate::control::queue::EventQueue;
use crate::device::DiskInfo;
use crate::device::connection::ConnectionSlot;
use crate::device::hold::Hold;
use crate::engine::{Policy, Shared};
use crate::replica::ring::Aio;
use crate::statistics::Statistics;

/// Why the daemon stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A signal or a monitor command asked for it.
    Requested,
    /// `--blkverify` found a difference.
    ContentsDiffer(SectorRange),
    /// A worker failed.
    Broken(String),
}

/// The parts that the workers of a disk are built from.
#[derive(Clone)]
pub struct Disk {
    /// The disk as the guest sees it.
    pub info: DiskInfo,
    /// How the engines decide.
    pub policy: Policy,
    /// How operations on replicas are carried out.
    pub aio: Aio,
    /// The state that the engines share.
    pub shared: Arc<Shared>,
    /// Receives each removed replica once no worker uses it any more.
    pub released: Sender<ReplicaIndex>,
    /// A slot for each connection that can be open at a time.
    pub slots: Vec<ConnectionSlot>,
    /// The counters of each worker.
    pub statistics: Statistics,
    /// Receives reports.
    pub events: Arc<EventQueue>,
    /// What is held of the guests' requests.
    pub hold: Arc<Hold>,
    /// Receives the reason to stop the daemon.
    pub stop: Sender<Stop>,
}

impl Disk {
    /// The disk with the virtqueues of one worker of `count`: every `count`-th one from `index` on.
    fn share_of(&self, index: u16, count: u16) -> Self {
        let mut share = self.clone();
        for slot in &mut share.slots {
            let own = slot.vrings.drain(..).skip(usize::from(index));
            slot.vrings = own.step_by(usize::from(count)).collect();
        }
        share
    }
}

#[cfg(test)]
mod tests;
