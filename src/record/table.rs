//! A record in memory, and how its table is changed.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::epoch::{Branch, Epoch};
use super::layout::Layout;
use super::member::{Member, MemberState};
use super::past_job::PastJob;
use super::stale::Stale;
use crate::limits::RECORD_BRANCHES_MAX;

/// What is kept on disk about a replica. The records of one disk differ in whose they are, and in
/// what one of them has not received yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Record {
    /// The disk.
    pub disk: Uuid,
    /// The replica beside which the record lies, one of the members.
    pub replica: Uuid,
    /// Grows with each slot that was written durably. A write that failed is repeated with the same
    /// number, so that it never overwrites the slot that counts.
    pub sequence: u64,
    /// Sectors of the disk.
    #[serde(rename = "capacity-sectors")]
    pub capacity: u64,
    /// Sectors of an extent.
    #[serde(skip)]
    pub extent_sectors: u64,
    /// How many equal versions win a vote.
    pub threshold: Threshold,
    /// The branches that lead here, oldest first.
    pub lineage: Vec<Branch>,
    /// The table that the record has.
    pub epoch: Epoch,
    /// The last table that was agreed upon, if this one is not.
    pub before: Option<Before>,
    /// A replica that an operator has taken as the truth: it decides where fewer than the vote
    /// threshold are fresh. Until enough are.
    pub adopted: Option<Uuid>,
    /// All was flushed, and no write came after it.
    pub clean: bool,
    /// The image of this replica at a clean end.
    pub image: Option<Fingerprint>,
    /// All replicas of the disk, in their order.
    pub members: Vec<Member>,
    /// The last jobs that have ended, for the operator.
    pub jobs: Vec<PastJob>,
}

/// The vote threshold of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Threshold {
    /// How many equal versions win.
    pub votes: u8,
    /// It follows the number of members.
    pub follows_majority: bool,
}

/// What another program has probably not changed, if it is the same at the next start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Fingerprint {
    /// Bytes of the image.
    pub bytes: u64,
    /// When it was modified, in nanoseconds since 1970.
    pub modified_ns: i64,
}

/// The tables before one that is proposed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Before {
    /// The last one that was agreed upon, then those that were proposed since by runs that were cut
    /// short, and that may have been agreed upon.
    pub tables: Vec<Table>,
    /// An operator has forced the change, whatever replicas that are missing may have done.
    pub forced: bool,
}

/// Who has to agree to a change of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Table {
    /// Its epoch.
    pub epoch: Epoch,
    /// Its vote threshold.
    pub votes: u8,
    /// The members that are active.
    pub active: Vec<Uuid>,
    /// All others.
    pub inactive: Vec<Uuid>,
}

/// What a new disk begins with.
#[derive(Clone, Debug)]
pub struct Creation {
    /// Random: names the disk.
    pub disk: Uuid,
    /// Random: names its first branch.
    pub branch: Uuid,
    /// Random: drawn at each start.
    pub run: Uuid,
    /// The size of the disk and of its extents.
    pub layout: Layout,
    /// The vote threshold.
    pub threshold: Threshold,
    /// The replicas, each with a random name and its node-name.
    pub members: Vec<(Uuid, String)>,
}

impl Threshold {
    /// The majority of `members`.
    pub fn majority(members: usize) -> Self {
        Self {
            votes: u8::try_from(members / 2 + 1).expect("few members"),
            follows_majority: true,
        }
    }
}

impl Record {
    /// The first proposal for a new disk, to be written to all members.
    pub fn create(creation: &Creation) -> Self {
        let members = creation.members.iter();
        Self {
            disk: creation.disk,
            replica: Uuid::nil(),
            sequence: 1,
            capacity: creation.layout.capacity(),
            extent_sectors: creation.layout.extent_sectors(),
            threshold: creation.threshold,
            lineage: vec![Branch {
                id: creation.branch,
                since: 1,
            }],
            epoch: Epoch {
                number: 1,
                run: creation.run,
            },
            before: Some(Before {
                tables: vec![Table {
                    epoch: Epoch::NONE,
                    votes: 1,
                    active: Vec::new(),
                    inactive: Vec::new(),
                }],
                forced: false,
            }),
            adopted: None,
            clean: false,
            image: None,
            members: members.map(|(id, name)| Member::new(*id, name)).collect(),
            jobs: Vec::new(),
        }
    }

    /// The same record for another replica, with the sequence number for its next slot.
    #[must_use]
    pub fn for_replica(&self, replica: Uuid, sequence: u64) -> Self {
        Self {
            replica,
            sequence,
            ..self.clone()
        }
    }

    /// The layout of its maps.
    pub fn layout(&self) -> Layout {
        Layout::with_extents(self.capacity, self.extent_sectors)
    }

    /// Has the maps of a disk that has grown to `capacity` sectors.
    pub fn grow(&mut self, capacity: u64) {
        let layout = self.layout().grown(capacity);
        (self.capacity, self.extent_sectors) = (layout.capacity(), layout.extent_sectors());
        for member in &mut self.members {
            member.stale = member.stale.fitted(layout);
            member.doubtful = member.doubtful.fitted(layout);
        }
    }

    /// The last table that was agreed upon.
    pub fn agreed(&self) -> Epoch {
        let before = self.before.as_ref();
        let last = before.and_then(|before| before.tables.first());
        last.map_or(self.epoch, |table| table.epoch)
    }

    /// A member by its name.
    pub fn member(&self, id: Uuid) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }

    /// A member by its name, to be changed.
    pub fn member_mut(&mut self, id: Uuid) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.id == id)
    }

    /// The table of this record, as it binds the next one once it was agreed upon.
    pub fn table(&self) -> Table {
        let ids = |is_active: bool| {
            let members = self.members.iter();
            let members = members.filter(|member| member.is_active() == is_active);
            members.map(|member| member.id).collect()
        };
        Table {
            epoch: self.epoch,
            votes: self.threshold.votes,
            active: ids(true),
            inactive: ids(false),
        }
    }

    /// The table in force: this one, if it was agreed upon.
    pub fn in_force(&self) -> Table {
        let last = self.tables_before().first();
        last.cloned().unwrap_or_else(|| self.table())
    }

    /// The last table that was agreed upon, if it is not this one, and those proposed since.
    pub fn tables_before(&self) -> &[Table] {
        let before = self.before.as_ref();
        before.map_or(&[], |before| &before.tables)
    }

    /// Begins a change of the table. To be called before members, threshold or capacity change; a
    /// proposal that was not agreed upon can be followed by another one.
    pub fn propose(&mut self) {
        let table = self.table();
        self.before.get_or_insert_with(|| Before {
            tables: vec![table],
            forced: false,
        });
        self.epoch = self.epoch.next();
    }

    /// Makes a member inactive in the proposed table. It is stale wherever something changes from
    /// now on. `before`: what the table said of it before it was to become active, if that has not
    /// been agreed upon: its record may be no newer than that.
    pub fn deactivate(&mut self, id: Uuid, before: Option<&Member>) {
        let in_force = self.in_force();
        let was_active = in_force.active.contains(&id);
        let layout = self.layout();
        let Some(member) = self.member_mut(id).filter(|member| member.is_active()) else {
            return;
        };
        member.stale_where_changed = true;
        if let Some(before) = before {
            member.state = before.state;
            member.include(before, layout);
            return;
        }
        let holds = was_active.then_some(in_force.epoch);
        member.state = MemberState::Inactive { holds };
        if holds.is_none() {
            // What it held before it was to become active is not known any more.
            member.stale = Stale::All;
            member.doubtful = Stale::None;
        }
    }

    /// Whether the proposed table may come into force, if the members in `holders` hold it
    /// durably: all that are active in it do, and no start without one of the holders would be
    /// allowed to begin with a table before.
    pub fn may_agree(&self, holders: &[Uuid]) -> bool {
        let active = self.members.iter().filter(|member| member.is_active());
        let all_hold = active
            .into_iter()
            .all(|member| holders.contains(&member.id));
        let before = self.before.as_ref();
        let are_bound = |before: &Before| {
            let mut tables = before.tables.iter();
            before.forced || tables.all(|table| table.is_bound_by(holders))
        };
        all_hold && before.is_none_or(are_bound)
    }

    /// The proposed table was agreed upon. Nothing may depend on it before this is durable on all
    /// active members.
    pub fn agree(&mut self) {
        self.before = None;
    }

    /// Begins a branch with the proposed table.
    pub fn branch(&mut self, id: Uuid) {
        self.lineage.push(Branch {
            id,
            since: self.epoch.number,
        });
        let surplus = self.lineage.len().saturating_sub(RECORD_BRANCHES_MAX);
        self.lineage.drain(..surplus);
    }
}

impl Table {
    /// Whether no start without a member in `holders` can begin with this table: either so many of
    /// its active members would be missing that it is refused, or fewer members than the vote
    /// threshold would be left.
    pub fn is_bound_by(&self, holders: &[Uuid]) -> bool {
        let votes = usize::from(self.votes);
        let hold = |id: &&Uuid| holders.contains(id);
        let active = self.active.iter().filter(hold).count();
        let all = active + self.inactive.iter().filter(hold).count();
        let members = self.active.len() + self.inactive.len();
        active >= votes || members - all < votes
    }

    /// Whether the members in `seen` would know if others had gone on: fewer than the vote
    /// threshold of the active ones are missing.
    pub fn is_known_to(&self, seen: &[Uuid]) -> bool {
        let missing = self.active.iter().filter(|id| !seen.contains(id)).count();
        missing < usize::from(self.votes)
    }
}
