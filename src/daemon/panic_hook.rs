//! A panic of any thread ends the process at once.
//!
//! A panic means that an invariant is violated. A daemon that lost one of its threads would serve
//! only some requests, so it aborts: the frontend keeps the requests in flight in its inflight
//! region, and the next daemon repeats them.

#![forbid(unsafe_code)]

use std::panic::PanicHookInfo;
use std::sync::Arc;

use log::Level;

use super::logging::{Style, push_field};

/// Has every panic from now on print one line and abort the process.
pub(super) fn install(style: Arc<Style>) {
    std::panic::set_hook(Box::new(move |panic| {
        let line = line(&style, panic);
        // Directly, because the thread may hold the locks of the logger or of stderr.
        let _ = rustix::io::write(std::io::stderr(), line.as_bytes());
        std::process::abort();
    }));
}

fn line(style: &Style, panic: &PanicHookInfo<'_>) -> String {
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
    let text = format_args!("internal error: the process aborts");
    style.line(Level::Error, text, &fields)
}
