//! The clean end: the records say that all is flushed, and how the images are left (S7).

use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc::channel;
use std::time::Instant;

use log::{debug, info, warn};

use crate::admin::records::fingerprint;
use crate::common::message::Reason;
use crate::common::{ReplicaIndex, ReplicaSet};
use crate::engine::Shared;
use crate::limits::OPEN_LIMIT;
use crate::record::{Fingerprint, Keeper};
use crate::replica::file::ImageStamp;
use crate::replica::table::ReplicaTable;

/// Has the records say that the disk was ended cleanly. All replicas in service are flushed, no
/// worker runs, and nothing is in flight. A failure leaves the end unclean, which costs the next
/// start a recovery.
pub(in crate::daemon) fn close(shared: &Shared, replicas: &ReplicaTable) {
    let in_service = shared.in_service();
    if shared.anything_undecided() {
        info!("the disk has sectors that no vote has decided: its records are left as they are");
        return;
    }
    let Some((mut keeper, wanted)) = shared.forget() else {
        return;
    };
    let open = replicas.in_use();
    let open = open
        .iter()
        .filter(|(replica, _)| in_service.contains(*replica));
    let syncs = open.map(|(replica, file)| {
        let image = file.file.try_clone();
        (*replica, move || ImageStamp::synced(&image?))
    });
    let synced = each_in_time(syncs);
    if synced.len() < in_service.iter().count() {
        return;
    }
    let images = synced.into_iter();
    let images = images.filter_map(|(replica, stamp)| Some((replica, fingerprint(stamp?))));
    let images: Vec<(ReplicaIndex, Fingerprint)> = images.collect();
    keeper.close(&images, &wanted);
    if write(&mut keeper, replicas) {
        debug!("the records of the disk are closed");
    }
}

/// Writes what `keeper` wants to the records. Returns whether all of it is durable.
fn write(keeper: &mut Keeper, replicas: &ReplicaTable) -> bool {
    let open = replicas.in_use();
    while let Some(round) = keeper.next_round() {
        let asked = round.writes.len();
        let writes = round.writes.into_iter().filter_map(|(replica, write)| {
            let (_, file) = open.iter().find(|(open, _)| *open == replica)?;
            let record = file.record()?.file.try_clone();
            let write = move || record?.write_all_at(&write.bytes, write.offset_bytes);
            Some((replica, write))
        });
        let written: ReplicaSet = each_in_time(writes)
            .iter()
            .map(|(replica, ())| *replica)
            .collect();
        keeper.ended(written);
        if written.iter().count() < asked {
            return false;
        }
    }
    keeper.is_durable()
}

/// Carries out all of these at the same time, and returns what has succeeded in time.
fn each_in_time<T: Send + 'static>(
    steps: impl Iterator<
        Item = (
            ReplicaIndex,
            impl FnOnce() -> io::Result<T> + Send + 'static,
        ),
    >,
) -> Vec<(ReplicaIndex, T)> {
    let (done, is_done) = channel();
    for (replica, step) in steps {
        let done = done.clone();
        let thread = std::thread::Builder::new().name("closing".into());
        // Without a thread it has not succeeded.
        let _ = thread.spawn(move || done.send((replica, step())));
    }
    drop(done);
    let deadline = Instant::now() + OPEN_LIMIT;
    let mut succeeded = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match is_done.recv_timeout(left) {
            Ok((replica, Ok(done))) => succeeded.push((replica, done)),
            Ok((replica, Err(error))) => warn!(
                replica = replica.0, error:% = Reason(&error);
                "cannot close the record of a replica"
            ),
            Err(_) => return succeeded,
        }
    }
}
