//! The protocols of systemd and other service managers: sockets that the service manager passes
//! (sd_listen_fds(3)), and notifications of the state of the daemon (sd_notify(3)). Without a
//! service manager there are neither.

#![forbid(unsafe_code)]

use std::io;

use log::warn;
use sd_notify::NotifyState;

use crate::common::message::Reason;
use crate::config::PassedSocket;

/// The variables of the service manager contradict each other.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot use the sockets of the service manager (LISTEN_FDS, LISTEN_FDNAMES): {}",
    Reason(.0)
)]
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

/// Sends a state to the service manager, if there is one.
pub(super) fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(error:%; "cannot notify the service manager");
    }
}
