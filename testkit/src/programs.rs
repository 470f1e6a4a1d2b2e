//! Where the programs are that the tests start: those of this project, and those that
//! `make clients` and `make guest` prepare.

use std::env;
use std::path::PathBuf;
use std::process::Command;

/// The daemon.
pub const DAEMON: &str = "quorum-blkd";

/// The client of the operator.
pub const BLKCTL: &str = "quorum-blkctl";

/// The path of [`DAEMON`] or [`BLKCTL`].
///
/// Cargo builds both before it runs an integration test or a benchmark, and puts them into the
/// directory of the profile. That of the running test is `deps` below it. (`CARGO_BIN_EXE_*` is
/// set only for the crate of the test, not for this one.)
pub fn program(name: &str) -> PathBuf {
    let path = profile_directory().join(name);
    assert!(path.exists(), "no {}: is it built?", path.display());
    path
}

/// A command that starts [`DAEMON`] or [`BLKCTL`].
///
/// With QUORUM_BLK_TEST_AIO=threads, the daemon carries operations out in threads (`--aio`): the
/// same tests check that.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(program(name));
    if let Some(aio) = env::var_os("QUORUM_BLK_TEST_AIO")
        && name == DAEMON
    {
        command.arg("--aio").arg(aio);
    }
    command
}

/// The path of a program that `tests/clients/prepare.sh` (`make clients`) has fetched.
pub fn client_program(name: &str) -> PathBuf {
    let path = target_directory().join("clients").join(name);
    let how_to_prepare = "run `make clients` (tests/clients/prepare.sh) first";
    assert!(path.exists(), "no {}: {how_to_prepare}", path.display());
    path
}

/// The path of a part of the guest, which `tests/guest/prepare.sh` and `tests/guest/firmware.sh`
/// make. It may be missing.
pub fn guest_part(name: &str) -> PathBuf {
    target_directory().join("guest").join(name)
}

/// The directory of the profile: `target/debug` or `target/release`.
fn profile_directory() -> PathBuf {
    let test = env::current_exe().expect("the path of the running test");
    let profile = test.ancestors().nth(2);
    profile.expect("the test is in target/PROFILE/deps").into()
}

/// Cargo's directory for all that is built, `target`.
pub fn target_directory() -> PathBuf {
    let profile = profile_directory();
    profile.parent().expect("the test is below target").into()
}
