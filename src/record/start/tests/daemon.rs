//! What the daemon of the model does with a disk that is served, in the simplest way that obeys the
//! rules of the records. It may be killed in each step, after any part of it.

use uuid::Uuid;

use super::model::{Copy, EXTENTS, Killed, Replica, Served, Step, World, extent, layout, read};
use crate::record::start::{Verdict, take_in};
use crate::record::{Extents, Member, MemberState, Record, Stale};

impl World<'_> {
    /// Makes the replicas equal where they may differ.
    pub(super) fn settle(&mut self, served: &mut Served, images: &[Verdict]) -> Step {
        for index in 0..EXTENTS {
            let voting = served.there.iter().zip(images);
            let voting = voting.filter(|(_, image)| image.votes());
            let voting = voting.filter(|(_, image)| !image.stale.overlaps(extent(index)));
            let is_doubtful = |image: &Verdict| image.doubtful.overlaps(extent(index));
            let (doubtful, fresh): (Vec<_>, Vec<_>) =
                voting.partition(|(_, image)| is_doubtful(image));
            // A doubtful copy has a vote where none is fresh.
            let Some((first, _)) = fresh.iter().chain(&doubtful).next() else {
                continue;
            };
            let number = self.replicas[**first].image[index];
            let to = fresh.iter().chain(&doubtful);
            let to: Vec<usize> = to.map(|(place, _)| **place).collect();
            if !doubtful.is_empty() {
                // What is settled has changed for those that are missing.
                self.mark(served, index)?;
            }
            self.write_images(&to, index, number)?;
            let history = self.histories.get_mut(&served.history).unwrap();
            history.legal[index] = vec![number];
            history.before[index] = None;
            if !doubtful.is_empty() {
                history.older[index] = None;
                self.dispel(served, &to, index);
            }
        }
        self.clear_marks(served)
    }

    /// A table in two rounds. `false` if it cannot come into force.
    pub(super) fn change_table(&mut self, served: &mut Served) -> Result<bool, Killed> {
        let holders: Vec<Uuid> = served
            .there
            .iter()
            .map(|place| self.replicas[*place].id)
            .collect();
        if !served.record.may_agree(&holders) {
            return Ok(false);
        }
        self.write_records(served)?;
        served.record.agree();
        self.write_records(served)?;
        Ok(true)
    }

    /// Writes the record to all active replicas, and to those that are to hold it.
    fn write_records(&mut self, served: &Served) -> Step {
        let epoch = served.record.epoch;
        let is_meant = |place: &usize| {
            let member = served.record.member(self.replicas[*place].id).unwrap();
            let holds = MemberState::Inactive { holds: Some(epoch) };
            member.is_active() || member.state == holds
        };
        let to: Vec<usize> = served.there.iter().copied().filter(is_meant).collect();
        let (done, killed) = self.durable(&to, "record");
        for place in done {
            let replica = &mut self.replicas[place];
            let sequence = replica.record.as_ref().map_or(1, |old| old.sequence + 1);
            let record = served.record.for_replica(replica.id, sequence);
            replica.record = Some(Record {
                clean: served.record.clean,
                image: served.record.clean.then(|| replica.fingerprint()),
                ..record
            });
        }
        killed
    }

    fn write_images(&mut self, to: &[usize], index: usize, number: u32) -> Step {
        let (done, killed) = self.durable(to, "image");
        self.time += 1;
        for place in done {
            self.replicas[place].image[index] = number;
            self.replicas[place].modified = self.time;
        }
        killed
    }

    /// All of `to`, or those that a write has reached when the daemon was killed.
    fn durable(&mut self, to: &[usize], what: &str) -> (Vec<usize>, Step) {
        let subset = if self.kills {
            self.choices.of_rare(1 << to.len())
        } else {
            0
        };
        if subset == 0 {
            return (to.to_vec(), Ok(()));
        }
        let places = to.iter().enumerate();
        let done = places.filter(|(bit, _)| (subset - 1) & (1 << bit) != 0);
        let done: Vec<usize> = done.map(|(_, place)| *place).collect();
        self.log
            .push(format!("killed: of {to:?} a {what} has reached {done:?}"));
        (done, Err(Killed))
    }

    fn mark(&mut self, served: &Served, index: usize) -> Step {
        let active = self.active(served);
        let (done, killed) = self.durable(&active, "mark");
        for place in done {
            self.replicas[place].intent.insert(extent(index));
        }
        killed
    }

    /// What is marked is equal on all active replicas. Those that are not active missed it.
    fn clear_marks(&mut self, served: &mut Served) -> Step {
        let active = self.active(served);
        let marked = active
            .iter()
            .fold(Extents::new(layout()), |mut all, place| {
                all.insert_all(&self.replicas[*place].intent);
                all
            });
        let mut is_changed = false;
        for member in &mut served.record.members {
            if member.stale_where_changed && !marked.is_empty() {
                let missed = Stale::of_extents(&marked, layout());
                member.stale = member.stale.union(&missed, layout());
                is_changed = true;
            }
        }
        if is_changed {
            self.write_records(served)?;
        }
        let (done, killed) = self.durable(&active, "cleared map");
        for place in done {
            self.replicas[place].intent = Extents::new(layout());
        }
        killed
    }

    /// These have a copy that is good again.
    fn dispel(&self, served: &mut Served, places: &[usize], index: usize) {
        let mut good = Extents::new(layout());
        good.insert(extent(index));
        let good = Stale::of_extents(&good, layout());
        for place in places {
            let id = self.replicas[*place].id;
            let member = served.record.member_mut(id).unwrap();
            member.doubtful = member.doubtful.without(&good, layout());
        }
    }

    /// A flush that fails on so many replicas that too few hold the newest version for certain.
    pub(super) fn fail_flush(&mut self, served: &mut Served, index: usize) -> Step {
        let active = self.active(served).into_iter();
        let fresh = active.filter(|place| self.is_fresh(served, *place, index));
        let mut failing: Vec<usize> = fresh.collect();
        let history = &self.histories[&served.history];
        let Some(before) = history.before[index] else {
            return Ok(());
        };
        let sparing = self.choices.of(usize::from(self.votes));
        failing.drain(..sparing.min(failing.len()));
        let lost = match self.choices.of(3) {
            0 => &[],
            1 => &failing[..failing.len().min(1)],
            _ => &failing[..],
        };
        self.log.push(format!(
            "a flush of {index} fails on {failing:?}, lost on {lost:?}"
        ));
        for place in lost {
            self.replicas[*place].image[index] = before;
        }
        // A kill leaves the marks, since the flush has failed.
        let history = self.histories.get_mut(&served.history).unwrap();
        history.before[index] = None;
        history.legal[index].push(before);
        let mut extents = Extents::new(layout());
        extents.insert(extent(index));
        let lost = Stale::of_extents(&extents, layout());
        for place in failing {
            let id = self.replicas[place].id;
            let member = served.record.member_mut(id).unwrap();
            member.doubtful = member.doubtful.union(&lost, layout());
        }
        self.write_records(served)?;
        let history = self.histories.get_mut(&served.history).unwrap();
        history.legal[index].retain(|number| *number != before);
        history.older[index] = Some(before);
        Ok(())
    }

    pub(super) fn active(&self, served: &Served) -> Vec<usize> {
        let is_active = |place: &&usize| {
            let member = served.record.member(self.replicas[**place].id);
            member.is_some_and(Member::is_active)
        };
        served.there.iter().filter(is_active).copied().collect()
    }

    fn is_fresh(&self, served: &Served, place: usize, index: usize) -> bool {
        let member = served.record.member(self.replicas[place].id).unwrap();
        let is_bad = |set: &Stale| set.overlaps(extent(index));
        member.is_active() && !is_bad(&member.stale) && !is_bad(&member.doubtful)
    }

    /// A write, which the replica `failing` fails.
    pub(super) fn write(
        &mut self,
        served: &mut Served,
        index: usize,
        failing: Option<usize>,
    ) -> Step {
        self.log
            .push(format!("write to {index}, fails on {failing:?}"));
        self.mark(served, index)?;
        self.numbers += 1;
        let number = self.numbers;
        let history = self.histories.get_mut(&served.history).unwrap();
        let before = history.legal[index].clone();
        history.before[index] = None;
        history.legal[index].push(number);
        let mut to = self.active(served);
        to.retain(|place| Some(*place) != failing);
        self.write_images(&to, index, number)?;
        self.dispel(served, &to, index);
        let holding = to
            .iter()
            .filter(|place| self.is_fresh(served, **place, index));
        if holding.count() < usize::from(self.votes) {
            served.is_undecided |= failing.is_some();
            return Ok(());
        }
        if let Some(failing) = failing
            && self.active(served).contains(&failing)
            && !self.evict(served, failing)?
        {
            served.is_undecided = true;
            return Ok(());
        }
        let history = self.histories.get_mut(&served.history).unwrap();
        history.legal[index] = vec![number];
        history.older[index] = None;
        if let [before] = before[..] {
            history.before[index] = Some(before);
        }
        Ok(())
    }

    /// Whether the replica is out.
    pub(super) fn evict(&mut self, served: &mut Served, place: usize) -> Result<bool, Killed> {
        self.log.push(format!("evict {place}"));
        let others: Vec<usize> = self.active(served);
        let others = others.into_iter().filter(|other| *other != place);
        let others: Vec<usize> = others.collect();
        let has_copies = |index| {
            let fresh = others
                .iter()
                .filter(|other| self.is_fresh(served, **other, index));
            fresh.count() >= usize::from(self.votes)
        };
        if !(0..EXTENTS).all(has_copies) {
            return Ok(false);
        }
        let before = served.record.clone();
        served.record.propose();
        served.record.deactivate(self.replicas[place].id, None);
        let done = self.change_table(served)?;
        if !done {
            served.record = before;
        }
        Ok(done)
    }

    /// Takes a replica in that is not active, and copies to it.
    pub(super) fn rejoin(&mut self, served: &mut Served, place: usize) -> Step {
        self.log.push(format!("rejoin {place}"));
        let active = self.active(served);
        if active.contains(&place) {
            return self.resync(served, place);
        }
        let Some(first) = active.first() else {
            return Ok(());
        };
        let running = &self.replicas[*first];
        let running = read(running.record.as_ref().unwrap(), &running.intent);
        let Ok(verdict) = take_in(&running, &self.candidate(place)) else {
            return Ok(());
        };
        if !served.there.contains(&place) {
            served.there.push(place);
        }
        // It holds the table before anything is copied to it.
        served.record.propose();
        let epoch = served.record.epoch;
        let id = self.replicas[place].id;
        let member = served.record.member_mut(id).unwrap();
        member.state = MemberState::Inactive { holds: Some(epoch) };
        member.stale = verdict.stale.union(&member.stale, layout());
        if !verdict.votes() {
            member.stale = Stale::All;
        }
        let doubtful = verdict.doubtful.union(&member.doubtful, layout());
        member.doubtful = doubtful.without(&member.stale, layout());
        if !self.change_table(served)? {
            return Err(Killed);
        }
        self.replicas[place].intent = self.replicas[*first].intent.clone();
        served.record.propose();
        let member = served.record.member_mut(id).unwrap();
        member.state = MemberState::Active;
        member.stale_where_changed = false;
        if !self.change_table(served)? {
            return Err(Killed);
        }
        self.resync(served, place)
    }

    fn resync(&mut self, served: &mut Served, place: usize) -> Step {
        let id = self.replicas[place].id;
        for index in 0..EXTENTS {
            if self.is_fresh(served, place, index) {
                continue;
            }
            let active = self.active(served);
            let mut fresh = active
                .iter()
                .filter(|other| self.is_fresh(served, **other, index));
            let Some(source) = fresh.next() else {
                return Ok(());
            };
            let number = self.replicas[*source].image[index];
            self.write_images(&[place], index, number)?;
        }
        let member = served.record.member_mut(id).unwrap();
        if member.is_active() {
            member.stale = Stale::None;
            member.doubtful = Stale::None;
            self.replicas[place].history = served.history;
            self.write_records(served)?;
        }
        Ok(())
    }

    pub(super) fn end(&mut self, served: &mut Served) -> Step {
        self.log.push("end".to_owned());
        if served.is_undecided {
            return Err(Killed);
        }
        self.clear_marks(served)?;
        served.record.clean = true;
        self.write_records(served)
    }

    /// Copies an image with its record.
    pub(super) fn copy(&mut self, while_served: bool) {
        let place = self.choices.of(self.replicas.len());
        self.log.push(format!("copy {place}"));
        self.copy = Some(Copy {
            place,
            replica: self.replicas[place].clone(),
            while_served,
        });
    }

    /// Puts the copy back, if there is one and that can be recognized: enough of the others know of
    /// a clean end of a table in which it is active, or it was made while the disk was not served.
    pub(super) fn restore(&mut self) -> bool {
        let Some(copy) = self.copy.take() else {
            return false;
        };
        let id = copy.replica.id;
        let epoch = copy.replica.record.as_ref();
        let epoch = epoch.map_or(0, |record| record.epoch.number);
        let knows = |replica: &&Replica| {
            let record = replica.record.as_ref();
            let record = record.filter(|record| record.clean && record.epoch.number >= epoch);
            let is_active = |id| {
                let member = record.and_then(|record| record.member(id));
                member.filter(|member| member.is_active())
            };
            let own = is_active(replica.id);
            let own = own.filter(|own| own.stale.is_none() && own.doubtful.is_none());
            replica.id != id && own.is_some() && is_active(id).is_some()
        };
        let knowing = self.replicas.iter().filter(knows).count();
        if copy.while_served && knowing < usize::from(self.votes) {
            return false;
        }
        self.log.push(format!("restore {}", copy.place));
        self.replicas[copy.place] = copy.replica;
        self.disturbed = true;
        true
    }

    /// Another program writes to an image.
    pub(super) fn modify(&mut self, place: usize) {
        self.log.push(format!("modify {place}"));
        self.time += 1;
        self.replicas[place].image = [9999; EXTENTS];
        self.replicas[place].modified = self.time;
        self.disturbed = true;
    }
}
