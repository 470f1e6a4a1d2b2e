//! quorum-blk: several image files served as one voted disk over vhost-user-blk.
//!
//! The modules in the order in which a request meets them:
//!
//! 1. [`device`] takes a descriptor chain off a virtqueue, understands it as a virtio-blk request
//!    and cuts it into pieces. Data to write is copied out of guest memory once.
//! 2. [`engine`] decides what to do: a read asks all replicas at once, a write takes the lock of
//!    its range and goes to all of them, a flush too.
//! 3. [`replica`] does it: operations are queued to an io_uring and come back as replies, with
//!    their buffers.
//! 4. [`quorum`] has the pure decisions: who wins the vote on a sector, whether a write counts,
//!    what a replica is known not to hold.
//! 5. The engine answers the guest through [`device`], which copies the winner into guest memory
//!    and puts the chain on the used ring.
//! 6. [`control`] tells the operator who was wrong.
//!
//! [`jobs`] has the work that no guest asked for: bringing a replica up to date, looking for
//! damage. [`admin`] is what an operator can do to a disk while it is served.
//!
//! [`client`] is another program, `quorum-blkctl`, which talks to the monitor.
//!
//! [`worker`] is the thread all of this runs on, [`statistics`] what it counts, [`daemon`] builds
//! and stops the parts, [`config`] is the command line, [`limits`] has every bound.

// For what unit tests share with those outside of the crate.
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
pub mod jobs;
pub mod limits;
pub mod quorum;
pub mod replica;
#[cfg(feature = "sim")]
pub mod sim;
pub mod statistics;
pub mod worker;
