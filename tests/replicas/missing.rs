//! A disk that is served without one of its members: that is listed as missing, and taken in when
//! its image can be opened (W13). Real files, the workers of the daemon within this process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use quorum_blk::admin::{AdminError, Recognition, Removed};
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::common::{ReplicaIndex, ReplicaSet};
use quorum_blk::replica::file::{Overwrite, ReplicaFile};
use quorum_blk::replica::record_file::RecordAccess;
use quorum_blk::replica::table::Member;
use testkit::images::{are_identical, data_ranges};
use testkit::machine;
use testkit::stop::StopOnDrop;

use super::jobs::{Served, serve_without, source, verify_until};

const MISSING: ReplicaIndex = ReplicaIndex(2);

/// Recognizes every image, or none.
#[derive(Default)]
struct Judge {
    refuses: AtomicBool,
    asked: AtomicUsize,
    taken_in: AtomicUsize,
}

impl Recognition for Judge {
    fn recognize(
        &self,
        replica: ReplicaIndex,
        _file: &ReplicaFile,
        _record: &mut RecordAccess,
    ) -> Result<RangeSet, String> {
        assert_eq!(replica, MISSING);
        self.asked.fetch_add(1, Ordering::SeqCst);
        match self.refuses.load(Ordering::SeqCst) {
            true => Err("it is the image of another disk".to_owned()),
            false => Ok(RangeSet::default()),
        }
    }

    fn is_image_of(&self, replica: ReplicaIndex, _record: &mut RecordAccess) -> bool {
        assert_eq!(replica, MISSING);
        false
    }

    fn taken_in(&self, replica: ReplicaIndex, _record: RecordAccess) {
        assert_eq!(replica, MISSING);
        self.taken_in.fetch_add(1, Ordering::SeqCst);
    }
}

/// A disk whose third member is missing, and what decides whether an image is that.
fn serve() -> (Served, Arc<Judge>) {
    (serve_without(Some(2)), Arc::default())
}

/// Tries the images until the condition holds.
fn try_until(served: &Served, judge: &Arc<Judge>, what: &str, holds: impl Fn() -> bool) {
    let recognition: Arc<dyn Recognition> = judge.clone();
    served.wait_until(what, || {
        served.admin.try_missing(&recognition);
        holds()
    });
}

/// Why the third member is missing; `None` if it is not.
fn why(served: &Served) -> Option<String> {
    let replicas = served.admin.replicas();
    match &replicas[2] {
        (MISSING, Member::Missing(missing)) => Some(missing.why().to_string()),
        _ => None,
    }
}

fn name(served: &Served) -> String {
    source(&served.images[2]).node_name
}

#[test]
fn a_missing_member_is_taken_in_when_its_image_is_there_again() {
    let _machine = machine::shared();
    let (served, judge) = serve();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let running = StopOnDrop(&stop);
        let verifier = scope.spawn(|| verify_until(&stop, &served.socket, 7));
        let others: ReplicaSet = [0, 1].map(ReplicaIndex).into_iter().collect();
        assert_eq!(served.shared.in_service(), others);
        assert!(
            why(&served)
                .unwrap()
                .ends_with(": No such file or directory")
        );
        std::fs::rename(served.path("elsewhere"), &served.images[2]).unwrap();
        try_until(&served, &judge, "the member in service", || {
            served.shared.in_service() == ReplicaSet::first(3)
        });
        assert_eq!(why(&served), None);
        assert_eq!(judge.taken_in.load(Ordering::SeqCst), 1);
        served.wait_until("the end of its resync", || {
            served.shared.stale_sectors(MISSING) == 0
        });
        drop(running);
        assert!(verifier.join().unwrap() > 0);
    });
    let (_directory, images) = served.end();
    assert_eq!(images.len(), 3);
    assert!(are_identical(&images));
}

#[test]
fn an_image_that_is_not_the_member_is_not_taken_in() {
    let _machine = machine::shared();
    let (served, judge) = serve();
    let image = &served.images[2];
    let until = |text: &str| {
        try_until(&served, &judge, text, || {
            why(&served).is_some_and(|why| why.contains(text))
        });
    };
    // Another name of an image of the disk.
    std::fs::hard_link(&served.images[0], image).unwrap();
    until("are the same image");
    std::fs::remove_file(image).unwrap();
    std::fs::File::create(image).unwrap().set_len(512).unwrap();
    until("less than the disk");
    assert_eq!(judge.asked.load(Ordering::SeqCst), 0);

    judge.refuses.store(true, Ordering::SeqCst);
    let other = served.another("other");
    std::fs::rename(&other, image).unwrap();
    let before = data_ranges(image);
    until("another disk");
    assert_eq!(judge.taken_in.load(Ordering::SeqCst), 0);
    assert_eq!(served.shared.missing(), [MISSING].into_iter().collect());
    assert_eq!(data_ranges(image), before);
    judge.refuses.store(false, Ordering::SeqCst);
    try_until(&served, &judge, "the member taken in", || {
        why(&served).is_none()
    });
    served.end();
}

#[test]
fn a_missing_member_is_renamed_removed_and_replaced() {
    let _machine = machine::shared();
    let (served, judge) = serve();
    let (admin, old) = (&served.admin, name(&served));
    let new = served.path("new");
    std::fs::File::create(&new)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let mut taken = source(&new);
    taken.node_name.clone_from(&old);
    let refused = admin.add_replica(&taken, Overwrite::Never).unwrap_err();
    assert!(matches!(refused, AdminError::NameTaken(_)), "{refused}");
    let refused = admin.resize(128 << 20).unwrap_err();
    assert!(matches!(refused, AdminError::Missing(_)), "{refused}");
    let needed = admin.remove_replica(&source(&served.images[0]).node_name);
    assert!(matches!(needed, Err(AdminError::Needed { .. })));

    admin.rename_replica(&old, "c").unwrap();
    assert!(admin.rename_replica("c", "c").is_ok());
    assert_eq!(admin.intended_replicas(), 3);
    assert_eq!(admin.loss_of("c").unwrap().lost.sectors(), 0);
    assert_eq!(admin.remove_replica("c").unwrap(), Removed::Closed);
    assert_eq!(admin.replicas().len(), 2);
    let recognition: Arc<dyn Recognition> = judge;
    assert!(!admin.try_missing(&recognition), "none is missing");
    admin.add_replica(&source(&new), Overwrite::Never).unwrap();
    served.wait_until("a resync of the new replica", || {
        served.shared.members().len() == 3
            && served
                .shared
                .members()
                .iter()
                .all(|replica| served.shared.stale_sectors(replica) == 0)
    });
    served.end();
}

#[test]
fn a_missing_member_is_given_up() {
    let _machine = machine::shared();
    let (served, _) = serve();
    let loss = served.admin.fail_replica(&name(&served)).unwrap();
    assert_eq!(loss.lost.sectors(), 0);
    assert_eq!(served.admin.replicas().len(), 2);
    assert_eq!(served.shared.missing(), ReplicaSet::EMPTY);
    served.end();
}
