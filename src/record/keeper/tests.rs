use uuid::Uuid;

use super::*;
use crate::common::SectorRange;
use crate::common::ranges::RangeSet;
use crate::record::{Creation, PAGE_BYTES, Threshold, format};

const SECTORS: u64 = 1 << 20;
const A: ReplicaIndex = ReplicaIndex(0);
const B: ReplicaIndex = ReplicaIndex(1);
const C: ReplicaIndex = ReplicaIndex(2);

fn set(replicas: &[ReplicaIndex]) -> ReplicaSet {
    replicas.iter().copied().collect()
}

fn id(replica: ReplicaIndex) -> Uuid {
    Uuid::from_u128(u128::from(replica.0) + 1)
}

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(start, count)
}

/// The files of the records.
#[derive(Default)]
struct Files([Vec<u8>; 4]);

impl Files {
    fn write(&mut self, round: &Round) {
        for (replica, write) in &round.writes {
            let file = &mut self.0[replica.as_usize()];
            let start = usize::try_from(write.offset_bytes).unwrap();
            let end = start + write.bytes.len();
            file.resize(file.len().max(end), 0);
            file[start..end].copy_from_slice(&write.bytes);
        }
    }

    fn read(&self, replica: ReplicaIndex) -> format::Read {
        let mut file = self.0[replica.as_usize()].clone();
        let layout = Layout::new(SECTORS);
        let pages = usize::try_from(Layout::page_offset(layout.pages())).unwrap();
        file.resize(file.len().max(pages + PAGE_BYTES), 0);
        format::read(&file).unwrap()
    }

    /// Makes all writes, of which those to `failing` are lost.
    fn drain(&mut self, keeper: &mut Keeper, failing: &[ReplicaIndex]) {
        while let Some(mut round) = keeper.next_round() {
            round
                .writes
                .retain(|(replica, _)| !failing.contains(replica));
            self.write(&round);
            let asked: ReplicaSet = round.writes.iter().map(|(replica, _)| *replica).collect();
            keeper.ended(asked);
            if asked.is_empty() {
                return;
            }
        }
    }
}

fn created() -> (Keeper, Files) {
    let members = [A, B, C].map(|replica| (id(replica), replica.0.to_string()));
    let record = Record::create(&Creation {
        disk: Uuid::from_u128(100),
        branch: Uuid::from_u128(101),
        run: Uuid::from_u128(102),
        layout: Layout::new(SECTORS),
        threshold: Threshold::majority(3),
        members: members.to_vec(),
    });
    let holder = |replica| {
        Some(Holder {
            member: id(replica),
            sequence: 0,
        })
    };
    let unmarked = Extents::new(record.layout());
    let mut keeper = Keeper::new(record, [A, B, C].map(holder).to_vec(), unmarked);
    let mut files = Files::default();
    files.drain(&mut keeper, &[]);
    assert!(keeper.is_durable());
    (keeper, files)
}

/// All three are members, and these are active; `stale` on C.
fn wanted(active: &[ReplicaIndex], stale: &[SectorRange]) -> Wanted {
    let members = [A, B, C].map(|replica| {
        let mut member = WantedMember {
            replica,
            is_active: active.contains(&replica),
            is_coarse: false,
            stale: RangeSet::default(),
            doubtful: RangeSet::default(),
        };
        if replica == C {
            stale.iter().for_each(|range| member.stale.insert(*range));
        }
        member
    });
    Wanted {
        members: members.to_vec(),
        threshold: Threshold::majority(3),
        capacity: SECTORS,
    }
}

fn stale_on_c(read: &format::Read) -> Vec<SectorRange> {
    let record = &read.record;
    let member = record.member(id(C)).unwrap();
    member.stale.to_ranges(record.layout()).iter().collect()
}

#[test]
fn nothing_is_written_that_the_records_say_already() {
    let (mut keeper, mut files) = created();
    keeper.want(&wanted(&[A, B, C], &[]), false);
    assert!(keeper.is_durable());
    keeper.want(&wanted(&[A, B, C], &[range(0, 16)]), false);
    files.drain(&mut keeper, &[]);
    for smaller in [&[range(0, 8)][..], &[]] {
        keeper.want(&wanted(&[A, B, C], smaller), false);
        assert!(keeper.is_durable(), "it is stale in more sectors there");
    }
    assert_eq!(stale_on_c(&files.read(A)), [range(0, 16)]);
    keeper.want(&wanted(&[A, B, C], &[]), true);
    assert!(!keeper.is_durable());
    files.drain(&mut keeper, &[]);
    assert_eq!(stale_on_c(&files.read(A)), []);
}

#[test]
fn what_a_coarse_member_misses_needs_no_write_where_something_is_marked() {
    let (mut keeper, mut files) = created();
    let mut marked = Extents::new(keeper.layout());
    marked.insert(range(0, 8));
    keeper.mark(&marked);
    files.drain(&mut keeper, &[]);
    let coarse = |stale: &[SectorRange]| {
        let mut wanted = wanted(&[A, B, C], stale);
        wanted.members[2].is_coarse = true;
        wanted
    };
    keeper.want(&coarse(&[range(0, 8)]), false);
    files.drain(&mut keeper, &[]);
    let read = files.read(A);
    let member = read.record.member(id(C)).unwrap();
    assert!(member.is_active() && member.stale_where_changed);
    keeper.want(&coarse(&[range(0, 8), range(64, 8)]), false);
    assert!(keeper.is_durable(), "it is marked there");
    keeper.want(&coarse(&[range(0, 8), range(4096, 8)]), false);
    assert!(!keeper.is_durable(), "nothing is marked there");
    files.drain(&mut keeper, &[]);
    assert_eq!(stale_on_c(&files.read(A)), [range(0, 8), range(4096, 8)]);
    // It is exact again at once: no other one becomes coarse before.
    keeper.want(&wanted(&[A, B, C], &[]), false);
    assert!(!keeper.is_durable());
    files.drain(&mut keeper, &[]);
    let read = files.read(A);
    assert!(!read.record.member(id(C)).unwrap().stale_where_changed);
    assert_eq!(stale_on_c(&read), []);
}

#[test]
fn jobs_are_in_the_next_slot_and_no_slot_is_written_before_it_is_time() {
    let (mut keeper, mut files) = created();
    let job = |id: &str| PastJob {
        id: id.to_owned(),
        ..PastJob::default()
    };
    keeper.keep_jobs(vec![job("job0")]);
    assert!(keeper.is_durable() && keeper.next_round().is_none());
    keeper.want(&wanted(&[A, B, C], &[range(0, 16)]), false);
    files.drain(&mut keeper, &[]);
    assert_eq!(files.read(A).record.jobs, [job("job0")]);
    keeper.keep_jobs(vec![job("job0"), job("job1")]);
    keeper.write_jobs();
    assert!(!keeper.is_durable());
    files.drain(&mut keeper, &[]);
    assert_eq!(files.read(C).record.jobs, [job("job0"), job("job1")]);
    keeper.keep_jobs(vec![job("job0"), job("job1")]);
    keeper.write_jobs();
    assert!(keeper.is_durable(), "the slots have them");
}

#[test]
fn a_slot_that_failed_is_written_again_in_its_place() {
    let (mut keeper, mut files) = created();
    let before = files.read(B).record.sequence;
    keeper.want(&wanted(&[A, B, C], &[range(0, 16)]), false);
    files.drain(&mut keeper, &[B]);
    assert!(!keeper.is_durable());
    let round = keeper.next_round().expect("that of B");
    let offset = Layout::slot_offset(before + 1);
    assert_eq!(round.writes.len(), 1);
    assert_eq!(
        (round.writes[0].0, round.writes[0].1.offset_bytes),
        (B, offset)
    );
    files.write(&round);
    keeper.ended(set(&[B]));
    assert!(keeper.is_durable());
    assert_eq!(files.read(B).record.sequence, before + 1);
}

#[test]
fn a_change_of_the_table_is_proposed_and_then_agreed_upon() {
    let (mut keeper, mut files) = created();
    let before = files.read(A).record.epoch;
    keeper.want(&wanted(&[A, B], &[range(8, 8)]), false);
    let proposal = keeper.next_round().expect("a proposal");
    files.write(&proposal);
    let read = files.read(A);
    assert_eq!(read.record.agreed(), before);
    assert_eq!(read.record.epoch, before.next());
    keeper.ended(set(&[A, B]));
    assert!(!keeper.is_durable(), "nothing may depend on it yet");
    files.drain(&mut keeper, &[]);
    for replica in [A, B] {
        let read = files.read(replica);
        assert_eq!(read.record.agreed(), before.next());
        let member = read.record.member(id(C)).unwrap();
        assert!(!member.is_active() && member.stale_where_changed);
        assert_eq!(stale_on_c(&read), [range(8, 8)]);
    }
    assert_eq!(files.read(C).record.epoch, before, "it is not written");
}

#[test]
fn a_table_that_not_all_active_replicas_hold_is_not_agreed_upon() {
    let (mut keeper, mut files) = created();
    let before = files.read(A).record.epoch;
    keeper.want(&wanted(&[A, B], &[]), false);
    files.drain(&mut keeper, &[B]);
    assert!(!keeper.is_durable());
    assert_eq!(files.read(A).record.agreed(), before);
}

#[test]
fn a_replica_that_returns_has_all_pages_before_it_is_active() {
    let (mut keeper, mut files) = created();
    keeper.want(&wanted(&[A, B], &[]), false);
    files.drain(&mut keeper, &[]);
    let mut marked = Extents::new(keeper.layout());
    marked.insert(range(4096, 8));
    keeper.mark(&marked);
    files.drain(&mut keeper, &[]);
    assert!(files.read(C).intent.is_empty(), "it is not active");
    keeper.want(&wanted(&[A, B, C], &[range(4096, 8)]), false);
    let round = keeper.next_round().expect("its pages");
    let to: Vec<_> = round
        .writes
        .iter()
        .map(|(r, w)| (*r, w.offset_bytes))
        .collect();
    assert_eq!(to, [(C, Layout::page_offset(0))]);
    files.write(&round);
    keeper.ended(set(&[C]));
    files.drain(&mut keeper, &[]);
    let read = files.read(C);
    assert_eq!(read.intent, marked);
    assert!(read.record.member(id(C)).unwrap().is_active());
}

/// Its image may come back from a copy that was made before it returned: what was stale then, and
/// what was written since.
#[test]
fn a_replica_that_leaves_before_its_return_is_agreed_upon_is_stale_as_before_and_where_marked() {
    let (mut keeper, mut files) = created();
    let in_force = files.read(A).record.epoch;
    let [stale, written] = [range(8, 8), range(4096, 8)];
    keeper.want(&wanted(&[A, B], &[stale]), false);
    files.drain(&mut keeper, &[]);
    keeper.want(&wanted(&[A, B, C], &[stale]), false);
    files.drain(&mut keeper, &[C]);
    let mut marked = Extents::new(keeper.layout());
    marked.insert(written);
    keeper.mark(&marked);
    // It was copied, and then it leaves: twice, the second time with nothing more.
    for _ in 0..2 {
        keeper.want(&wanted(&[A, B, C], &[]), true);
        files.drain(&mut keeper, &[C]);
        assert!(!keeper.is_durable());
        keeper.want(&wanted(&[A, B], &[]), false);
        files.drain(&mut keeper, &[]);
        assert!(keeper.is_durable());
        let read = files.read(A);
        let layout = keeper.layout();
        let holds = Some(in_force);
        let state = read.record.member(id(C)).unwrap().state;
        assert_eq!(state, MemberState::Inactive { holds });
        assert_eq!(stale_on_c(&read), [layout.extent(0), layout.extent(2)]);
    }
    keeper.clear(marked, &wanted(&[A, B], &[]));
    files.drain(&mut keeper, &[]);
    let lacks = stale_on_c(&files.read(A));
    assert!(lacks.iter().any(|range| range.overlaps(written)));
    // When it is agreed upon that it is back, it holds all that.
    keeper.want(&wanted(&[A, B, C], &[]), false);
    files.drain(&mut keeper, &[]);
    keeper.want(&wanted(&[A, B], &[]), false);
    files.drain(&mut keeper, &[]);
    assert_eq!(stale_on_c(&files.read(B)), []);
}

#[test]
fn marks_are_taken_away_after_the_slots_say_what_they_stood_for() {
    let (mut keeper, mut files) = created();
    let mut marked = Extents::new(keeper.layout());
    marked.insert(range(0, 8));
    keeper.mark(&marked);
    files.drain(&mut keeper, &[]);
    keeper.want(&wanted(&[A, B], &[]), false);
    files.drain(&mut keeper, &[]);
    keeper.clear(marked.clone(), &wanted(&[A, B], &[range(0, 8)]));
    let round = keeper.next_round().expect("the slots");
    files.write(&round);
    let read = files.read(A);
    assert_eq!(
        (stale_on_c(&read), read.intent),
        (vec![range(0, 8)], marked)
    );
    keeper.ended(set(&[A, B]));
    files.drain(&mut keeper, &[]);
    let read = files.read(A);
    assert!(read.intent.is_empty());
    assert_eq!(stale_on_c(&read), [range(0, 8)]);
}

#[test]
fn a_member_that_was_adopted_can_be_removed() {
    let (mut keeper, mut files) = created();
    keeper.record.adopted = Some(id(C));
    let mut without_c = wanted(&[A, B], &[]);
    keeper.want(&without_c, false);
    files.drain(&mut keeper, &[]);
    assert_eq!(files.read(A).record.adopted, Some(id(C)));
    without_c.members.pop();
    without_c.threshold = Threshold::majority(2);
    keeper.want(&without_c, false);
    files.drain(&mut keeper, &[]);
    assert!(keeper.is_durable());
    assert_eq!(files.read(A).record.adopted, None);
}

#[test]
fn a_new_member_has_the_table_before_all_others() {
    let (mut keeper, mut files) = created();
    let new = ReplicaIndex(3);
    let holder = Holder {
        member: Uuid::from_u128(4),
        sequence: 0,
    };
    keeper.add(new, holder, "new");
    let mut wanted = wanted(&[A, B, C], &[]);
    let mut stale = RangeSet::default();
    stale.insert(range(0, SECTORS));
    wanted.members.push(WantedMember {
        replica: new,
        is_active: true,
        is_coarse: false,
        stale,
        doubtful: RangeSet::default(),
    });
    keeper.want(&wanted, false);
    for _ in ["its pages", "its slot"] {
        let round = keeper.next_round().expect("for the new one");
        assert_eq!(round.writes.len(), 1);
        assert_eq!(round.writes[0].0, new);
        files.write(&round);
        keeper.ended(set(&[new]));
    }
    files.drain(&mut keeper, &[]);
    assert!(keeper.is_durable());
    for replica in [A, new] {
        assert_eq!(files.read(replica).record.members.len(), 4);
    }
    wanted.members.retain(|member| member.replica != B);
    keeper.want(&wanted, false);
    files.drain(&mut keeper, &[]);
    assert_eq!(files.read(new).record.members.len(), 3);
    assert_eq!(
        files.read(B).record.members.len(),
        4,
        "it is not written any more"
    );
}

#[test]
fn a_clean_end_says_what_each_image_was() {
    let (mut keeper, mut files) = created();
    let mut marked = Extents::new(keeper.layout());
    marked.insert(range(0, 8));
    keeper.mark(&marked);
    files.drain(&mut keeper, &[]);
    let image = |replica: ReplicaIndex| Fingerprint {
        bytes: 1 << 29,
        modified_ns: i64::from(replica.0),
    };
    let images = [A, B, C].map(|replica| (replica, image(replica)));
    keeper.close(&images, &wanted(&[A, B, C], &[]));
    files.drain(&mut keeper, &[]);
    for replica in [A, B, C] {
        let read = files.read(replica);
        assert!(read.record.clean && read.intent.is_empty());
        assert_eq!(read.record.image, Some(image(replica)));
    }
}
