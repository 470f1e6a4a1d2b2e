//! `quorum-blkctl verify`: images are compared, without a daemon.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Output;
use std::time::SystemTime;

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use testkit::daemon::{Daemon, replica_arguments};
use testkit::fuse::FuseImage;
use testkit::images::{corrupt_sectors, create_images};
use testkit::terminal::Terminal;

use crate::offline_disk::{Disk, run, usual};

const THREE: [&str; 3] = ["0.raw", "1.raw", "2.raw"];

fn stdout(output: Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:#?}");
    assert!(output.stderr.is_empty(), "{output:#?}");
    String::from_utf8(output.stdout).unwrap()
}

fn digests(directory: &Path, names: &[&str]) -> String {
    let line = |name: &&str| {
        let digest = Sha256::digest(fs::read(directory.join(name)).unwrap());
        let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{digits}  {name}\n")
    };
    names.iter().map(line).collect()
}

#[test]
fn images_without_records_vote_and_the_majority_wins() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, 3 << 20);
    for image in &images {
        corrupt_sectors(image, 100..5000, 0x35);
        // The last chunk is short, and so is its last block.
        let image = File::options().write(true).open(image).unwrap();
        image.set_len((3 << 20) + 4096 + 512).unwrap();
    }
    let digests = |names: &[&str]| digests(directory.path(), names);
    let run = |names: &[&str]| run(directory.path(), "verify", names);
    let said = stdout(run(&THREE), 0);
    let expected = "no difference in 3 MiB of 3 images\n";
    assert_eq!(said, digests(&THREE) + expected);
    corrupt_sectors(&images[1], 1020..1030, 1);
    let image = File::options().write(true).open(&images[1]).unwrap();
    image.write_all_at(&[1], 6152 * 512 + 7).unwrap();
    corrupt_sectors(&images[2], 1023..1024, 2);
    let said = stdout(run(&THREE), 1);
    let expected = "\
1.raw differs in 10 sectors (5 KiB):
  sectors 1020-1022
  sectors 1024-1029
  sector 6152
no version has 2 of 3 votes in 1 sector (512 B):
  sector 1023
";
    assert_eq!(said, digests(&THREE) + expected);
    // Two of two must agree.
    let said = stdout(run(&["0.raw", "1.raw"]), 1);
    let expected = "\
no version has 2 of 2 votes in 11 sectors (5.5 KiB):
  sectors 1020-1029
  sector 6152
";
    assert_eq!(said, digests(&["0.raw", "1.raw"]) + expected);
}

#[test]
fn what_the_records_call_stale_has_no_vote_and_what_is_marked_is_nothing_wrong() {
    let mut disk = Disk::of(8 << 20);
    disk.disturb();
    disk.keep(&[0, 1, 2], &usual());
    let digests = |disk: &Disk| digests(disk.directory.path(), &THREE);
    // Stale on the second one, and with that on two of the three.
    corrupt_sectors(&disk.images[1], 4096..4104, 1);
    let without_vote = "\
1.raw has no vote in 4.5 KiB, where it is stale or doubtful
2.raw has no vote in 2 MiB, where it is stale or doubtful
";
    let said = stdout(disk.run("verify", &THREE), 1);
    let (of_second, of_third) = without_vote.split_at(without_vote.find("2.raw").unwrap());
    let differs = "\
1.raw differs without a vote in 8 sectors (4 KiB):
  sectors 4096-4103
";
    let without_vote = [of_second, differs, of_third].concat();
    assert_eq!(said, digests(&disk) + &without_vote);
    // Where changes are marked, the third one is stale and the others may differ.
    corrupt_sectors(&disk.images[0], 8..16, 1);
    // Elsewhere it votes.
    corrupt_sectors(&disk.images[2], 9000..9001, 1);
    let said = stdout(disk.run("verify", &THREE), 1);
    let expected = "\
2.raw differs in 1 sector (512 B):
  sector 9000
a start would make the images equal in 8 sectors (4 KiB), changed at the end:
  sectors 8-15
";
    assert_eq!(said, digests(&disk) + &without_vote + expected);
    let json = disk.run("verify", &["--json", "0.raw", "1.raw", "2.raw"]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["version"], 1);
    assert_eq!(
        json["images"][2]["differs"]["first"][0],
        serde_json::json!([9000, 1])
    );
    assert_eq!(json["unsettled"]["sectors"], 8);
    // Images that could not be started are compared all the same.
    let said = stdout(disk.run("verify", &["2.raw"]), 1);
    assert!(said.contains("a start would be refused: '0.raw', '1.raw' could have gone on"));
}

#[test]
fn an_image_that_another_program_has_modified_is_compared_without_a_vote() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, 2 << 20);
    let mut daemon = Daemon::start_with_records(directory.path(), replica_arguments(&images));
    assert!(daemon.terminate().success());
    let run = || run(directory.path(), "verify", &THREE);
    assert!(stdout(run(), 0).ends_with("\nno difference in 2 MiB of 3 images\n"));
    // Its time changes, and not what it holds.
    let touched = File::options().write(true).open(&images[1]).unwrap();
    touched.set_modified(SystemTime::now()).unwrap();
    let without_vote = "1.raw has no vote: modified by another program since its clean end\n";
    let expected = format!("{without_vote}no difference in 2 MiB of 3 images\n");
    assert_eq!(
        stdout(run(), 0),
        digests(directory.path(), &THREE) + &expected
    );
    corrupt_sectors(&images[1], 1020..1030, 1);
    let differs = "\
1.raw differs without a vote in 10 sectors (5 KiB):
  sectors 1020-1029
";
    assert_eq!(
        stdout(run(), 1),
        digests(directory.path(), &THREE) + without_vote + differs
    );
}

#[test]
fn what_cannot_be_read_is_reported_and_has_no_digest() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, 2 << 20);
    let failing = FuseImage::serve(&images[2]);
    failing.make_unreadable(1_048_576..1_056_768);
    let path = failing.path();
    let path = path.to_str().unwrap();
    let said = stdout(
        run(directory.path(), "verify", &["0.raw", "1.raw", path]),
        1,
    );
    let expected = format!(
        "{:64}  {path}\n{path} cannot be read in 16 sectors (8 KiB):\n  sectors 2048-2063\n",
        "cannot be read everywhere"
    );
    assert_eq!(
        said,
        digests(directory.path(), &["0.raw", "1.raw"]) + &expected
    );
}

#[test]
fn an_image_that_a_daemon_writes_to_is_not_compared() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, 2 << 20);
    let _daemon = Daemon::start(directory.path(), replica_arguments(&images[2..]));
    let refused = run(directory.path(), "verify", &THREE);
    assert_eq!(refused.status.code(), Some(3));
    let line = String::from_utf8(refused.stderr).unwrap();
    assert!(
        line.starts_with("quorum-blkctl: '2.raw' is in use by another process"),
        "{line}"
    );
}

#[test]
fn a_terminal_sees_the_progress() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 2, 2 << 20);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_quorum-blkctl"));
    command.env_clear().env("TERM", "xterm");
    command.arg("verify").args(&images);
    let terminal = Terminal::start(command, 80);
    terminal.wait_until("no end", || terminal.drawn().contains("no difference"));
    let drawn = terminal.drawn();
    assert!(drawn.contains("verify   0 %  0 B of 2 MiB"), "{drawn}");
}
