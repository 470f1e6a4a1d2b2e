//! What the last jobs have found is known after a restart.

use testkit::HANG_LIMIT;
use testkit::machine;
use testkit::process::wait_until;
use testkit::programs;

use super::{Host, Running, modify, write};

fn last_scrub(running: &Running) -> String {
    let (_, status) = running.blkctl(&["status"]);
    let mut lines = status.lines();
    let line = lines.position(|line| line.starts_with("last scrub: "));
    let from = line.unwrap_or_else(|| panic!("{status}"));
    let lines: Vec<&str> = status.lines().skip(from).map(str::trim).collect();
    lines.join(" ")
}

/// What `quorum-blkctl inspect` shows of the first image.
fn inspected(host: &Host) -> String {
    let mut command = programs::command(programs::BLKCTL);
    let output = command.arg("inspect").arg(&host.images[0]).output();
    String::from_utf8(output.expect("running quorum-blkctl").stdout).unwrap()
}

#[test]
fn the_last_scrub_is_known_after_any_end() {
    let _machine = machine::shared();
    let host = Host::new(3);
    let running = host.start();
    write(&mut running.client(), 0, 1);
    running.wait_until_healthy();
    modify(&host.images[2], 9, 7);
    let (code, text) = running.blkctl(&["scrub", "--repair"]);
    assert_eq!(code, 0, "{text}");
    let found = "8 corrupt sectors found, 8 sectors written";
    let line = last_scrub(&running);
    assert!(line.contains(found) && !line.contains("before"), "{line}");
    // It comes into the records by itself, although the guest does nothing.
    let came = wait_until(HANG_LIMIT, || {
        inspected(&host).contains("8 sectors corrupt")
    });
    assert!(came, "{}", inspected(&host));
    running.kill();
    for is_killed in [false, true] {
        let running = host.start();
        let line = last_scrub(&running);
        assert!(
            line.contains(" ago (before the daemon started): completed, ") && line.ends_with(found),
            "{line}"
        );
        let (_, jobs) = running.blkctl(&["jobs", "--all"]);
        assert!(
            jobs.contains(" UTC, before the daemon started\njob1 (scrub) "),
            "{jobs}"
        );
        // It is no job of this daemon.
        let (code, text) = running.blkctl(&["jobs", "wait", "job1"]);
        assert_eq!(code, 3, "{text}");
        running.wait_until_healthy();
        match is_killed {
            false => running.end(),
            true => running.kill(),
        }
    }
    let running = host.start();
    let (code, text) = running.blkctl(&["scrub"]);
    assert_eq!(code, 0, "{text}");
    let line = last_scrub(&running);
    assert!(
        !line.contains("before") && line.ends_with("no corrupt sectors found"),
        "{line}"
    );
    running.end();
}
