//! For the simulator: the input of one worker runs in the middle of another worker's.
//!
//! In production the workers' inputs overlap, and each access to what they share may come before or
//! after those of the other worker. A simulated input is one call, so the simulator hands over
//! another worker's input here, which then runs whole just before one of the accesses.

use std::cell::RefCell;

type Run = Box<dyn FnOnce()>;

thread_local! {
    /// The other input, and before how many accesses it is not to run.
    static PLANNED: RefCell<Option<(u32, Run)>> = const { RefCell::new(None) };
}

/// Has `run` called before the access after the next `accesses`, which nothing may lock.
pub fn plan(accesses: u32, run: impl FnOnce() + 'static) {
    PLANNED.set(Some((accesses, Box::new(run))));
}

/// Runs what is planned and has not run: there were too few accesses.
pub fn finish() {
    if let Some((_, run)) = PLANNED.take() {
        run();
    }
}

/// Forgets what is planned.
pub fn forget() {
    PLANNED.set(None);
}

/// An access follows. `is_free`: nothing is locked.
#[inline]
pub(super) fn access(is_free: impl FnOnce() -> bool) {
    let due = PLANNED.with_borrow_mut(|planned| {
        let (accesses, _) = planned.as_mut()?;
        if *accesses > 0 {
            *accesses -= 1;
            return None;
        }
        if is_free() { planned.take() } else { None }
    });
    if let Some((_, run)) = due {
        run();
    }
}
