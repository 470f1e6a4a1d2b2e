//! The result of a job: what it has found, on which replica, where, and why it has failed.

use testkit::disk::{Disk, Plan, System};
use testkit::fuse::{Fault, Operation};
use testkit::images::{corrupt_sectors, create_images};

/// A disk whose replicas fail on demand, and which scrubs nothing by itself.
fn serve(faulty: &[usize]) -> Disk {
    let plan = Plan {
        faulty: faulty.to_vec(),
        ..Plan::default()
    };
    Disk::start(System::Ours, &plan)
}

#[test]
fn a_scrub_that_cannot_repair_names_the_replica_the_place_and_the_cause() {
    let disk = serve(&[1]);
    let image = disk.faulty(1);
    image.make_unreadable(4096..8192);
    image.inject(Operation::Write, Fault::Fail(libc::ENOSPC));
    let (code, text) = disk.blkctl(&["scrub", "--repair"]);
    assert_eq!(code, 1, "{text}");
    for part in [
        "failed: 8 sectors could not be written; r1: write: No space left on device",
        "  r1: 8 unreadable, sectors 8-15 (Input/output error); \
         8 not written (No space left on device)",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_scrub_without_repair_names_the_replicas_that_it_could_not_read() {
    let disk = serve(&[1]);
    disk.faulty(1).make_unreadable(4096..8192);
    let (code, text) = disk.blkctl(&["scrub"]);
    assert_eq!(code, 1, "{text}");
    let part = "failed: r1 (Input/output error) could not be read everywhere";
    assert!(text.contains(part), "{text}");
}

#[test]
fn a_scrub_says_where_which_replica_was_corrupt() {
    let directory = tempfile::tempdir().unwrap();
    let plan = Plan {
        more: vec!["--empty-anyway"],
        ..Plan::default()
    };
    let images = create_images(directory.path(), 3, plan.size_bytes);
    corrupt_sectors(&images[2], 100..102, 0xff);
    let disk = Disk::over(&plan, images);
    let (code, text) = disk.blkctl(&["scrub", "--repair"]);
    assert_eq!(code, 0, "{text}");
    let part = ": 2 corrupt, sectors 100-101; 2 written\n";
    assert!(text.contains(part), "{text}");
}

#[test]
fn the_result_of_a_detached_job_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let plan = Plan {
        more: vec!["--empty-anyway"],
        ..Plan::default()
    };
    let images = create_images(directory.path(), 3, plan.size_bytes);
    corrupt_sectors(&images[2], 100..102, 0xff);
    let disk = Disk::over(&plan, images);
    assert_eq!(disk.blkctl(&["jobs", "--all"]), (0, "no jobs\n".into()));
    let last_scrub = || {
        let (_, status) = disk.blkctl(&["status"]);
        let line = status.lines().find(|line| line.starts_with("last scrub: "));
        line.map(str::to_owned)
            .unwrap_or_else(|| panic!("{status}"))
    };
    assert_eq!(last_scrub(), "last scrub: none since the daemon started");
    let (code, text) = disk.blkctl(&["scrub", "--detach"]);
    assert_eq!(code, 0, "{text}");
    disk.wait_for("BLOCK_JOB_COMPLETED", None);
    assert_eq!(disk.blkctl(&["jobs"]), (0, "no jobs\n".into()));
    let (code, text) = disk.blkctl(&["jobs", "--all"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains(" UTC\njob0 (scrub) completed, "), "{text}");
    assert!(
        text.contains("; 2 corrupt sectors found, not repaired\n"),
        "{text}"
    );
    assert!(text.contains(": 2 corrupt, sectors 100-101\n"), "{text}");
    let line = last_scrub();
    assert!(
        line.starts_with("last scrub: job0, ")
            && line.contains(" ago: completed, ")
            && line.ends_with("; 2 corrupt sectors found, not repaired"),
        "{line}"
    );
    // A client that waits too late gets the result, and the exit status of a scrub.
    let (code, waited) = disk.blkctl(&["jobs", "wait", "job0"]);
    assert!(code == 1 && text.ends_with(&waited), "{code}: {waited}");
    assert_eq!(
        disk.monitor().execute("query-jobs", serde_json::json!({})),
        serde_json::json!([])
    );
}
