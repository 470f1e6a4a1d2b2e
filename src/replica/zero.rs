//! How a replica is made to hold zeroes: in the best way that it has (contract W4).
//!
//! Punching a hole gives the space back, zeroing the range keeps it; both are quick, and not every
//! file system or block device has them. All of them can be written to. On a block device the
//! kernel does either only where the device promises zeroes afterwards.

use crate::common::{Errno, ReplicaIndex};

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// `FALLOC_FL_PUNCH_HOLE`.
    PunchHole,
    /// `FALLOC_FL_ZERO_RANGE`.
    ZeroRange,
    /// Writing zeroes.
    Write,
}

/// The ways in the order in which they are tried, if the space may be given back and if it may not.
const UNMAP: [Way; 3] = [Way::PunchHole, Way::ZeroRange, Way::Write];
const KEEP: [Way; 2] = [Way::ZeroRange, Way::Write];

/// Bytes of [`ZEROES`].
pub(super) const ZEROES_BYTES: usize = 1 << 20;

/// What is written, aligned for direct I/O on any file.
pub(super) static ZEROES: Zeroes = Zeroes([0; ZEROES_BYTES]);

/// See [`ZEROES`].
#[repr(align(4096))]
pub(super) struct Zeroes(pub(super) [u8; ZEROES_BYTES]);

/// The ways that replicas were found not to have, so that they are tried once.
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

    /// The replica is another one.
    pub(super) fn forget(&mut self, replica: ReplicaIndex) {
        self.0[replica.as_usize()] = Lacks::default();
    }

    /// The way to begin with.
    pub(super) fn best(&self, replica: ReplicaIndex, unmap: bool) -> Way {
        let mut ways = order(unmap).iter().copied();
        ways.find(|way| self.has(replica, *way))
            .unwrap_or(Way::Write)
    }

    /// The way to go on with after `way` has failed with `errno`. `None` if zeroes cannot be
    /// written either, which is then what counts.
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
    /// The mode for fallocate(2).
    pub(super) fn fallocate_mode(self) -> Option<libc::c_int> {
        match self {
            Self::PunchHole => Some(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            Self::ZeroRange => Some(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
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
    const NOT_THERE: Errno = Errno(libc::EOPNOTSUPP);

    #[test]
    fn what_a_replica_lacks_is_tried_once() {
        let mut ways = Ways::new(2);
        assert_eq!(ways.best(REPLICA, true), Way::PunchHole);
        assert_eq!(
            ways.after(REPLICA, true, Way::PunchHole, NOT_THERE),
            Some(Way::ZeroRange)
        );
        assert_eq!(
            ways.after(REPLICA, true, Way::ZeroRange, NOT_THERE),
            Some(Way::Write)
        );
        assert_eq!(ways.after(REPLICA, true, Way::Write, NOT_THERE), None);
        assert_eq!(ways.best(REPLICA, true), Way::Write);
        assert_eq!(ways.best(REPLICA, false), Way::Write);
        assert_eq!(ways.best(ReplicaIndex(0), false), Way::ZeroRange);
    }

    #[test]
    fn another_error_is_no_reason_to_give_a_way_up() {
        let mut ways = Ways::new(2);
        assert_eq!(
            ways.after(REPLICA, false, Way::ZeroRange, Errno(libc::ENOSPC)),
            Some(Way::Write)
        );
        assert_eq!(ways.best(REPLICA, false), Way::ZeroRange);
    }
}
