//! A slot: a line with the checksum, a JSON text that people can read, then the stale maps.
//!
//! ```text
//! quorum-blk record crc32c=0123abcd text=001536 bytes=0008192
//! { … }
//! zeroes up to a multiple of 512, the maps, zeroes up to a multiple of 4096
//! ```
//!
//! `text` counts the bytes of the text with its final newline, `bytes` those of the whole slot that
//! are in use. The checksum covers all of these but the beginning of the line up to itself.

use super::SlotFault;
use super::text;
use crate::limits::{RECORD_SLOT_BYTES, RECORD_TEXT_BYTES_MAX};
use crate::record::Record;

/// A slot to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Where it belongs in the file.
    pub offset: u64,
    /// Its bytes: a multiple of 4096.
    pub bytes: Vec<u8>,
}

/// The line up to the checksum.
const MAGIC: &[u8] = b"quorum-blk record crc32c=";

/// Where the checksum ends and what it covers begins.
const COVERED: usize = MAGIC.len() + 8;

/// Bytes of the line.
pub(super) const LINE_BYTES: usize = COVERED + " text=001536 bytes=0008192\n".len();

/// The maps begin at a multiple of so many bytes.
const MAPS_ALIGNMENT: usize = 512;

pub(super) const SLOT_ALIGNMENT: usize = 4096;

/// The bytes of the slot of a record.
pub(super) fn encode(record: &Record) -> Vec<u8> {
    let (text, maps) = text::encode(record);
    of_parts(&text, &maps)
}

/// The bytes of a slot with this text and these maps.
pub(super) fn of_parts(text: &[u8], maps: &[u8]) -> Vec<u8> {
    assert!(text.len() <= RECORD_TEXT_BYTES_MAX, "the text has a bound");
    let mut slot = vec![0; LINE_BYTES];
    slot.extend_from_slice(text);
    slot.resize(slot.len().next_multiple_of(MAPS_ALIGNMENT), 0);
    slot.extend_from_slice(maps);
    slot.resize(slot.len().next_multiple_of(SLOT_ALIGNMENT), 0);
    assert!(slot.len() as u64 <= RECORD_SLOT_BYTES, "a slot has a bound");
    let lengths = format!(" text={:06} bytes={:07}\n", text.len(), slot.len());
    slot[..MAGIC.len()].copy_from_slice(MAGIC);
    slot[COVERED..LINE_BYTES].copy_from_slice(lengths.as_bytes());
    let checksum = format!("{:08x}", crc32c::crc32c(&slot[COVERED..]));
    slot[MAGIC.len()..COVERED].copy_from_slice(checksum.as_bytes());
    slot
}

/// How many bytes of a slot are in use, from its first ones; 0 if these do not say it.
pub(super) fn bytes_in_use(begin: &[u8]) -> usize {
    let fields = begin.get(..LINE_BYTES).and_then(fields);
    let slot_bytes = usize::try_from(RECORD_SLOT_BYTES).expect("a slot is small");
    fields.map_or(0, |fields| fields.bytes.min(slot_bytes))
}

/// The record in a slot. `place` is 0 or 1: slots with even sequence numbers, or odd ones.
pub(super) fn decode(slot: &[u8], place: u64) -> Result<Record, SlotFault> {
    let limit = slot.len().min(SLOT_ALIGNMENT);
    if slot[..limit].iter().all(|byte| *byte == 0) {
        return Err(SlotFault::Blank);
    }
    if !slot.starts_with(MAGIC) {
        return Err(SlotFault::NoRecord);
    }
    let line = slot.get(..LINE_BYTES).ok_or(SlotFault::Short)?;
    let fields = fields(line).ok_or(SlotFault::NoRecord)?;
    let slot = slot.get(..fields.bytes).ok_or(SlotFault::Short)?;
    let covered = slot.get(COVERED..).ok_or(SlotFault::NoRecord)?;
    if crc32c::crc32c(covered) != fields.checksum {
        return Err(SlotFault::Checksum);
    }
    let text_end = LINE_BYTES + fields.text;
    let text = slot.get(LINE_BYTES..text_end);
    let text = text.filter(|_| fields.text <= RECORD_TEXT_BYTES_MAX);
    let text = text.ok_or(SlotFault::Impossible("the length of its text"))?;
    let maps = slot.get(text_end.next_multiple_of(MAPS_ALIGNMENT)..);
    let record = text::decode(text, maps.unwrap_or_default())?;
    if record.sequence % 2 != place {
        return Err(SlotFault::Impossible(
            "its sequence number is that of the other slot",
        ));
    }
    Ok(record)
}

/// What the line says.
struct Fields {
    checksum: u32,
    text: usize,
    bytes: usize,
}

fn fields(line: &[u8]) -> Option<Fields> {
    let line = std::str::from_utf8(line.strip_prefix(MAGIC)?).ok()?;
    let (checksum, line) = line.split_once(" text=")?;
    let (text, line) = line.split_once(" bytes=")?;
    let bytes = line.strip_suffix('\n')?;
    let is_hexadecimal = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if checksum.len() != 8 || !checksum.bytes().all(is_hexadecimal) {
        return None;
    }
    let number = |digits: &str, count| {
        let are_digits = digits.len() == count && digits.bytes().all(|byte| byte.is_ascii_digit());
        are_digits.then(|| digits.parse::<usize>().ok()).flatten()
    };
    Some(Fields {
        checksum: u32::from_str_radix(checksum, 16).ok()?,
        text: number(text, 6)?,
        bytes: number(bytes, 7)?,
    })
}
