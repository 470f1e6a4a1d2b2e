//! Record files, and what may start with them.
//!
//! An input is a script. It begins with what the operator wants. Then come up to four images, each
//! with a record that is given as the numbers in it, as the text of a slot, or as the bytes of a
//! file. A text gets the checksum that it needs.

use quorum_blk::common::SectorRange;
use quorum_blk::record::format::{Read, Unusable, pages, read, read_parts};
use quorum_blk::record::start::{Candidate, Decision, Found, Kept, Options, Start, Why, decide};
use quorum_blk::record::{
    Before, Branch, Epoch, Extents, Fingerprint, Layout, Member, MemberState, Record, Stale, Table,
    Threshold,
};
use uuid::Uuid;

use super::script::Script;

/// Sectors of the disks in scripts: three extents.
const CAPACITY: u64 = 3 * 2048 - 7;

/// Kinds of images in a script.
pub const ABSENT: u8 = 0;
/// An image that cannot be opened.
pub const MISSING: u8 = 1;
/// The bytes of a file follow, with their number before them.
pub const FILE: u8 = 2;
/// The text of a slot follows, with the number of its bytes before it.
pub const TEXT: u8 = 3;

/// Runs an input.
pub fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let wants = script.u8();
    let options = Options {
        force: wants & 1 != 0,
        adopt: (wants & 2 != 0).then(|| (wants >> 2 & 3).to_string()),
        votes: (wants & 16 != 0).then_some(wants >> 5),
        run: Uuid::from_u128(1000),
        branch: Uuid::from_u128(1001),
    };
    let mut candidates = Vec::new();
    while candidates.len() < 4 && !script.is_empty() {
        candidates.push(candidate(&mut script, candidates.len()));
    }
    match decide(&candidates, &options) {
        Ok(Decision::Create) => {}
        Ok(Decision::Start(start)) => check(&candidates, &start),
        Err(refusal) => assert!(!refusal.to_string().contains('\n'), "{refusal}"),
    }
}

fn candidate(script: &mut Script<'_>, place: usize) -> Candidate {
    let found = |kept| {
        Ok(Found {
            fingerprint: Some(FINGERPRINT),
            kept,
        })
    };
    let image = match script.u8() {
        ABSENT => found(Kept::Absent),
        MISSING => Err("cannot open it".to_owned()),
        FILE => {
            let count = usize::from(script.u16());
            found(kept(read(script.take(count))))
        }
        TEXT => {
            let count = usize::from(script.u16());
            let slot = slot(script.take(count));
            let [even, odd] = [[&slot[..], &[]], [&[], &slot]].map(|slots| read_parts(slots, &[]));
            found(kept(even.or(odd)))
        }
        numbers => found(kept(of_numbers(script, numbers))),
    };
    Candidate {
        node_name: place.to_string(),
        path: place.to_string().into(),
        image,
    }
}

const FINGERPRINT: Fingerprint = Fingerprint {
    bytes: 512 * CAPACITY,
    modified_ns: 0,
};

fn kept(read: Result<Read, Unusable>) -> Kept {
    match read {
        Ok(read) => {
            assert_read_again(&read.record, &read.intent);
            Kept::Read(Box::new(read))
        }
        Err(unusable) => {
            let line = unusable.to_string();
            assert!(!line.contains('\n'), "{line}");
            Kept::Unusable(unusable)
        }
    }
}

/// What was read is written as it was, or as the same sectors.
fn assert_read_again(record: &Record, intent: &Extents) {
    let slot = record.slot();
    let pages = pages(
        record.disk,
        record.replica,
        intent,
        0..record.layout().pages(),
    );
    let slots = if slot.offset == 0 {
        [&slot.bytes[..], &[]]
    } else {
        [&[][..], &slot.bytes]
    };
    let again = read_parts(slots, &pages).expect("what was written can be read");
    let layout = record.layout();
    let mut fitted = record.clone();
    for member in &mut fitted.members {
        member.stale = member.stale.fitted(layout);
        member.doubtful = member.doubtful.fitted(layout);
    }
    assert_eq!(again.record, fitted);
    assert_eq!(again.intent, *intent);
}

/// A slot with this text, as docs/state-format.md says.
pub fn slot(text: &[u8]) -> Vec<u8> {
    let bytes = (60 + text.len()).next_multiple_of(4096);
    let line = format!(" text={:06} bytes={bytes:07}\n", text.len());
    let mut covered = [line.as_bytes(), text].concat();
    covered.resize(bytes - 33, 0);
    let line = format!("quorum-blk record crc32c={:08x}", crc32c(&covered));
    [line.as_bytes(), &covered].concat()
}

/// CRC-32C, a bit at a time.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut rest = u32::MAX;
    for byte in bytes {
        rest ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = rest & 1;
            rest = (rest >> 1) ^ (carry * 0x82f6_3b78);
        }
    }
    !rest
}

/// A record of small numbers, as it is read if it is none that contradicts itself.
fn of_numbers(script: &mut Script<'_>, kind: u8) -> Result<Read, Unusable> {
    let mut number = |most: u8| script.u8() % most;
    let id = |number: u8| Uuid::from_u128(u128::from(number) + 1);
    let epoch = |numbers: u8| Epoch {
        number: u64::from(numbers & 7),
        run: id(numbers >> 3 & 3),
    };
    let members = 1 + number(4);
    let table = |number: &mut dyn FnMut(u8) -> u8| {
        let active = number(16);
        let ids = |is_active| {
            let places = (0..members).filter(move |place| (active >> place & 1 == 1) == is_active);
            places.map(id).collect()
        };
        Table {
            epoch: epoch(number(32)),
            votes: 1 + number(4),
            active: ids(true),
            inactive: ids(false),
        }
    };
    let replica = id(number(members));
    let lineage = (0..1 + number(3)).map(|place| Branch {
        id: id(place * 3 + number(2)),
        since: u64::from(number(8)),
    });
    let lineage: Vec<Branch> = lineage.collect();
    let tables: Vec<Table> = (0..number(3)).map(|_| table(&mut number)).collect();
    let clean = number(4) == 0;
    let mut record = Record {
        disk: id(u8::from(kind & 128 != 0)),
        replica,
        sequence: 2,
        capacity: CAPACITY,
        extent_sectors: Layout::new(CAPACITY).extent_sectors(),
        threshold: Threshold {
            votes: 1 + number(members),
            follows_majority: false,
        },
        lineage,
        epoch: epoch(number(32)),
        before: (!tables.is_empty()).then_some(Before {
            tables,
            forced: kind & 64 != 0,
        }),
        adopted: (kind & 32 != 0).then(|| id(number(members))),
        clean,
        image: clean.then(|| Fingerprint {
            modified_ns: i64::from(number(2)),
            ..FINGERPRINT
        }),
        members: Vec::new(),
        jobs: Vec::new(),
    };
    let layout = Layout::new(CAPACITY);
    for place in 0..members {
        let flags = number(255);
        let mut member = Member::new(id(place), &place.to_string());
        if flags & 1 != 0 {
            let holds = (flags & 2 != 0).then(|| epoch(number(32)));
            member.state = MemberState::Inactive { holds };
        }
        member.stale_where_changed = flags & 4 != 0;
        let extent = Extents::of_bits(layout, flags >> 5);
        member.stale = Stale::of_extents(&extent, layout);
        let extent = Extents::of_bits(layout, flags >> 3 & 3);
        member.doubtful = Stale::of_extents(&extent, layout);
        record.members.push(member);
    }
    let intent = Extents::of_bits(layout, number(8));
    let pages = pages(record.disk, record.replica, &intent, 0..layout.pages());
    read_parts([&record.slot().bytes, &[]], &pages)
}

/// Extents from the bits of a number.
trait OfBits {
    fn of_bits(layout: Layout, bits: u8) -> Self;
}

impl OfBits for Extents {
    fn of_bits(layout: Layout, bits: u8) -> Self {
        let mut extents = Self::new(layout);
        for index in (0..3).filter(|index| bits & (1 << index) != 0) {
            extents.insert(SectorRange::new(index * 2048, 1));
        }
        extents
    }
}

/// What holds for every start.
fn check(candidates: &[Candidate], start: &Start) {
    assert_eq!(candidates.len(), start.images.len());
    let record = &start.record;
    let mut there = Vec::new();
    for (candidate, image) in candidates.iter().zip(&start.images) {
        let member = record.member(image.member).expect("images are members");
        let is_missing = candidate.image.is_err();
        assert_eq!(is_missing, image.why == Why::Missing);
        assert_eq!(member.is_active(), !is_missing);
        assert!(!there.contains(&image.member), "two images are two members");
        if !is_missing {
            there.push(image.member);
            assert_eq!(member.stale, image.stale);
            assert_eq!(member.doubtful, image.doubtful);
        }
        let of_both = image.doubtful.to_ranges(record.layout());
        let of_both = of_both.iter().any(|range| image.stale.overlaps(range));
        assert!(!of_both, "what is stale is not doubtful");
        let is_fresh = image.stale.is_none() && image.doubtful.is_none();
        assert!(is_missing || is_fresh == (image.why == Why::Fresh));
    }
    let voting = start.images.iter().filter(|image| image.votes()).count();
    assert!(voting >= usize::from(record.threshold.votes) || record.adopted.is_some());
    assert!(voting > 0, "a disk has data");
    assert!(record.may_agree(&there), "what is allowed can be done");
    assert!(!there.is_empty());
    // The proposal can be written, and is one.
    let first = record.for_replica(there[0], 2);
    assert_read_again(&first, &start.unsettled);
    assert!(record.agreed().number < record.epoch.number);
}
