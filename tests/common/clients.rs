//! Programs of others that the tests talk to the operator's interfaces with.

use std::path::{Path, PathBuf};

/// What a test without them says.
const HOW_TO_PREPARE: &str = "run `make clients` (tests/clients/prepare.sh) first";

/// A program that `tests/clients/prepare.sh` has put there.
pub fn client_program(name: &str) -> PathBuf {
    let temporary = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let target = temporary.parent().expect("a directory inside of target/");
    let program = target.join("clients").join(name);
    assert!(
        program.exists(),
        "no {}: {HOW_TO_PREPARE}",
        program.display()
    );
    program
}
