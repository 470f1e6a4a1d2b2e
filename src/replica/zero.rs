//! How to zero a range of a replica: in the best way that it supports (contract W4).
//!
//! Punching a hole frees the space, zeroing the range keeps it. Both are quick, but not every file
//! system or block device supports them; writing works everywhere. On a block device the kernel
//! does the first two only if the device guarantees zeroes afterwards.

#![forbid(unsafe_code)]

use rustix::fs::FallocateFlags;

use crate::common::{Errno, ReplicaIndex};

/// A way to zero a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// `FALLOC_FL_PUNCH_HOLE`.
    PunchHole,
    /// `FALLOC_FL_ZERO_RANGE`.
    ZeroRange,
    /// Writing zeroes.
    Write,
}

/// The ways to try, in order, when the space may be freed and when it must be kept.
const UNMAP: [Way; 3] = [Way::PunchHole, Way::ZeroRange, Way::Write];
const KEEP: [Way; 2] = [Way::ZeroRange, Way::Write];

/// Bytes of [`ZEROES`].
pub(super) const ZEROES_BYTES: usize = 1 << 20;

/// Zeroes to write, aligned for direct I/O on any file.
pub(super) static ZEROES: Zeroes = Zeroes([0; ZEROES_BYTES]);

/// See [`ZEROES`].
#[repr(align(4096))]
pub(super) struct Zeroes(pub(super) [u8; ZEROES_BYTES]);

/// Remembers which ways a replica lacks, so that each is tried in vain only once.
#[derive(Debug)]
pub(super) struct Ways(Vec<Lacks>);

#[derive(Clone, Copy, Debug, Default)]
struct Lacks {
    punch_hole: bool,
    zero_range: bool,
}

impl Ways {
    pub(super) fn new(replicas: usize) -> Self {
        Self(vec![Lacks::default(); replicas])
    }

    /// Another replica takes this index.
    pub(super) fn forget(&mut self, replica: ReplicaIndex) {
        self.0[replica.as_usize()] = Lacks::default();
    }

    /// The way to try first.
    pub(super) fn best(&self, replica: ReplicaIndex, unmap: bool) -> Way {
        let mut ways = order(unmap).iter().copied();
        ways.find(|way| self.has(replica, *way))
            .unwrap_or(Way::Write)
    }

    /// The way to try after `way` failed with `errno`. `None` after writing failed: that error is
    /// the result then.
    pub(super) fn after(
        &mut self,
        replica: ReplicaIndex,
        unmap: bool,
        way: Way,
        errno: Errno,
    ) -> Option<Way> {
        if matches!(errno.0, libc::EOPNOTSUPP | libc::ENOSYS) {
            let lacks = &mut self.0[replica.as_usize()];
            match way {
                Way::PunchHole => lacks.punch_hole = true,
                Way::ZeroRange => lacks.zero_range = true,
                Way::Write => {}
            }
        }
        let mut ways = order(unmap).iter().copied();
        ways.by_ref().find(|other| *other == way)?;
        ways.find(|other| self.has(replica, *other))
    }

    fn has(&self, replica: ReplicaIndex, way: Way) -> bool {
        let lacks = self.0[replica.as_usize()];
        match way {
            Way::PunchHole => !lacks.punch_hole,
            Way::ZeroRange => !lacks.zero_range,
            Way::Write => true,
        }
    }
}

impl Way {
    /// The flags for fallocate(2), or `None` if this way needs writes.
    pub(super) fn fallocate_flags(self) -> Option<FallocateFlags> {
        match self {
            Self::PunchHole => Some(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE),
            Self::ZeroRange => Some(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE),
            Self::Write => None,
        }
    }
}

fn order(unmap: bool) -> &'static [Way] {
    if unmap { &UNMAP } else { &KEEP }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPLICA: ReplicaIndex = ReplicaIndex(1);
    const UNSUPPORTED: Errno = Errno(libc::EOPNOTSUPP);

    #[test]
    fn a_way_that_a_replica_lacks_is_tried_once() {
        let mut ways = Ways::new(2);
        assert_eq!(ways.best(REPLICA, true), Way::PunchHole);
        assert_eq!(
            ways.after(REPLICA, true, Way::PunchHole, UNSUPPORTED),
            Some(Way::ZeroRange)
        );
        assert_eq!(
            ways.after(REPLICA, true, Way::ZeroRange, UNSUPPORTED),
            Some(Way::Write)
        );
        assert_eq!(ways.after(REPLICA, true, Way::Write, UNSUPPORTED), None);
        assert_eq!(ways.best(REPLICA, true), Way::Write);
        assert_eq!(ways.best(REPLICA, false), Way::Write);
        assert_eq!(ways.best(ReplicaIndex(0), false), Way::ZeroRange);
    }

    #[test]
    fn another_error_does_not_rule_a_way_out() {
        let mut ways = Ways::new(2);
        assert_eq!(
            ways.after(REPLICA, false, Way::ZeroRange, Errno(libc::ENOSPC)),
            Some(Way::Write)
        );
        assert_eq!(ways.best(REPLICA, false), Way::ZeroRange);
    }
}
