//! What is written is read again, and nothing else is.

mod hostile;
mod page;
mod round_trip;

use uuid::Uuid;

use super::pages;
use crate::common::SectorRange;
use crate::common::ranges::RangeSet;
use crate::record::{Creation, Extents, Layout, Record, Threshold};

/// Sectors of 1 MiB.
const MIB: u64 = 2048;

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number + 1)
}

fn record(capacity: u64, members: u8) -> Record {
    let members = (0..members).map(|place| (id(place.into()), format!("{place}.raw")));
    let members: Vec<_> = members.collect();
    let creation = Creation {
        disk: id(100),
        branch: id(200),
        run: id(300),
        layout: Layout::new(capacity),
        threshold: Threshold::majority(members.len()),
        members,
    };
    let mut record = Record::create(&creation).for_replica(id(0), 1);
    record.agree();
    record
}

/// A file in which these slots were written one after the other, and all pages.
fn file(records: &[&Record], intent: &Extents) -> Vec<u8> {
    let last = records.last().unwrap();
    let layout = last.layout();
    let mut file = vec![0; usize::try_from(layout.file_bytes()).unwrap()];
    for record in records {
        let slot = record.slot();
        put(&mut file, slot.offset, &slot.bytes);
    }
    let pages = pages(last.disk, last.replica, intent, 0..layout.pages());
    put(&mut file, Layout::page_offset(0), &pages);
    file
}

fn put(file: &mut [u8], offset: u64, bytes: &[u8]) {
    let offset = usize::try_from(offset).unwrap();
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn set(ranges: &[(u64, u64)]) -> RangeSet {
    let mut set = RangeSet::default();
    for (start, count) in ranges {
        set.insert(SectorRange::new(*start, *count));
    }
    set
}

fn extents(layout: Layout, ranges: &[(u64, u64)]) -> Extents {
    let mut extents = Extents::new(layout);
    for (start, count) in ranges {
        extents.insert(SectorRange::new(*start, *count));
    }
    extents
}
