//! What may be served, from the records of the images that are there (S3).
//!
//! The newest table that was agreed upon decides: that of the newest branch, with the highest
//! epoch. A record is *current* if it has this table, or one that was proposed after it. Records
//! that are not current say nothing but whose they are, and how far they reach.

mod newest;
mod plan;
mod refusal;
mod verdict;

use std::path::PathBuf;

use uuid::Uuid;

use self::newest::Created;
pub use self::plan::Start;
pub use self::refusal::{Refusal, Side};
pub use self::verdict::{Verdict, Why};
use super::Fingerprint;
use super::format::{Read, Unusable};

/// An image of the command line.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its node-name.
    pub node_name: String,
    /// Its path, for messages.
    pub path: PathBuf,
    /// What was found there, or in one line why it cannot be opened.
    pub image: Result<Found, String>,
}

/// An image that was opened.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its size and time of modification, if these say anything.
    pub fingerprint: Option<Fingerprint>,
    /// Its record.
    pub kept: Kept,
}

/// What was found where the record of an image belongs.
#[derive(Clone, Debug)]
pub enum Kept {
    /// Nothing.
    Absent,
    /// A file that is no record that can be used.
    Unusable(Unusable),
    /// A record.
    Read(Box<Read>),
}

/// What the operator wants, and random names.
#[derive(Clone, Debug)]
pub struct Options {
    /// Start although replicas that are missing could have gone on alone.
    pub force: bool,
    /// The node-name of the image to take as the truth.
    pub adopt: Option<String>,
    /// A vote threshold other than that of the records.
    pub votes: Option<u8>,
    /// Names this run of the daemon.
    pub run: Uuid,
    /// Names the branch that begins if the start is forced.
    pub branch: Uuid,
}

/// What may be done with the images.
#[derive(Clone, Debug)]
pub enum Decision {
    /// No image is of a disk: a new one may be made of all of them.
    Create,
    /// The disk may be served.
    Start(Box<Start>),
}

/// Decides what may be served.
pub fn decide(candidates: &[Candidate], options: &Options) -> Result<Decision, Refusal> {
    refuse_later_versions(candidates)?;
    let created = Created::of(candidates);
    if created.is_empty() {
        return may_create(candidates).map(|()| Decision::Create);
    }
    let plain = plan::plan(candidates, &created, options, None);
    let start = match &options.adopt {
        None => plain,
        Some(name) => adopt(candidates, &created, options, name, plain),
    };
    start.map(|start| Decision::Start(Box::new(start)))
}

/// What an image is that could not be opened before, or was added to the command line, and that may
/// become active again in a disk that is served. `running` is the record of an active replica.
pub fn take_in(running: &Read, returning: &Candidate) -> Result<Verdict, Refusal> {
    let member = running.record.member(running.record.replica);
    let of_running = Candidate {
        node_name: member.map_or_else(String::new, |member| member.node_name.clone()),
        path: PathBuf::new(),
        image: Ok(Found {
            fingerprint: running.record.image,
            kept: Kept::Read(Box::new(running.clone())),
        }),
    };
    refuse_later_versions(std::slice::from_ref(returning))?;
    let candidates = [of_running, returning.clone()];
    let created = Created::of(&candidates);
    plan::take_in(&candidates, &created)
}

/// Takes the image of this name as the truth, unless it may vote anyway.
fn adopt(
    candidates: &[Candidate],
    created: &Created<'_>,
    options: &Options,
    name: &str,
    plain: Result<Start, Refusal>,
) -> Result<Start, Refusal> {
    let mut places = candidates.iter();
    let place = places.position(|candidate| candidate.node_name == name);
    let place = place.filter(|place| created.read(*place).is_some());
    let Some(place) = place else {
        return Err(Refusal::NothingToAdopt {
            node_name: name.to_owned(),
        });
    };
    match plain {
        Ok(start) if start.images[place].votes() => Ok(start),
        Err(refusal) if !refusal.can_be_overridden() => Err(refusal),
        _ => {
            if !options.force {
                plan::check_adopted(candidates, created, place)?;
            }
            plan::plan(candidates, created, options, Some(place))
        }
    }
}

fn refuse_later_versions(candidates: &[Candidate]) -> Result<(), Refusal> {
    for candidate in candidates {
        if let Ok(found) = &candidate.image
            && let Kept::Unusable(unusable @ Unusable::Incompatible(_)) = &found.kept
        {
            return Err(Refusal::LaterVersion {
                node_name: candidate.node_name.clone(),
                unusable: unusable.clone(),
            });
        }
    }
    Ok(())
}

/// Whether a new disk may be made: all images are there, and none has or had a record.
fn may_create(candidates: &[Candidate]) -> Result<(), Refusal> {
    for candidate in candidates {
        match &candidate.image {
            Err(reason) => return Err(Refusal::not_opened(reason)),
            Ok(found) => match &found.kept {
                Kept::Unusable(Unusable::Blank) | Kept::Absent | Kept::Read(_) => {}
                Kept::Unusable(unusable) => {
                    return Err(Refusal::NoRecord {
                        node_name: candidate.node_name.clone(),
                        unusable: unusable.clone(),
                    });
                }
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
