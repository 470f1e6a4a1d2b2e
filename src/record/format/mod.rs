//! The bytes of a record file (S11): two slots, written alternately, then the pages of the intent
//! map. docs/state-format.md describes them for other readers.
//!
//! A file may hold anything. Reading one takes bounded memory and never panics.

mod error;
mod page;
mod slot;
mod text;

pub use self::error::{SlotFault, Unusable};
pub use self::page::{page, pages};
pub use self::slot::Slot;

use std::convert::Infallible;

use super::{Extents, Layout, PAGE_BYTES, Record};

/// A record file that was read.
#[derive(Clone, Debug)]
pub struct Read {
    /// From the slot that counts.
    pub record: Record,
    /// The marked extents. A page that does not verify is marked as a whole.
    pub intent: Extents,
    /// Why a slot does not count, for each of the two. One that was never written is blank.
    pub slots: [Option<SlotFault>; 2],
    /// The pages of the intent map that do not verify.
    pub unverified_pages: Vec<u32>,
}

/// Reads a whole record file.
pub fn read(file: &[u8]) -> Result<Read, Unusable> {
    let part = |offset, length| {
        let rest = usize::try_from(offset).ok().and_then(|at| file.get(at..));
        let rest = rest.unwrap_or_default();
        Ok::<_, Infallible>(rest[..rest.len().min(length)].to_vec())
    };
    match read_by(part) {
        Ok(read) => read,
        Err(never) => match never {},
    }
}

/// Reads a record file of which `part` returns a part, from an offset on: so many bytes, fewer at
/// the end of the file. Asks for no more of a slot than is in use.
///
/// # Errors
/// That of `part`.
pub fn read_by<E>(
    mut part: impl FnMut(u64, usize) -> Result<Vec<u8>, E>,
) -> Result<Result<Read, Unusable>, E> {
    let mut slot = |sequence| {
        let offset = Layout::slot_offset(sequence);
        let begin = part(offset, slot::SLOT_ALIGNMENT)?;
        match slot::bytes_in_use(&begin) {
            bytes if bytes > begin.len() => part(offset, bytes),
            _ => Ok(begin),
        }
    };
    let slots = [slot(0)?, slot(1)?];
    let offset = Layout::page_offset(0);
    let pages = usize::try_from(Layout::FILE_BYTES_MAX - offset).expect("the maps are small");
    let pages = part(offset, pages)?;
    Ok(read_parts([&slots[0], &slots[1]], &pages))
}

/// Reads the two slots of a record file, and what follows them.
pub fn read_parts(slots: [&[u8]; 2], pages: &[u8]) -> Result<Read, Unusable> {
    let [first, second] = [0, 1].map(|place| slot::decode(slots[place], place as u64));
    let (record, slots) = newer(first, second)?;
    let layout = record.layout();
    let mut intent = Extents::new(layout);
    let mut unverified_pages = Vec::new();
    for page in 0..layout.pages() {
        let bytes = pages.chunks(PAGE_BYTES).nth(page as usize);
        match bytes.and_then(|bytes| page::verified_bits(&record, page, bytes)) {
            Some(bits) => intent.load_page(page, bits),
            None => {
                intent.fill_page(page);
                unverified_pages.push(page);
            }
        }
    }
    Ok(Read {
        record,
        intent,
        slots,
        unverified_pages,
    })
}

type Decoded = Result<Record, SlotFault>;

/// The record that counts: that of the higher sequence number.
fn newer(first: Decoded, second: Decoded) -> Result<(Record, [Option<SlotFault>; 2]), Unusable> {
    // A slot of a later version is newer than one of ours, unless its number says otherwise.
    let of_later_version = |slot: &Decoded| match slot {
        Err(SlotFault::Incompatible { sequence, .. }) => *sequence,
        _ => None,
    };
    let (from_first, from_second) = (of_later_version(&first), of_later_version(&second));
    match (first, second) {
        (Ok(first), Ok(second)) if first.sequence > second.sequence => Ok((first, [None, None])),
        (Ok(_), Ok(second)) => Ok((second, [None, None])),
        (Ok(first), Err(fault)) if from_second.is_none_or(|other| other < first.sequence) => {
            Ok((first, [None, Some(fault)]))
        }
        (Err(fault), Ok(second)) if from_first.is_none_or(|other| other < second.sequence) => {
            Ok((second, [Some(fault), None]))
        }
        (Ok(_), Err(fault)) | (Err(fault), Ok(_)) => Err(Unusable::of(fault.clone(), fault)),
        (Err(first), Err(second)) => Err(Unusable::of(first, second)),
    }
}

impl Record {
    /// The bytes of its slot, and where they belong in the file.
    pub fn slot(&self) -> Slot {
        Slot {
            offset: Layout::slot_offset(self.sequence),
            bytes: slot::encode(self),
        }
    }
}

impl Slot {
    /// Whether a start would understand it.
    pub fn can_be_read(&self) -> bool {
        let place = u64::from(self.offset != Layout::slot_offset(0));
        slot::decode(&self.bytes, place).is_ok()
    }
}

#[cfg(test)]
mod tests;
