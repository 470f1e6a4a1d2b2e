//! seccomp: each kind of thread makes the system calls of its list and no other one.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::str::FromStr as _;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use syscalls::Sysno;

use super::system_calls::Limited;
use super::{Part, SandboxError, ThreadKind, system_calls, violation};

/// The filters of the threads of this process, once they are wanted.
static FILTERS: OnceLock<Vec<(ThreadKind, Vec<BpfProgram>)>> = OnceLock::new();

/// Why this kernel does not have filters, if it does not.
pub(super) fn lack() -> Option<String> {
    match TargetArch::try_from(std::env::consts::ARCH) {
        Ok(_) if violation::is_trap_available() => None,
        Ok(_) => Some("the kernel has no seccomp filters that trap".to_owned()),
        Err(_) => Some("there is no list of calls for this kind of processor".to_owned()),
    }
}

/// Has each thread that [`enter`]s a kind from now on have its filter. Nothing is filtered yet.
pub(super) fn prepare(kinds: &[ThreadKind]) -> Result<(), SandboxError> {
    let filters = kinds.iter().map(|kind| Ok((*kind, filters(*kind)?)));
    let filters: Result<Vec<_>, seccompiler::BackendError> = filters.collect();
    let filters = filters.map_err(|error| refused(&error))?;
    violation::handle().map_err(|source| SandboxError::Refused {
        part: Part::SystemCalls,
        source,
    })?;
    let _ = FILTERS.set(filters);
    Ok(())
}

/// From now on the calling thread, and those that it starts, make the calls of this kind only.
/// Does nothing in a process whose filters are not prepared.
///
/// # Panics
/// If the kernel has no memory for it.
pub(super) fn enter(kind: ThreadKind) {
    let filters = FILTERS.get().map(Vec::as_slice).unwrap_or_default();
    let of_kind = filters.iter().find(|(of, _)| *of == kind);
    for filter in of_kind.into_iter().flat_map(|(_, filters)| filters) {
        apply_filter(filter).expect("the kernel has memory for a filter");
    }
}

/// The filters of a kind, each of which must let a call pass. That which traps is the last one: the
/// others could not be added after it.
fn filters(kind: ThreadKind) -> Result<Vec<BpfProgram>, seccompiler::BackendError> {
    let refused = system_calls::refused(kind).iter().map(|(errno, names)| {
        let numbers = names.iter().filter_map(|name| Sysno::from_str(name).ok());
        let rules = numbers.map(|number| (i64::from(number.id()), Vec::new()));
        let action = SeccompAction::Errno(errno.cast_unsigned());
        compile(rules.collect(), SeccompAction::Allow, action)
    });
    let limited = system_calls::limited(kind).into_iter().map(limit);
    refused.chain(limited).chain([filter(kind)]).collect()
}

/// The filter that has a call fail if its argument has no value that it may have.
fn limit(limited: Limited) -> Result<BpfProgram, seccompiler::BackendError> {
    let condition = |argument, compare, value: u32| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value.into())
    };
    let when = limited.when.into_iter();
    let when = when.map(|(argument, value)| condition(argument, SeccompCmpOp::Eq, value));
    let values = limited.values.into_iter();
    let others = values.map(|value| condition(limited.argument, SeccompCmpOp::Ne, value));
    let conditions: Result<Vec<_>, _> = when.chain(others).collect();
    let rule = SeccompRule::new(conditions?)?;
    let number = Sysno::from_str(limited.name).map(|number| (i64::from(number.id()), vec![rule]));
    let action = SeccompAction::Errno(limited.errno.cast_unsigned());
    compile(number.into_iter().collect(), SeccompAction::Allow, action)
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    mismatch: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, mismatch, matched, arch)?.try_into()
}

fn filter(kind: ThreadKind) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for name in system_calls::allowed(kind) {
        // Not every architecture has all of them.
        let Ok(number) = Sysno::from_str(name) else {
            continue;
        };
        rules.insert(i64::from(number.id()), conditions(kind, name)?);
    }
    compile(rules, SeccompAction::Trap, SeccompAction::Allow)
}

/// On which arguments a call is allowed; on all if there is no condition.
fn conditions(kind: ThreadKind, name: &str) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let bits = |argument, mask: libc::c_int, value: libc::c_int| {
        let (mask, value) = (
            u64::from(mask.cast_unsigned()),
            u64::from(value.cast_unsigned()),
        );
        let compare = SeccompCmpOp::MaskedEq(mask);
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value)
    };
    let is_null = |argument| {
        let (len, compare) = (SeccompCmpArgLen::Qword, SeccompCmpOp::Eq);
        SeccompCondition::new(argument, len, compare, 0)
    };
    // The type of a socket has flags.
    let one_of = |argument, types: &[libc::c_int]| {
        let rules = types.iter().map(|kind| {
            let condition = bits(argument, 0xf, *kind)?;
            SeccompRule::new(vec![condition])
        });
        rules.collect()
    };
    let starts_programs = matches!(kind, ThreadKind::Spawner | ThreadKind::Opener);
    let condition = match name {
        // The loader maps code.
        "mmap" | "mprotect" if !starts_programs => bits(2, libc::PROT_EXEC, 0)?,
        // No datagram could be sent to a name: pairs of sockets are connected for good.
        "socketpair" => return one_of(1, &[libc::SOCK_STREAM, libc::SOCK_SEQPACKET]),
        "sendto" => is_null(4)?,
        // A thread, or a task that shares the memory.
        "clone" if kind != ThreadKind::Spawner => bits(0, libc::CLONE_VM, libc::CLONE_VM)?,
        // Limits are only read, such as that of descriptors.
        "prlimit64" if !starts_programs => is_null(2)?,
        // A panic, and a task that tells its process that it has made a call that is not allowed.
        "kill" | "tgkill" => bits(0, -1, std::process::id().cast_signed())?,
        _ => return Ok(Vec::new()),
    };
    Ok(vec![SeccompRule::new(vec![condition])?])
}

fn refused(error: &dyn std::error::Error) -> SandboxError {
    SandboxError::Refused {
        part: Part::SystemCalls,
        source: io::Error::other(error.to_string()),
    }
}
