//! What a frontend does with descriptors and memory that it has passed harms only itself.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use rustix::fs::{MemfdFlags, memfd_create};
use testkit::frontend::{Layout, Plan, Request, Segment, Vmm, memfd};
use testkit::process::wait_until;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{Setup, both_styles};
use testkit::HANG_LIMIT;

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

/// The file of guest memory.
fn memory_file(vmm: &Vmm) -> &File {
    let region = vmm.memory().iter().next().unwrap();
    region.file_offset().map(FileOffset::file).unwrap()
}

/// Waits until the daemon has ended the connection.
fn wait_for_end(vmm: &mut Vmm, what: &str) {
    let ended = wait_until(HANG_LIMIT, || vmm.frontend().get_features().is_err());
    assert!(ended, "the connection stays after {what}");
}

#[test]
fn guest_memory_that_is_cut_harms_only_its_sender() {
    for aio in ["io_uring", "threads"] {
        let mut setup = Setup::new(&["--aio", aio]);
        for plan in both_styles() {
            let mut victim = setup.start(&plan);
            let mut vmm = setup.start(&plan);
            vmm.queues[0].write_disk(0, &[1; 4096]);
            // This process must not touch it either.
            memory_file(&vmm).set_len(0).unwrap();
            vmm.queues[0].kick();
            wait_for_end(&mut vmm, "its memory was cut");
            assert_eq!(victim.queues[0].read_disk(0, 4096), [1; 4096]);
            victim.queues[0].write_disk(0, &[2; 4096]);
            setup.assert_serves("guest memory that was cut");
        }
        setup.end();
    }
}

/// What was lost must not reach the disk as zeroes.
#[test]
fn data_that_is_cut_is_not_written() {
    let mut setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut victim = setup.start(&plan);
        let mut vmm = setup.start(&Plan { slots: 1, ..plan });
        let queue = &mut vmm.queues[0];
        queue.write_disk(0, &[1; 4096]);
        // The header is in the first page of the slot, the data behind it.
        let first = memory_start(&vmm);
        let queue = &mut vmm.queues[0];
        let kept = queue.slot_page(0) + 4096 - first;
        queue.add(&Request::write(0, vec![3; 4096]), Layout::INDIRECT);
        queue.publish();
        memory_file(&vmm).set_len(kept).unwrap();
        vmm.queues[0].kick();
        wait_for_end(&mut vmm, "its data was cut");
        assert_eq!(
            vmm.inflight_chains(),
            Some(1),
            "it is left for the next start"
        );
        assert_eq!(victim.queues[0].read_disk(0, 4096), [1; 4096]);
        setup.assert_serves("data that was cut");
    }
    setup.end();
}

fn memory_start(vmm: &Vmm) -> u64 {
    vmm.memory().iter().next().unwrap().start_addr().0
}

/// Memory of huge pages of which the host has none.
#[test]
fn huge_pages_that_are_not_there_harm_only_their_sender() {
    const ADDRESS: u64 = 1 << 32;
    const BYTES: u64 = 2 << 20;
    let huge = memfd_create("huge", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let none = meminfo.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some("HugePages_Total:") && words.next() == Some("0")
    });
    let more = fs::read_to_string("/proc/sys/vm/nr_overcommit_hugepages");
    let none = none && more.is_ok_and(|count| count.trim() == "0");
    let (Ok(huge), true) = (huge, none) else {
        println!("not tested: there are no huge pages, or there are some");
        return;
    };
    let huge = File::from(huge);
    huge.set_len(BYTES).unwrap();
    let mut setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut victim = setup.start(&plan);
        let mut vmm = setup.start(&plan);
        victim.queues[0].write_disk(0, &[1; 4096]);
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: ADDRESS,
            memory_size: BYTES,
            userspace_addr: ADDRESS,
            mmap_offset: 0,
            mmap_handle: huge.as_raw_fd(),
        };
        vmm.frontend().add_mem_region(&region).unwrap();
        let segment = |address, len, writable| Segment {
            address,
            len,
            writable,
        };
        let queue = &mut vmm.queues[0];
        let page = queue.slot_page(0);
        // A read: its header is all zeroes.
        queue.add_segments(
            &[
                segment(page, 16, false),
                segment(ADDRESS, 4096, true),
                segment(page + 16, 1, true),
            ],
            None,
        );
        queue.publish();
        queue.kick();
        wait_for_end(&mut vmm, "a huge page was missing");
        assert_eq!(victim.queues[0].read_disk(0, 4096), [1; 4096]);
        setup.assert_serves("huge pages that are not there");
    }
    setup.end();
}

#[test]
fn a_dirty_log_that_is_cut_harms_only_its_sender() {
    let mut setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut victim = setup.start(&plan);
        let mut vmm = setup.start(&Plan {
            protocol_features: plan.protocol_features | VhostUserProtocolFeatures::LOG_SHMFD,
            ..plan
        });
        let log = memfd(1 << 20);
        let region = VhostUserDirtyLogRegion {
            mmap_size: 1 << 20,
            mmap_offset: 0,
            mmap_handle: log.as_raw_fd(),
        };
        vmm.frontend().set_log_base(0, Some(region)).unwrap();
        let features = vmm.features | VhostUserVirtioFeatures::LOG_ALL.bits();
        vmm.frontend().set_features(features).unwrap();
        vmm.queues[0].write_disk(0, &[1; 4096]);
        log.set_len(0).unwrap();
        vmm.queues[0].submit(&Request::read(0, 4096), Layout::DIRECT);
        wait_for_end(&mut vmm, "its dirty log was cut");
        assert_eq!(victim.queues[0].read_disk(0, 4096), [1; 4096]);
        setup.assert_serves("a dirty log that was cut");
    }
    setup.end();
}

#[test]
fn an_inflight_region_that_is_cut_harms_only_its_sender() {
    let mut setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut victim = setup.start(&plan);
        let mut vmm = setup.start(&plan);
        vmm.queues[0].write_disk(0, &[1; 4096]);
        vmm.stop_virtqueues().unwrap();
        let (layout, _) = vmm.inflight().unwrap();
        let layout = *layout;
        // It cannot be sealed against this.
        let file = memfd(layout.mmap_size);
        let descriptor = file.as_raw_fd();
        vmm.frontend().set_inflight_fd(&layout, descriptor).unwrap();
        vmm.activate_virtqueues().unwrap();
        assert_eq!(vmm.queues[0].read_disk(0, 4096), [1; 4096]);
        file.set_len(0).unwrap();
        vmm.queues[0].submit(&Request::read(0, 4096), Layout::DIRECT);
        wait_for_end(&mut vmm, "its inflight region was cut");
        assert_eq!(victim.queues[0].read_disk(0, 4096), [1; 4096]);
        setup.assert_serves("an inflight region that was cut");
    }
    setup.end();
}
