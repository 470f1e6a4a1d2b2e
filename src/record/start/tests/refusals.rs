//! What is refused, with its line, and what is not yet a disk.

use super::disk::{
    FINGERPRINT, adopting, disk, evict, forced, id, keep, line, options, read, start, whys,
};
use crate::common::SectorRange;
use crate::common::ranges::RangeSet;
use crate::record::format::{SlotFault, Unusable};
use crate::record::start::{Decision, Kept, Options, Why, decide};
use crate::record::{Extents, Stale};

#[test]
fn images_without_a_record_may_become_a_disk() {
    let mut images = disk(3);
    for image in &mut images {
        keep(image, Kept::Absent);
    }
    keep(&mut images[1], Kept::Unusable(Unusable::Blank));
    assert!(matches!(decide(&images, &options()), Ok(Decision::Create)));
    // A crash while the first table was proposed: nothing was served.
    let mut begun = disk(3);
    let record = &mut read(&mut begun[0]).record;
    record.propose();
    let mut first = record.table();
    first.epoch = crate::record::Epoch::NONE;
    record.before.as_mut().unwrap().tables = vec![first];
    images[0] = begun[0].clone();
    assert!(matches!(decide(&images, &options()), Ok(Decision::Create)));
    images[2].image = Err("cannot open 'c.raw': No such file or directory".to_owned());
    assert_eq!(
        line(&images, &options()),
        "cannot open 'c.raw': No such file or directory"
    );
    let mut images = disk(2);
    keep(&mut images[0], Kept::Absent);
    let unusable = Unusable::Both(SlotFault::Checksum, SlotFault::Blank);
    keep(&mut images[1], Kept::Unusable(unusable));
    assert_eq!(
        line(&images, &options()),
        "cannot use 'b.raw': neither slot of its record can be used; the first: its checksum \
         differs; the second: it was never written; no other replica has a record, so what it has \
         missed is not known; start with those that have one, or, to take what the images hold for \
         a new disk, quorum-blkctl forget each of them"
    );
}

#[test]
fn half_of_the_replicas_cannot_start_where_the_other_half_could() {
    let mut images = disk(4);
    for image in &mut images {
        read(image).record.threshold.votes = 2;
        read(image).record.threshold.follows_majority = false;
    }
    evict(&mut images, 2);
    evict(&mut images, 3);
    // a.raw and b.raw are active. Each of them with one of the others is a majority of none.
    for pair in [[0, 2], [1, 3], [0, 3], [1, 2]] {
        let pair = pair.map(|place| images[place].clone());
        assert!(decide(&pair, &options()).is_err());
    }
    assert!(decide(&images[..2], &options()).is_ok());
    assert!(decide(&images[..3], &options()).is_ok());
}

#[test]
fn the_only_copy_of_what_was_being_changed_is_needed() {
    let mut images = disk(3);
    let layout = read(&mut images[0]).record.layout();
    let mut missed = RangeSet::default();
    missed.insert(SectorRange::new(8, 8));
    for image in &mut images {
        let read = read(image);
        read.record.members[0].stale = Stale::of(&missed, layout);
        read.record.members[2].stale_where_changed = true;
    }
    let others = [images[0].clone(), images[2].clone()];
    assert_eq!(start(&others, &options()).unsettled.count(), 0);
    read(&mut images[2]).intent.insert(SectorRange::new(0, 1));
    let others = [images[0].clone(), images[2].clone()];
    assert_eq!(
        line(&others, &options()),
        "only 'b.raw' may hold some of what was being written when the disk ended, and the others \
         have missed it; start with them, or, if they are lost with what they hold, add \
         --force-start"
    );
    assert!(start(&others, &forced()).forced);
    assert!(decide(&images, &options()).is_ok());
    assert!(decide(&images[..2], &options()).is_ok());
    // It has missed that, too.
    for image in &mut images {
        read(image).record.members[1].stale = Stale::All;
    }
    let others = [images[0].clone(), images[2].clone()];
    assert!(decide(&others, &options()).is_ok());
}

#[test]
fn a_lower_threshold_lets_no_two_sides_start_alone() {
    let lower = Options {
        votes: Some(1),
        ..options()
    };
    let images = disk(2);
    for image in &images {
        let one = [image.clone()];
        let refusal = line(&one, &lower);
        assert!(
            refusal.starts_with("only 1 of 2 needed replicas can be used, and '"),
            "{refusal}"
        );
        let force = Options {
            force: true,
            ..lower.clone()
        };
        assert!(start(&one, &force).forced);
    }
    let both = start(&images, &lower);
    assert!(!both.forced && both.record.threshold.votes == 1);
    let mut images = disk(3);
    evict(&mut images, 2);
    // Those left out are not as many as decide, but would be with a lower threshold.
    assert!(decide(&images[1..], &options()).is_ok(), "it is complete");
    images.pop();
    assert!(!start(&images, &lower).forced);
}

#[test]
fn images_that_do_not_belong_together_are_refused() {
    let mut images = disk(3);
    keep(&mut images[2], Kept::Absent);
    assert_eq!(
        line(&images, &options()),
        "'c.raw' has no record, so it is no replica of this disk; start without it, and have it \
         copied with quorum-blkctl replace 'c.raw' '/images/c.raw'"
    );
    images[2].node_name = "new.raw".to_owned();
    let refusal = line(&images, &options());
    assert!(
        refusal.ends_with("quorum-blkctl add '/images/c.raw'"),
        "{refusal}"
    );
    images[2].node_name = "c.raw".to_owned();
    let unusable = Unusable::Both(SlotFault::NoRecord, SlotFault::Blank);
    keep(&mut images[2], Kept::Unusable(unusable));
    let decided = start(&images, &options());
    assert_eq!(whys(&decided), [Why::Fresh, Why::Fresh, Why::NoRecord]);
    keep(
        &mut images[2],
        Kept::Unusable(Unusable::Incompatible(vec!["x".to_owned()])),
    );
    assert_eq!(
        line(&images, &forced()),
        "cannot use 'c.raw': its record needs 'x', which this version of quorum-blk does not know; \
         use the version that wrote it"
    );
    images[2] = images[1].clone();
    images[2].node_name = "copy.raw".to_owned();
    assert_eq!(
        line(&images, &forced()),
        "'b.raw' and 'copy.raw' are the same replica: one is a copy of the other with its record; \
         start without the copy"
    );
    read(&mut images[2]).record.replica = id(9);
    assert_eq!(
        line(&images, &forced()),
        format!(
            "'copy.raw' was removed from disk {}, or never added completely; start without it",
            id(0xd)
        )
    );
    read(&mut images[2]).record.disk = id(0xe);
    assert_eq!(
        line(&images, &forced()),
        format!(
            "'a.raw' is a replica of disk {}, 'copy.raw' is one of disk {}; start each disk with \
             its own replicas",
            id(0xd),
            id(0xe)
        )
    );
    let many = Options {
        votes: Some(4),
        ..options()
    };
    assert_eq!(
        line(&disk(3), &many),
        "--vote-threshold 4: the disk has 3 replicas"
    );
}

#[test]
fn starts_that_are_always_cut_short_end_with_a_refusal() {
    let mut images = disk(3);
    images.remove(2);
    let mut count = 0;
    let refusal = loop {
        let decided = match decide(&images, &options()) {
            Ok(Decision::Start(start)) => start,
            other => break other.unwrap_err(),
        };
        for (image, number) in images.iter_mut().zip(1..) {
            read(image).record = decided.record.for_replica(id(number), 1);
        }
        count += 1;
    };
    assert_eq!(count, crate::limits::RECORD_TABLES_MAX);
    assert_eq!(
        refusal.to_string(),
        "the last 8 starts were cut short while other replicas were missing; start with all \
         replicas, or, if those missing are lost with what they hold, add --force-start"
    );
    images.push(disk(3).remove(2));
    assert_eq!(whys(&start(&images, &options())), [Why::Fresh; 3]);
}

#[test]
fn changes_that_were_all_cut_short_have_put_no_replica_out() {
    let mut images = disk(4);
    for image in &mut images {
        let intent = &mut read(image).intent;
        *intent = Extents::full(intent.layout());
    }
    let record = &mut read(&mut images[2]).record;
    record.propose();
    record.deactivate(id(4), None);
    let others = [images[0].clone(), images[1].clone(), images[3].clone()];
    let decided = start(&others, &options());
    for (place, number) in [(0, 1), (1, 2), (3, 4)] {
        read(&mut images[place]).record = decided.record.for_replica(id(number), 2);
    }
    assert_eq!(whys(&start(&images, &options())), [Why::Fresh; 4]);
}

/// What the tools show of a start.
#[test]
fn a_start_becomes_json() {
    let mut images = disk(2);
    evict(&mut images, 1);
    let json = serde_json::to_value(start(&images, &forced())).unwrap();
    assert_eq!(json["images"][1]["why"], "fresh");
    assert_eq!(json["unsettled"], "nowhere");
    assert_eq!(json["record"]["members"][0]["state"]["is"], "active");
    let stale = Stale::of_extents(
        &Extents::full(read(&mut images[0]).record.layout()),
        read(&mut images[0]).record.layout(),
    );
    assert_eq!(serde_json::to_value(stale).unwrap(), "everywhere");
}

#[test]
fn an_image_that_is_old_is_not_adopted_by_mistake() {
    let mut images = disk(3);
    evict(&mut images, 2);
    for image in &mut images[..2] {
        let record = &mut read(image).record;
        let layout = record.layout();
        let mut missed = RangeSet::default();
        missed.insert(SectorRange::new(8, 8));
        record.members[2].stale = Stale::of(&missed, layout);
    }
    for image in &mut images {
        let record = &mut read(image).record;
        record.clean = true;
        record.image = Some(FINGERPRINT);
        image.image.as_mut().unwrap().fingerprint = None;
    }
    assert_eq!(
        line(&images, &options()),
        "another program has modified 'a.raw', 'b.raw', 'c.raw' since the clean end, and only 0 of \
         2 needed replicas are as they were; undo that, or overwrite all others with one replica \
         by --adopt NODE; of these 'a.raw', 'b.raw' were up to date"
    );
    let old = adopting("c.raw");
    assert_eq!(
        line(&images, &old),
        "--adopt 'c.raw': this replica is not up to date (has missed changes), and 'a.raw', \
         'b.raw' would be without what another program has modified; adopt one of those, or, to \
         lose what they hold, add --force-start"
    );
    assert_eq!(start(&images, &adopting("b.raw")).adopted, Some(1));
    let force = Options { force: true, ..old };
    assert_eq!(start(&images, &force).adopted, Some(2));
    // No other image that can be adopted is better.
    for image in &mut images[..2] {
        let record = &mut read(image).record;
        record.members[0].doubtful = Stale::All;
        record.members[1].stale = Stale::All;
    }
    let refusal = line(&images, &options());
    assert!(
        refusal.ends_with("; none of these was up to date"),
        "{refusal}"
    );
    assert_eq!(start(&images, &adopting("c.raw")).adopted, Some(2));
}
