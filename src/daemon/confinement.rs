//! What the daemon gives up when its images and sockets are open: the paths that stay in reach.

#![forbid(unsafe_code)]

use std::fs;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use log::{debug, warn};

use super::Error;
use super::replicas::Replicas;
use crate::common::message::Quoted;
use crate::config::{Config, Listen};
use crate::replica::file::DEVICES;
use crate::sandbox::{Access, Beneath, Mode, Part, Sandbox};

/// The variable that names the socket of the service manager, sd_notify(3).
const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// Checks that a start need not be refused later, because the kernel lacks a part of the sandbox.
pub(super) fn check(config: &Config) -> Result<(), Error> {
    Ok(described(Some(config)).check()?)
}

/// Gives up what is not needed to serve `replicas`. The calling thread must be the only one.
///
/// # Errors
/// If that cannot be done.
pub(super) fn confine(config: &Config, replicas: &Replicas) -> Result<(), Error> {
    let mut sandbox = described(Some(config));
    if let Some(files) = &mut sandbox.files {
        for member in &replicas.members {
            match member {
                Ok(file) => files.extend(of_image(&file.file, config)),
                Err(missing) => files.extend(of_missing(&missing.path, config)),
            }
        }
    }
    let lacking = sandbox.apply()?;
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

/// What `--print-sandbox` prints: the parts, one a line, and the files that stay in reach of a
/// daemon with these options.
pub fn print_sandbox(config: Option<&Config>) -> String {
    let sandbox = described(config);
    let mut text = String::new();
    let mut line = |first: &str, second: &str, third: &str| {
        text.push_str(&format!("{first:<18}{second:<9}{third}\n"));
    };
    for part in Part::ALL {
        match part.lack() {
            _ if !sandbox.wants(part) => line(part.name(), "off", part.effect()),
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
    if let Some(config) = config {
        for directory in &config.image_directories.directories {
            line("image-directory", "", &Quoted(directory).to_string());
        }
    }
    if sandbox.wants(Part::Files) {
        for Beneath { path, access, .. } in sandbox.files.iter().flatten() {
            line("file", access.name(), &Quoted(path).to_string());
        }
    }
    text
}

/// The sandbox of a daemon with these options, without what its images tell when they are open.
fn described(config: Option<&Config>) -> Sandbox {
    let mut files = of_system();
    if let Some(config) = config {
        let directories = &config.image_directories;
        let of_images = directories.images.iter().filter_map(|path| path.parent());
        let of_images = of_images.filter(|path| path.parent().is_some());
        let given = directories.directories.iter().map(PathBuf::as_path);
        let paths = given.chain(of_images).map(Path::to_owned);
        files.extend(paths.map(|path| of_directory(path, false, config)));
        if config.records.are_kept {
            let path = config.records.directory.path().to_owned();
            files.push(of_directory(path, true, config));
        }
        let sockets = [
            Some(&config.listen),
            config.events.as_ref(),
            config.qmp.as_ref(),
        ];
        files.extend(sockets.into_iter().flatten().filter_map(of_socket));
    }
    let is_anywhere = config.is_some_and(|config| config.image_directories.is_anywhere());
    let mut unique: Vec<Beneath> = Vec::new();
    for file in files {
        if !unique.contains(&file) {
            unique.push(file);
        }
    }
    Sandbox {
        mode: config.map_or(Mode::Auto, |config| config.sandbox.into()),
        user: config.and_then(|config| config.user.clone()),
        // With images anywhere, there is nothing to keep out of reach.
        files: (!is_anywhere).then_some(unique),
        abstract_sockets: has_abstract_manager(),
    }
}

/// What every daemon needs.
fn of_system() -> Vec<Beneath> {
    let beneath = |path: &str, access| Beneath {
        path: path.into(),
        access,
        answers: true,
    };
    let mut files = vec![
        beneath("/proc", Access::Read),
        beneath("/sys", Access::Read),
        beneath("/run/udev", Access::Read),
        beneath("/dev/disk", Access::Read),
        beneath("/dev/null", Access::Use),
        beneath("/etc/ld.so.cache", Access::Read),
        beneath("/etc/ld.so.preload", Access::Read),
        // The program opens images in processes of its own.
        beneath("/proc/self/exe", Access::Execute),
    ];
    // Those of its libraries and of the loader: a directory, so that an update does not hurt.
    files.extend(library_directories().into_iter().map(|path| Beneath {
        path,
        access: Access::Execute,
        answers: true,
    }));
    files
}

/// The directories of the files that this program is made of, except its own.
fn library_directories() -> Vec<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let own = fs::read_link("/proc/self/exe").unwrap_or_default();
    let paths = maps
        .lines()
        .filter_map(|line| line.find('/').map(|start| &line[start..]));
    let libraries = paths
        .map(Path::new)
        .filter(|path| *path != own && path.to_string_lossy().contains(".so"));
    let mut directories: Vec<PathBuf> = libraries
        .filter_map(|path| path.parent().map(Path::to_owned))
        .collect();
    directories.sort();
    directories.dedup();
    directories
}

/// A directory with images or records.
fn of_directory(path: PathBuf, answers: bool, config: &Config) -> Beneath {
    let access = if path.starts_with(DEVICES) {
        Access::Use
    } else if config.read_only {
        Access::Read
    } else {
        Access::Write
    };
    Beneath {
        path,
        access,
        answers,
    }
}

/// An open image, which may be in no directory any more, and the directory that it really is in,
/// unless that is `/`: it may have been reached through links.
fn of_image(image: &fs::File, config: &Config) -> Vec<Beneath> {
    let itself = format!("/proc/self/fd/{}", image.as_raw_fd());
    let real = fs::read_link(&itself).unwrap_or_default();
    let directory = real.parent().filter(|path| path.parent().is_some());
    let directory = directory.map(|path| of_directory(path.to_owned(), true, config));
    let itself = of_directory(itself.into(), true, config);
    directory.into_iter().chain([itself]).collect()
}

/// The directory above that of an image that is not there: if the file system of the image is
/// mounted later, that is all that Landlock sees.
fn of_missing(image: &Path, config: &Config) -> Option<Beneath> {
    let image = std::path::absolute(image).ok()?;
    let above = image.parent()?.parent()?;
    above.parent()?;
    Some(of_directory(above.to_owned(), false, config))
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
        answers: true,
    })
}

/// Whether the service manager listens on an abstract socket.
fn has_abstract_manager() -> bool {
    std::env::var_os(NOTIFY_SOCKET).is_some_and(|name| name.as_encoded_bytes().starts_with(b"@"))
}
