//! What the daemon and its service manager tell each other: which sockets were passed, and when the
//! disk is served.
//!
//! systemd's protocols (sd_listen_fds(3), sd_notify(3)), which other service managers and
//! supervisors speak too. Without one nothing is passed, and nobody is told.

use std::io;

use log::warn;
use sd_notify::NotifyState;

use crate::common::message::Reason;
use crate::config::PassedSocket;

/// Why what was passed cannot be taken: the environment contradicts itself.
#[derive(Debug, thiserror::Error)]
#[error("the sockets that the service manager passed cannot be taken: {}", Reason(.0))]
pub struct PassedError(#[from] io::Error);

/// The sockets that the service manager passed to this process; children do not inherit them.
///
/// The variables stay in the environment: changing it is unsafe once there are threads, and
/// LISTEN_PID names this process only.
///
/// # Errors
/// If descriptors are missing, or their number and that of their names differ.
pub fn take_passed_sockets() -> Result<Vec<PassedSocket>, PassedError> {
    // Variables for another process, whose child this one is, may even be invalid.
    if sd_notify::listen_fds()?.len() == 0 {
        return Ok(Vec::new());
    }
    let passed = sd_notify::listen_fds_with_names()?;
    Ok(passed.map(|(fd, name)| PassedSocket { name, fd }).collect())
}

/// Tells the service manager, if there is one that wants to know.
pub(super) fn tell(news: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(news) {
        warn!(error:%; "cannot notify the service manager");
    }
}
