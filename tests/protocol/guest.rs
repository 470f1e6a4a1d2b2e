//! What the guest knows, and may rely on.

use crate::disk::{SECTORS_MAX, Version};
use crate::sets::{self, Set};

/// By sector, sets of versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Guest {
    /// What a read may return (I1).
    pub(crate) legal: [Set; SECTORS_MAX],
    /// What a read may return after a power cut: no older than what a flush has covered (I5).
    pub(crate) after_power_cut: [Set; SECTORS_MAX],
    /// The last version that was written.
    pub(crate) last: Version,
}

impl Guest {
    /// A write begins: it may take effect at any time from now on.
    pub(crate) fn begins(&mut self, sector: usize) -> Version {
        self.last += 1;
        let version = sets::one(self.last.into());
        self.legal[sector] |= version;
        self.after_power_cut[sector] |= version;
        self.last
    }

    /// A write has succeeded, or a read has returned this.
    pub(crate) fn sees(&mut self, sector: usize, version: Version) {
        self.legal[sector] = sets::one(version.into());
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            legal: [sets::one(0); SECTORS_MAX],
            after_power_cut: [sets::one(0); SECTORS_MAX],
            last: 0,
        }
    }
}
