//! The ledger of a worker's operations in flight: the one place that counts them.
//!
//! An operation is entered when it is submitted and struck out when its reply comes, whether or not
//! its request still waits for it. Lag of a replica, rejoin after an eviction, the release of a
//! removed replica's place and the lifetime of a request's slot all follow from these counts.

use crate::common::operation::{Operation, Reply, RequestId};
use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::{LAG_BYTES_MAX, LAG_OPERATIONS_MAX, REPLICAS_MAX};

/// The operations in flight of one worker.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    by_replica: [Load; REPLICAS_MAX],
    /// By request. As long as the highest id ever used, which the bound on requests limits.
    by_request: Vec<usize>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Load {
    operations: usize,
    bytes: u64,
    /// Operations that have ended; wraps.
    ended: u32,
}

impl InFlight {
    /// Makes room for the operations of a new request.
    pub(super) fn open(&mut self, request: RequestId) {
        let index = request.0 as usize;
        if index >= self.by_request.len() {
            self.by_request.resize(index + 1, 0);
        }
        assert_eq!(self.by_request[index], 0, "a new request has no operations");
    }

    /// Enters an operation.
    pub(super) fn submitted(&mut self, operation: &Operation) {
        self.by_request[operation.request.0 as usize] += 1;
        let load = &mut self.by_replica[operation.replica.as_usize()];
        load.operations += 1;
        load.bytes += operation.action.bytes();
    }

    /// Strikes out an operation.
    pub(super) fn ended(&mut self, reply: &Reply) {
        let operations = &mut self.by_request[reply.request.0 as usize];
        let load = &mut self.by_replica[reply.replica.as_usize()];
        let bytes = reply.action.bytes();
        assert!(
            *operations > 0 && load.operations > 0 && load.bytes >= bytes,
            "a reply ends an operation in flight"
        );
        *operations -= 1;
        load.operations -= 1;
        load.bytes -= bytes;
        load.ended = load.ended.wrapping_add(1);
    }

    /// How many operations on a replica have ended; wraps.
    pub(super) fn ended_on(&self, replica: ReplicaIndex) -> u32 {
        self.by_replica[replica.as_usize()].ended
    }

    /// How many operations of a request are in flight.
    pub(super) fn of_request(&self, request: RequestId) -> usize {
        self.by_request[request.0 as usize]
    }

    /// How many operations on a replica are in flight.
    pub(super) fn on_replica(&self, replica: ReplicaIndex) -> usize {
        self.by_replica[replica.as_usize()].operations
    }

    /// The replicas with operations in flight.
    pub(super) fn replicas(&self) -> ReplicaSet {
        let all = ReplicaSet::first(REPLICAS_MAX).iter();
        all.filter(|replica| self.on_replica(*replica) > 0)
            .collect()
    }

    /// Whether so much is in flight on a replica that reads should not wait for it.
    pub(super) fn lags(&self, replica: ReplicaIndex) -> bool {
        let load = self.by_replica[replica.as_usize()];
        load.operations >= LAG_OPERATIONS_MAX || load.bytes >= LAG_BYTES_MAX
    }

    /// Asserts that both sides of the ledger agree.
    pub(super) fn self_check(&self) {
        let by_replica: usize = self.by_replica.iter().map(|load| load.operations).sum();
        let by_request: usize = self.by_request.iter().sum();
        assert_eq!(by_replica, by_request, "operations in flight");
        let mut idle = self.by_replica.iter().filter(|load| load.operations == 0);
        assert!(idle.all(|load| load.bytes == 0), "bytes without operation");
    }
}
