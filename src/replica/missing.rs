//! A replica of the disk whose image cannot be opened, or cannot be used any more.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use super::file::{ReplicaFile, ReplicaSource};
use crate::common::NOT_POISONED;
use crate::limits::{MISSING_RETRY_INTERVAL, SILENT_RETRY_INTERVAL_MAX};

/// A replica that has a place and a name, but no file that can be used.
#[derive(Debug)]
pub struct MissingReplica {
    /// The path of its image, as the operator gave it.
    pub path: PathBuf,
    /// Its name in events, which may change.
    node_name: RwLock<Arc<str>>,
    /// The command line names its image.
    is_named: bool,
    tries: Mutex<Tries>,
}

/// What has come of the tries to open its image.
#[derive(Debug)]
struct Tries {
    /// Why it was not taken when that was last tried.
    why: Arc<str>,
    /// A thread tries to open the image.
    is_sought: bool,
    /// When that was last tried.
    last: Option<Instant>,
    /// The file that was lost, as long as workers may use it.
    before: Option<Arc<ReplicaFile>>,
}

impl MissingReplica {
    /// The replica of this image, and why that cannot be opened, in one line.
    pub fn new(source: &ReplicaSource, why: &str) -> Self {
        Self {
            path: source.path.clone(),
            node_name: RwLock::new(source.node_name.as_str().into()),
            is_named: true,
            tries: Mutex::new(Tries {
                why: why.into(),
                is_sought: false,
                last: None,
                before: None,
            }),
        }
    }

    /// The replica of an image that was open and cannot be used any more, and why, in one line.
    pub fn lost(file: Arc<ReplicaFile>, why: &str) -> Self {
        let source = ReplicaSource {
            path: file.path.clone(),
            node_name: file.node_name().to_string(),
        };
        let missing = Self::new(&source, why);
        missing.tries().before = Some(file);
        missing
    }

    /// A member of the disk for which no image was named. It is not sought: it has the name in the
    /// place of a path.
    pub fn absent(node_name: &str) -> Self {
        let source = ReplicaSource {
            path: PathBuf::from(node_name),
            node_name: node_name.to_owned(),
        };
        Self {
            is_named: false,
            ..Self::new(&source, "no --blk-file names its image")
        }
    }

    /// Its name in events.
    pub fn node_name(&self) -> Arc<str> {
        Arc::clone(&self.node_name.read().expect(NOT_POISONED))
    }

    /// Gives it another name.
    pub fn rename(&self, node_name: &str) {
        *self.node_name.write().expect(NOT_POISONED) = node_name.into();
        if let Some(file) = self.before() {
            file.rename(node_name);
        }
    }

    /// Why its image was not taken when that was last tried: one line.
    pub fn why(&self) -> Arc<str> {
        Arc::clone(&self.tries().why)
    }

    /// It was tried again. Returns whether the reason is another one.
    pub fn still_missing(&self, why: &str) -> bool {
        let mut tries = self.tries();
        let is_new = *tries.why != *why;
        if is_new {
            tries.why = why.into();
        }
        is_new
    }

    /// The file that was lost, if workers may use it.
    pub fn before(&self) -> Option<Arc<ReplicaFile>> {
        self.tries().before.clone()
    }

    /// No worker uses the file any more that was lost: closes it, which may wait for its file
    /// system.
    pub fn close(&self) {
        let file = self.tries().before.take();
        drop(file);
    }

    /// What to open.
    pub fn source(&self) -> ReplicaSource {
        ReplicaSource {
            path: self.path.clone(),
            node_name: self.node_name().to_string(),
        }
    }

    /// Whether its image is known, so that it can be tried again.
    pub fn is_named(&self) -> bool {
        self.is_named
    }

    /// A thread is to try it, if its image is known and no other one does. `waiting` processes that
    /// have tried it cannot end, since its file system does not answer. Each of them doubles the
    /// time until the next one. It is tried all the same: another file system may be there by now.
    pub fn seek(&self, waiting: usize) -> bool {
        let mut tries = self.tries();
        let is_due = waiting == 0
            || tries
                .last
                .is_none_or(|last| last.elapsed() >= pause(waiting));
        let is_wanted = self.is_named && is_due;
        is_wanted && !std::mem::replace(&mut tries.is_sought, true)
    }

    /// That thread has tried.
    pub fn sought(&self) {
        let mut tries = self.tries();
        (tries.is_sought, tries.last) = (false, Some(Instant::now()));
    }

    fn tries(&self) -> MutexGuard<'_, Tries> {
        self.tries.lock().expect(NOT_POISONED)
    }
}

/// How long an image is not tried for which so many processes wait.
fn pause(waiting: usize) -> Duration {
    let doublings = u32::try_from(waiting).unwrap_or(u32::MAX);
    let times = 2_u32.checked_pow(doublings).unwrap_or(u32::MAX);
    let pause = MISSING_RETRY_INTERVAL.saturating_mul(times);
    pause.min(SILENT_RETRY_INTERVAL_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_does_not_answer_is_tried_less_and_less_often() {
        let source = ReplicaSource {
            path: "/nowhere/a.raw".into(),
            node_name: "a".into(),
        };
        let missing = MissingReplica::new(&source, "it does not answer");
        assert!(missing.seek(1), "it was not tried yet");
        assert!(!missing.seek(0), "it is being tried");
        missing.sought();
        assert!(!missing.seek(1));
        assert!(missing.seek(0), "it has answered");
        missing.sought();
        let pauses = [1, 2, 3].map(|waiting| pause(waiting).as_secs());
        assert_eq!(pauses, [10, 20, 40]);
        for waiting in [20, 40, usize::MAX] {
            assert_eq!(pause(waiting), SILENT_RETRY_INTERVAL_MAX);
        }
    }
}
