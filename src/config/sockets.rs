//! Combines the sockets of the options with those that a service manager passed.
//!
//! Invariant: every passed socket is used. A client of an unused one would wait for ever, so an
//! unknown name is an error, and so is a passed socket that an option asks for too.

use std::path::{Path, PathBuf};

use super::command_line::Options;
use super::{ConfigError, Listen, PassedSocket};
use crate::limits::SOCKET_PATH_BYTES_MAX;

/// The names of the sockets that a service manager can pass.
const VHOST_USER: &str = "vhost-user";
const EVENTS: &str = "events";
const QMP: &str = "qmp";

/// The sockets of the daemon.
pub(super) struct Sockets {
    pub(super) listen: Listen,
    pub(super) events: Option<Listen>,
    pub(super) qmp: Option<Listen>,
}

impl Sockets {
    /// Checks that the options and the passed sockets fit together.
    pub(super) fn check(
        options: &Options,
        mut passed: Vec<PassedSocket>,
    ) -> Result<Self, ConfigError> {
        check_paths([
            ("--socket-path", &options.socket_path),
            ("--events", &options.events),
            ("--qmp", &options.qmp),
        ])?;
        // `--fd` identifies this one by its number; its name does not matter.
        passed.retain(|socket| Some(socket.fd) != options.fd);
        let is_given = options.socket_path.is_some() || options.fd.is_some();
        if let ([only], false) = (&mut passed[..], is_given)
            && ![EVENTS, QMP].contains(&only.name.as_str())
        {
            // Without FileDescriptorName= a socket has the name of its unit. A single one can only
            // be that of the disk.
            only.name = VHOST_USER.to_owned();
        }
        let listen = options.socket_path.clone().map(Listen::Path);
        let mut listen = listen.or(options.fd.map(Listen::Fd));
        let mut events = options.events.clone().map(Listen::Path);
        let mut qmp = options.qmp.clone().map(Listen::Path);
        for socket in passed {
            let (place, option) = match socket.name.as_str() {
                VHOST_USER if options.fd.is_some() => (&mut listen, "--fd"),
                VHOST_USER => (&mut listen, "--socket-path"),
                EVENTS => (&mut events, "--events"),
                QMP => (&mut qmp, "--qmp"),
                _ => return Err(ConfigError::PassedUnknown(socket)),
            };
            match place {
                Some(Listen::Passed(_)) => return Err(ConfigError::PassedTwice(socket)),
                Some(_) => return Err(ConfigError::PassedAndGiven { socket, option }),
                None => *place = Some(Listen::Passed(socket)),
            }
        }
        Ok(Self {
            listen: listen.ok_or(ConfigError::NoSocket)?,
            events,
            qmp,
        })
    }
}

fn check_paths(sockets: [(&'static str, &Option<PathBuf>); 3]) -> Result<(), ConfigError> {
    let mut seen: Vec<(&'static str, &Path)> = Vec::new();
    for (option, path) in sockets {
        let Some(path) = path.as_deref() else {
            continue;
        };
        if !(1..=SOCKET_PATH_BYTES_MAX).contains(&path.as_os_str().len()) {
            return Err(ConfigError::SocketPathLength {
                option,
                path: path.to_owned(),
            });
        }
        if let Some((first, _)) = seen.iter().find(|(_, other)| *other == path) {
            return Err(ConfigError::OneSocketPath {
                first,
                second: option,
                path: path.to_owned(),
            });
        }
        seen.push((option, path));
    }
    Ok(())
}
