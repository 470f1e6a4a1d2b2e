//! A job that has ended, as the records keep it for the operator: nothing is decided by it.

use serde::{Deserialize, Serialize};

use crate::limits::{
    RECORD_JOB_ERROR_BYTES_MAX, RECORD_JOB_ID_BYTES_MAX, RECORD_NAME_BYTES_MAX, RECORD_NUMBER_MAX,
};

/// A job that has ended. Texts that are too long are cut, and numbers that are too large lowered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PastJob {
    /// Its name in the run of the daemon that it was of.
    pub id: String,
    /// What it did, by the name that it has in commands and events.
    pub r#type: String,
    /// The replica of a resync.
    pub node_name: Option<String>,
    /// It was cancelled.
    pub cancelled: bool,
    /// Why it has failed.
    pub error: Option<String>,
    /// When it ended, in seconds since 1970 by the clock of the host.
    pub ended: u64,
    /// Bytes that were done.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Corrupt sectors that it found, counted for each replica.
    pub corrupt_sectors: u64,
    /// Unreadable sectors that it found, counted for each replica.
    pub unreadable_sectors: u64,
    /// Sectors that it wrote.
    pub sectors_written: u64,
}

impl PastJob {
    /// The same within all bounds.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        for (text, bytes_max) in self.texts() {
            let ends = (0..=bytes_max.min(text.len())).rev();
            let end = ends.into_iter().find(|end| text.is_char_boundary(*end));
            text.truncate(end.unwrap_or_default());
        }
        for number in self.numbers() {
            *number = (*number).min(RECORD_NUMBER_MAX);
        }
        self
    }

    fn texts(&mut self) -> impl Iterator<Item = (&mut String, usize)> {
        let optional = [
            (self.node_name.as_mut(), RECORD_NAME_BYTES_MAX),
            (self.error.as_mut(), RECORD_JOB_ERROR_BYTES_MAX),
        ];
        let names = [&mut self.id, &mut self.r#type];
        let names = names
            .into_iter()
            .map(|name| (name, RECORD_JOB_ID_BYTES_MAX));
        let optional = optional.into_iter();
        names.chain(optional.filter_map(|(text, max)| Some((text?, max))))
    }

    fn numbers(&mut self) -> [&mut u64; 6] {
        [
            &mut self.ended,
            &mut self.done_bytes,
            &mut self.total_bytes,
            &mut self.corrupt_sectors,
            &mut self.unreadable_sectors,
            &mut self.sectors_written,
        ]
    }
}
