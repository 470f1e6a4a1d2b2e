//! Any record and any map survive the way to the disk and back, torn writes included.

use proptest::prelude::*;

use super::{MIB, extents, file, id, record, set};
use crate::common::SectorRange;
use crate::limits::{
    RECORD_BRANCHES_MAX, RECORD_JOB_ERROR_BYTES_MAX, RECORD_JOB_ID_BYTES_MAX, RECORD_JOBS_MAX,
    RECORD_MAP_BYTES_MAX, RECORD_NAME_BYTES_MAX, RECORD_NUMBER_MAX, RECORD_SLOT_BYTES,
    RECORD_TABLES_MAX, REPLICAS_MAX,
};
use crate::record::format::{read, read_by};
use crate::record::{
    Branch, Epoch, Extents, Fingerprint, Layout, Member, MemberState, PAGE_BYTES, PastJob, Record,
    Stale,
};

/// A capacity, and ranges of a disk of it.
fn ranges() -> impl Strategy<Value = (u64, Vec<(u64, u64)>)> {
    let capacities = prop_oneof![
        1..64u64,
        Just(64 * MIB),
        Just(8192 * MIB),
        Just((1 << 51) - 3),
        1..=RECORD_NUMBER_MAX
    ];
    capacities.prop_flat_map(|capacity| {
        let range = (0..capacity, 1..=capacity)
            .prop_map(move |(start, count)| (start, count.min(capacity - start)));
        let short = (0..capacity).prop_map(|start| (start, 1));
        let list = prop::collection::vec(prop_oneof![short, range], 0..8);
        (Just(capacity), list)
    })
}

fn member_state() -> impl Strategy<Value = MemberState> {
    let inactive = prop::option::of(1..9u64).prop_map(|held| MemberState::Inactive {
        holds: held.map(|number| Epoch { number, run: id(7) }),
    });
    prop_oneof![Just(MemberState::Active), inactive]
}

prop_compose! {
    fn any_record()(
        (capacity, stale) in ranges(),
        extent_sectors in (0..12).prop_map(|bits| 1_u64 << bits),
        everywhere in any::<bool>(),
        states in prop::collection::vec((member_state(), any::<bool>()), 0..6),
        name in ".{0,80}",
        sequence in 2..1000u64,
        number in 10..1000u64,
        is_proposal in any::<bool>(),
        image in prop::option::of((any::<u64>(), any::<i64>())),
    ) -> Record {
        let count = u8::try_from(states.len() + 1).unwrap();
        let mut record = record(capacity, count);
        record.sequence = sequence;
        record.epoch.number = number;
        record.clean = image.is_some();
        record.image = image.map(|(bytes, modified_ns)| Fingerprint { bytes, modified_ns });
        let layout = Layout::with_extents(capacity, extent_sectors);
        record.extent_sectors = layout.extent_sectors();
        for (member, (state, where_changed)) in record.members[1..].iter_mut().zip(states) {
            *member = Member::new(member.id, &name);
            member.state = state;
            member.stale_where_changed = where_changed;
            let (first, second) = stale.split_at(stale.len() / 2);
            member.stale = Stale::of(&set(first), layout);
            member.doubtful = Stale::of(&set(second), layout);
        }
        if everywhere {
            record.members[0].stale = Stale::All;
        }
        if is_proposal {
            record.propose();
            record.branch(id(201));
            record.adopted = Some(id(0));
        }
        record
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(record in any_record(), (_, marks) in ranges()) {
        let intent = extents(record.layout(), &marks);
        let read = read(&file(&[&record], &intent)).unwrap();
        prop_assert_eq!(&read.record, &record);
        prop_assert_eq!(&read.intent, &intent);
        prop_assert_eq!(read.unverified_pages, Vec::<u32>::new());
        let slot = record.slot();
        prop_assert_eq!(slot.offset, record.sequence % 2 * RECORD_SLOT_BYTES);
        prop_assert!(slot.bytes.len() % PAGE_BYTES == 0);
    }

    /// A write of a slot over an older one that was cut short, at any byte.
    #[test]
    fn a_torn_slot_leaves_the_other_one(
        record in any_record(),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut newer = record.clone();
        newer.sequence += 1;
        newer.members[0].stale_where_changed = true;
        newer.clean = !record.clean;
        let mut oldest = record.clone();
        oldest.sequence -= 1;
        oldest.members[0].stale = Stale::None;
        let intent = Extents::new(record.layout());
        let before = file(&[&oldest, &record], &intent);
        let after = file(&[&newer, &record], &intent);
        let slot = newer.slot();
        let start = usize::try_from(slot.offset).unwrap();
        let cut = start + cut.index(slot.bytes.len());
        let torn = [&after[..cut], &before[cut..]].concat();
        // Where the rest does not differ, the write was complete.
        let is_complete = torn[start..start + slot.bytes.len()] == slot.bytes;
        let expected = if is_complete { &newer } else { &record };
        prop_assert_eq!(&read(&torn).unwrap().record, expected);
    }

    #[test]
    fn a_flipped_bit_leaves_the_other_slot(
        record in any_record(),
        place in any::<prop::sample::Index>(),
        bit in 0..8u8,
    ) {
        let mut newer = record.clone();
        newer.sequence += 1;
        newer.clean = !record.clean;
        let mut bytes = file(&[&record, &newer], &Extents::new(record.layout()));
        prop_assert_eq!(&read(&bytes).unwrap().record, &newer);
        let slot = newer.slot();
        let at = usize::try_from(slot.offset).unwrap() + place.index(slot.bytes.len());
        bytes[at] ^= 1 << bit;
        let read = read(&bytes).unwrap();
        prop_assert_eq!(&read.record, &record);
        prop_assert_eq!(read.slots.iter().flatten().count(), 1);
    }

    #[test]
    fn a_set_of_extents_has_every_sector_and_no_far_one((capacity, list) in ranges()) {
        let layout = Layout::new(capacity);
        let mut map = Extents::new(layout);
        let ranges = set(&list);
        for range in ranges.iter() {
            let is_known = map.contains(range);
            prop_assert_eq!(map.insert(range), !is_known);
        }
        for range in ranges.iter() {
            prop_assert!(map.contains(range) && map.overlaps(range));
        }
        let sectors = layout.extent_sectors();
        for marked in map.iter() {
            prop_assert!(marked.end() <= capacity && marked.start % sectors == 0);
            for index in (marked.start / sectors..marked.end().div_ceil(sectors)).take(9) {
                prop_assert!(ranges.overlaps(layout.extent(index)));
            }
        }
        let marked: u64 = map.iter().map(|range| range.count.div_ceil(sectors)).sum();
        prop_assert_eq!(marked, map.count());
        let other = Layout::new((capacity * 3).min(RECORD_NUMBER_MAX));
        for range in ranges.iter() {
            prop_assert!(map.fitted(other).contains(range));
            prop_assert!(map.remove(range));
            prop_assert!(!map.overlaps(range));
            map.insert(range);
        }
        for range in ranges.iter() {
            map.remove(range);
        }
        prop_assert!(map.is_empty());
    }

    #[test]
    fn a_difference_has_all_sectors_that_are_not_in_the_other_set(
        (capacity, list) in ranges(),
        split in 0..8usize,
    ) {
        let layout = Layout::new(capacity);
        let (first, second) = list.split_at(split.min(list.len()));
        let widened = |list| Stale::of_extents(&extents(layout, list), layout);
        let exact = |list| Stale::of(&set(list), layout);
        for (one, other) in [
            (exact(first), exact(second)),
            (exact(first), widened(second)),
            (widened(first), exact(second)),
            (Stale::All, exact(second)),
        ] {
            let ranges = one.without(&other, layout).to_ranges(layout);
            let mut expected = one.to_ranges(layout);
            expected.remove_all(&other.to_ranges(layout));
            prop_assert!(ranges.iter().eq(expected.iter()), "few runs are exact");
        }
    }

    #[test]
    fn a_union_has_the_sectors_of_both_sets((capacity, list) in ranges(), split in 0..8usize) {
        let layout = Layout::new(capacity);
        let (first, second) = list.split_at(split.min(list.len()));
        let widened = |list| Stale::of_extents(&extents(layout, list), layout);
        let exact = |list| Stale::of(&set(list), layout);
        for (one, other) in [
            (exact(first), exact(second)),
            (exact(first), widened(second)),
            (widened(first), widened(second)),
        ] {
            let ranges = one.union(&other, layout).to_ranges(layout);
            let mut expected = one.to_ranges(layout);
            expected.insert_all(&other.to_ranges(layout));
            for range in expected.iter() {
                prop_assert_eq!(ranges.within(range), vec![range]);
            }
        }
    }
}

#[test]
fn sizes_of_disks() {
    let sizes = [1, 64 * MIB, 8192 * MIB, 1 << 31, 1 << 51, RECORD_NUMBER_MAX];
    let layouts = sizes.map(Layout::new);
    let extents = layouts.map(|layout| layout.extent_sectors() / MIB);
    assert_eq!(extents, [1, 1, 1, 16, 16 << 20, 64 << 20]);
    assert_eq!(layouts.map(Layout::pages), [1, 1, 1, 3, 3, 3]);
    for layout in layouts {
        assert!(layout.map_bytes() <= RECORD_MAP_BYTES_MAX);
        assert!(layout.file_bytes() <= (2 << 20) + (32 << 10));
        let last = layout.page_of(layout.capacity() - 1);
        assert_eq!(
            last,
            layout.pages() - 1,
            "the last sector is on the last page"
        );
    }
}

/// 32 members with the longest names and maps, and the longest lineage.
#[test]
fn the_largest_record_fits_a_slot() {
    let capacity = 8 * RECORD_MAP_BYTES_MAX * MIB;
    let mut record = record(capacity, u8::try_from(REPLICAS_MAX).unwrap());
    let layout = record.layout();
    assert_eq!(layout.map_bytes(), RECORD_MAP_BYTES_MAX);
    let mut map = Extents::new(layout);
    let mut ranges = set(&[]);
    for index in (0..layout.extents()).step_by(2) {
        map.insert(layout.extent(index));
        ranges.insert(SectorRange::new(layout.extent(index).start, 1));
    }
    let many = Stale::of(&ranges, layout);
    assert_eq!(
        many,
        Stale::Extents(map.clone()),
        "too many runs become extents"
    );
    let branches = (0..RECORD_BRANCHES_MAX as u64).map(|since| Branch {
        id: id(500 + u128::from(since)),
        since,
    });
    record.lineage = branches.collect();
    record.epoch.number = RECORD_NUMBER_MAX - 1;
    let holds = Some(Epoch {
        number: RECORD_NUMBER_MAX - 2,
        run: id(9),
    });
    for member in &mut record.members[1..] {
        member.node_name = "\u{1}".repeat(RECORD_NAME_BYTES_MAX);
        member.stale = many.clone();
        member.doubtful = many.clone();
        member.state = MemberState::Inactive { holds };
    }
    record.propose();
    let before = record.before.as_mut().unwrap();
    before.tables = vec![before.tables[0].clone(); RECORD_TABLES_MAX];
    record.branch(id(900));
    record.adopted = Some(id(3));
    let text = |bytes| "\u{1}".repeat(bytes);
    let job = PastJob {
        id: text(RECORD_JOB_ID_BYTES_MAX),
        r#type: text(RECORD_JOB_ID_BYTES_MAX),
        node_name: Some(text(RECORD_NAME_BYTES_MAX)),
        error: Some(text(RECORD_JOB_ERROR_BYTES_MAX)),
        ended: RECORD_NUMBER_MAX,
        ..PastJob::default()
    };
    record.jobs = vec![job; RECORD_JOBS_MAX];
    assert_eq!(record.lineage.len(), RECORD_BRANCHES_MAX);
    assert_eq!(read(&file(&[&record], &map)).unwrap().record, record);
}

#[test]
fn no_more_of_a_slot_is_read_than_is_in_use() {
    let record = record(8192 * MIB, 3);
    let file = file(&[&record], &Extents::new(record.layout()));
    let mut asked = 0;
    let read = read_by(|offset, length| {
        asked += length;
        let at = usize::try_from(offset).unwrap();
        Ok::<_, ()>(file[at..(at + length).min(file.len())].to_vec())
    });
    assert_eq!(read.unwrap().unwrap().record, record);
    assert_eq!(asked, 6 * 4096, "two blocks of slots, and four pages");
}
