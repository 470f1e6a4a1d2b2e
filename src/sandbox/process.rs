//! What a process can give up by itself: its user, its capabilities, core dumps, new privileges.

#![forbid(unsafe_code)]

use std::io;

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use super::{Part, SandboxError};

/// A user to become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// As the operator gave it.
    pub name: String,
    /// Its number.
    pub uid: u32,
    /// The number of its group.
    pub gid: u32,
    /// The numbers of all its groups.
    pub groups: Vec<u32>,
}

/// Changes the user and all groups of the process. Its capabilities are gone then, except from the
/// bounding set.
pub(super) fn become_user(user: &User) -> Result<(), SandboxError> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let groups: Vec<Gid> = user.groups.iter().copied().map(Gid::from_raw).collect();
    let changed = setgroups(&groups)
        .and_then(|()| setresgid(gid, gid, gid))
        .and_then(|()| setresuid(uid, uid, uid));
    changed.map_err(|errno| SandboxError::User {
        user: user.name.clone(),
        source: errno.into(),
    })
}

/// Keeps what the right to lock memory allows: without it, buffers of io_uring count against a
/// limit of all processes of the user together. What the daemon locks has bounds of its own.
///
/// Returns the capability that threads must keep until their io_urings exist, where the limit
/// cannot be raised; the kernel does not count what belongs to those.
pub(super) fn keep_locked_memory() -> Result<CapabilitySet, SandboxError> {
    let held = capabilities(None).map_err(refused(Part::Capabilities))?;
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    let kept = held.effective & CapabilitySet::IPC_LOCK;
    if kept.is_empty() || setrlimit(Resource::Memlock, unlimited).is_ok() {
        return Ok(CapabilitySet::empty());
    }
    Ok(kept)
}

/// Has no program that this process starts gain a capability, whatever its user.
pub(super) fn forget_bounding_set() -> Result<(), SandboxError> {
    let held = capabilities(None).map_err(refused(Part::Capabilities))?;
    if !held.effective.contains(CapabilitySet::SETPCAP) {
        // Then `no_new_privs` alone has to prevent that.
        return Ok(());
    }
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel has no more of them.
            Err(rustix::io::Errno::INVAL) => break,
            Err(errno) => return Err(refused(Part::Capabilities)(errno)),
        }
    }
    Ok(())
}

/// Drops all capabilities but those that are kept from all sets of the calling thread.
pub(super) fn drop_capabilities(kept: CapabilitySet) -> Result<(), SandboxError> {
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    let dropped = clear_ambient_capability_set().and_then(|()| set_capabilities(None, sets));
    dropped.map_err(refused(Part::Capabilities))
}

/// Core dumps hold guest memory, and so does what a debugger of the same user reads.
pub(super) fn forbid_core_dumps() -> Result<(), SandboxError> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let forbidden = setrlimit(Resource::Core, none)
        .and_then(|()| set_dumpable_behavior(DumpableBehavior::NotDumpable));
    forbidden.map_err(refused(Part::CoreDumps))
}

/// No program that this process starts has more rights than the process.
pub(super) fn forbid_new_privileges() -> Result<(), SandboxError> {
    set_no_new_privs(true).map_err(refused(Part::Privileges))
}

fn refused<E: Into<io::Error>>(part: Part) -> impl FnOnce(E) -> SandboxError {
    move |source| SandboxError::Refused {
        part,
        source: source.into(),
    }
}
