//! A directory that remembers everything that is done to its files, in one order, so that a test
//! can make what a power cut would have left at any moment.
//!
//! The files are in memory, and every operation arrives past the page cache. Writes, zeroing,
//! changes of the length, syncs and changes of names each have a moment at which they begin and,
//! except for names, one at which they end. A sync makes durable what had ended when it began, a
//! write with O_DSYNC itself.
//!
//! Needs `/dev/fuse` and the right to mount (root).

mod crash;
mod filesystem;
mod log;

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use fuser::{BackgroundSession, Config, MountOption};
use tempfile::TempDir;

pub use crash::{Content, FileContent};
pub use filesystem::{Failing, SLOW};
use filesystem::{Logged, Shared};
use log::Log;
pub use log::Moment;

use crate::images::Random;

/// Operations that are done at the same time: so many that a slow file makes no other one slow.
const THREADS: usize = 24;

/// A logged directory. Drop it after the processes that use it.
pub struct LoggedDirectory {
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
    mount_point: TempDir,
}

/// The order of events of a logged directory, for those that happen elsewhere.
#[derive(Clone)]
pub struct Clock(Arc<Shared>);

impl Clock {
    /// A new moment, after all others so far.
    pub fn tick(&self) -> Moment {
        self.0.log().tick()
    }
}

impl LoggedDirectory {
    /// Mounts a directory with these files. What they hold is durable. The mount is seen by the
    /// calling thread and those that it starts, if it has called [`crate::mounts::separate`].
    pub fn mount(content: &Content) -> Self {
        keep_large_memory_apart();
        let shared = Arc::new(Shared::of(Log::of(content)));
        let mount_point = tempfile::tempdir().expect("creating a directory");
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("quorum-blk-test".into())];
        config.n_threads = Some(THREADS);
        let filesystem = Logged(Arc::clone(&shared));
        let session = fuser::spawn_mount(filesystem, mount_point.path(), &config).expect(
            "mounting a FUSE file system; this takes /dev/fuse and the right to mount (root)",
        );
        Self {
            shared,
            session: Some(session),
            mount_point,
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.mount_point.path()
    }

    /// Its order of events.
    pub fn clock(&self) -> Clock {
        Clock(Arc::clone(&self.shared))
    }

    /// The first moment that has not come yet.
    pub fn end(&self) -> Moment {
        self.shared.log().end_moment()
    }

    /// From now on operations on the file with this name fail or are slow; or not any more. What
    /// was not durable when a sync failed is never made durable by a later one.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn fail(&self, name: &str, how: Option<Failing>) {
        let number = self.shared.log().names[OsStr::new(name)];
        self.shared.fail(how.map(|how| (number, how)));
    }

    /// The moments just before and after each sync and each durable write has begun and ended, and
    /// each change of a name: where most depends on what is on the disk.
    pub fn edges(&self) -> Vec<Moment> {
        let log = self.shared.log();
        let syncs = log.syncs.iter().map(|sync| (sync.begin, sync.end));
        let durable = log.operations.iter().filter(|write| write.is_durable);
        let durable = durable.map(|write| (write.begin, write.end));
        let spans = syncs.chain(durable);
        let ends = spans.flat_map(|(begin, end)| [Some(begin), end].into_iter().flatten());
        let names = log.name_changes.iter().map(|(moment, _)| *moment);
        let all = ends.chain(names);
        all.flat_map(|moment| [moment.saturating_sub(1), moment])
            .collect()
    }

    /// From now on it is as if no sync so far had written anything: disks that lie.
    pub fn forget_syncs(&self) {
        self.shared.log().syncs.clear();
    }

    /// What the directory holds when the power fails at `moment`: everything that was synced, and
    /// of the rest of each file another part. `atom` gets the name of a file, and returns how many
    /// of its sectors, counted from its beginning, are old or new together.
    pub fn crash(
        &self,
        moment: Moment,
        atom: impl Fn(&str) -> usize,
        random: &mut Random,
    ) -> Content {
        self.shared.log().crash(moment, atom, random)
    }
}

/// Has large buffers mapped, each by itself. The crate `fuser` gives 16 MiB of zeroes to each
/// thread: they take memory, and time, only if they are cut from memory that was used before.
fn keep_large_memory_apart() {
    const LARGE_BYTES: libc::c_int = 1 << 20;
    // SAFETY: the call changes a setting of the allocator only.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES) };
}

impl Drop for LoggedDirectory {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            // Unmounts it, and waits for its threads.
            let _ = session.umount_and_join();
        }
    }
}
