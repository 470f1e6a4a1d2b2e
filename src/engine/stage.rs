//! How far a read has come: its first pass, or the confirmation under the lock.

use std::time::Duration;

use super::confirmation::Confirmation;
use super::context::Core;
use super::first_pass::FirstPass;
use super::lateness::{Kind, Out};
use crate::common::ReplicaSet;
use crate::common::operation::OperationType;
use crate::quorum::tally::Tally;

#[derive(Debug)]
pub(super) enum Stage {
    FirstPass(FirstPass),
    /// Boxed: rare, and much larger than a first pass.
    Confirming(Box<Confirmation>),
}

impl Stage {
    /// What the replicas are doing.
    pub(super) fn operation(&self) -> OperationType {
        match self {
            Self::FirstPass(_) => OperationType::Read,
            Self::Confirming(confirmation) => confirmation.operation(),
        }
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        match self {
            Self::FirstPass(pass) => pass.waiting_since(limit),
            Self::Confirming(confirmation) => confirmation.waiting_since(limit),
        }
    }

    /// What the read waits for; `needed` replies decide its first pass.
    pub(super) fn out(&self, kind: Kind, needed: usize) -> Out {
        match self {
            Self::FirstPass(pass) => pass.out(kind, needed),
            Self::Confirming(confirmation) => confirmation.out(kind),
        }
    }

    /// The replicas that may still be asked.
    pub(super) fn unasked(&self) -> ReplicaSet {
        match self {
            Self::FirstPass(pass) => pass.unasked(),
            Self::Confirming(_) => ReplicaSet::EMPTY,
        }
    }

    /// The replicas that the read has anything to do with.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        match self {
            Self::FirstPass(pass) => pass.refers_to(),
            Self::Confirming(confirmation) => confirmation.refers_to(),
        }
    }

    pub(super) fn tally(&self) -> &Tally {
        match self {
            Self::FirstPass(pass) => pass.tally(),
            Self::Confirming(confirmation) => confirmation.tally(),
        }
    }

    pub(super) fn confirmation(&self) -> Option<&Confirmation> {
        match self {
            Self::FirstPass(_) => None,
            Self::Confirming(confirmation) => Some(confirmation),
        }
    }

    /// Keeps what can be used again. A confirmation has done so itself.
    pub(super) fn recycle(&mut self, core: &mut Core) {
        if let Self::FirstPass(pass) = self {
            pass.replies_mut().recycle(core);
        }
    }
}
