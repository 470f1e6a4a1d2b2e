//! Events for operators: reports of the engine and changes of jobs, with the names that operators
//! know. `line` gives an event its JSON form, `record` its form in the log.

mod line;
mod record;

use std::sync::{Arc, RwLock};
use std::time::SystemTime;

pub(super) use self::line::missed_line;
use crate::common::image::ImageChanges;
use crate::common::operation::OperationType;
use crate::common::report::{Cause, Report};
use crate::common::{NOT_POISONED, ReplicaIndex};
use crate::jobs::JobEvent;

/// The names of the voted disk and its replicas in events.
#[derive(Clone, Debug)]
pub struct Names {
    /// `reference` of QUORUM_FAILURE.
    pub reference: String,
    /// `node-name` of each replica.
    pub nodes: NodeNames,
}

/// The `node-name` of each replica by its index; it may change while the disk is served. Clones are
/// handles to the same list.
#[derive(Clone, Debug, Default)]
pub struct NodeNames(Arc<RwLock<Vec<Arc<str>>>>);

impl NodeNames {
    /// The name, empty if there is no such replica.
    pub fn get(&self, replica: ReplicaIndex) -> Arc<str> {
        let names = self.0.read().expect(NOT_POISONED);
        names.get(replica.as_usize()).cloned().unwrap_or_default()
    }

    /// Gives the replica this name.
    pub fn set(&self, replica: ReplicaIndex, name: &str) {
        let mut names = self.0.write().expect(NOT_POISONED);
        if names.len() <= replica.as_usize() {
            names.resize(replica.as_usize() + 1, Arc::default());
        }
        names[replica.as_usize()] = name.into();
    }
}

impl<S: AsRef<str>> FromIterator<S> for NodeNames {
    fn from_iter<I: IntoIterator<Item = S>>(names: I) -> Self {
        let names = names.into_iter().map(|name| Arc::from(name.as_ref()));
        Self(Arc::new(RwLock::new(names.collect())))
    }
}

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A replica or a request.
    Report(Report),
    /// A job.
    Job(JobEvent),
    /// Another program has changed the image of a replica, or has undone it.
    Image(ReplicaIndex, ImageChanges),
    /// A replica is missing, since the start or from now on.
    Missing {
        /// The replica.
        replica: ReplicaIndex,
        /// The path of its image.
        file: String,
        /// Why that cannot be opened, in one line.
        reason: String,
    },
}

impl Notice {
    /// Frees the evidence that no event lists.
    pub(super) fn forget_unlisted(&mut self) {
        if let Self::Report(Report::Bad {
            cause: Cause::Corrupt(evidence),
            ..
        }) = self
        {
            evidence.unlisted = Vec::new();
        }
    }
}

impl From<Report> for Notice {
    fn from(report: Report) -> Self {
        Self::Report(report)
    }
}

impl From<JobEvent> for Notice {
    fn from(event: JobEvent) -> Self {
        Self::Job(event)
    }
}

/// A notice on its way to the readers and the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What it is about.
    pub notice: Notice,
    /// When it was pushed.
    pub made_at: SystemTime,
    /// How many earlier notices of the same kind were folded into this one.
    pub suppressed: u64,
}

impl Event {
    /// How many notices this event stands for.
    pub fn stands_for(&self) -> u64 {
        self.suppressed + 1
    }
}

pub(super) fn type_name(operation: OperationType) -> &'static str {
    match operation {
        OperationType::Read => "read",
        OperationType::Write => "write",
        OperationType::Flush => "flush",
    }
}
