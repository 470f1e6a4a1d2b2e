//! Growing the images: all of them, or none.
//!
//! A thread for each image extends it and then waits for the verdict. A replica that hangs delays
//! the others only for a limited time, and its thread restores the old size when the replica
//! answers.
//!
//! Invariant: the rest of the daemon learns of the new size only after all images have it, so an
//! image can get its old size back without loss.

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

/// Why the disk cannot grow. One line.
#[derive(Debug)]
pub struct NotGrown {
    node_name: String,
    reason: GrowError,
    /// The replicas that do not have their old size, and why.
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
                GrowError::Silent => write!(f, "; {name} gets its old size back when it answers")?,
                reason => write!(
                    f,
                    "; {name} has not got its old size, {bytes} bytes, back ({reason}): replace it \
                     by a new image before the next start"
                )?,
            }
        }
        Ok(())
    }
}

/// The progress of a thread that extends an image.
enum Progress {
    /// It starts this step.
    Step(Step),
    /// It has extended the image, and waits for the verdict.
    Grown(Result<(), GrowError>),
    /// It has followed the verdict.
    Settled(Result<(), GrowError>),
}

impl Progress {
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

    /// How long the next progress may take.
    fn may_be_silent_for(&self, limit: Duration) -> Duration {
        match self {
            Self::Step(Step::Syncing) => limit.max(LAST_FLUSH_LIMIT),
            Self::Step(Step::Zeroing) | Self::Grown(_) | Self::Settled(_) => limit,
        }
    }
}

/// The failures of `count` threads, as they come, until each has reached `end` or has been silent
/// for too long.
fn wait(
    progress: &Receiver<(usize, Progress)>,
    count: usize,
    limit: Duration,
    end: fn(Progress) -> Option<Result<(), GrowError>>,
) -> impl Iterator<Item = (usize, GrowError)> {
    let mut deadlines: Vec<_> = (0..count).map(|_| Some(Instant::now() + limit)).collect();
    std::iter::from_fn(move || {
        loop {
            let waiting = deadlines.iter().enumerate();
            let waiting = waiting.filter_map(|(place, deadline)| Some(((*deadline)?, place)));
            let (deadline, place) = waiting.min()?;
            match progress.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
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
    Restore,
}

/// The threads that extend images.
#[derive(Debug, Default)]
pub(super) struct Growers {
    /// The images of threads that have not followed their verdict.
    unsettled: Arc<Mutex<Vec<ImageIdentity>>>,
}

impl Growers {
    /// Whether one of these images still has to get its old size back.
    fn is_any_unsettled(&self, replicas: &[Arc<ReplicaFile>]) -> bool {
        let unsettled = self.unsettled.lock().expect(NOT_POISONED);
        replicas
            .iter()
            .any(|replica| unsettled.contains(&replica.identity))
    }

    /// Extends all images, or restores their old size. An image that is silent for longer than
    /// `limit` fails.
    pub(super) fn grow(
        &self,
        replicas: &[Arc<ReplicaFile>],
        sizes: (u64, u64),
        limit: Duration,
    ) -> Result<(), AdminError> {
        if self.is_any_unsettled(replicas) {
            return Err(AdminError::Unsettled);
        }
        let (sender, progress) = channel();
        let mut verdicts = Vec::new();
        let mut started = Ok(());
        for (place, replica) in replicas.iter().enumerate() {
            let (verdict, is_decided) = channel();
            if let Err(source) = self.start(place, replica, sizes, sender.clone(), is_decided) {
                let operation = "starting a thread";
                started = Err((place, GrowError::System { operation, source }));
                break;
            }
            verdicts.push(verdict);
        }
        drop(sender);
        let count = verdicts.len();
        let grown = started.and_then(|()| {
            let first = wait(&progress, count, limit, Progress::grown).next();
            first.map_or(Ok(()), Err)
        });
        let verdict = if grown.is_ok() {
            Verdict::Keep
        } else {
            Verdict::Restore
        };
        for waiting in verdicts {
            // The thread waits for it.
            let _ = waiting.send(verdict);
        }
        let not_restored: Vec<_> = wait(&progress, count, limit, Progress::settled).collect();
        let name = |place: usize| replicas[place].node_name().to_string();
        grown.map_err(|(place, reason)| {
            let left = not_restored.into_iter();
            AdminError::NotGrown(NotGrown {
                node_name: name(place),
                reason,
                left: left.map(|(place, reason)| (name(place), reason)).collect(),
                disk_bytes: sizes.0,
            })
        })
    }

    fn start(
        &self,
        place: usize,
        replica: &Arc<ReplicaFile>,
        (from, to): (u64, u64),
        sender: Sender<(usize, Progress)>,
        verdict: Receiver<Verdict>,
    ) -> io::Result<()> {
        // Keeps the image locked as long as the thread may change it.
        let replica = Arc::clone(replica);
        let unsettled = Unsettled::new(&self.unsettled, replica.identity);
        let thread = std::thread::Builder::new().name("growing".into());
        thread.spawn(move || {
            // Fails if this side has stopped waiting. The verdict is in its channel then.
            let report = |what| drop(sender.send((place, what)));
            let mut growth = Growth::new(&replica, from, to);
            let extended = match &mut growth {
                Ok(growth) => growth.extend(|step| report(Progress::Step(step))),
                Err(_) => Ok(()),
            };
            let (mut growth, grown) = match growth {
                Ok(growth) => (Some(growth), extended),
                Err(error) => (None, Err(error)),
            };
            report(Progress::Grown(grown));
            let settled = match (verdict.recv(), &mut growth) {
                (Ok(Verdict::Keep), _) | (_, None) => Ok(()),
                (Ok(Verdict::Restore) | Err(_), Some(growth)) => growth.undo(),
            };
            if let Err(error) = &settled {
                warn!(
                    replica:% = replica.node_name(), error:%;
                    "image is longer than the disk: cannot restore its old size"
                );
            }
            drop(unsettled);
            report(Progress::Settled(settled));
        })?;
        Ok(())
    }
}

/// An image is unsettled until this is dropped.
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
