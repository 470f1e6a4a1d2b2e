//! docs/state-format.md shows what is written.

use uuid::Uuid;

use super::super::slot::LINE_BYTES;
use super::{extents, set};
use crate::record::format::pages;
use crate::record::{Creation, Layout, MemberState, Record, Stale, Threshold};

/// The record of the page.
fn example() -> Record {
    let uuid = |text: &str| Uuid::parse_str(text).unwrap();
    let names = [
        ("8d0c7a51-3c0f-4d0e-9a45-30ee5b3dd9a1", "a.raw"),
        ("f2f0e7b4-59a5-4a1b-8b57-2b8ef22a9c65", "b.raw"),
        ("1b9b8f0a-6f2e-4c3d-8a73-b1c77f2d4e19", "c.raw"),
    ];
    let creation = Creation {
        disk: uuid("5f1c2d9e-0b7a-4e36-9d55-7c2f4be0a811"),
        branch: uuid("c3a96a6e-7d3b-4f5c-a1fe-0d64b96d2b07"),
        run: uuid("2d4e0a5c-9c1b-4b8e-8f6a-f57bb1a0c3d2"),
        layout: Layout::new(2 << 20),
        threshold: Threshold::majority(3),
        members: names.map(|(id, name)| (uuid(id), name.to_owned())).into(),
    };
    let mut record = Record::create(&creation).for_replica(creation.members[0].0, 6);
    record.agree();
    record.epoch.number = 4;
    let holds = Some(record.epoch);
    record.propose();
    record.agree();
    let layout = record.layout();
    record.members[1].stale = Stale::of(&set(&[(4096, 8), (40_960, 2048)]), layout);
    record.members[2].state = MemberState::Inactive { holds };
    record.members[2].stale_where_changed = true;
    record.members[2].doubtful = Stale::of(&set(&[(8192, 8)]), layout);
    record
}

fn hexadecimal(bytes: &[u8]) -> String {
    let words = bytes.chunks(8).map(|word| {
        let digits: Vec<String> = word.iter().map(|byte| format!("{byte:02x}")).collect();
        digits.join(" ")
    });
    words.collect::<Vec<_>>().join("  ")
}

/// What `head` prints of the example is in the page, byte for byte.
#[test]
fn the_page_about_the_format_shows_what_is_written() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/state-format.md")).unwrap();
    let shows = |text: &str| assert!(page.contains(text), "the page does not show:\n{text}");
    let slot = example().slot().bytes;
    let end = slot.iter().position(|byte| *byte == 0).unwrap();
    let text = std::str::from_utf8(&slot[..end]).unwrap();
    shows(&format!("```\n{text}```\n"));
    shows(&format!("| line | {LINE_BYTES} bytes"));
    let maps = &slot[end.next_multiple_of(512)..];
    shows(&hexadecimal(&maps[..16]));
    shows(&hexadecimal(&maps[16..32]));
    shows(&hexadecimal(&maps[32..48]));
    let intent = extents(example().layout(), &[(2048, 4096)]);
    let pages = pages(example().disk, example().replica, &intent, 0..1);
    shows(&hexadecimal(&pages[..16]));
    shows(&hexadecimal(&pages[16..24]));
}
