//! What the engine reports of jobs and removed replicas, and what must be true then.

use super::Violation;
use super::pending::PendingKind;
use super::plan::bits;
use super::state::{Checked, World, trace};
use crate::common::ReplicaIndex;
use crate::jobs::{JobChange, JobEvent, JobInfo, JobKind, JobStatus, Jobs};
use crate::quorum::health::Health;

impl World {
    /// Looks at or changes the jobs, like the thread that runs the operator's commands.
    pub(super) fn with_jobs<R>(
        &mut self,
        with: impl FnOnce(&mut Jobs, &Health) -> R,
    ) -> Result<R, Violation> {
        let mut events = Vec::new();
        self.overlapped = false;
        let result = self.shared.jobs(|event| events.push(event), with);
        self.tick_wanted |= 1;
        self.jobs_reported(events)?;
        Ok(result)
    }

    pub(super) fn jobs_reported(&mut self, events: Vec<JobEvent>) -> Checked {
        events
            .into_iter()
            .try_for_each(|event| self.job_reported(event))
    }

    /// The engine reports a change of a job: jobs go through their states in order.
    pub(super) fn job_reported(&mut self, event: JobEvent) -> Checked {
        let JobInfo {
            id, kind, status, ..
        } = event.job;
        trace!(self, "{id}: {:?} {status:?} of {kind:?}", event.what);
        let known = self.jobs.iter().position(|job| job.id == id);
        let before = known.map(|known| self.jobs[known].status);
        let is_next = match (event.what, before) {
            (JobChange::Status, None) => status == JobStatus::Created,
            (JobChange::Status, Some(before)) => follows(before, status),
            (JobChange::Completed | JobChange::Cancelled, before) => before == Some(status),
        };
        if !is_next {
            let text = format!("{id} is {status:?} after {before:?}");
            return Err(Violation::new("jobs", text));
        }
        self.note_decision(&event);
        match known {
            Some(known) if status == JobStatus::Null => drop(self.jobs.swap_remove(known)),
            Some(known) => self.jobs[known] = event.job.clone(),
            None => self.jobs.push(event.job.clone()),
        }
        if event.what == JobChange::Completed {
            self.completed_job = Some(event.job.clone());
        }
        match (event.what, event.job.kind, event.job.error) {
            (JobChange::Completed, JobKind::Resync(replica), None) => {
                self.statistics.resynced += 1;
                self.unsynced &= !(1 << replica.0);
                self.check_progress(&event.job)?;
                self.check_synced(replica.as_usize())?;
                // A resync that has copied nothing since the replica last failed does not flush:
                // what the guest has written is durable after the guest's next flush.
                let failures = self.ledger.failures[replica.as_usize()];
                let copied = event.job.sectors_written > self.ledger.copied[replica.as_usize()];
                if copied && self.asked_resyncs.contains(&(id, failures)) {
                    self.check_synced_durably(replica.as_usize())?;
                }
                Ok(())
            }
            (JobChange::Completed, _, None) => self.check_progress(&event.job),
            (JobChange::Status, JobKind::Resync(replica), _) if before.is_none() => {
                self.ledger.copied[replica.as_usize()] = 0;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The engine knows that a replica has failed a flush, or has evicted it.
    pub(super) fn note_failure(&mut self, replica: usize) {
        self.ledger.failures[replica] += 1;
        self.note_setback();
        let jobs = self.shared.jobs(|_| (), |jobs, health| jobs.list(health));
        let resync =
            |job: &&JobInfo| matches!(job.kind, JobKind::Resync(of) if of.as_usize() == replica);
        let copied = jobs.iter().find(resync).map(|job| job.sectors_written);
        self.ledger.copied[replica] = copied.unwrap_or(0);
    }

    /// A job that is complete has done all of its work.
    fn check_progress(&self, job: &JobInfo) -> Checked {
        if job.current_bytes == job.total_bytes {
            return Ok(());
        }
        let text = format!(
            "{} is done at {} of {}",
            job.id, job.current_bytes, job.total_bytes
        );
        Err(Violation::new("jobs", text))
    }

    /// A replica that was added, and has not failed or been evicted since, has been written
    /// everywhere when its resync is complete.
    fn check_synced(&self, replica: usize) -> Checked {
        // What a vote on another worker has made stale during the same input may be later.
        let mut stale = self.ledger.excused[replica] & !self.staleness.decided_against[replica];
        if self.overlapped {
            // And so may be the end of a write that it has missed.
            stale &= self.before_input.excused[replica];
        }
        // A write that has ended in this input is perhaps answered after this.
        for pending in self.pending.iter().filter(|_| self.plan.records) {
            if let PendingKind::Write(write) = &pending.kind
                && write.succeeded >> replica & 1 == 1
            {
                stale &= !self.plan.mask(pending.range);
            }
        }
        if self.ledger.failures[replica] == 0 && stale != 0 {
            let text = format!("replica {replica} is resynced, but was not written at {stale:b}");
            return Err(Violation::new("resync", text).at(stale));
        }
        Ok(())
    }

    /// W5: a resync that the operator has asked for is complete when its copies are durable.
    fn check_synced_durably(&self, replica: usize) -> Checked {
        let mut crashed = self.model.clone();
        crashed.crashed(self.now + 1);
        let doubt = self.ledger.falsely_durable[replica]
            | self.ledger.wrong(replica)
            | self.ledger.excused[replica]
            | self.ledger.mixed;
        for sector in bits(self.replicas[replica].all() & !doubt) {
            let value = self.replicas[replica].durable(sector);
            if !crashed.is_permitted(sector, value, self.now + 1) {
                let text =
                    format!("replica {replica} is resynced, but has {value} of {sector} on disk");
                return Err(Violation::new("W5", text).at(1 << sector));
            }
        }
        Ok(())
    }

    /// The engines report that the place of a removed replica is free.
    pub(super) fn released(&mut self, replica: ReplicaIndex) -> Checked {
        let place = replica.as_usize();
        trace!(self, "replica {place} is released");
        let in_flight = self.flights.iter().any(|flight| flight.replica() == place)
            || self.is_preferred_holder(place);
        if self.to_be_released >> place & 1 == 0 || in_flight {
            let text = format!("the place of replica {place} is not free");
            return Err(Violation::new("remove", text));
        }
        self.to_be_released &= !(1 << place);
        Ok(())
    }
}

/// Whether a job can go from one state to the other.
fn follows(before: JobStatus, after: JobStatus) -> bool {
    use JobStatus::{Aborting, Concluded, Created, Null, Paused, Running};
    matches!(
        (before, after),
        (Created, Running)
            | (Running, Paused | Aborting | Concluded)
            | (Paused, Running | Aborting)
            | (Aborting, Concluded)
            | (Concluded, Null)
    )
}
