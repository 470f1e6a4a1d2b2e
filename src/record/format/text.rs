//! The text of a slot, and the maps that it refers to.
//!
//! A text is checked as a whole before it becomes a record: what contradicts itself is refused.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::SlotFault;
use crate::common::SectorRange;
use crate::common::ranges::RangeSet;
use crate::limits::{
    RECORD_BRANCHES_MAX, RECORD_FEATURES_MAX, RECORD_JOBS_MAX, RECORD_NAME_BYTES_MAX,
    RECORD_NUMBER_MAX, RECORD_TABLES_MAX, REPLICAS_MAX,
};
use crate::record::layout::RUN_BYTES;
use crate::record::{
    Before, Branch, Epoch, Extents, Fingerprint, Layout, Member, MemberState, PastJob, Record,
    Stale, Table, Threshold, short_name,
};

/// The version of the format, raised only if even the line or the kinds of features change.
const FORMAT: u32 = 1;

/// What has its place in every version.
#[derive(Deserialize)]
struct Start {
    format: u32,
    incompatible: Vec<String>,
    sequence: Option<u64>,
}

/// The text, in the order in which it is written.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Text {
    format: u32,
    incompatible: Vec<String>,
    compatible: Vec<String>,
    disk: Uuid,
    replica: Uuid,
    sequence: u64,
    capacity_sectors: u64,
    extent_sectors: u64,
    vote_threshold: u8,
    follows_majority: bool,
    lineage: Vec<Branch>,
    epoch: Epoch,
    before: Option<Before>,
    adopted: Option<Uuid>,
    clean: bool,
    image: Option<Fingerprint>,
    members: Vec<TextMember>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    jobs: Vec<PastJob>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct TextMember {
    id: Uuid,
    node_name: String,
    active: bool,
    holds: Option<Epoch>,
    stale: TextStale,
    doubtful: TextStale,
    stale_where_changed: bool,
}

/// Offsets count from the beginning of the maps.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum TextStale {
    Nowhere,
    Everywhere,
    Runs { offset: u64, count: u64 },
    Extents { offset: u64, bytes: u64 },
}

/// The text of a record, with its final newline, and the maps.
pub(super) fn encode(record: &Record) -> (Vec<u8>, Vec<u8>) {
    let layout = record.layout();
    let mut maps = Vec::new();
    let members = record.members.iter();
    let text = Text {
        format: FORMAT,
        incompatible: Vec::new(),
        compatible: Vec::new(),
        disk: record.disk,
        replica: record.replica,
        sequence: record.sequence,
        capacity_sectors: record.capacity,
        extent_sectors: layout.extent_sectors(),
        vote_threshold: record.threshold.votes,
        follows_majority: record.threshold.follows_majority,
        lineage: record.lineage.clone(),
        epoch: record.epoch,
        before: record.before.clone(),
        adopted: record.adopted,
        clean: record.clean,
        image: record.image,
        members: members
            .map(|member| encode_member(member, layout, &mut maps))
            .collect(),
        jobs: record.jobs.clone(),
    };
    let mut bytes = serde_json::to_vec_pretty(&text).expect("plain values become JSON");
    bytes.push(b'\n');
    (bytes, maps)
}

fn encode_member(member: &Member, layout: Layout, maps: &mut Vec<u8>) -> TextMember {
    let stale = encode_stale(&member.stale, layout, maps);
    let doubtful = encode_stale(&member.doubtful, layout, maps);
    let (active, holds) = match member.state {
        MemberState::Active => (true, None),
        MemberState::Inactive { holds } => (false, holds),
    };
    TextMember {
        id: member.id,
        node_name: short_name(&member.node_name).to_owned(),
        active,
        holds,
        stale,
        doubtful,
        stale_where_changed: member.stale_where_changed,
    }
}

fn encode_stale(stale: &Stale, layout: Layout, maps: &mut Vec<u8>) -> TextStale {
    let offset = maps.len() as u64;
    match stale.fitted(layout) {
        Stale::None => TextStale::Nowhere,
        Stale::All => TextStale::Everywhere,
        Stale::Runs(runs) => {
            for run in runs.iter() {
                maps.extend(run.start.to_le_bytes());
                maps.extend(run.count.to_le_bytes());
            }
            let count = (maps.len() as u64 - offset) / RUN_BYTES;
            TextStale::Runs { offset, count }
        }
        Stale::Extents(extents) => {
            maps.extend(extents.to_bytes());
            let bytes = maps.len() as u64 - offset;
            maps.resize(maps.len().next_multiple_of(8), 0);
            TextStale::Extents { offset, bytes }
        }
    }
}

/// The record of a text and its maps.
pub(super) fn decode(text: &[u8], maps: &[u8]) -> Result<Record, SlotFault> {
    let start: Start = parse(text)?;
    if start.format != FORMAT || !start.incompatible.is_empty() {
        return Err(incompatible(&start));
    }
    let text: Text = parse(text)?;
    check(&text)?;
    let layout = Layout::recorded(text.capacity_sectors, text.extent_sectors)
        .ok_or(SlotFault::Impossible("the size of its extents"))?;
    let mut maps = Maps {
        layout,
        bytes: maps,
        used: 0,
    };
    let members: Result<Vec<Member>, SlotFault> = text
        .members
        .into_iter()
        .map(|member| decode_member(member, &mut maps))
        .collect();
    Ok(Record {
        disk: text.disk,
        replica: text.replica,
        sequence: text.sequence,
        capacity: text.capacity_sectors,
        extent_sectors: text.extent_sectors,
        threshold: Threshold {
            votes: text.vote_threshold,
            follows_majority: text.follows_majority,
        },
        lineage: text.lineage,
        epoch: text.epoch,
        before: text.before,
        adopted: text.adopted,
        clean: text.clean,
        image: text.image,
        members: members?,
        jobs: text.jobs,
    })
}

fn parse<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Result<T, SlotFault> {
    serde_json::from_slice(text).map_err(|error| {
        // The error may quote the text.
        SlotFault::Text(error.to_string().chars().take(200).collect())
    })
}

fn incompatible(start: &Start) -> SlotFault {
    let names = start.incompatible.iter().take(RECORD_FEATURES_MAX);
    let mut needs: Vec<String> = names.map(|name| short_name(name).to_owned()).collect();
    if start.format != FORMAT {
        needs.push(format!("format {}", start.format));
    }
    SlotFault::Incompatible {
        needs,
        sequence: start.sequence,
    }
}

/// Checks everything but the maps.
fn check(text: &Text) -> Result<(), SlotFault> {
    let ids: HashSet<Uuid> = text.members.iter().map(|member| member.id).collect();
    let branches: HashSet<Uuid> = text.lineage.iter().map(|branch| branch.id).collect();
    let before = text.before.as_ref();
    let tables = before.iter().flat_map(|before| &before.tables);
    let holds = text.members.iter().filter_map(|member| member.holds);
    let since = text.lineage.iter().map(|branch| branch.since);
    let is_active = |member: &&TextMember| member.active;
    let numbers = [text.sequence, text.epoch.number, text.capacity_sectors];
    let in_range = |number: u64| (1..=RECORD_NUMBER_MAX).contains(&number);
    let is_before = |number: u64| number < text.epoch.number;
    let conditions = [
        (numbers.into_iter().all(in_range), "a number out of range"),
        (
            text.members.len() <= REPLICAS_MAX && ids.len() == text.members.len(),
            "its list of members",
        ),
        (ids.contains(&text.replica), "it is of no member"),
        (
            text.adopted.is_none_or(|id| ids.contains(&id)),
            "it follows a replica that is no member",
        ),
        (
            text.members.iter().any(|member| is_active(&member)),
            "no member is active",
        ),
        (
            (1..=text.members.len()).contains(&usize::from(text.vote_threshold)),
            "its vote threshold",
        ),
        (
            text.members
                .iter()
                .all(|member| member.node_name.len() <= RECORD_NAME_BYTES_MAX),
            "a node-name that is too long",
        ),
        (
            (1..=RECORD_BRANCHES_MAX).contains(&text.lineage.len())
                && branches.len() == text.lineage.len()
                && since.clone().is_sorted()
                && since.clone().all(|since| since <= text.epoch.number),
            "its lineage",
        ),
        (
            before.is_none_or(|before| (1..=RECORD_TABLES_MAX).contains(&before.tables.len()))
                && tables.clone().all(|table| is_before(table.epoch.number))
                && tables.clone().is_sorted_by_key(|table| table.epoch.number)
                && tables.clone().all(is_table),
            "the tables before",
        ),
        (
            holds
                .into_iter()
                .all(|epoch| is_before(epoch.number) || epoch == text.epoch),
            "a member that holds a later table",
        ),
        (
            text.members
                .iter()
                .all(|member| !member.active || member.holds.is_none()),
            "the state of a member",
        ),
        (
            text.jobs.len() <= RECORD_JOBS_MAX
                && text.jobs.iter().all(|job| job.clone().bounded() == *job),
            "its list of jobs",
        ),
    ];
    match conditions.into_iter().find(|(holds, _)| !holds) {
        Some((_, what)) => Err(SlotFault::Impossible(what)),
        None => Ok(()),
    }
}

fn is_table(table: &Table) -> bool {
    let all = [&table.active[..], &table.inactive].concat();
    let ids: HashSet<&Uuid> = all.iter().collect();
    all.len() <= REPLICAS_MAX && ids.len() == all.len() && table.votes >= 1
}

fn decode_member(member: TextMember, maps: &mut Maps<'_>) -> Result<Member, SlotFault> {
    let stale = maps.take(&member.stale);
    let stale = stale.ok_or(SlotFault::Impossible("a map of stale sectors"))?;
    let doubtful = maps.take(&member.doubtful);
    let doubtful = doubtful.ok_or(SlotFault::Impossible("a map of doubtful sectors"))?;
    Ok(Member {
        id: member.id,
        node_name: member.node_name,
        state: if member.active {
            MemberState::Active
        } else {
            MemberState::Inactive {
                holds: member.holds,
            }
        },
        stale,
        doubtful,
        stale_where_changed: member.stale_where_changed,
    })
}

/// The maps of a slot. Each begins behind the one before.
struct Maps<'a> {
    layout: Layout,
    bytes: &'a [u8],
    used: u64,
}

impl<'a> Maps<'a> {
    fn take(&mut self, stale: &TextStale) -> Option<Stale> {
        match *stale {
            TextStale::Nowhere => Some(Stale::None),
            TextStale::Everywhere => Some(Stale::All),
            TextStale::Runs { offset, count } => {
                if count > self.layout.runs_max() {
                    return None;
                }
                let bytes = self.part(offset, count * RUN_BYTES)?;
                runs(bytes, self.layout.capacity())
            }
            TextStale::Extents { offset, bytes } => {
                let bytes = self.part(offset, bytes)?;
                Extents::from_bytes(self.layout, bytes).map(Stale::Extents)
            }
        }
    }

    fn part(&mut self, offset: u64, count: u64) -> Option<&'a [u8]> {
        let end = offset.checked_add(count)?;
        if offset < self.used {
            return None;
        }
        self.used = end;
        self.bytes
            .get(usize::try_from(offset).ok()?..usize::try_from(end).ok()?)
    }
}

/// A list of runs, in order, on the disk, none of them empty, no two of them touching.
fn runs(bytes: &[u8], capacity: u64) -> Option<Stale> {
    let mut ranges = RangeSet::default();
    let mut free_from = 0;
    for run in bytes.chunks_exact(16) {
        let number = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).ok();
        let (start, count) = (number(&run[..8])?, number(&run[8..])?);
        let end = start.checked_add(count)?;
        if start < free_from || count == 0 || end > capacity {
            return None;
        }
        free_from = end + 1;
        ranges.insert(SectorRange::new(start, count));
    }
    (!ranges.is_empty()).then_some(Stale::Runs(ranges))
}
