//! For the simulator: the input of one worker runs in the middle of another worker's.
//!
//! In production the workers' inputs overlap, and each access to what they share may come before or
//! after those of the other worker. A simulated input is one call, so the simulator hands over
//! another worker's input here, which then runs whole just before one of the accesses.

use std::cell::{Cell, RefCell};

type Run = Box<dyn FnOnce()>;

thread_local! {
    /// The other input, and before how many accesses it is not to run.
    static PLANNED: RefCell<Option<(u32, Run)>> = const { RefCell::new(None) };
    /// Whether there is one: mostly not, and then an access costs nothing.
    static IS_PLANNED: Cell<bool> = const { Cell::new(false) };
}

/// Has `run` called before the access after the next `accesses`, which nothing may lock.
pub fn plan(accesses: u32, run: impl FnOnce() + 'static) {
    PLANNED.set(Some((accesses, Box::new(run))));
    IS_PLANNED.set(true);
}

/// Runs what is planned and has not run: there were too few accesses.
pub fn finish() {
    IS_PLANNED.set(false);
    if let Some((_, run)) = PLANNED.take() {
        run();
    }
}

/// Forgets what is planned.
pub fn forget() {
    IS_PLANNED.set(false);
    PLANNED.set(None);
}

/// An access follows. `is_free`: nothing is locked.
#[inline]
pub(super) fn access(is_free: impl FnOnce() -> bool) {
    if IS_PLANNED.get() {
        run_if_due(is_free);
    }
}

fn run_if_due(is_free: impl FnOnce() -> bool) {
    let due = PLANNED.with_borrow_mut(|planned| {
        let (accesses, _) = planned.as_mut()?;
        if *accesses > 0 {
            *accesses -= 1;
            return None;
        }
        if is_free() { planned.take() } else { None }
    });
    if let Some((_, run)) = due {
        IS_PLANNED.set(false);
        run();
    }
}
