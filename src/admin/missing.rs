//! Replicas whose images could not be opened at the start, or were lost since: each is tried again
//! and again, and taken in when it can be opened (W13).
//!
//! Invariants: each image has at most one thread that tries to open it, so one that does not answer
//! delays no other; it leaves less and less often a process behind that waits for it; the workers
//! have the file before the replica may rejoin.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use log::{debug, info, warn};

use super::{Admin, AdminError};
use crate::common::ranges::RangeSet;
use crate::common::{NOT_POISONED, ReplicaIndex};
use crate::control::events::Notice;
use crate::limits::MISSING_RETRY_INTERVAL;
use crate::replica::file::{
    OpenError, ReplicaFile, ReplicaSource, check_beside, open_again, waiting_for,
};
use crate::replica::record_file::RecordAccess;
use crate::replica::table::MissingReplica;
use crate::sandbox::{self, ThreadKind};

/// Decides whether an image that can be opened is the replica that is missing.
pub trait Recognition: Send + Sync {
    /// Whether `file` is what the replica in this place is to be. Returns where it turns out to be
    /// stale, besides where that is known already. The calling thread is there for this image
    /// alone, and may wait for its file system.
    ///
    /// # Errors
    /// Why it is not, in one line. It is closed, and tried again later.
    fn recognize(
        &self,
        replica: ReplicaIndex,
        file: &ReplicaFile,
        record: &mut RecordAccess,
    ) -> Result<RangeSet, String>;

    /// Whether the record of an image, which is not to be taken in, says that it is the one of the
    /// replica in this place. The calling thread may wait as above.
    fn is_image_of(&self, replica: ReplicaIndex, record: &mut RecordAccess) -> bool;

    /// The replica is taken in, and may rejoin when this returns. No other change of the replicas
    /// runs meanwhile, and no request waits for it.
    fn taken_in(&self, replica: ReplicaIndex, record: RecordAccess);
}

impl Admin {
    /// Reports the replicas that are missing, and tries to open their images again and again, and
    /// those of replicas that are lost later, on threads of its own, until this is dropped.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub fn seek_missing(self: &Arc<Self>, recognition: Arc<dyn Recognition>) -> io::Result<()> {
        for (index, missing) in &self.table.missing() {
            self.tell_missing(*index, missing);
        }
        let admin = Arc::downgrade(self);
        let thread = std::thread::Builder::new().name("missing".into());
        thread.spawn(move || {
            sandbox::enter(ThreadKind::Images);
            seek(&admin, &recognition, MISSING_RETRY_INTERVAL);
        })?;
        Ok(())
    }

    fn tell_missing(&self, index: ReplicaIndex, missing: &MissingReplica) {
        self.events.push(Notice::Missing {
            replica: index,
            file: missing.path.to_string_lossy().into_owned(),
            reason: missing.why().to_string(),
        });
    }

    /// The open image of a replica cannot be used any more. With records it is missing from now on,
    /// unless the disk needs it: then it stays as it is.
    pub(super) fn lose(&self, index: ReplicaIndex, file: &Arc<ReplicaFile>, why: &str) {
        // Another change may take long. It is found lost again at the next look.
        let Ok(_changing) = self.changing.try_lock() else {
            return;
        };
        let may_be_lost = self.shared.has_records() && self.table.is_in_use(index, file);
        if !may_be_lost || !self.shared.lose(index) {
            return;
        }
        let missing = Arc::new(MissingReplica::lost(Arc::clone(file), why));
        self.table.lost(index, file, Arc::clone(&missing));
        warn!(
            replica:% = missing.node_name(), file:% = missing.path.display(), error = why;
            "the image of a replica is lost: it is taken in when it can be opened again"
        );
        self.tell_missing(index, &missing);
        self.workers.tick_all();
    }

    /// Closes the image of a replica that was lost, as soon as no worker uses it.
    fn close_lost(&self, index: ReplicaIndex, missing: &Arc<MissingReplica>) -> Result<(), String> {
        if missing.before().is_none() {
            return Ok(());
        }
        {
            let _changing = self.changing.lock().expect(NOT_POISONED);
            if !self.table.is_missing(index, missing) {
                return Err("it was removed meanwhile".to_owned());
            }
            if !self.shared.is_drained(index) {
                self.workers.tick_all();
                return Err("operations on the image that was lost are in flight".to_owned());
            }
            let closed = self.workers.set_file(index, None);
            closed.map_err(|error| error.to_string())?;
        }
        missing.close();
        Ok(())
    }

    /// Tries once to open the images of the missing replicas, each on a thread of its own, except
    /// for those of earlier calls that have not ended. Does not wait for them. Returns whether a
    /// replica is missing.
    pub fn try_missing(self: &Arc<Self>, recognition: &Arc<dyn Recognition>) -> bool {
        let missing = self.table.missing();
        let sought = missing
            .iter()
            .filter(|(_, missing)| missing.seek(waiting_for(&missing.path)));
        for (index, missing) in sought {
            let (index, sought) = (*index, Arc::clone(missing));
            let (admin, recognition) = (Arc::downgrade(self), Arc::clone(recognition));
            let thread = std::thread::Builder::new().name("opening".into());
            let started = thread.spawn(move || {
                if let Some(admin) = admin.upgrade() {
                    admin.try_one(index, &sought, &*recognition);
                }
                sought.sought();
            });
            if let Err(error) = started {
                missing.sought();
                debug!(replica:% = missing.node_name(), error:%; "cannot try to open an image");
            }
        }
        !missing.is_empty()
    }

    fn try_one(
        &self,
        index: ReplicaIndex,
        missing: &Arc<MissingReplica>,
        recognition: &dyn Recognition,
    ) {
        match self.take_in(index, missing, recognition) {
            Ok(()) => info!(
                replica:% = missing.node_name(), file:% = missing.path.display();
                "missing replica is there again"
            ),
            Err(reason) => {
                if missing.still_missing(&reason) {
                    info!(replica:% = missing.node_name(), reason; "replica is still missing");
                }
            }
        }
    }

    /// Opens the image of a missing replica, and has it rejoin.
    fn take_in(
        &self,
        index: ReplicaIndex,
        missing: &Arc<MissingReplica>,
        recognition: &dyn Recognition,
    ) -> Result<(), String> {
        self.close_lost(index, missing)?;
        let how = (self.options, self.opening);
        let source = missing.source();
        // Of any size: its record comes first.
        let directory = self.image_directories.of(&source.path);
        let directory = directory.map_err(|error| error.to_string())?;
        let opened = open_again(&self.open_files(), &source, how, 0, directory);
        // It may take long until here, so no other change waits for it.
        let (file, mut record) = opened.map_err(|error| error.of_missing())?;
        let checked = check_beside(&self.open_files(), &file, self.capacity.bytes());
        // An empty one has the place of an image whose file system is not there.
        if matches!(checked, Err(OpenError::ShorterThanDisk { .. }))
            && file.size_bytes > 0
            && recognition.is_image_of(index, &mut record)
        {
            // That is not to be seen any more when it has its length again.
            self.shared.distrust(index);
            self.workers.tick_all();
        }
        checked.map_err(|error| error.of_missing())?;
        let stale = recognition.recognize(index, &file, &mut record)?;
        let _changing = self.changing.lock().expect(NOT_POISONED);
        if !self.table.is_missing(index, missing) {
            return Err("it was removed meanwhile".to_owned());
        }
        file.rename(&missing.node_name());
        let checked = check_beside(&self.open_files(), &file, self.capacity.bytes());
        checked.map_err(|error| error.of_missing())?;
        if let Err(source) = self.workers.set_file(index, Some(file.ring_file())) {
            let _ = self.workers.set_file(index, None);
            let node_name = missing.node_name().to_string();
            return Err(AdminError::Register { node_name, source }.to_string());
        }
        if !self.table.found(index, Arc::new(file)) {
            return Err("the disk is being closed".to_owned());
        }
        recognition.taken_in(index, record);
        self.shared.found(index, &stale);
        self.workers.tick_all();
        Ok(())
    }

    /// Checks that an image has not the name of a replica that is missing.
    pub(super) fn check_beside_missing(&self, source: &ReplicaSource) -> Result<(), AdminError> {
        for (_, missing) in self.table.missing() {
            let node_name = missing.node_name();
            if *node_name == *source.node_name {
                return Err(AdminError::NameTaken(source.node_name.clone()));
            }
        }
        Ok(())
    }
}

fn seek(admin: &Weak<Admin>, recognition: &Arc<dyn Recognition>, interval: Duration) {
    loop {
        std::thread::sleep(interval);
        let Some(admin) = admin.upgrade() else {
            return;
        };
        admin.try_missing(recognition);
    }
}
