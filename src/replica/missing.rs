//! A replica of the disk whose image cannot be opened, or cannot be used any more.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use super::file::{ReplicaFile, ReplicaSource};
use crate::common::NOT_POISONED;

/// A replica that has a place and a name, but no file that can be used.
#[derive(Debug)]
pub struct MissingReplica {
    /// The path of its image, as the operator gave it.
    pub path: PathBuf,
    /// Its name in events, which may change.
    node_name: RwLock<Arc<str>>,
    /// Why its image was not taken when that was last tried.
    why: RwLock<Arc<str>>,
    /// A thread tries to open its image.
    is_sought: AtomicBool,
    /// The command line names its image.
    is_named: bool,
    /// The file that was lost, as long as workers may use it.
    before: Mutex<Option<Arc<ReplicaFile>>>,
}

impl MissingReplica {
    /// The replica of this image, and why that cannot be opened, in one line.
    pub fn new(source: &ReplicaSource, why: &str) -> Self {
        Self {
            path: source.path.clone(),
            node_name: RwLock::new(source.node_name.as_str().into()),
            why: RwLock::new(why.into()),
            is_sought: AtomicBool::new(false),
            is_named: true,
            before: Mutex::new(None),
        }
    }

    /// The replica of an image that was open and cannot be used any more, and why, in one line.
    pub fn lost(file: Arc<ReplicaFile>, why: &str) -> Self {
        let source = ReplicaSource {
            path: file.path.clone(),
            node_name: file.node_name().to_string(),
        };
        Self {
            before: Mutex::new(Some(file)),
            ..Self::new(&source, why)
        }
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
    }

    /// Why its image was not taken when that was last tried: one line.
    pub fn why(&self) -> Arc<str> {
        Arc::clone(&self.why.read().expect(NOT_POISONED))
    }

    /// It was tried again. Returns whether the reason is another one.
    pub fn still_missing(&self, why: &str) -> bool {
        let mut present = self.why.write().expect(NOT_POISONED);
        let is_new = **present != *why;
        if is_new {
            *present = why.into();
        }
        is_new
    }

    /// The file that was lost, if workers may use it.
    pub fn before(&self) -> Option<Arc<ReplicaFile>> {
        self.before.lock().expect(NOT_POISONED).clone()
    }

    /// No worker uses the file any more that was lost: closes it, which may wait for its file
    /// system.
    pub fn close(&self) {
        let file = self.before.lock().expect(NOT_POISONED).take();
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

    /// A thread is to try it, if its image is known and no other one does.
    pub fn seek(&self) -> bool {
        self.is_named && !self.is_sought.swap(true, Ordering::Relaxed)
    }

    /// That thread has tried.
    pub fn sought(&self) {
        self.is_sought.store(false, Ordering::Relaxed);
    }
}
