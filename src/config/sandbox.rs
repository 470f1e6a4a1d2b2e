//! The options about what the daemon gives up, and which images the monitor may use.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum, ValueHint};
use nix::unistd::{Gid, Uid, getgrouplist};

use super::ConfigError;
use crate::replica::file::{ImageDirectories, ReplicaSource};
use crate::sandbox::{Mode, User};

/// Where device nodes are. The links there lead from one directory to the other.
const DEVICES: &str = "/dev";

/// The options as written.
#[derive(Debug, Args)]
pub(super) struct SandboxOptions {
    /// What the daemon gives up when its images and sockets are open. It then has no capabilities,
    /// dumps no core, and reaches only the files that it needs
    #[arg(long, value_name = "MODE", value_enum, default_value_t = SandboxMode::Auto,
        help_heading = "Security")]
    pub(super) sandbox: SandboxMode,

    /// Change to USER when the images and sockets are open, and to GROUP, names or numbers
    /// [default for GROUP: the group of USER; its other groups are set as well]. Images that are
    /// added later must belong to USER. The daemon must be started as root
    #[arg(long, value_name = "USER[:GROUP]", value_parser = parse_user,
        help_heading = "Security")]
    pub(super) user: Option<User>,

    /// Let the monitor add images from the directory DIR and those in it. Repeat the option for
    /// more directories [default: the directories of the images of --blk-file; /dev for those that
    /// are in it]. Symbolic links there must not lead out of it. With / images may be anywhere
    #[arg(long, value_hint = ValueHint::DirPath, value_name = "DIR", help_heading = "Security")]
    pub(super) image_dir: Vec<PathBuf>,

    /// Print what the daemon would give up on this kernel, with the other options if they are
    /// given, and exit
    #[arg(long)]
    pub(super) print_sandbox: bool,
}

/// What the daemon gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SandboxMode {
    /// Everything that the kernel can take away. One line of the log says what it cannot
    Auto,
    /// As auto, but do not start if the kernel lacks a part
    On,
    /// Nothing
    Off,
}

impl From<SandboxMode> for Mode {
    fn from(mode: SandboxMode) -> Self {
        match mode {
            SandboxMode::Auto => Self::Auto,
            SandboxMode::On => Self::On,
            SandboxMode::Off => Self::Off,
        }
    }
}

/// The images that the monitor may use.
pub(super) fn image_directories(
    options: &SandboxOptions,
    replicas: &[ReplicaSource],
) -> Result<ImageDirectories, ConfigError> {
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|source| ConfigError::NotAbsolute {
            path: path.to_owned(),
            source,
        })
    };
    let images = replicas.iter().map(|replica| absolute(&replica.path));
    let images = images.collect::<Result<Vec<_>, _>>()?;
    let mut directories = match options.image_dir.is_empty() {
        false => {
            let given = options.image_dir.iter().map(|path| absolute(path));
            given.collect::<Result<Vec<_>, _>>()?
        }
        true => images.iter().filter_map(|image| usual(image)).collect(),
    };
    directories.sort();
    directories.dedup();
    Ok(ImageDirectories {
        images,
        directories,
    })
}

/// The directory of an image. `None` if it is that of everything.
fn usual(image: &Path) -> Option<PathBuf> {
    if image.starts_with(DEVICES) {
        return Some(DEVICES.into());
    }
    let directory = image.parent()?;
    directory.parent().map(|_| directory.to_owned())
}

/// A user and a group by name or number.
fn parse_user(value: &str) -> Result<User, String> {
    let (user, group) = match value.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (value, None),
    };
    let described = |error: nix::errno::Errno| error.desc().to_owned();
    let number = user.parse::<u32>().ok();
    let found = match number {
        Some(number) => nix::unistd::User::from_uid(Uid::from_raw(number)),
        None => nix::unistd::User::from_name(user),
    };
    let found = found.map_err(described)?;
    let gid = match (group, &found) {
        (Some(group), _) => super::command_line::parse_group(group)?,
        (None, Some(found)) => found.gid.as_raw(),
        (None, None) if number.is_some() => {
            return Err("this number has no name here, so give its group too".to_owned());
        }
        (None, None) => return Err("there is no such user".to_owned()),
    };
    let uid = match (&found, number) {
        (Some(found), _) => found.uid.as_raw(),
        (None, Some(number)) => number,
        (None, None) => return Err("there is no such user".to_owned()),
    };
    let groups = match found.and_then(|found| CString::new(found.name).ok()) {
        Some(name) => getgrouplist(&name, Gid::from_raw(gid)).map_err(described)?,
        None => vec![Gid::from_raw(gid)],
    };
    Ok(User {
        name: value.to_owned(),
        uid,
        gid,
        groups: groups.into_iter().map(Gid::as_raw).collect(),
    })
}
