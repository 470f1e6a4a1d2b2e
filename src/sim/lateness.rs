//! W6: which replicas may be evicted, which must be, and how long the guest waits.
//!
//! As naive as the model: all that has happened is looked at anew each time.

use std::time::Duration;

use uuid::Uuid;

use super::Violation;
use super::flight::{Flight, Looked, Took};
use super::ledger::Masks;
use super::pending::PendingKind;
use super::plan::bits;
use super::state::{Checked, World};
use crate::limits::{
    FLAPPING_EVICTIONS, FLAPPING_WINDOW, JOB_GIVES_WAY, LATE_LONG_LIMIT, LATE_MOST,
    LATE_PATIENCE_MOST,
};
use crate::record::Table;

impl World {
    /// An operation has ended and its reply is about to reach the engine.
    pub(super) fn note_end(&mut self, flight: &Flight) {
        let replica = flight.replica();
        if self.is_late(flight) {
            self.late_reply_at = self.clock;
        }
        if flight.is_long() || flight.background {
            self.yielded[replica] += 1;
            self.yielded_at[replica].set(self.clock);
        }
        self.looked[flight.worker].replied[replica] = true;
        let time = self.clock.saturating_sub(flight.submitted_at);
        self.longest = self.longest.max(time);
    }

    /// A worker is about to look at the clock.
    pub(super) fn note_look(&mut self, worker: usize) {
        let looked = &mut self.looked[worker];
        looked.last = self.clock;
        // What the last replica of a free place has ended is seen when the next one is added.
        for place in bits(u64::from(self.members | self.to_be_released)) {
            if looked.yielded[place] != self.yielded[place] {
                looked.yielded[place] = self.yielded[place];
                looked.at[place] = self.clock;
            }
            if std::mem::take(&mut looked.replied[place]) {
                self.replied_at[place].set(self.clock);
            }
        }
    }

    /// The daemon has died. The next one knows nothing of what has ended, and numbers its requests
    /// from the beginning.
    pub(super) fn forget_times(&mut self) {
        self.took.clear();
        self.longest = Duration::ZERO;
        for looked in &mut self.looked {
            *looked = Looked {
                yielded: self.yielded,
                ..Looked::default()
            };
        }
    }

    /// How long an operation may take in any case. What this input has submitted changes no limit:
    /// the engine looked before, or it was another worker's.
    fn limit_of(&self, flight: &Flight) -> Duration {
        let earlier = |f: &Flight| f.submitted_at < self.clock;
        let here = |f: &Flight| f.replica() == flight.replica();
        let on_it = |f: &&Flight| here(f) && f.is_long() && earlier(f);
        let others = self.flights.iter().filter(on_it).count();
        if flight.background || others > 0 {
            self.plan.replica_timeout * LATE_LONG_LIMIT
        } else {
            self.plan.replica_timeout
        }
    }

    fn age(&self, flight: &Flight) -> Duration {
        self.clock.saturating_sub(flight.submitted_at)
    }

    fn is_much_too_old(&self, flight: &Flight) -> bool {
        self.age(flight) >= self.plan.replica_timeout * LATE_PATIENCE_MOST
    }

    /// Whether the guest waits for a replica longer than the limit of its operation, and the worker
    /// has seen it.
    fn must_give_way(&self) -> bool {
        self.flights.iter().any(|flight| {
            let factor = if flight.is_long() { LATE_LONG_LIMIT } else { 1 };
            let seen = self.looked[flight.worker].last;
            let is_guests = !flight.background && !flight.reads() && !flight.is_repair();
            is_guests
                && !self.is_evicted(flight.replica())
                && seen.saturating_sub(flight.submitted_at) >= self.plan.replica_timeout * factor
        })
    }

    /// While the guest waits too long for a replica, jobs begin one chunk now and then, no more.
    pub(super) fn check_chunks(&mut self) -> Checked {
        let begun = self.shared.jobs(|_| (), |jobs, _| jobs.chunks_begun());
        let (before, last) = self.chunks;
        if begun == before {
            return Ok(());
        }
        self.chunks = (begun, self.clock);
        let pause = self.plan.replica_timeout * JOB_GIVES_WAY;
        let may = u64::from(self.clock >= last + pause);
        if begun > before + may && !self.overlapped && self.must_give_way() {
            let text = "a job goes on at full speed while the guest waits for a replica";
            return Err(Violation::new("W6", text));
        }
        Ok(())
    }

    /// A replica is evicted: it has kept a request of the guest waiting for too long, and longer
    /// than its peers have, and t remain.
    pub(super) fn check_eviction(&self, replica: usize) -> Checked {
        let here = |f: &&Flight| f.replica() == replica;
        if !self.is_evicted(replica) || !self.flights.iter().any(|f| here(&f)) {
            let text = format!("replica {replica} owes no reply");
            return Err(Violation::new("W6", text));
        }
        if !self.flights.iter().filter(here).any(|f| self.is_late(f)) {
            let text = format!("replica {replica} is evicted and not late");
            return Err(Violation::new("W6", text));
        }
        if !self.flights.iter().filter(here).any(|f| self.is_slower(f)) {
            let text = format!("replica {replica} is evicted for being as slow as its peers");
            return Err(Violation::new("W6", text));
        }
        let out = (self.ledger.evicted & self.members).count_ones();
        if self.count() - usize::try_from(out).expect("few") < self.thresholds.least {
            return Err(Violation::new("W6", "fewer than t replicas are left"));
        }
        Ok(())
    }

    /// A replica rejoins: it was not evicted again and again of late, or the disk
    /// has needed it since: an operation was late.
    pub(super) fn check_rejoin(&self, replica: usize) -> Checked {
        let timeout = self.plan.replica_timeout;
        let good = FLAPPING_WINDOW.min(timeout * 600);
        let of_late = |at: &&Duration| self.clock.saturating_sub(**at) < good;
        let evicted = &self.evicted_at[replica];
        let last = evicted.last().copied().unwrap_or_default();
        // It counts from its last rejoin on, and the first worker may miss one in a quick series.
        let often = evicted.iter().filter(of_late).count() > FLAPPING_EVICTIONS;
        let others = self.members & !self.ledger.evicted & !(1 << replica);
        let fresh = |r: &usize| self.ledger.excused[*r] == 0;
        let spare = bits(u64::from(others)).filter(fresh).count() > self.thresholds.most;
        let too_soon = self.clock < last + timeout * 2;
        let late = self.late_reply_at >= last || self.flights.iter().any(|f| self.is_late(f));
        // An eviction for a record is soon over, so that the first worker may miss it.
        let counts = self.records.failures == 0;
        if counts && often && spare && too_soon && !late {
            let text = format!("replica {replica} rejoins at once, evicted at {evicted:?}");
            return Err(Violation::new("W6", text));
        }
        Ok(())
    }

    /// Whether its replica has had the operation too long, whatever its peers do.
    fn is_late(&self, flight: &Flight) -> bool {
        let limit = self.limit_of(flight);
        let since = if flight.background {
            self.replied_at[flight.replica()].before(self.clock)
        } else {
            self.yielded_at[flight.replica()].before(self.clock)
        };
        let counted = self.clock.saturating_sub(since.max(flight.submitted_at));
        counted >= limit || self.is_much_too_old(flight)
    }

    /// Whether its replica has had the operation longer than twice what others of the request took.
    fn is_slower(&self, flight: &Flight) -> bool {
        // One that has rejoined in this input was no peer when it began.
        let out = self.ledger.evicted | self.before_input.evicted;
        let of_peers = self.took.iter().filter(|took| {
            let request = (flight.worker, flight.operation.request);
            let is_peer = took.replica != flight.replica() && out >> took.replica & 1 == 0;
            let same = took.request == request.1 && took.worker == request.0;
            same && is_peer && took.reads == flight.reads()
        });
        let twice = of_peers.map(|took| took.time).max().unwrap_or_default() * 2;
        let slower = self.age(flight) >= twice.min(self.limit_of(flight) * LATE_MOST);
        self.is_late(flight) && (slower || flight.background || flight.is_repair())
    }

    /// The replicas that may be needed, of those that owe `worker` a reply for too long, a mask. A
    /// request that needs one is perhaps answered when the worker looks at the clock.
    pub(super) fn overdue_and_needed(&self, worker: usize) -> u32 {
        let (excused, evicted) = (&self.ledger.excused, self.ledger.evicted);
        let owed = self.flights.iter().filter(|flight| {
            let is_owed = flight.worker == worker && flight.is_waited_for();
            is_owed && !self.is_evicted(flight.replica()) && self.is_overdue(flight)
        });
        let owing = owed.fold(0, |mask, flight| mask | 1 << flight.replica());
        let needed = bits(owing).filter(|replica| self.may_be_needed(*replica, excused, evicted));
        needed.fold(0, |mask, replica| mask | 1 << replica)
    }

    /// `worker` has just looked at the clock, so no replica that is not needed owes it a reply for
    /// longer than the contract says. `excused`, `evicted` and `needed`: as it was before.
    pub(super) fn check_overdue(
        &self,
        worker: usize,
        excused: &Masks,
        evicted: u32,
        needed: u32,
    ) -> Checked {
        if self.ledger.evicted != evicted || self.overlapped {
            // What was answered since has perhaps needed the others until then: at the next look.
            return Ok(());
        }
        for flight in &self.flights {
            let is_owed = flight.worker == worker && flight.is_waited_for();
            let replica = flight.replica();
            if is_owed
                && !self.is_evicted(replica)
                && self.members >> replica & 1 == 1
                && needed >> replica & 1 == 0
                && self.is_overdue(flight)
                && self.is_decided_without(flight)
                && !self.may_be_needed(replica, excused, evicted)
            {
                let text = format!(
                    "replica {replica} has not answered since {:?} and is not evicted",
                    flight.submitted_at
                );
                return Err(Violation::new("W6", text));
            }
        }
        Ok(())
    }

    /// Whether its replica has had the operation too long, however slow the others are.
    fn is_overdue(&self, flight: &Flight) -> bool {
        let limit = self.limit_of(flight);
        let since = if flight.background {
            // Other workers learn of a reply a tick later.
            return self.is_much_too_old(flight);
        } else {
            self.looked[flight.worker].at[flight.replica()]
        };
        let counted = self.clock.saturating_sub(since.max(flight.submitted_at));
        counted >= (self.longest * 2).clamp(limit, limit * LATE_MOST)
            || self.is_much_too_old(flight)
    }

    /// Whether the request has an answer without the operation: t others have done it, and no reply
    /// is out that may still come in time.
    fn is_decided_without(&self, flight: &Flight) -> bool {
        let request = (flight.worker, flight.operation.request);
        let of_it = |f: &&Flight| {
            (f.worker, f.operation.request) == request && !self.is_evicted(f.replica())
        };
        let done = self.took.iter().filter(|took| {
            let here = (took.worker, took.request) == request;
            here && took.success && self.members >> took.replica & 1 == 1
        });
        let enough = flight.is_repair() || done.count() >= self.thresholds.least;
        enough
            && self
                .flights
                .iter()
                .filter(of_it)
                .all(|f| self.is_overdue(f))
    }

    /// Whether too few others may be fresh, or a request in flight may fail without the replica.
    fn may_be_needed(&self, replica: usize, excused: &Masks, evicted: u32) -> bool {
        let others = self.members & !self.ledger.evicted & !evicted & !(1 << replica);
        let needed = self.thresholds.most;
        let few_of = |others: u32, excused: &Masks| {
            let enough = |sector: usize| {
                let fresh = |r: &usize| excused[*r] >> sector & 1 == 0;
                bits(u64::from(others)).filter(fresh).count() >= needed
            };
            !(0..self.changed_at.len()).all(enough)
        };
        let few = |excused: &Masks| few_of(others, excused);
        let by_request = |kind: &PendingKind, seen: &Masks| match kind {
            PendingKind::Read => false,
            PendingKind::Write(write) => {
                let may = write.submitted_to & !write.failed & others;
                let counts = |r: &usize| self.ledger.failures[*r] == write.failures[*r];
                let may = bits(u64::from(may)).filter(counts).count();
                write.submitted_to != 0 && may < needed
            }
            PendingKind::Flush => few(seen),
        };
        let flushes = self.flights.iter().filter(|f| f.is_flush());
        let mut pending = self.pending.iter();
        // What has become fresh since the running flush began is not durable by it.
        let flush_lacks: Masks = std::array::from_fn(|r| excused[r] | self.flush_lacks[r]);
        // A replica that has failed the flush makes nothing durable by it.
        let of_flush = |took: &&Took| {
            let mut flushes = flushes.clone();
            flushes.any(|f| (f.worker, f.operation.request) == (took.worker, took.request))
        };
        let failed = self
            .took
            .iter()
            .filter(of_flush)
            .filter(|took| !took.success);
        let failed = failed.fold(0, |mask, took| mask | 1 << took.replica);
        few(excused)
            || self.may_be_needed_by_records(others)
            || flushes.clone().any(|f| f.background)
            || (flushes.clone().next().is_some() && few_of(others & !failed, &flush_lacks))
            || pending.any(|p| by_request(&p.kind, &p.seen.excused))
    }

    /// S3: whether a start without `others`, a mask, could go on with what the records may say, so
    /// that these cannot change it.
    fn may_be_needed_by_records(&self, others: u32) -> bool {
        let binds = |table: &Table| {
            let is_other = |member: &&Uuid| {
                bits(u64::from(others)).any(|place| self.member_in(place) == **member)
            };
            let active = table.active.iter().filter(is_other).count();
            let absent = table.active.iter().chain(&table.inactive);
            let absent = absent.filter(|member| !is_other(member)).count();
            let votes = usize::from(table.votes);
            active >= votes || absent < votes
        };
        let tables = self.shared.records(|keeper| keeper.binding_tables());
        !tables.unwrap_or_default().iter().all(binds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::ReplicaIndex;
    use crate::common::operation::{Action, Operation, RequestId};

    /// A replica that hangs keeps the request of a series in flight from one step to the next.
    #[test]
    fn what_has_ended_of_an_earlier_step_of_a_series_does_not_count() {
        let mut world = World::planned(1, |plan| plan);
        let request = RequestId(0);
        let operation = |replica| Operation {
            request,
            replica: ReplicaIndex(replica),
            action: Action::Record {
                offset_bytes: 0,
                bytes: [].into(),
            },
        };
        world.start_operation(operation(0)).expect("it is allowed");
        world.took.push(Took {
            worker: world.input_from,
            request,
            replica: 1,
            time: Duration::from_secs(1),
            success: true,
            reads: false,
        });
        world.start_operation(operation(1)).expect("it is allowed");
        assert!(world.took.is_empty());
        assert_eq!(world.flights.len(), 2);
    }
}
