//! What a frontend does with descriptors and memory that it has passed harms only itself.

use std::os::fd::AsRawFd;

use testkit::frontend::{Layout, Request};
use vhost::VhostBackend;
use vmm_sys_util::eventfd::EventFd;

use super::{Setup, both_styles};

/// Makes a call eventfd one to which a write waits: what the open file says is shared.
fn block(event: &EventFd) {
    let _ = event.read();
    event.write(u64::MAX - 1).unwrap();
    // SAFETY: no memory is passed.
    let set = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, 0) };
    assert_eq!(set, 0);
}

#[test]
fn a_call_eventfd_that_blocks_after_it_was_passed_harms_only_its_sender() {
    for aio in ["io_uring", "threads"] {
        let mut setup = Setup::new(&["--aio", aio]);
        for plan in both_styles() {
            let mut vmm = setup.start(&plan);
            let call = vmm.queues[0].call.try_clone().unwrap();
            vmm.queues[0].write_disk(0, &[1; 4096]);
            block(&call);
            for _ in 0..4 {
                let queue = &mut vmm.queues[0];
                queue.ask_for_calls();
                queue.submit(&Request::read(0, 4096), Layout::DIRECT);
            }
            setup.assert_serves("a call that blocks");
            // The frontend thread, and its end.
            vmm.frontend().set_vring_call(0, &call).unwrap();
            setup.assert_serves("a call that blocks from the start");
            drop(vmm);
            setup.assert_serves("the end of a frontend whose call blocks");
        }
        setup.end();
    }
}
