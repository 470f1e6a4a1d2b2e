//! A panic of any thread ends the process at once.
//!
//! A panic means that an invariant is violated. A daemon that lost one of its threads would serve
//! only some requests, so it aborts: the frontend keeps the requests in flight in its inflight
//! region, and the next daemon repeats them.

#![forbid(unsafe_code)]

use std::panic::PanicHookInfo;

use super::logging::{print_last, push_field};

/// Has every panic from now on print one line and abort the process.
pub(super) fn install() {
    std::panic::set_hook(Box::new(|panic| {
        print_last("internal error: the process aborts", &fields(panic));
        std::process::abort();
    }));
}

fn fields(panic: &PanicHookInfo<'_>) -> String {
    let thread = std::thread::current();
    let payload = panic.payload();
    let message = match payload.downcast_ref::<String>() {
        Some(message) => message.as_str(),
        None => payload.downcast_ref::<&str>().copied().unwrap_or_default(),
    };
    let mut fields = String::new();
    push_field(&mut fields, "thread", thread.name().unwrap_or_default());
    if let Some(location) = panic.location() {
        push_field(&mut fields, "location", &location.to_string());
    }
    push_field(&mut fields, "message", message);
    fields
}
