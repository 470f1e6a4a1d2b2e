//! Waiting for calls, which are eventfds.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Watches eventfds.
pub(super) fn watch<'a>(events: impl IntoIterator<Item = &'a EventFd>) -> Epoll {
    let epoll = Epoll::new().expect("an epoll");
    for event in events {
        let readable = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, event.as_raw_fd(), readable)
            .expect("watching an eventfd");
    }
    epoll
}

/// Waits for one of the watched eventfds.
pub(super) fn wait_for(epoll: &Epoll, limit: Duration) -> bool {
    let timeout = i32::try_from(limit.as_millis()).expect("short");
    let mut events = [EpollEvent::default()];
    loop {
        match epoll.wait(timeout, &mut events) {
            Ok(count) => return count > 0,
            // A debugger, or a signal for another thread.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => panic!("waiting: {error}"),
        }
    }
}
