//! The flush of the replicas before the daemon ends.

#![forbid(unsafe_code)]

use std::io;
use std::sync::mpsc::channel;
use std::time::Instant;

use log::error;

use super::Error;
use crate::common::message::Reason;
use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::LAST_FLUSH_LIMIT;
use crate::replica::table::ReplicaTable;

/// Flushes the replicas in service, all at once. An evicted replica is not asked, because it would
/// delay the end, nor is one of the `unanswered`. Replicas that do not answer within
/// [`LAST_FLUSH_LIMIT`] join the `unanswered`.
pub(super) fn flush(
    replicas: &ReplicaTable,
    in_service: ReplicaSet,
    read_only: bool,
    unanswered: &mut ReplicaSet,
) -> Result<(), Error> {
    if read_only {
        return Ok(());
    }
    let mut result = Ok(());
    let replicas = replicas.in_use();
    let mut failed = |index: ReplicaIndex, source: io::Error| {
        let named = replicas.iter().find(|(replica, _)| *replica == index);
        let (path, node_name) = match named {
            Some((_, file)) => (file.path.clone(), file.node_name()),
            None => Default::default(),
        };
        error!(replica:% = node_name, error:% = Reason(&source); "the last flush failed");
        result = Err(Error::LastFlush { path, source });
    };
    let (done, is_done) = channel();
    let mut waiting = in_service;
    let asked = in_service.without(*unanswered);
    for (index, replica) in replicas.iter().filter(|(index, _)| asked.contains(*index)) {
        let (index, done) = (*index, done.clone());
        let asked = replica.file.try_clone().and_then(|file| {
            std::thread::Builder::new()
                .name("last-flush".into())
                .spawn(move || done.send((index, file.sync_data())))
        });
        if let Err(error) = asked {
            waiting.remove(index);
            failed(index, error);
        }
    }
    drop(done);
    let deadline = Instant::now() + LAST_FLUSH_LIMIT;
    while let Ok((index, flushed)) =
        is_done.recv_timeout(deadline.saturating_duration_since(Instant::now()))
    {
        waiting.remove(index);
        if let Err(error) = flushed {
            failed(index, error);
        }
    }
    for index in waiting.iter() {
        failed(index, io::ErrorKind::TimedOut.into());
    }
    *unanswered = unanswered.or(waiting);
    result
}
