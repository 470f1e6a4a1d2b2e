//! What the daemon gives up when its images and sockets are open: the paths that stay in reach.
//!
//! Images and records are not among them. They are opened by processes that another one starts
//! (`replica/file/spawner.rs`), which keeps the rights to do so.

#![forbid(unsafe_code)]

use std::fmt::Write as _;

use log::{debug, warn};

use super::Error;
use super::error::system;
use crate::common::message::Quoted;
use crate::config::{Config, Listen};
use crate::replica::file::{Permitted, start_spawner};
use crate::sandbox::{Access, Beneath, Mode, Part, Sandbox};

/// Checks that a start need not be refused later, because the kernel lacks a part of the sandbox.
pub(super) fn check(config: &Config) -> Result<(), Error> {
    Ok(described(Some(config)).check()?)
}

/// Gives up what is not needed to serve a disk whose images and sockets are open. The calling
/// thread must be the only one.
///
/// # Errors
/// If that cannot be done.
pub(super) fn confine(config: &Config) -> Result<(), Error> {
    let sandbox = described(Some(config));
    let begun = sandbox.begin()?;
    if sandbox.mode != Mode::Off {
        match start_spawner(&permitted(config)) {
            Err(error) if sandbox.mode == Mode::Auto => warn!(
                error:%;
                "cannot start the process that starts those that open images: no image can be \
                 added, and none that is missing is taken in; check that the user may execute the \
                 program, or use --sandbox off"
            ),
            started => started.map_err(system("cannot start a process"))?,
        }
    }
    let lacking = begun.finish()?;
    if sandbox.mode == Mode::Off {
        return Ok(());
    }
    if lacking.is_empty() {
        debug!("the sandbox is complete");
        return Ok(());
    }
    let parts: Vec<&str> = lacking.iter().map(|(part, _)| part.name()).collect();
    let (_, reason) = &lacking[0];
    warn!(missing = parts.join(","), reason; "parts of the sandbox cannot be had");
    Ok(())
}

/// The images that may be opened while the disk is served.
fn permitted(config: &Config) -> Permitted {
    let records = &config.records;
    Permitted {
        directories: config.image_directories.clone(),
        records: records.are_kept.then(|| records.directory.clone()),
        read_only: config.read_only,
    }
}

/// What `--print-sandbox` prints: the parts, one a line, and the files that stay in reach of a
/// daemon with these options.
pub fn print_sandbox(config: Option<&Config>) -> String {
    let sandbox = described(config);
    let is_off = sandbox.mode == Mode::Off;
    let mut text = String::new();
    let mut line = |first: &str, second: &str, third: &str| {
        let _ = writeln!(text, "{first:<18}{second:<9}{third}");
    };
    for part in Part::ALL {
        match part.lack() {
            _ if is_off => line(part.name(), "off", part.effect()),
            None => line(part.name(), "on", part.effect()),
            Some(why) => line(part.name(), "missing", &why),
        }
    }
    let user = sandbox.user.as_ref().map(|user| user.name.as_str());
    line(
        "user",
        user.unwrap_or("same"),
        "the user while the disk is served",
    );
    if !is_off {
        for Beneath { path, access } in &sandbox.files {
            line("file", access.name(), &Quoted(path).to_string());
        }
    }
    if let Some(config) = config {
        let Permitted {
            directories,
            records,
            read_only,
        } = permitted(config);
        let access = match read_only {
            true => Access::Read,
            false => Access::Write,
        };
        let lists = [
            ("image", directories.images),
            ("image-directory", directories.directories),
            (
                "records",
                records
                    .iter()
                    .map(|directory| directory.path().to_owned())
                    .collect(),
            ),
        ];
        for (what, paths) in &lists {
            for path in paths {
                line(what, access.name(), &Quoted(path).to_string());
            }
        }
    }
    text
}

/// The sandbox of a daemon with these options.
fn described(config: Option<&Config>) -> Sandbox {
    let mut files = vec![
        Beneath {
            path: "/proc".into(),
            access: Access::Read,
        },
        Beneath {
            path: "/sys".into(),
            access: Access::Read,
        },
    ];
    if let Some(config) = config {
        let sockets = [
            Some(&config.listen),
            config.events.as_ref(),
            config.qmp.as_ref(),
        ];
        for file in sockets.into_iter().flatten().filter_map(of_socket) {
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    Sandbox {
        mode: config.map_or(Mode::Auto, |config| config.sandbox.into()),
        user: config.and_then(|config| config.user.clone()),
        files,
    }
}

/// The directory of a socket that the daemon has made and will remove.
fn of_socket(listen: &Listen) -> Option<Beneath> {
    let Listen::Path(path) = listen else {
        return None;
    };
    let absolute = std::path::absolute(path).ok()?;
    Some(Beneath {
        path: absolute.parent()?.to_owned(),
        access: Access::Remove,
    })
}
