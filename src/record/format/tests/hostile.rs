//! What verifies, and what does not.

use proptest::prelude::*;

use super::super::{slot, text};
use super::{extents, file, id, put, record, set};
use crate::limits::{RECORD_JOBS_MAX, RECORD_SLOT_BYTES};
use crate::record::format::{SlotFault, Unusable, read};
use crate::record::{Extents, Layout, MemberState, PAGE_BYTES, PastJob, Record, Stale};

proptest! {
    #[test]
    fn anything_can_be_read(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        at in 0..200usize,
    ) {
        let _ = read(&bytes);
        let mut file = file(&[&record(1, 2)], &Extents::new(Layout::new(1)));
        let start = usize::try_from(RECORD_SLOT_BYTES).unwrap() + at * 10;
        file[start..start + bytes.len()].copy_from_slice(&bytes);
        let _ = read(&file);
    }
}

#[test]
fn every_bit_of_the_first_block_counts() {
    let record = record(100, 3);
    let mut newer = record.clone();
    newer.sequence = 2;
    newer.clean = true;
    let bytes = file(&[&record, &newer], &Extents::new(record.layout()));
    assert_eq!(read(&bytes).unwrap().record, newer, "the newer one counts");
    let slot_bytes = usize::try_from(RECORD_SLOT_BYTES).unwrap();
    let [first, second] = [&bytes[..8192], &bytes[slot_bytes..slot_bytes + 8192]];
    for at in 0..newer.slot().bytes.len() {
        for bit in 0..8 {
            let mut first = first.to_vec();
            first[at] ^= 1 << bit;
            let read = crate::record::format::read_parts([&first, second], &[]);
            assert_eq!(read.unwrap().record, record, "bit {bit} of {at}");
        }
    }
}

#[test]
fn a_page_that_does_not_verify_is_marked() {
    // 112 GiB, the size with the longest map.
    let record = record(224 << 20, 2);
    let layout = record.layout();
    assert_eq!(layout.pages(), 4);
    let intent = extents(layout, &[(0, 1)]);
    let whole = file(&[&record], &intent);
    let place = |page| usize::try_from(Layout::page_offset(page)).unwrap();
    for (page, at) in [(0, 0), (1, 4), (2, 8), (3, 4095)] {
        let mut bytes = whole.clone();
        bytes[place(page) + at] ^= 4;
        let read = read(&bytes).unwrap();
        assert_eq!(read.unverified_pages, [page]);
        let mut expected = intent.clone();
        expected.fill_page(page);
        assert_eq!(read.intent, expected);
    }
    let short = read(&whole[..place(0) + 100]).unwrap();
    assert_eq!(
        short.intent,
        Extents::full(layout),
        "it ends before its pages"
    );
    let mut moved = whole.clone();
    moved[place(0)..].rotate_left(PAGE_BYTES);
    assert_eq!(read(&moved).unwrap().unverified_pages, [0, 1, 2, 3]);
    let mut of_other = file(&[&record.for_replica(id(1), 1)], &intent);
    of_other[..place(0)].copy_from_slice(&whole[..place(0)]);
    assert_eq!(read(&of_other).unwrap().unverified_pages.len(), 4);
}

/// A file with a slot in which the text was changed, and whose checksum is right.
fn with_text(record: &Record, from: &str, to: &str) -> Vec<u8> {
    let (text, maps) = text::encode(record);
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains(from), "{text}");
    let slot = slot::of_parts(text.replacen(from, to, 1).as_bytes(), &maps);
    let mut file = vec![0; usize::try_from(Layout::page_offset(1)).unwrap()];
    put(&mut file, Layout::slot_offset(record.sequence), &slot);
    file
}

#[test]
fn a_text_that_contradicts_itself_does_not_count() {
    let mut record = record(1000, 3);
    record.members[1].stale = Stale::of(&set(&[(5, 2), (8, 1)]), record.layout());
    record.members[2].state = MemberState::Inactive { holds: None };
    record.jobs = vec![PastJob {
        id: "job7".to_owned(),
        error: Some("none".to_owned()),
        ended: 70,
        ..PastJob::default()
    }];
    let [first, second, third] = [0, 1, 2].map(|place| record.members[place].id.to_string());
    let replica = format!("\"replica\": \"{first}\"");
    let of_none = format!("\"replica\": \"{}\"", id(9));
    let follower = format!("\"adopted\": \"{}\"", id(9));
    let too_large = u64::MAX.to_string();
    let job = serde_json::to_string(&record.jobs[0]).unwrap() + ",";
    let many = job.repeat(RECORD_JOBS_MAX);
    let cases = [
        ("\"sequence\": 1", "\"sequence\": 2"),
        ("\"sequence\": 1", "\"sequence\": 0"),
        ("\"capacity-sectors\": 1000", "\"capacity-sectors\": 0"),
        ("\"capacity-sectors\": 1000", "\"capacity-sectors\": 8"),
        ("1000", &too_large),
        ("\"extent-sectors\": 2048", "\"extent-sectors\": 4096"),
        ("\"extent-sectors\": 2048", "\"extent-sectors\": 1000"),
        ("\"extent-sectors\": 2048", "\"extent-sectors\": 0"),
        ("\"vote-threshold\": 2", "\"vote-threshold\": 4"),
        ("\"vote-threshold\": 2", "\"vote-threshold\": 0"),
        ("\"count\": 2", "\"count\": 1800"),
        ("\"count\": 2", "\"count\": 0"),
        ("\"count\": 2", &format!("\"count\": {too_large}")),
        ("\"offset\": 0", &format!("\"offset\": {too_large}")),
        ("\"offset\": 0", "\"offset\": 16"),
        ("\"since\": 1", "\"since\": 7"),
        ("\"adopted\": null", &follower),
        (
            "\"active\": true,\n      \"holds\": null",
            "\"active\": true,\n      \"holds\": {}",
        ),
        ("\"job7\"", &format!("\"{}\"", "7".repeat(33))),
        ("\"none\"", &format!("\"{}\"", "7".repeat(201))),
        ("\"ended\": 70", &format!("\"ended\": {too_large}")),
        (
            "{\n      \"id\": \"job7\"",
            &format!("{many}{{\n      \"id\": \"job7\""),
        ),
        (&replica, &of_none),
        (&second, &third),
    ];
    for (from, to) in cases {
        let to = to.replace(
            "{}",
            "{\"number\": 1, \"run\": \"00000000-0000-0000-0000-00000000012d\"}",
        );
        let fault = read(&with_text(&record, from, &to)).unwrap_err();
        let is_impossible = matches!(fault, Unusable::Both(_, SlotFault::Impossible(_)));
        assert!(is_impossible, "{from} → {to}: {fault}");
    }
    let none_active = with_text(&record, "\"members\": [", "\"members\": [], \"more\": [");
    assert!(read(&none_active).is_err());
    let fault = read(&with_text(&record, "\"epoch\": {", "\"epoch\": {{")).unwrap_err();
    assert!(
        matches!(fault, Unusable::Both(_, SlotFault::Text(_))),
        "{fault}"
    );
    let nested = "[".repeat(60_000);
    let fault = read(&with_text(&record, "{", &nested)).unwrap_err();
    assert!(
        matches!(fault, Unusable::Both(_, SlotFault::Text(_))),
        "{fault}"
    );
}

#[test]
fn features_of_later_versions_are_refused_by_name_or_ignored() {
    let record = record(1000, 3);
    let compatible = "\"compatible\": [\"new\"], \"more\": 1";
    let unknown = read(&with_text(&record, "\"compatible\": []", compatible));
    assert_eq!(unknown.unwrap().record, record);
    for (from, to, needs) in [
        (
            "\"incompatible\": []",
            "\"incompatible\": [\"a\", \"b\"]",
            "'a', 'b'",
        ),
        ("\"format\": 1", "\"format\": 2", "'format 2'"),
    ] {
        let mut file = with_text(&record, from, to);
        assert_eq!(
            read(&file).unwrap_err().to_string(),
            format!("its record needs {needs}, which this version of quorum-blk does not know")
        );
        // A newer slot that this version knows counts, an older one does not.
        let mut other = record.clone();
        other.sequence = 2;
        put(&mut file, 0, &other.slot().bytes);
        assert_eq!(read(&file).unwrap().record, other);
        let mut later = record.clone();
        later.sequence = 3;
        let mut file = with_text(&later, from, to);
        put(&mut file, 0, &other.slot().bytes);
        assert!(matches!(read(&file), Err(Unusable::Incompatible(_))));
    }
}

#[test]
fn a_file_that_was_never_written_is_blank() {
    assert_eq!(read(&[]).unwrap_err(), Unusable::Blank);
    assert_eq!(read(&[0; 3 << 20]).unwrap_err(), Unusable::Blank);
    assert_eq!(
        read(b"QFI\xfb").unwrap_err(),
        Unusable::Both(SlotFault::NoRecord, SlotFault::Blank)
    );
}
