//! I6: how long the guest may wait, whatever the times of the replicas are.
//!
//! Time is counted in *rounds*: a round ends when all operations have ended, or were evicted with
//! their replica, that were in flight when it began. So of operations that follow each other each
//! takes two rounds at most. W6 bounds how long one operation is waited for; this file bounds how
//! many follow each other until a request is answered, and that nothing else is waited for.

use std::time::Duration;

use super::Violation;
use super::effects::number_of;
use super::flight::Flight;
use super::state::{Checked, World};
use crate::engine::ReadPattern;

/// For how many rounds a request may be overtaken: until it has asked for the lock of its range.
const OVERTAKEN_ROUNDS: u64 = 4;

impl World {
    /// The rounds that a request may take, with one for each of `others` that is in its way.
    fn rounds_of(&self, others: usize) -> u64 {
        // First, others if need be, under the lock, the winner over what else is legal.
        let steps = match self.plan.read_pattern {
            ReadPattern::Fifo => self.members_ever + 3,
            ReadPattern::Quorum | ReadPattern::Threshold => 4,
        };
        // S2, S4: marks, the table twice, and another series of writes before.
        let records = if self.plan.records { 12 } else { 0 };
        2 * ((steps + records) * (1 + others)) as u64
    }

    /// The requests that may be in the way of a new one: also those of jobs, and what follows
    /// requests that are answered.
    fn in_the_way(&self) -> usize {
        let active = self.engines.iter().map(|engine| engine.active());
        // A chunk is about to begin, perhaps.
        active.sum::<usize>() + self.jobs.len()
    }

    /// The rounds that a request may take which begins now.
    pub(super) fn rounds_at_begin(&mut self) -> u64 {
        self.note_overtaking();
        self.rounds_of(self.in_the_way())
    }

    /// A request begins that may ask for a lock before those that have begun just now.
    fn note_overtaking(&mut self) {
        let (more, rounds) = (self.rounds_of(0), self.rounds);
        let is_young = |round: u64| rounds <= round + OVERTAKEN_ROUNDS;
        let young = self.pending.iter_mut().filter(|p| is_young(p.round));
        young.for_each(|pending| pending.rounds += more);
    }

    /// An operation is submitted.
    pub(super) fn note_step(&mut self, flight: &Flight) {
        let is_new = |other: &Flight| request_of(other) != request_of(flight);
        if flight.background && self.flights.iter().all(is_new) {
            self.note_overtaking();
        }
        if flight.part {
            self.pending.iter_mut().for_each(|p| p.rounds += 2);
        }
    }

    /// A replica has failed or was evicted: a vote may have to be taken again.
    pub(super) fn note_setback(&mut self) {
        let more = self.rounds_of(self.in_the_way());
        self.pending.iter_mut().for_each(|p| p.rounds += more);
    }

    /// Something has happened: perhaps a round has ended.
    pub(super) fn note_round(&mut self) -> Checked {
        let in_service = |replica: usize| !self.is_evicted(replica);
        let of_service = self.flights.iter().filter(|f| in_service(f.replica()));
        let oldest = of_service.map(|flight| flight.round).min();
        if oldest.is_none_or(|oldest| oldest < self.rounds) {
            return Ok(());
        }
        self.rounds += 1;
        let mut pending = self.pending.iter();
        match pending.find(|p| self.rounds > p.round + p.rounds) {
            None => Ok(()),
            Some(pending) => {
                let (number, rounds) = (number_of(pending.tag), pending.rounds);
                let text = format!("request {number} is not answered after {rounds} rounds");
                Err(Violation::new("I6", text).at(self.plan.mask(pending.range)))
            }
        }
    }

    /// Nothing happens before `next`.
    pub(super) fn check_jump(&mut self, next: Duration) -> Checked {
        let is_served = self.flights.iter().any(|f| !self.is_evicted(f.replica()));
        if let Some(pending) = self.pending.first()
            && !is_served
            && next > self.clock
        {
            let text = format!("nothing is done for request {}", number_of(pending.tag));
            return Err(Violation::new("I6", text).at(self.plan.mask(pending.range)));
        }
        Ok(())
    }
}

fn request_of(flight: &Flight) -> (usize, u32) {
    (flight.worker, flight.operation.request.0)
}
