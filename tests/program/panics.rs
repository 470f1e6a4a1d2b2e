//! A panic of any thread ends the process: this binary runs itself once more, with the hook of the
//! daemon, and panics in a thread.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::thread;

use quorum_blk::daemon;

/// Set for the process that is to panic.
const VARIABLE: &str = "QUORUM_BLK_TEST_PANIC";

/// Does nothing in the ordinary run of the tests.
#[test]
fn panics_in_a_thread_if_the_environment_says_so() {
    if env::var_os(VARIABLE).is_none() {
        return;
    }
    daemon::start_log("vm1", 0).unwrap();
    let worker = thread::Builder::new().name("worker-3".into());
    let worker = worker
        .spawn(|| panic!("the sums of request {} differ", 7))
        .unwrap();
    let outcome = worker.join();
    // Not reached.
    println!("the process survived: {}", outcome.is_err());
}

#[test]
fn a_panic_in_a_thread_aborts_the_process_with_one_line() {
    let output = Command::new(env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            "panics::panics_in_a_thread_if_the_environment_says_so",
        ])
        .env(VARIABLE, "1")
        .env_remove("QUORUM_BLKD_LOG")
        .env_remove("JOURNAL_STREAM")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{stderr}");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("survived"));
    let line = stderr.strip_suffix('\n').expect("a whole line");
    assert!(!line.contains('\n'), "{stderr}");
    for part in [
        " ERROR disk=vm1 internal error: the process aborts thread=worker-3 location=",
        "tests/program/panics.rs:",
        " message=\"the sums of request 7 differ\"",
    ] {
        assert!(line.contains(part), "no {part} in {line}");
    }
}
