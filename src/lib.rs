//! quorum-blk: several image files served as one voted disk over vhost-user-blk.
//!
//! The modules in the order in which a request meets them:
//!
//! 1. [`device`] takes a descriptor chain off a virtqueue, parses it as a virtio-blk request and
//!    divides it into fragments. Data to write is copied out of guest memory once.
//! 2. [`engine`] decides what to do: a read asks the replicas at once; a write takes the lock of
//!    its range and goes to all of them; a flush goes to all of them.
//! 3. [`replica`] does the operations: it queues them to an io_uring and returns replies with their
//!    buffers.
//! 4. [`quorum`] has the pure decisions: which version of a sector wins, which replicas are stale
//!    where, whether a flush made everything durable.
//! 5. The engine answers the guest through [`device`], which copies the winner to guest memory and
//!    puts the chain on the used ring.
//! 6. [`control`] reports to the operator which replica failed.
//!
//! [`jobs`] schedules the work that no guest asked for: resync and scrub. [`admin`] is what an
//! operator can do to a disk while it is served.
//!
//! [`worker`] is the thread on which all of this runs, [`statistics`] counts what it does.
//! [`daemon`] builds and stops the parts, [`config`] is the command line, [`common`] the vocabulary
//! of all rooms, and [`limits`] has every bound.
//!
//! [`sandbox`] is what the daemon gives up when all of this is open.
//!
//! [`client`] is a second program, `quorum-blkctl`, which talks to the monitor.
//!
//! [`record`] is what is kept on disk about each replica: its format, and what may start.
//! [`inspect`] shows that without a daemon.
//!
//! The rules that all of this keeps are in docs/contract.md; comments cite them by their tags.

// Unit tests use test support that names this crate from outside.
#[cfg(test)]
extern crate self as quorum_blk;

pub mod admin;
pub mod client;
pub mod common;
pub mod config;
pub mod control;
pub mod daemon;
pub mod device;
pub mod engine;
pub mod inspect;
pub mod jobs;
pub mod limits;
pub mod quorum;
pub mod record;
pub mod replica;
pub mod sandbox;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod statistics;
pub mod untrusted;
pub mod worker;
