//! Whether an image that can be opened is the member that is missing (W13, S3).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::admin::Recognition;
use crate::admin::records::{FoundRecord, blank_record, fingerprint};
use crate::common::message::Quoted;
use crate::common::ranges::RangeSet;
use crate::common::{NOT_POISONED, ReplicaIndex, SectorRange};
use crate::engine::Shared;
use crate::record::format::Read;
use crate::record::start::{Candidate, Found, Kept, Why, take_in};
use crate::record::{Keeper, Member};
use crate::replica::file::ReplicaFile;
use crate::replica::record_file::{RecordAccess, StateDirectory};

/// The members of a disk, as its records know them.
pub(in crate::daemon) struct Members {
    shared: Arc<Shared>,
    directory: StateDirectory,
    /// Of the last slot in the records of those that were recognized.
    sequences: Mutex<BTreeMap<ReplicaIndex, u64>>,
}

impl Members {
    pub(in crate::daemon) fn new(shared: &Arc<Shared>, directory: &StateDirectory) -> Self {
        Self {
            shared: Arc::clone(shared),
            directory: directory.clone(),
            sequences: Mutex::default(),
        }
    }
}

impl Recognition for Members {
    fn recognize(
        &self,
        replica: ReplicaIndex,
        file: &ReplicaFile,
        access: &mut RecordAccess,
    ) -> Result<RangeSet, String> {
        let found = FoundRecord::of(access, &self.directory);
        let found = found.map_err(|error| error.to_string())?;
        let mut sequence = found.sequence();
        let candidate = Candidate {
            node_name: file.node_name().to_string(),
            path: file.path.clone(),
            image: Ok(Found {
                fingerprint: file.stamp.map(fingerprint),
                kept: found.kept,
            }),
        };
        let running = self.shared.records(|keeper| {
            let (member, last) = (keeper.member(replica), keeper.sequence(replica));
            (running(keeper), member, keeper.layout(), last)
        });
        let Some((Some(running), Some(member), layout, last)) = running else {
            return Err("the disk is being closed".to_owned());
        };
        let known = running.record.member(member);
        if known.is_some_and(Member::is_active) {
            return Err("the records do not say yet that its image was lost".to_owned());
        }
        let verdict = take_in(&running, &candidate).map_err(|refusal| refusal.to_string())?;
        if verdict.member != member {
            let other = running.record.member(verdict.member);
            let name = other.map_or("", |other| other.node_name.as_str());
            return Err(format!("it is the image of replica {}", Quoted(name)));
        }
        let record = match (verdict.why, found.file) {
            (Why::NoRecord, _) => {
                sequence = 0;
                let made = access.make_instead(&blank_record());
                made.map_err(|error| error.to_string())?
            }
            (_, Some(record)) => record,
            (_, None) => return Err("it has no record".to_owned()),
        };
        file.keep_record(record);
        let mut sequences = self.sequences.lock().expect(NOT_POISONED);
        sequences.insert(replica, sequence);
        let mut stale = verdict.stale.to_ranges(layout);
        stale.insert_all(&verdict.doubtful.to_ranges(layout));
        if last.is_some_and(|last| sequence < last) {
            // It had a later record when its image was lost: this is an older copy.
            stale.insert(SectorRange::new(0, layout.capacity()));
        }
        Ok(stale)
    }

    fn is_image_of(&self, replica: ReplicaIndex, access: &mut RecordAccess) -> bool {
        let Ok(found) = FoundRecord::of(access, &self.directory) else {
            return false;
        };
        let Kept::Read(read) = found.kept else {
            return false;
        };
        let (disk, member) = (read.record.disk, read.record.replica);
        let is_same = |keeper: &Keeper| {
            keeper.record().disk == disk && keeper.member(replica) == Some(member)
        };
        self.shared.records(is_same) == Some(true)
    }

    fn taken_in(&self, replica: ReplicaIndex, _access: RecordAccess) {
        let mut sequences = self.sequences.lock().expect(NOT_POISONED);
        let sequence = sequences.remove(&replica).unwrap_or_default();
        self.shared.record_found(replica, sequence);
    }
}

/// The record of an active replica.
fn running(keeper: &Keeper) -> Option<Read> {
    let record = keeper.record();
    let active = record.members.iter().find(|member| member.is_active())?;
    Some(Read {
        record: record.for_replica(active.id, record.sequence),
        intent: keeper.intent().clone(),
        slots: [None, None],
        unverified_pages: Vec::new(),
    })
}
