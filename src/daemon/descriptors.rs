//! How many descriptors the process may have open.

#![forbid(unsafe_code)]

use log::warn;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::limits::{DESCRIPTORS_NEEDED, DESCRIPTORS_RESERVED};
use crate::untrusted::reserve::reserve_from;

/// Raises the soft limit of open files to what all connections together can need, and reserves some
/// descriptors for the operator. Where the hard limit is lower, the log says so.
pub(super) fn raise_limit() {
    let limits = getrlimit(Resource::Nofile);
    let hard = limits.maximum.unwrap_or(u64::MAX);
    let mut soft = limits.current.unwrap_or(u64::MAX);
    let wanted = DESCRIPTORS_NEEDED.min(hard);
    let raised = Rlimit {
        current: Some(wanted),
        ..limits
    };
    if soft < wanted && setrlimit(Resource::Nofile, raised).is_ok() {
        soft = wanted;
    }
    if soft < DESCRIPTORS_NEEDED {
        warn!(
            limit = soft, needed = DESCRIPTORS_NEEDED;
            "the limit of open files is low: some frontends may be rejected; raise RLIMIT_NOFILE \
             (LimitNOFILE= of the unit)"
        );
    }
    reserve_from(first_reserved(soft));
}

/// The first reserved descriptor. Where there are few in all, it is a quarter of them.
fn first_reserved(limit: u64) -> i32 {
    let reserved = DESCRIPTORS_RESERVED.min(limit / 4);
    i32::try_from(limit - reserved).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_descriptors_are_reserved_whatever_the_limit_is() {
        assert_eq!(first_reserved(256), 192);
        let first = i32::try_from(DESCRIPTORS_NEEDED - DESCRIPTORS_RESERVED).unwrap();
        assert_eq!(first_reserved(DESCRIPTORS_NEEDED), first);
        assert_eq!(first_reserved(u64::MAX), i32::MAX);
    }
}
