//! Each kind of start.

use super::disk::{
    FINGERPRINT, adopting, disk, evict, forced, id, line, options, read, start, whys,
};
use crate::common::SectorRange;
use crate::common::ranges::RangeSet;
use crate::record::start::{Candidate, Options, Refusal, Why, decide, take_in};
use crate::record::{Extents, MemberState, Stale};

#[test]
fn a_replica_that_was_evicted_is_stale_where_the_others_have_changed() {
    let mut images = disk(3);
    evict(&mut images, 2);
    read(&mut images[0]).intent.insert(SectorRange::new(0, 1));
    let decided = start(&images, &options());
    assert_eq!(whys(&decided), [Why::Fresh, Why::Fresh, Why::MissedChanges]);
    assert!(decided.images[2].stale.overlaps(SectorRange::new(2000, 8)));
    assert!(!decided.images[2].stale.overlaps(SectorRange::new(2048, 8)));
    assert_eq!(decided.unsettled.count(), 1);
    assert!(!decided.was_clean && !decided.forced);
    let record = &decided.record;
    assert_eq!(record.epoch.number, 3);
    assert!(record.members.iter().all(crate::record::Member::is_active));
    assert_eq!(record.agreed().number, 2);
    // The others do not count as long as they are missing.
    let refusal = decide(&images[1..2], &options()).unwrap_err();
    assert!(
        matches!(refusal, Refusal::HistoryUnknown { .. }),
        "{refusal}"
    );
    assert_eq!(
        line(&images[2..], &options()),
        "'a.raw', 'b.raw' could have gone on without the other replicas, since the vote threshold \
         is 2; start with them, or, if they are lost with what they hold, add --force-start"
    );
}

#[test]
fn a_coarse_replica_is_stale_where_something_was_being_changed() {
    let mut images = disk(3);
    for image in &mut images {
        read(image).record.members[2].stale_where_changed = true;
    }
    assert_eq!(whys(&start(&images, &options())), [Why::Fresh; 3]);
    read(&mut images[1]).intent.insert(SectorRange::new(0, 1));
    let decided = start(&images, &options());
    assert_eq!(whys(&decided), [Why::Fresh, Why::Fresh, Why::MissedChanges]);
    assert!(decided.images[2].stale.overlaps(SectorRange::new(2000, 8)));
    assert!(!decided.images[2].stale.overlaps(SectorRange::new(2048, 8)));
    assert!(!decided.record.members[2].stale_where_changed);
    // All that is there is a proposal that was cut short, by which another one goes.
    let record = &mut read(&mut images[1]).record;
    record.propose();
    record.deactivate(id(1), None);
    let decided = start(&images[1..], &options());
    assert_eq!(whys(&decided)[1], Why::MissedChanges);
}

#[test]
fn what_is_doubtful_is_so_after_the_start_unless_it_is_stale() {
    let mut images = disk(3);
    let layout = read(&mut images[0]).record.layout();
    let of = |start, count| {
        let mut ranges = RangeSet::default();
        ranges.insert(SectorRange::new(start, count));
        Stale::of(&ranges, layout)
    };
    for (place, doubtful, stale) in [(0, of(0, 16), of(8, 4)), (1, of(4, 16), Stale::None)] {
        let members = &mut read(&mut images[place]).record.members;
        members[0].doubtful = doubtful.clone();
        members[2].doubtful = doubtful;
        members[2].stale = stale;
    }
    let decided = start(&images, &options());
    assert_eq!(
        whys(&decided),
        [Why::Doubtful, Why::Fresh, Why::MissedChanges]
    );
    assert!(decided.images[0].votes());
    let expected = of(0, 20);
    assert_eq!(decided.images[0].doubtful, expected);
    let rest = expected.without(&of(8, 4), layout);
    assert_eq!(decided.images[2].doubtful, rest);
    assert_eq!(decided.images[2].stale, of(8, 4));
    let members = &decided.record.members;
    assert_eq!(members[2].doubtful, rest);
    // A member that is missing, and one that is stale everywhere.
    let without_last = start(&images[..2], &options());
    assert_eq!(without_last.record.members[2].doubtful, rest);
    read(&mut images[0]).record.members[2].stale = Stale::All;
    let decided = start(&images, &options());
    assert_eq!(decided.images[2].why, Why::Incomplete);
    assert!(decided.images[2].doubtful.is_none());
}

#[test]
fn a_missing_replica_is_one_that_can_return() {
    let mut images = disk(3);
    images[1].image = Err("cannot open 'b.raw': No such file or directory".to_owned());
    let decided = start(&images, &options());
    assert_eq!(whys(&decided), [Why::Fresh, Why::Missing, Why::Fresh]);
    let missing = decided.record.member(id(2)).unwrap();
    let holds = Some(decided.record.agreed());
    assert_eq!(missing.state, MemberState::Inactive { holds });
    assert!(missing.stale_where_changed);
    let on_no_path = start(&[images[0].clone(), images[2].clone()], &options());
    assert_eq!(on_no_path.absent, [id(2)]);
    // It returns while the disk is served, or an older copy of it does.
    let mut running = read(&mut images[0]).clone();
    running.record = decided.record.for_replica(id(1), 2);
    running.record.agree();
    running.intent.insert(SectorRange::new(4096, 1));
    let verdict = take_in(&running, &disk(3)[1]).unwrap();
    assert_eq!(verdict.why, Why::MissedChanges);
    let mut older = disk(3);
    let mut older = older.remove(1);
    running.record.members[1].state = MemberState::Inactive {
        holds: Some(running.record.epoch),
    };
    assert_eq!(take_in(&running, &older).unwrap().why, Why::Restored);
    read(&mut older).record.disk = id(99);
    assert!(matches!(
        take_in(&running, &older),
        Err(Refusal::TwoDisks { .. })
    ));
    // The name says which one an image is that cannot be opened.
    images[1].node_name = "x.raw".to_owned();
    assert_eq!(
        line(&images, &options()),
        "cannot open 'b.raw': No such file or directory"
    );
}

#[test]
fn a_forced_start_begins_a_branch_and_leaves_the_others_behind() {
    let mut images = disk(4);
    let alone = [images[0].clone(), images[1].clone(), images[2].clone()];
    assert_eq!(whys(&start(&alone, &forced())).len(), 3);
    assert!(!start(&alone, &forced()).forced, "it is not needed");
    let few = Options {
        votes: Some(1),
        ..forced()
    };
    assert_eq!(
        line(&alone[..1], &forced()),
        "1 of 3 needed replicas can be used; 'b.raw': missing; 'c.raw': missing; 'd.raw': missing; \
         start with those that are missing too, or, if they are lost with what they hold, with a \
         lower --vote-threshold and --force-start"
    );
    let decided = start(&alone[..1], &few);
    assert!(decided.forced);
    assert_eq!(decided.record.lineage.len(), 2);
    assert!(decided.record.may_agree(&[id(1)]) && !decided.record.may_agree(&[id(2)]));
    let record = &mut read(&mut images[0]).record;
    *record = decided.record.for_replica(id(1), 2);
    // A proposal is not in force yet, and must be forced again.
    assert!(decide(&images[..1], &options()).is_err());
    read(&mut images[0]).record.agree();
    let returned = start(&images, &few);
    let expected = [
        Why::Fresh,
        Why::OlderBranch,
        Why::OlderBranch,
        Why::OlderBranch,
    ];
    assert_eq!(whys(&returned), expected);
    assert!(returned.images[1].stale.is_all());
    // The others have gone on as well.
    for image in &mut images[1..] {
        let record = &mut read(image).record;
        record.propose();
        record.agree();
    }
    assert_eq!(
        line(&images, &options()),
        format!(
            "the replicas have gone on without each other: 'a.raw' with epoch 2 of 'a.raw' (branch \
             {}); 'b.raw', 'c.raw', 'd.raw' with epoch 2 of 'a.raw', 'b.raw', 'c.raw', 'd.raw' \
             (branch {}); start those of one side only, or overwrite all others with one replica \
             by --adopt NODE",
            id(0x52),
            id(0xb)
        )
    );
    assert!(decide(&images[1..], &options()).is_ok());
    let running = read(&mut images[1]).clone();
    let refused = take_in(&running, &images[0]).unwrap_err().to_string();
    for side in ["'b.raw' with epoch 2", "'a.raw' with epoch 2"] {
        assert!(refused.contains(side), "{refused}");
    }
    let adopted = start(&images, &adopting("c.raw"));
    let expected = [
        Why::NotAdopted,
        Why::NotAdopted,
        Why::Fresh,
        Why::NotAdopted,
    ];
    assert_eq!(whys(&adopted), expected);
    assert_eq!(adopted.adopted, Some(2));
    assert_eq!(adopted.record.adopted, Some(id(3)));
    assert_eq!(adopted.record.epoch.number, 3);
    // After a crash the copies to the others go on.
    for (image, number) in images.iter_mut().zip(1..) {
        let mut record = adopted.record.for_replica(id(number), 3);
        record.agree();
        read(image).record = record;
    }
    let again = start(&images, &options());
    let expected = [
        Why::Incomplete,
        Why::Incomplete,
        Why::Fresh,
        Why::Incomplete,
    ];
    assert_eq!(whys(&again), expected);
    assert!(!again.forced);
}

#[test]
fn an_image_that_another_program_has_modified_is_stale() {
    let mut images = disk(3);
    for image in &mut images {
        let record = &mut read(image).record;
        record.clean = true;
        record.image = Some(FINGERPRINT);
    }
    assert!(start(&images, &options()).was_clean);
    let modify = |image: &mut Candidate| {
        let found = image.image.as_mut().unwrap();
        found.fingerprint.as_mut().unwrap().modified_ns += 1;
    };
    modify(&mut images[1]);
    let decided = start(&images, &options());
    assert_eq!(whys(&decided), [Why::Fresh, Why::Modified, Why::Fresh]);
    assert!(decided.images[1].stale.is_all());
    assert_eq!(
        start(&images, &adopting("a.raw")).adopted,
        None,
        "it votes anyway"
    );
    assert_eq!(start(&images, &adopting("b.raw")).adopted, Some(1));
    modify(&mut images[2]);
    assert_eq!(
        line(&images, &options()),
        "another program has modified 'b.raw', 'c.raw' since the clean end, and only 1 of 2 needed \
         replicas are as they were; undo that, or overwrite all others with one replica by --adopt \
         NODE"
    );
    let adopted = start(&images, &adopting("b.raw"));
    assert_eq!(
        whys(&adopted),
        [Why::NotAdopted, Why::Fresh, Why::NotAdopted]
    );
    // Where undoing it would not help the refusal does not say so.
    for image in &mut images {
        for member in &mut read(image).record.members[1..] {
            member.stale = Stale::All;
        }
    }
    let refused = line(&images, &options());
    assert!(
        refused.starts_with("1 of 2 needed replicas can be used; 'b.raw': modified"),
        "{refused}"
    );
    assert_eq!(
        line(&images, &adopting("x.raw")),
        "--adopt 'x.raw': no image of this name has a record"
    );
}

#[test]
fn an_image_restored_from_an_older_copy_does_not_vote() {
    let mut images = disk(3);
    let old = images[0].clone();
    for image in &mut images {
        let record = &mut read(image).record;
        record.propose();
        record.agree();
    }
    images[0] = old;
    let decided = start(&images, &options());
    assert_eq!(whys(&decided), [Why::Restored, Why::Fresh, Why::Fresh]);
    assert!(decided.images[0].stale.is_all());
    // Where a start that was cut short has recorded that, it is still not believed.
    let record = decided.record.for_replica(id(1), 2);
    read(&mut images[0]).record = record;
    let again = start(&images, &options());
    assert_eq!(whys(&again), [Why::Incomplete, Why::Fresh, Why::Fresh]);
}

/// Where only such replicas are there beside it that were out of service since it was made, all is
/// as it was then. Those that have gone on are refused beside them.
#[test]
fn an_older_copy_is_recognized_by_those_that_were_active_since() {
    let mut images = disk(3);
    let old = images[0].clone();
    evict(&mut images, 2);
    for image in &mut images[..2] {
        read(image).intent.insert(SectorRange::new(0, 1));
    }
    let served = images[0].clone();
    images[0] = old;
    let decided = start(&images, &options());
    let expected = [Why::Restored, Why::Fresh, Why::MissedChanges];
    assert_eq!(whys(&decided), expected);
    let refusal = decide(&images[..2], &options()).unwrap_err();
    assert!(matches!(refusal, Refusal::TooFewCopies { .. }), "{refusal}");
    // Without the other one that was active.
    let without = [images[0].clone(), images[2].clone()];
    let decided = start(&without, &options());
    assert_eq!(whys(&decided), [Why::Fresh; 2]);
    for (image, number) in [(0, 1), (2, 3)] {
        let mut record = decided.record.for_replica(id(number), 2);
        record.agree();
        read(&mut images[image]).record = record;
    }
    for rest in [&images[..], &images[1..], &images[..2]] {
        let refusal = decide(rest, &options()).unwrap_err();
        assert!(matches!(refusal, Refusal::Split(_)), "{refusal}");
    }
    images[0] = served;
    assert!(decide(&images, &options()).is_err());
}

/// A copy that was made while the disk was served has the newest table.
#[test]
fn an_image_that_does_not_know_of_the_clean_end_was_restored() {
    let mut images = disk(3);
    let mark = SectorRange::new(0, 1);
    let end = |image: &mut Candidate| {
        let record = &mut read(image).record;
        record.clean = true;
        record.image = Some(FINGERPRINT);
    };
    // A close that was cut short after its first record: all marks are left.
    for image in &mut images {
        read(image).intent.insert(mark);
    }
    end(&mut images[0]);
    assert_eq!(whys(&start(&images, &options())), [Why::Fresh; 3]);
    end(&mut images[1]);
    let layout = read(&mut images[2]).record.layout();
    let mut missed = RangeSet::default();
    missed.insert(mark);
    // What it says of the others was so once.
    read(&mut images[2]).record.members[0].stale = Stale::of(&missed, layout);
    for image in &mut images[..2] {
        read(image).intent = Extents::new(layout);
    }
    let decided = start(&images, &options());
    assert_eq!(whys(&decided), [Why::Fresh, Why::Fresh, Why::Restored]);
    assert!(decided.images[2].stale.is_all());
    assert!(decided.was_clean && !decided.forced);
    // Of the two that know of the end one is not complete, so that it is needed.
    for image in &mut images[..2] {
        let record = &mut read(image).record;
        record.members[0].stale = Stale::of(&missed, layout);
    }
    read(&mut images[2]).intent = Extents::new(layout);
    let decided = start(&images, &options());
    assert_eq!(whys(&decided)[2], Why::Fresh);
    // Marks that were cleared after all had recorded the end: one record is enough.
    let mut images = disk(3);
    end(&mut images[0]);
    for image in &mut images[1..] {
        read(image).intent.insert(mark);
    }
    assert_eq!(
        line(&images, &options()),
        "1 of 2 needed replicas can be used; 'b.raw': restored from an older copy; 'c.raw': \
         restored from an older copy; start with those that are missing too, or, if they are lost \
         with what they hold, with a lower --vote-threshold and --force-start"
    );
    assert_eq!(start(&images, &adopting("a.raw")).adopted, Some(0));
}

#[test]
fn a_table_that_was_only_proposed_is_not_in_force() {
    let mut images = disk(3);
    let record = &mut read(&mut images[0]).record;
    record.propose();
    record.deactivate(id(3), None);
    assert!(record.may_agree(&[id(1), id(2)]) && !record.may_agree(&[id(1)]));
    assert_eq!(whys(&start(&images, &options())), [Why::Fresh; 3]);
    // Meanwhile the others have gone on.
    evict(&mut images[..], 0);
    let proposed = read(&mut images[0]).record.epoch;
    assert_eq!(read(&mut images[1]).record.epoch, proposed);
    for image in &mut images[1..] {
        read(image).record.epoch.run = id(0x77);
    }
    let decided = start(&images, &options());
    assert_eq!(whys(&decided), [Why::Fresh; 3]);
    assert_eq!(decided.record.epoch.number, 3);
    // Tables of one number that were both agreed upon.
    read(&mut images[0]).record.agree();
    assert!(matches!(
        decide(&images, &options()),
        Err(Refusal::Split(_))
    ));
}
