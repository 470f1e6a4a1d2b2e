//! The daemon ends, and starts again with the images that can be opened then (S3).
//!
//! Any image may be missing. A start is refused where the others could have gone on alone, and
//! tried again with more of them; what is missing when the disk is served may be there later.

use std::path::PathBuf;

use super::Violation;
use super::ledger::{Ledger, Masks};
use super::plan::{bits, mask_below, mask_of};
use super::records::{name, show_record, uuid};
use super::repair_limit::Unasked;
use super::staleness::Staleness;
use super::state::{Checked, World, trace};
use crate::common::operation::Action;
use crate::common::ranges::RangeSet;
use crate::quorum::health::Remembered;
use crate::record::MemberState;
use crate::record::format::Read;
use crate::record::start::{Candidate, Decision, Found, Kept, Options, Refusal, Start, decide};

/// The images of a start, masks of places.
#[derive(Clone, Copy, Debug)]
struct Images {
    /// The command line has them.
    named: u32,
    /// They can be opened.
    there: u32,
    /// They are members no more, or not yet.
    no_members: u32,
}

/// How the records were when the daemon ended.
#[derive(Clone, Copy, Debug)]
struct Ended {
    /// All replicas were in service, and their records said so.
    complete: bool,
}

impl World {
    /// The host crashes, or the daemon is `killed`: what is in flight, and after a crash also what
    /// is not durable, is there afterwards or not, sector by sector and replica by replica. Then
    /// the daemon starts again, and knows from its records which replicas are stale where.
    pub(super) fn crash(&mut self, killed: bool) -> Checked {
        let kind = match killed {
            true if self.records.is_closed => "clean end",
            true => "kill",
            false => "crash",
        };
        trace!(self, "-- {kind}");
        match killed {
            true if self.records.is_closed => self.statistics.clean_ends += 1,
            true => self.statistics.kills += 1,
            false => self.statistics.crashes += 1,
        }
        for index in 0..self.flights.len() {
            let sectors = self.random.bits();
            self.crash_in_flight(index, sectors);
        }
        if killed {
            self.lose_errors();
        }
        let ended = self.ended();
        self.tear_records();
        self.records.forget();
        let all = u64::from(self.members | self.records.named());
        for replica in bits(all) {
            if killed {
                self.drop_lost_pages(replica);
                continue;
            }
            let sectors = self.random.bits();
            self.write_back(replica, sectors);
            self.replicas[replica].crash(0);
        }
        if self.plan.records {
            self.copy_or_put_back();
            self.edit_outside();
        }
        // What the records say.
        let start = match self.plan.records {
            true => match self.read_records(ended)? {
                Some(start) => Some(start),
                None => {
                    self.is_lost = true;
                    return Ok(());
                }
            },
            false => None,
        };
        let mut changed = RangeSet::default();
        let remembered = match &start {
            Some(start) => {
                changed = self.unsettled(start);
                self.known_at_start(start)
            }
            None => {
                self.missing = 0;
                // Anything may have been changed last.
                changed.insert(self.plan.disk());
                self.shared.remembered()
            }
        };
        let before = self.forget(killed);
        if let Some(start) = start.as_ref().filter(|start| start.forced) {
            self.begin_branch(start, self.members & !self.missing, (&before, killed));
        }
        let marked = mask_of(changed.iter());
        self.note_remembered(&remembered, &before, (marked, killed))?;

        self.members_ever = self.count();
        // The operator has changed the command line too.
        self.plan.threshold = self.threshold;
        if let Some(start) = &start {
            self.plan.threshold = usize::from(start.record.threshold.votes);
            self.plan.follows = start.record.threshold.follows_majority;
        }
        let missing = self.missing;
        self.start_engines();
        self.restore(&remembered, &changed, killed)?;
        self.leave_out(missing, &remembered);
        if let Some(start) = &start {
            self.keep_records(start)?;
        }
        self.compare_first()
    }

    fn ended(&self) -> Ended {
        let is_record = |action: &Action| matches!(action, Action::Record { .. });
        let mut flights = self.flights.iter();
        let written = flights.all(|flight| !is_record(&flight.operation.action));
        let in_service = self.ledger.evicted & self.members == 0;
        Ended {
            complete: written
                && in_service
                && self.may_change_members()
                && !self.records.is_cut_short,
        }
    }

    /// The daemon has ended: nothing of what it did goes on. Returns what was known of faults.
    fn forget(&mut self, killed: bool) -> Ledger {
        (self.to_be_released, self.unsynced) = (0, 0);
        self.jobs.clear();
        self.asked_resyncs.clear();
        let mut before = std::mem::take(&mut self.ledger);
        self.staleness = Staleness::default();
        self.flights.clear();
        self.chunks = Default::default();
        self.evicted_at = Default::default();
        self.forget_times();
        self.wakes.clear();
        self.pending.clear();
        self.preferences.clear();
        self.now += 1;
        self.forget_recovered(&mut before);
        match killed {
            true => self.model.killed(self.now),
            false => self.model.crashed(self.now),
        }
        self.crashed = true;
        self.tick_wanted = 0;
        self.undecided = 0;
        self.unasked = Unasked::default();
        self.ledger.any = before.any;
        self.ledger.unreadable = before.unreadable;
        self.ledger.unwritable = before.unwritable;
        if killed {
            self.ledger.corrupt = before.corrupt;
            self.ledger.dropped = before.dropped;
            self.ledger.falsely_durable = before.falsely_durable;
        }
        (self.ledger.at_risk, self.ledger.lost_by_crash) = (before.at_risk, before.lost_by_crash);
        before
    }

    /// What the daemon knows of the replicas when it starts, and whether that is right.
    fn note_remembered(
        &mut self,
        remembered: &Remembered,
        before: &Ledger,
        (marked, killed): (u64, bool),
    ) -> Checked {
        let disk = self.plan.mask(self.plan.disk());
        let mut missed = Masks::default();
        // Where the records say that it holds what the others hold, if it is missing.
        let mut returns_with = Masks::default();
        for replica in self.members() {
            let copies = &remembered.copies[replica];
            let [stale, doubtful] =
                [&copies.stale, &copies.doubtful].map(|set| mask_of(set.iter()));
            missed[replica] = stale;
            if stale == disk {
                self.records.uncopied |= 1 << replica;
            }
            let stale = stale | doubtful;
            self.ledger.excused[replica] = stale;
            self.ledger.unsound[replica] = stale;
            self.ledger.written[replica] = disk;
            self.staleness.restored(replica, stale, disk);
            if self.missing >> replica & 1 == 1 {
                // It is not asked, and what it holds is looked at when it is there.
                missed[replica] = disk;
                // Of an old copy its own record says that it is one.
                let old = self.records.put_back | self.records.left_behind;
                if old >> replica & 1 == 0 {
                    returns_with[replica] = disk & !stale;
                }
                self.ledger.excused[replica] = disk;
                self.ledger.corrupt[replica] |=
                    before.corrupt[replica] | before.falsely_durable[replica];
            }
        }
        for sector in 0..self.changed_at.len() {
            self.check_after_crash(sector, before, (&missed, &returns_with, killed), marked)?;
        }
        Ok(())
    }

    /// Which images can be opened.
    fn choose_images(&mut self) -> Images {
        let all = self.records.named();
        // One that never answers may be needed without the others.
        if self.plan.dead != 0 || self.random.below(2) == 0 {
            return Images::all(all);
        }
        let mut missing = self.random.part(all);
        if self.random.below(2) == 0 {
            missing = self.random.part(missing);
        }
        let absent = match self.random.below(4) {
            0 => self.random.part(missing),
            _ => 0,
        };
        let there = all & !missing;
        if there & !self.records.left_behind == 0 {
            // Those that a forced start has left behind would go on.
            return Images::all(all);
        }
        // One of those that know that a copy was put back.
        let known = match self.knowing() & all {
            knowing if knowing != 0 && knowing & there == 0 => {
                1 << self.random.bit(u64::from(knowing))
            }
            _ => 0,
        };
        Images {
            named: all & !absent | known,
            there: there | known,
            no_members: 0,
        }
    }

    /// The daemon starts again: what it may serve. The places of its members change if the last
    /// change of the operator is not in the records. `None`: nothing, and that is right.
    fn read_records(&mut self, ended: Ended) -> Result<Option<Box<Start>>, Violation> {
        let mut options = Options {
            force: false,
            adopt: None,
            votes: None,
            run: uuid(&mut self.random),
            branch: uuid(&mut self.random),
        };
        let mut images = self.choose_images();
        loop {
            let places: Vec<usize> = bits(u64::from(images.named)).collect();
            let candidate = |place: &usize| match images.there >> place & 1 {
                0 => missing(*place),
                _ => self.candidate(*place),
            };
            let candidates: Vec<Candidate> = places.iter().map(candidate).collect();
            for candidate in &candidates {
                trace!(self, "{}", show_record(candidate));
            }
            match decide(&candidates, &options) {
                Ok(Decision::Start(start)) => {
                    self.statistics.adopted += u64::from(start.adopted.is_some());
                    self.is_started(&places, images, &start)?;
                    return Ok(Some(start));
                }
                // None of those that are there has ever been a member.
                Ok(Decision::Create) => {}
                Err(refusal) => {
                    // The command line is that of before the last change, or of after it.
                    let other = match &refusal {
                        Refusal::Removed { node_name, .. }
                        | Refusal::NotAMember { node_name, .. } => Some(node_name),
                        Refusal::NotOpened { reason } => Some(reason),
                        _ => None,
                    };
                    let is_other = |place: &&usize| other.is_some_and(|n| name(**place) == *n);
                    if let Some(place) = places.iter().find(is_other) {
                        if options.adopt.is_some() {
                            // The adopted image is older than a member. Without that member it
                            // is all of the disk, as far as can be known.
                            return Ok(None);
                        }
                        images.named &= !(1 << place);
                        images.no_members |= 1 << place & images.there;
                        images.there &= !(1 << place);
                        continue;
                    }
                    trace!(self, "refused: {refusal}");
                    self.check_refused(&refusal, images, &candidates, ended)?;
                    if matches!(refusal, Refusal::Split(_)) {
                        // Those of the branch are started alone.
                        let left_behind = self.records.left_behind;
                        images.no_members |= left_behind;
                        images.named &= !left_behind;
                        images.there &= !left_behind;
                        continue;
                    }
                    let is_unknown = matches!(
                        refusal,
                        Refusal::HistoryUnknown { .. } | Refusal::CutShort { .. }
                    );
                    // One that is of a smaller disk would make the disk smaller.
                    let of_size = images.there & self.records.of_size(self.plan.sectors);
                    let may_force = self.plan.forces && of_size != 0;
                    if is_unknown && may_force && self.random.below(3) > 0 {
                        options.force = true;
                        continue;
                    }
                    // Without a record an image is of no disk that is known.
                    if of_size != 0 && self.may_adopt(&refusal, images) {
                        let place = self.random.bit(u64::from(of_size)) as usize;
                        options.adopt = Some(name(place));
                        options.force = true;
                        continue;
                    }
                }
            }
            options.force = false;
            if !self.open_more(&mut images)? {
                return Ok(None);
            }
        }
    }

    /// The disk is served with these.
    fn is_started(&mut self, places: &[usize], images: Images, start: &Start) -> Checked {
        for (place, image) in places.iter().zip(&start.images) {
            if image.member != self.member_in(*place) {
                let text = format!("replica {place} is taken for another one");
                return Err(Violation::new("S3", text));
            }
        }
        let is_member = |place: &usize| start.record.member(self.member_in(*place)).is_some();
        let members = bits(u64::from(self.records.named())).filter(is_member);
        self.members = members.fold(0, |mask, place| mask | 1 << place);
        self.missing = self.members & !images.there;
        self.are_served(images.there);
        self.statistics.subsets += u64::from(self.missing != 0);
        self.check_clean_start(start)
    }

    /// S3: whether the disk may be refused.
    fn check_refused(
        &self,
        refusal: &Refusal,
        images: Images,
        candidates: &[Candidate],
        ended: Ended,
    ) -> Checked {
        let named = self.records.named() & !images.no_members;
        let unusable = self.records.unusable();
        let old = self.records.put_back | self.records.left_behind | unusable;
        let missing = named & (!images.there | old);
        let missing_members = (missing & self.members).count_ones() as usize;
        let unknown = self.of_unknown_table(candidates);
        let uncopied = (self.records.uncopied | unknown) & self.members & !missing;
        let copied = self.copied_somewhere(uncopied);
        let may_be = match refusal {
            // W11: the operator has given up what no other replica holds, or, if that is all of the
            // disk, holds durably. Or the disk is so small that a vote on all of it, or errors,
            // have made most replicas stale. Or one was evicted again before the records said that
            // it was back: its copies are not known. Or all but one were to be copied as a whole.
            // Or so many old copies were put back one after the other that too few others are left.
            Refusal::TooFewCopies { .. } => {
                // What the disk has grown by is no copy that counts before the records say so.
                let disk = mask_below(recorded_capacity(candidates));
                missing != 0
                    || self.records.left_behind != 0
                    || self.ledger.given_up != 0
                    || disk != 0 && self.ledger.lost_by_crash & disk == disk
                    || self.is_marked(candidates)
                    || is_adopted(candidates)
                    || copied < self.threshold
            }
            Refusal::HistoryUnknown { .. } | Refusal::CutShort { .. } => {
                missing != 0 && !(ended.complete && missing_members < self.threshold)
            }
            Refusal::NoRecord { .. } | Refusal::OnlyCopies { .. } | Refusal::Modified { .. } => {
                missing != 0
            }
            Refusal::Split(_) => images.there & self.records.left_behind != 0,
            _ => false,
        };
        match may_be {
            true => Ok(()),
            false => {
                let text = format!("the disk is not served with {:b}: {refusal}", images.there);
                Err(Violation::new("S3", text))
            }
        }
    }

    /// Whether the operator takes one of the images as the truth now.
    fn may_adopt(&mut self, refusal: &Refusal, images: Images) -> bool {
        let too_few = matches!(
            refusal,
            Refusal::Modified { .. } | Refusal::TooFewCopies { .. }
        );
        let all = self.records.named() & !images.no_members;
        let all_there = images.there == all && self.records.left_behind == 0;
        too_few && all_there && self.plan.forces && self.random.below(3) > 0
    }

    /// After a refusal: more images can be opened. `false`: all could.
    fn open_more(&mut self, images: &mut Images) -> Result<bool, Violation> {
        let all = self.records.named() & !images.no_members;
        let missing = all & !images.there;
        if missing == 0 {
            return Ok(false);
        }
        self.statistics.refused += 1;
        let some = self.random.part(missing);
        images.there |= if some == 0 { missing } else { some };
        images.named = all;
        Ok(true)
    }

    /// Places of members of which the records do not say which table they hold.
    fn of_unknown_table(&self, candidates: &[Candidate]) -> u32 {
        let members = records_of(candidates).flat_map(|read| &read.record.members);
        let unknown: Vec<_> = members
            .filter(|member| matches!(member.state, MemberState::Inactive { holds: None }))
            .map(|member| member.id)
            .collect();
        let places = bits(u64::from(self.records.named()));
        let places = places.filter(|place| unknown.contains(&self.member_in(*place)));
        places.fold(0, |mask, place| mask | 1 << place)
    }

    /// How many members that are not to be copied as a whole hold something that is not stale, and
    /// durable.
    fn copied_somewhere(&self, uncopied: u32) -> usize {
        let disk = self.plan.mask(self.plan.disk());
        let members = self.members().filter(|member| uncopied >> member & 1 == 0);
        let lacks = |member: usize| self.ledger.excused[member] | self.ledger.unsound[member];
        members
            .filter(|member| lacks(*member) & disk != disk)
            .count()
    }

    /// Whether all of the disk, as one of the records knows it, is marked, or was lost by a forced
    /// start.
    fn is_marked(&self, candidates: &[Candidate]) -> bool {
        records_of(candidates).any(|read| {
            let disk = mask_below(read.intent.layout().capacity());
            let marked = mask_of(read.intent.iter()) | self.ledger.lost_by_crash;
            marked & disk == disk
        })
    }
}

impl Images {
    fn all(named: u32) -> Self {
        Self {
            named,
            there: named,
            no_members: 0,
        }
    }
}

/// Whether one image was taken as the truth, and the others were not complete when the daemon
/// ended: an extent of which they hold a part only counts as stale.
fn is_adopted(candidates: &[Candidate]) -> bool {
    records_of(candidates).any(|read| read.record.adopted.is_some())
}

/// Sectors of the disk as its records say.
fn recorded_capacity(candidates: &[Candidate]) -> u64 {
    let capacities = records_of(candidates).map(|read| read.record.capacity);
    capacities.max().unwrap_or(0)
}

/// The records that can be used.
fn records_of(candidates: &[Candidate]) -> impl Iterator<Item = &Read> {
    candidates
        .iter()
        .filter_map(|candidate| match &candidate.image {
            Ok(Found {
                kept: Kept::Read(read),
                ..
            }) => Some(&**read),
            _ => None,
        })
}

/// An image that cannot be opened.
fn missing(place: usize) -> Candidate {
    Candidate {
        node_name: name(place),
        path: PathBuf::from(name(place)),
        image: Err(name(place)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quorum::health::Wanted;
    use crate::sim::plan::Plan;

    fn world(seed: u64, replicas: usize, threshold: usize) -> World {
        World::planned(seed, |plan| Plan {
            replicas,
            threshold,
            follows: false,
            workers: 1,
            dead: 0,
            records: true,
            forces: false,
            old_copies: false,
            ..plan
        })
    }

    /// The daemon is killed while it ends and records that the threshold is higher: a replica that
    /// is missing then could have gone on alone.
    #[test]
    fn a_clean_end_that_is_cut_short_leaves_the_old_table() {
        for seed in 0..300 {
            let mut world = world(seed, 5, 1);
            let wanted = Wanted::Given(2);
            world.shared.want_threshold(wanted).expect("there are five");
            world.wanted = Some(2);
            world.note_threshold().expect("all are fresh");
            let ended = world.end();
            assert!(ended.is_ok(), "seed {seed}: {ended:?}");
        }
    }

    #[test]
    fn too_many_images_that_were_put_back_one_after_the_other_are_too_few_copies() {
        let mut world = world(1, 4, 3);
        let refusal = Refusal::TooFewCopies {
            voting: vec![name(0), name(1)],
            others: Vec::new(),
            votes: 3,
        };
        let images = Images::all(0b1111);
        let ended = Ended { complete: true };
        let mut is_excused = |uncopied| {
            world.records.uncopied = uncopied;
            world.check_refused(&refusal, images, &[], ended).is_ok()
        };
        assert!(!is_excused(0));
        assert!(!is_excused(0b0100), "one is not too many");
        assert!(is_excused(0b1100));
    }
}
