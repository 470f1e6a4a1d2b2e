//! The images of a disk, opened, and what is remembered of them.

use crate::common::ranges::RangeSet;
use crate::config::Config;
use crate::control::events::Notice;
use crate::daemon::Error;
use crate::daemon::records;
use crate::engine::Shared;
use crate::quorum::health::{Remembered, Wanted};
use crate::record::Keeper;
use crate::replica::file::ReplicaFile;
use crate::replica::ring::RingFile;
use crate::replica::table::MissingReplica;

/// The replicas of a disk that is about to be served.
pub(super) struct Replicas {
    /// In the order of the command line, then those that it does not name.
    pub(super) members: Vec<Result<ReplicaFile, MissingReplica>>,
    /// Size of the disk.
    pub(super) size_bytes: u64,
    /// The vote threshold.
    pub(super) votes: usize,
    /// What it is to be as soon as it can be.
    pub(super) wanted_votes: Wanted,
    /// `None`: the disk has no records.
    pub(super) memory: Option<Memory>,
}

/// What the records say.
pub(super) struct Memory {
    /// Of the replicas.
    pub(super) remembered: Remembered,
    /// Has written that. `None`: they are not written.
    pub(super) keeper: Option<Keeper>,
    /// Where replicas may differ, since the last daemon did not end cleanly.
    pub(super) unsettled: RangeSet,
    /// The disk was not served before.
    pub(super) is_new: bool,
}

impl Replicas {
    /// Opens the images.
    ///
    /// # Errors
    /// If the disk cannot be served with them.
    pub(super) fn open(config: &Config) -> Result<Self, Error> {
        // One whose replicas are compared has all of them.
        match config.records.are_kept && !config.blkverify {
            true => records::open(config),
            false => records::open_without(config),
        }
    }

    /// Of images about which nothing is known.
    pub(super) fn all(
        config: &Config,
        size_bytes: u64,
        members: Vec<Result<ReplicaFile, MissingReplica>>,
    ) -> Self {
        Self {
            size_bytes,
            members,
            votes: config.vote_threshold,
            wanted_votes: match config.threshold_follows {
                true => Wanted::Majority,
                false => Wanted::Given(config.vote_threshold),
            },
            memory: None,
        }
    }

    /// Whether what happens to them is remembered.
    pub(super) fn has_records(&self) -> bool {
        self.keeper().is_some()
    }

    /// What has written their records.
    pub(super) fn keeper(&self) -> Option<&Keeper> {
        self.memory.as_ref()?.keeper.as_ref()
    }

    /// Those whose images are open.
    pub(super) fn open_files(&self) -> impl Iterator<Item = &ReplicaFile> {
        self.members.iter().flatten()
    }

    /// As the workers use them, in order.
    pub(super) fn ring_files(&self) -> Vec<RingFile> {
        let files = self.members.iter().map(|member| match member {
            Ok(file) => file.ring_file(),
            Err(_) => RingFile::none(),
        });
        files.collect()
    }

    /// Has the engines begin with what is remembered. Returns whether the images of a new disk are
    /// to be compared first.
    pub(super) fn remember(
        &mut self,
        shared: &Shared,
        mut tell: impl FnMut(Notice),
    ) -> Result<bool, Error> {
        let want = || {
            let wanted = match self.wanted_votes {
                Wanted::Given(votes) if votes == self.votes => Ok(()),
                wanted => shared.want_threshold(wanted),
            };
            wanted.map_err(|error| Error::Broken(error.to_string()))
        };
        let Some(memory) = self.memory.take() else {
            return want().map(|()| false);
        };
        let Memory {
            remembered,
            keeper,
            unsettled,
            is_new,
        } = memory;
        shared.restore(&remembered, &unsettled, |event| tell(Notice::Job(event)));
        let missing = remembered.members.without(remembered.in_service);
        for replica in missing.iter() {
            let copies = &remembered.copies[replica.as_usize()];
            let mut stale = copies.stale.clone();
            stale.insert_all(&copies.doubtful);
            shared.leave_out(replica, &stale);
        }
        // Not before it is known which copies count.
        want()?;
        if let Some(keeper) = keeper {
            shared.remember(keeper);
        }
        Ok(is_new)
    }
}
