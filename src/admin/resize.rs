//! All replicas are made longer, or none.
//!
//! Each is dealt with by a thread of its own, which waits for the verdict when it has done its
//! part: one that hangs holds up nobody for longer than it is waited for, and puts its image back
//! by itself when it goes on.
//!
//! Invariant: until all have been made longer nobody else knows of it, so that what is put back is
//! of no use to anybody.

use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use log::warn;

use super::AdminError;
use crate::common::NOT_POISONED;
use crate::common::message::Quoted;
use crate::limits::LAST_FLUSH_LIMIT;
use crate::replica::file::{ImageIdentity, ReplicaFile};
use crate::replica::grow::{GrowError, Growth, Step};

/// Why the disk has not grown. One line.
#[derive(Debug)]
pub struct NotGrown {
    node_name: String,
    reason: GrowError,
    /// Those that do not have the size of before, and why.
    left: Vec<(String, GrowError)>,
    disk_bytes: u64,
}

impl std::error::Error for NotGrown {}

impl fmt::Display for NotGrown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} cannot be grown: {}",
            Quoted(&self.node_name),
            self.reason
        )?;
        for (node_name, reason) in &self.left {
            let (name, bytes) = (Quoted(node_name), self.disk_bytes);
            match reason {
                GrowError::Silent => write!(f, "; {name} gets its size of before when it answers")?,
                reason => write!(
                    f,
                    "; {name} could not be put back ({reason}): cut it with truncate --size={bytes}"
                )?,
            }
        }
        Ok(())
    }
}

/// What a thread that makes an image longer tells.
enum Told {
    /// It goes on with this.
    Step(Step),
    /// It has done its part, and waits for the verdict.
    Grown(Result<(), GrowError>),
    /// It has done according to the verdict.
    Settled(Result<(), GrowError>),
}

impl Told {
    fn grown(self) -> Option<Result<(), GrowError>> {
        match self {
            Self::Grown(result) => Some(result),
            Self::Step(_) | Self::Settled(_) => None,
        }
    }

    fn settled(self) -> Option<Result<(), GrowError>> {
        match self {
            Self::Settled(result) => Some(result),
            Self::Step(_) | Self::Grown(_) => None,
        }
    }

    /// For how long nothing more need come after this.
    fn may_be_silent_for(&self, limit: Duration) -> Duration {
        match self {
            Self::Step(Step::Syncing) => limit.max(LAST_FLUSH_LIMIT),
            Self::Step(Step::Zeroing) | Self::Grown(_) | Self::Settled(_) => limit,
        }
    }
}

/// The failures of `count` threads, as they come, until each has told the `end` that is waited for
/// or has been silent for too long.
fn wait(
    told: &Receiver<(usize, Told)>,
    count: usize,
    limit: Duration,
    end: fn(Told) -> Option<Result<(), GrowError>>,
) -> impl Iterator<Item = (usize, GrowError)> {
    let mut deadlines: Vec<_> = (0..count).map(|_| Some(Instant::now() + limit)).collect();
    std::iter::from_fn(move || {
        loop {
            let waiting = deadlines.iter().enumerate();
            let waiting = waiting.filter_map(|(place, deadline)| Some(((*deadline)?, place)));
            let (deadline, place) = waiting.min()?;
            match told.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((place, what)) => {
                    let silent_for = what.may_be_silent_for(limit);
                    let ended = end(what);
                    deadlines[place] = ended.is_none().then(|| Instant::now() + silent_for);
                    if let Some(Err(error)) = ended {
                        return Some((place, error));
                    }
                }
                Err(_) => {
                    deadlines[place] = None;
                    return Some((place, GrowError::Silent));
                }
            }
        }
    })
}

#[derive(Clone, Copy)]
enum Verdict {
    Keep,
    PutBack,
}

/// The threads that make images longer.
#[derive(Debug, Default)]
pub(super) struct Growers {
    /// The images of those that have not settled.
    unsettled: Arc<Mutex<Vec<ImageIdentity>>>,
}

impl Growers {
    /// Whether one of these images has not been put back yet, because it did not answer in time.
    fn is_any_unsettled(&self, replicas: &[Arc<ReplicaFile>]) -> bool {
        let unsettled = self.unsettled.lock().expect(NOT_POISONED);
        replicas
            .iter()
            .any(|replica| unsettled.contains(&replica.identity))
    }

    /// Makes all images longer, or puts them back. One that is silent for longer than `limit`
    /// fails.
    pub(super) fn grow(
        &self,
        replicas: &[Arc<ReplicaFile>],
        sizes: (u64, u64),
        limit: Duration,
    ) -> Result<(), AdminError> {
        if self.is_any_unsettled(replicas) {
            return Err(AdminError::Unsettled);
        }
        let (tell, told) = channel();
        let mut verdicts = Vec::new();
        let mut begun = Ok(());
        for (place, replica) in replicas.iter().enumerate() {
            let (verdict, is_decided) = channel();
            if let Err(source) = self.begin(place, replica, sizes, tell.clone(), is_decided) {
                let operation = "starting a thread";
                begun = Err((place, GrowError::System { operation, source }));
                break;
            }
            verdicts.push(verdict);
        }
        drop(tell);
        let count = verdicts.len();
        let grown = begun.and_then(|()| {
            let first = wait(&told, count, limit, Told::grown).next();
            first.map_or(Ok(()), Err)
        });
        let verdict = if grown.is_ok() {
            Verdict::Keep
        } else {
            Verdict::PutBack
        };
        for waiting in verdicts {
            // It is there: each waits for this.
            let _ = waiting.send(verdict);
        }
        let not_put_back: Vec<_> = wait(&told, count, limit, Told::settled).collect();
        let name = |place: usize| replicas[place].node_name.clone();
        grown.map_err(|(place, reason)| {
            let left = not_put_back.into_iter();
            AdminError::NotGrown(NotGrown {
                node_name: name(place),
                reason,
                left: left.map(|(place, reason)| (name(place), reason)).collect(),
                disk_bytes: sizes.0,
            })
        })
    }

    fn begin(
        &self,
        place: usize,
        replica: &Arc<ReplicaFile>,
        (from, to): (u64, u64),
        tell: Sender<(usize, Told)>,
        verdict: Receiver<Verdict>,
    ) -> io::Result<()> {
        // With its locks, as long as this may change it.
        let replica = Arc::clone(replica);
        let unsettled = Unsettled::new(&self.unsettled, replica.identity);
        let thread = std::thread::Builder::new().name("growing".into());
        thread.spawn(move || {
            // Whoever does not listen any more has left a verdict.
            let tell = |what| drop(tell.send((place, what)));
            let mut growth = Growth::new(&replica, from, to);
            let extended = match &mut growth {
                Ok(growth) => growth.extend(|step| tell(Told::Step(step))),
                Err(_) => Ok(()),
            };
            let (mut growth, grown) = match growth {
                Ok(growth) => (Some(growth), extended),
                Err(error) => (None, Err(error)),
            };
            tell(Told::Grown(grown));
            let settled = match (verdict.recv(), &mut growth) {
                (Ok(Verdict::Keep), _) | (_, None) => Ok(()),
                (Ok(Verdict::PutBack) | Err(_), Some(growth)) => growth.undo(),
            };
            if let Err(error) = &settled {
                warn!(
                    replica = replica.node_name, error:%;
                    "image is longer than the disk: cannot restore its old size"
                );
            }
            drop(unsettled);
            tell(Told::Settled(settled));
        })?;
        Ok(())
    }
}

/// Its image is unsettled until this is dropped.
struct Unsettled(Arc<Mutex<Vec<ImageIdentity>>>, ImageIdentity);

impl Unsettled {
    fn new(images: &Arc<Mutex<Vec<ImageIdentity>>>, image: ImageIdentity) -> Self {
        images.lock().expect(NOT_POISONED).push(image);
        Self(Arc::clone(images), image)
    }
}

impl Drop for Unsettled {
    fn drop(&mut self) {
        let mut images = self.0.lock().expect(NOT_POISONED);
        images.retain(|image| *image != self.1);
    }
}
