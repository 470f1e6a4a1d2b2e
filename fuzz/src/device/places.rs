//! Maps the numbers of a script to virtqueues and guest addresses.

use super::super::script::Script;

/// Virtqueues of the device.
pub(super) const QUEUES: u16 = 2;

/// An address of the guest. Most are near the beginning, the others far away.
pub(super) fn address(script: &mut Script<'_>) -> u64 {
    match u64::from(script.u16()) {
        near @ ..0xd000 => near,
        end @ 0xd000..0xe000 => u64::MAX - (end & 0xfff),
        high @ 0xe000..0xf000 => (1 << 32) + (high & 0xfff),
        far => far << 40,
    }
}

/// One of the virtqueues.
pub(super) fn queue(script: &mut Script<'_>) -> u16 {
    u16::from(script.u8()) % QUEUES
}
