//! A writer and a reader in a guest, shell loops that check all they read. Each leaves how often it
//! has done so in a file, `/tmp/writes` and `/tmp/reads`, what it found wrong in `/tmp/writer` and
//! `/tmp/reader`, and `-ended` after that name when it was told to stop by `/tmp/stop`.

use crate::guest::Guest;

/// Waits until both have begun and ended a round.
const WAIT_FOR_PROGRESS: &str = "for what in writes reads; do \
    until [ -e /tmp/$what ]; do sleep 0.1; done; n=$(cat /tmp/$what); \
    until [ $(cat /tmp/$what) -ge $((n + 2)) ]; do sleep 1; echo $what: $(cat /tmp/$what); done; done";

/// Waits until both have ended.
const WAIT_FOR_END: &str = "touch /tmp/stop; for who in writer reader; do \
    until [ -e /tmp/$who-ended ]; do sleep 0.1; done; done";

/// Asserts that writer and reader go on and found nothing wrong.
pub fn expect_progress(guest: &mut Guest) {
    guest.run_successfully(WAIT_FOR_PROGRESS);
    expect_nothing_wrong(guest);
}

/// Asserts that they have found nothing wrong so far.
pub fn expect_nothing_wrong(guest: &mut Guest) {
    assert_eq!(guest.run_successfully("cat /tmp/writer /tmp/reader"), "");
}

/// Tells both to stop, waits for that, and asserts that they have found nothing wrong.
pub fn expect_end(guest: &mut Guest) {
    guest.run_successfully(WAIT_FOR_END);
    expect_nothing_wrong(guest);
}
