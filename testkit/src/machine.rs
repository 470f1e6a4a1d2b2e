//! Tests that measure time, on a machine that also does other things.
//!
//! Such a test holds [`alone`], and every other test of its binary [`shared`], so that the tests
//! themselves do not disturb it. Other programs still do: [`measure`] repeats what was disturbed.

use std::fmt::Display;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

static MACHINE: RwLock<()> = RwLock::new(());

/// How often [`measure`] measures.
const ROUNDS: usize = 8;

/// Held by a test beside which others may run.
pub fn shared() -> RwLockReadGuard<'static, ()> {
    MACHINE.read().unwrap_or_else(PoisonError::into_inner)
}

/// Held by a test that measures.
pub fn alone() -> RwLockWriteGuard<'static, ()> {
    MACHINE.write().unwrap_or_else(PoisonError::into_inner)
}

/// Repeats a measurement until it keeps its bound, and returns what that round returned. A round
/// that does not keep it returns the reason.
///
/// Other programs may spoil single rounds; a fault spoils all of them, and then this panics with
/// all reasons.
pub fn measure<T, E: Display>(mut round: impl FnMut() -> Result<T, E>) -> T {
    let mut reasons = String::new();
    for number in 1..=ROUNDS {
        match round() {
            Ok(measured) => return measured,
            Err(reason) => {
                println!("round {number} of {ROUNDS}: {reason}");
                reasons.push_str(&format!("\n  {reason}"));
            }
        }
    }
    panic!("no round of {ROUNDS} keeps the bound:{reasons}");
}
