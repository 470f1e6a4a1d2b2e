//! What the files of the records hold durably, and what is to be written to them next.
//!
//! It takes what the records are to say ([`Keeper::want`]), and is asked for
//! one [`Round`] after the other: at most one write to each active replica. When there is none left
//! and [`Keeper::is_durable`], the records say it. Nothing else writes to them.
//!
//! Invariants:
//! - The pages of the intent map are written before a slot that makes a replica active, and before
//!   the first one of a start; marks are taken from pages only when the slots say exactly where
//!   each member is stale, since an inactive one is stale wherever there is a mark.
//! - A change of the table is proposed to all that will be active, and written to them again when
//!   it is agreed upon.
//! - A replica that has no record yet has the table that makes it one of the disk before all
//!   others have it.
//! - The number of a slot advances only when its predecessor is durable, so that a write that
//!   fails never touches the slot that counts.

mod wanted;

use std::sync::Arc;

use uuid::Uuid;

pub use self::wanted::{Wanted, WantedMember};

use self::wanted::{covers, take};
use super::extents::Extents;
use super::format;
use super::layout::Layout;
use super::member::{Member, MemberState, short_name};
use super::past_job::PastJob;
use super::stale::Stale;
use super::table::{Fingerprint, Record, Table};
use crate::common::{ReplicaIndex, ReplicaSet};

/// The records of a disk while it is served.
#[derive(Clone, Debug)]
pub struct Keeper {
    /// What the slots are to say, without what differs between them.
    record: Record,
    /// Grows with each change of `record`.
    slot_version: u64,
    /// What the pages are to say.
    intent: Extents,
    /// Grows with each change of `intent`.
    pages_version: u64,
    /// Marks to be taken away when the slots are durable.
    clearing: Option<Extents>,
    /// There are jobs that the slots may not have.
    has_new_jobs: bool,
    /// By index.
    places: Vec<Option<Place>>,
    /// What the table said of members before they were to become active, until that is agreed upon:
    /// their records may be no newer, and an older copy of their images may come back.
    returning: Vec<Member>,
    /// What the round in flight writes: which version of it, and to which replicas.
    writing: Option<(Part, u64, ReplicaSet)>,
}

/// A replica of the disk, as the keeper knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its name in the table.
    pub member: Uuid,
    /// The number of the last slot in the file of its record; 0 if there is none.
    pub sequence: u64,
}

/// Writes that may be made at the same time, one for each replica.
#[derive(Clone, Debug)]
pub struct Round {
    /// The writes. Each has to be durable before [`Keeper::ended`].
    pub writes: Vec<(ReplicaIndex, RecordWrite)>,
}

/// A write to the file of a record.
#[derive(Clone, Debug)]
pub struct RecordWrite {
    /// Where in the file.
    pub offset_bytes: u64,
    /// What is written there.
    pub bytes: Arc<[u8]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Slot,
    Pages,
}

/// What is known of the file of one record.
#[derive(Clone, Copy, Debug)]
struct Place {
    member: Uuid,
    /// Of the last slot that is durable.
    sequence: u64,
    /// The version of that slot; 0: from before.
    slot: u64,
    /// The version of its pages; 0: from before.
    pages: u64,
    /// Its image at a clean end.
    image: Option<Fingerprint>,
}

impl Keeper {
    /// The keeper of a disk at its start: `record` is a proposal to the active ones among `holders`
    /// (by index), to be agreed upon before the disk is served, and `intent` is what is marked.
    pub fn new(record: Record, holders: Vec<Option<Holder>>, intent: Extents) -> Self {
        let places = holders.into_iter().map(|holder| holder.map(Place::new));
        Self {
            record,
            slot_version: 1,
            intent,
            pages_version: 1,
            clearing: None,
            has_new_jobs: false,
            places: places.collect(),
            returning: Vec::new(),
            writing: None,
        }
    }

    /// What the records say, or are about to say.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// What is marked.
    pub fn intent(&self) -> &Extents {
        &self.intent
    }

    /// The layout of the maps.
    pub fn layout(&self) -> Layout {
        self.record.layout()
    }

    /// The member in a place.
    pub fn member(&self, replica: ReplicaIndex) -> Option<Uuid> {
        self.place(replica).map(|place| place.member)
    }

    /// The place of a member.
    pub fn place_of(&self, member: Uuid) -> Option<ReplicaIndex> {
        let mut places = self.places.iter();
        let index = places.position(|place| place.is_some_and(|place| place.member == member));
        index.map(|index| ReplicaIndex(u8::try_from(index).expect("few places")))
    }

    /// Whether there is a member in this place, and it is active.
    pub fn is_active(&self, replica: ReplicaIndex) -> bool {
        let known = self.member(replica).and_then(|id| self.record.member(id));
        known.is_some_and(Member::is_active)
    }

    /// The tables that the next one has to follow: those in force, or that may soon be.
    pub fn binding_tables(&self) -> Vec<Table> {
        let before = self.record.before.as_ref().filter(|before| !before.forced);
        let mut tables = before.map_or_else(Vec::new, |before| before.tables.clone());
        tables.push(self.record.table());
        tables
    }

    /// Which slot of its file the record of a replica has last, as [`Record::sequence`].
    pub fn sequence(&self, replica: ReplicaIndex) -> Option<u64> {
        self.place(replica).map(|place| place.sequence)
    }

    /// A replica becomes a member of the disk, in a free place: stale everywhere, and active as
    /// soon as that is wanted. Its file has a record of no other disk.
    pub fn add(&mut self, replica: ReplicaIndex, holder: Holder, node_name: &str) {
        let index = replica.as_usize();
        if self.places.len() <= index {
            self.places.resize(index + 1, None);
        }
        self.change_table();
        if let Some(removed) = self.places[index].take() {
            self.forget(removed.member);
        }
        self.places[index] = Some(Place::new(holder));
        self.record.members.push(Member {
            state: MemberState::Inactive { holds: None },
            stale: Stale::All,
            ..Member::new(holder.member, node_name)
        });
    }

    /// No member has this name any more.
    fn forget(&mut self, removed: Uuid) {
        self.record.members.retain(|member| member.id != removed);
        self.returning.retain(|member| member.id != removed);
        let adopted = &mut self.record.adopted;
        *adopted = adopted.filter(|member| *member != removed);
    }

    /// A member has another node-name.
    pub fn rename(&mut self, replica: ReplicaIndex, node_name: &str) {
        let member = self
            .member(replica)
            .and_then(|id| self.record.member_mut(id));
        if let Some(member) = member {
            member.node_name = short_name(node_name).to_owned();
            self.slot_version += 1;
        }
    }

    /// The image of a member that was missing is open; the number of the last slot in the file of
    /// its record.
    pub fn found(&mut self, replica: ReplicaIndex, sequence: u64) {
        if let Some(Some(place)) = self.places.get_mut(replica.as_usize()) {
            *place = Place::new(Holder {
                member: place.member,
                sequence,
            });
        }
    }

    /// Whether everything is durable on all active replicas.
    pub fn is_durable(&self) -> bool {
        let mut active = self.active().iter();
        self.record.before.is_none()
            && self.clearing.is_none()
            && active.all(|replica| {
                let place = self.place(replica).expect("an active replica has a place");
                (place.slot, place.pages) == (self.slot_version, self.pages_version)
            })
    }

    /// Whether the table that is proposed cannot come into force: those who would hold it could not
    /// keep the others from going on without them.
    fn is_blocked(&self) -> bool {
        let active = self.active().iter();
        let holders: Vec<Uuid> = active.filter_map(|replica| self.member(replica)).collect();
        self.record.before.is_some() && !self.record.may_agree(&holders)
    }

    /// Has the records say this, if they do not say it already. That a member is stale in more
    /// sectors than it is does no harm as long as nothing gets worse: unless `exactly`, sets that
    /// have only shrunk are left.
    pub fn want(&mut self, wanted: &Wanted, exactly: bool) {
        // Marks that are about to go must not stand for anything.
        let exactly = exactly || self.clearing.is_some();
        let before = self.slot_version;
        self.want_table(wanted);
        let layout = self.layout();
        let says = |member: &WantedMember| {
            let id = self.member(member.replica);
            let known = id.and_then(|id| self.record.member(id));
            known.is_some_and(|known| covers(known, member, &self.intent, layout))
        };
        let changes = self.slot_version != before;
        if !changes && !exactly && wanted.members.iter().all(says) {
            return;
        }
        // With one that holds less, the others may be needed: they are to say what they hold.
        let mut changed = false;
        for member in &wanted.members {
            let id = self.member(member.replica);
            let known = self.record.members.iter_mut();
            let known = id.and_then(|id| known.into_iter().find(|known| known.id == id));
            let known = known.expect("a member has a place and is in the table");
            if !known.is_active() && known.stale.is_all() {
                continue;
            }
            let before = known.clone();
            take(known, member, layout);
            if !known.is_active()
                && let Some(earlier) = self.returning.iter().find(|m| m.id == known.id)
            {
                known.include(earlier, layout);
            }
            changed |= *known != before;
        }
        self.slot_version += u64::from(changed);
    }

    /// Has the records say which members there are, which of them are active, and so on.
    fn want_table(&mut self, wanted: &Wanted) {
        let mut same =
            wanted.threshold == self.record.threshold && wanted.capacity == self.record.capacity;
        let members = wanted.members.iter();
        same &= members.clone().count() == self.places.iter().flatten().count();
        same &= members
            .clone()
            .all(|member| member.is_active == self.is_active(member.replica));
        if same {
            return;
        }
        self.change_table();
        self.record.threshold = wanted.threshold;
        if wanted.capacity != self.record.capacity {
            self.record.grow(wanted.capacity);
            self.intent = self.intent.fitted(self.layout());
            self.clearing = None;
            self.pages_version += 1;
        }
        for index in 0..self.places.len() {
            let is_here = |member: &WantedMember| member.replica.as_usize() == index;
            if !wanted.members.iter().any(is_here)
                && let Some(removed) = self.places[index].take()
            {
                self.forget(removed.member);
            }
        }
        for member in &wanted.members {
            let id = self.member(member.replica).expect("a member has a place");
            let known = self
                .record
                .member_mut(id)
                .expect("a member is in the table");
            match (known.is_active(), member.is_active) {
                (true, false) => {
                    let layout = self.record.layout();
                    let mut returning = self.returning.iter_mut();
                    let mut before = returning.find(|before| before.id == id);
                    if let Some(before) = &mut before {
                        // What was written to it meanwhile is marked: no mark is taken away before
                        // a table is agreed upon.
                        let marked = Stale::of_extents(&self.intent, layout);
                        before.stale = before.stale.union(&marked, layout);
                    }
                    self.record.deactivate(id, before.as_deref());
                }
                (false, true) => {
                    self.returning.retain(|before| before.id != id);
                    self.returning.push(known.clone());
                    known.state = MemberState::Active;
                    known.stale_where_changed = false;
                    // What its pages hold was not kept up to date.
                    if let Some(Some(place)) = self.places.get_mut(member.replica.as_usize()) {
                        (place.slot, place.pages) = (0, 0);
                    }
                }
                _ => {}
            }
        }
    }

    /// Marks extents. They are durable when [`Self::is_durable`].
    pub fn mark(&mut self, extents: &Extents) {
        let mut marked = self.intent.clone();
        marked.insert_all(extents);
        if let Some(clearing) = &mut self.clearing {
            for range in extents.iter() {
                clearing.remove(range);
            }
        }
        if marked != self.intent {
            self.intent = marked;
            self.pages_version += 1;
        }
    }

    /// Takes marks away, where no copy differs any more from what is known of it: once `wanted` is
    /// durable, which says exactly where each member is stale.
    pub fn clear(&mut self, extents: Extents, wanted: &Wanted) {
        self.want(wanted, true);
        self.clearing = Some(extents);
    }

    /// A clean end: all is flushed, and these are the images of the replicas in service then.
    /// To be called when no mark is left that is needed, and `wanted` is all that is known.
    pub fn close(&mut self, images: &[(ReplicaIndex, Fingerprint)], wanted: &Wanted) {
        self.want(wanted, true);
        self.clearing = Some(Extents::full(self.layout()));
        for (replica, image) in images {
            if let Some(Some(place)) = self.places.get_mut(replica.as_usize()) {
                place.image = Some(*image);
            }
        }
        self.record.adopted = None;
        self.record.clean = true;
        self.slot_version += 1;
    }

    /// The last jobs that have ended: they are in the slots that are written from now on. Nothing
    /// depends on them, so that nothing is written for them alone before
    /// [`Self::write_jobs`].
    pub fn keep_jobs(&mut self, jobs: Vec<PastJob>) {
        self.has_new_jobs |= self.record.jobs != jobs;
        self.record.jobs = jobs;
    }

    /// Has the jobs written, if that was not done yet.
    pub fn write_jobs(&mut self) {
        self.slot_version += u64::from(std::mem::take(&mut self.has_new_jobs));
    }

    /// What is to be written next. `None`: nothing, or the table that is proposed cannot come into
    /// force with these replicas.
    ///
    /// # Panics
    /// If the last round has not ended.
    pub fn next_round(&mut self) -> Option<Round> {
        assert!(self.writing.is_none(), "one round after the other");
        loop {
            if let Some(round) = self.round(Part::Pages).or_else(|| self.round(Part::Slot)) {
                return Some(round);
            }
            if self.record.before.is_some() {
                if self.is_blocked() {
                    return None;
                }
                self.record.agree();
                let members = &self.record.members;
                let is_active = |before: &Member| {
                    let mut members = members.iter();
                    members.any(|member| member.id == before.id && member.is_active())
                };
                self.returning.retain(|before| !is_active(before));
                self.slot_version += 1;
            } else {
                let extents = self.clearing.take()?;
                for range in extents.iter() {
                    if self.intent.remove(range) {
                        self.pages_version += 1;
                    }
                }
            }
        }
    }

    /// The round has ended: the writes to these replicas are durable, the others may have been made
    /// or not.
    pub fn ended(&mut self, succeeded: ReplicaSet) {
        let (part, version, asked) = self.writing.take().expect("a round in flight");
        for replica in asked.and(succeeded).iter() {
            let Some(Some(place)) = self.places.get_mut(replica.as_usize()) else {
                continue;
            };
            match part {
                Part::Pages => place.pages = version,
                Part::Slot => {
                    place.slot = version;
                    place.sequence += 1;
                }
            }
        }
    }

    /// The active replicas to whose files this part is to be written.
    fn round(&mut self, part: Part) -> Option<Round> {
        let version = match part {
            Part::Pages => self.pages_version,
            Part::Slot => self.slot_version,
        };
        let is_behind = |place: &Place| match part {
            Part::Pages => place.pages != version,
            Part::Slot => place.slot != version,
        };
        let mut asked = ReplicaSet::EMPTY;
        let mut writes = Vec::new();
        let places = self.active().iter();
        let places = places.filter_map(|replica| Some((replica, self.place(replica)?)));
        let behind: Vec<_> = places.filter(|(_, place)| is_behind(place)).collect();
        // A new replica has the table before all others: with a record that says nothing it could
        // not tell later whether the others have gone on with it.
        let is_new = |place: &Place| place.sequence == 0;
        let any_new = behind.iter().any(|(_, place)| is_new(place));
        let first = behind.iter().filter(|(_, place)| is_new(place) == any_new);
        for (replica, place) in first.copied() {
            asked.insert(replica);
            writes.push((replica, self.write(part, place)));
        }
        (!writes.is_empty()).then(|| {
            self.writing = Some((part, version, asked));
            Round { writes }
        })
    }

    fn write(&self, part: Part, place: &Place) -> RecordWrite {
        match part {
            Part::Pages => RecordWrite {
                offset_bytes: Layout::page_offset(0),
                bytes: {
                    let pages = 0..self.layout().pages();
                    format::pages(self.record.disk, place.member, &self.intent, pages).into()
                },
            },
            Part::Slot => {
                let mut record = self.record.for_replica(place.member, place.sequence + 1);
                record.image = place.image.filter(|_| record.clean);
                let slot = record.slot();
                // It would replace the last one that can be read.
                assert!(slot.can_be_read(), "a record that can be read: {record:?}");
                RecordWrite {
                    offset_bytes: slot.offset,
                    bytes: slot.bytes.into(),
                }
            }
        }
    }

    /// The members that are to have everything that is written.
    fn active(&self) -> ReplicaSet {
        let mut active = ReplicaSet::EMPTY;
        for (index, place) in self.places.iter().enumerate() {
            let member = place.and_then(|place| self.record.member(place.member));
            if member.is_some_and(Member::is_active) {
                active.insert(ReplicaIndex(u8::try_from(index).expect("few places")));
            }
        }
        active
    }

    fn place(&self, replica: ReplicaIndex) -> Option<&Place> {
        let place = self.places.get(replica.as_usize());
        place.and_then(Option::as_ref)
    }

    fn change_table(&mut self) {
        self.record.propose();
        self.slot_version += 1;
    }
}

impl Place {
    fn new(holder: Holder) -> Self {
        Self {
            member: holder.member,
            sequence: holder.sequence,
            slot: 0,
            pages: 0,
            image: None,
        }
    }
}

#[cfg(test)]
mod tests;
