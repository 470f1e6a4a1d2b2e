//! A writer and a reader in a guest: shell loops that check what they read. They count their rounds
//! in `/tmp/writes` and `/tmp/reads`, and write mismatches to `/tmp/writer` and `/tmp/reader`. When
//! `/tmp/stop` exists they end, and create `/tmp/writer-ended` and `/tmp/reader-ended`.

use crate::guest::Guest;

/// Waits until both have begun and ended a round.
const WAIT_FOR_PROGRESS: &str = "for what in writes reads; do \
    until [ -e /tmp/$what ]; do sleep 0.1; done; n=$(cat /tmp/$what); \
    until [ $(cat /tmp/$what) -ge $((n + 2)) ]; do \
    sleep 1; echo $what: $(cat /tmp/$what); done; done";

/// Waits until both have ended.
const WAIT_FOR_END: &str = "touch /tmp/stop; for loop in writer reader; do \
    until [ -e /tmp/$loop-ended ]; do sleep 0.1; done; done";

/// Asserts that writer and reader continue, and found no mismatch.
pub fn expect_progress(guest: &mut Guest) {
    guest.run_successfully(WAIT_FOR_PROGRESS);
    expect_no_mismatch(guest);
}

/// Asserts that they have found no mismatch so far.
pub fn expect_no_mismatch(guest: &mut Guest) {
    assert_eq!(guest.run_successfully("cat /tmp/writer /tmp/reader"), "");
}

/// Stops both, and asserts that they have found no mismatch.
pub fn expect_end(guest: &mut Guest) {
    guest.run_successfully(WAIT_FOR_END);
    expect_no_mismatch(guest);
}
