//! Memory that comes and goes.

use testkit::frontend::{Layout, Queue, Request, Segment, region};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

use super::{IOERR, OK, Setup, both_styles, status};

/// Memory is plugged and unplugged while requests are in flight, also requests that use it.
#[test]
fn memory_comes_and_goes_while_requests_run() {
    const ADDRESS: u64 = 1 << 32;
    const BYTES: u64 = 1 << 20;
    let setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut vmm = setup.start(&plan);
        // Requests continue while the device handles such a message. Those that use the new memory
        // come after it.
        vmm.frontend()
            .set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        vmm.queues[0].write_disk(0, &[1; 4096]);
        for round in 2..12 {
            let plugged = region(ADDRESS, BYTES);
            let info = VhostUserMemoryRegionInfo::from_guest_region(&plugged).unwrap();
            let mut busy = 0;
            let mut keep_busy = |queue: &mut Queue| {
                while queue.outstanding() < 16 {
                    queue.submit(&Request::read(0, 4096), Layout::DIRECT);
                    busy += 1;
                }
            };
            keep_busy(&mut vmm.queues[0]);
            vmm.frontend().add_mem_region(&info).unwrap();
            keep_busy(&mut vmm.queues[0]);
            // A write from the new memory, answered there.
            let mut header = [0; 16];
            header[0] = 1;
            header[8] = 64;
            plugged
                .write_slice(&header, MemoryRegionAddress(0))
                .unwrap();
            plugged
                .write_slice(&[round; 4096], MemoryRegionAddress(8192))
                .unwrap();
            plugged
                .write_slice(&[0xee], MemoryRegionAddress(BYTES - 1))
                .unwrap();
            let segment = |offset, len, writable| Segment {
                address: ADDRESS + offset,
                len,
                writable,
            };
            let chain = [
                segment(0, 16, false),
                segment(8192, 4096, false),
                segment(BYTES - 1, 1, true),
            ];
            let queue = &mut vmm.queues[0];
            let head = queue.add_segments(&chain, None);
            if queue.publish() {
                queue.kick();
            }
            while queue.outstanding() > 0 {
                let done = queue.wait();
                assert_eq!(status(&done), OK);
                assert!(done.head == head || done.data.iter().all(|byte| *byte == 1));
            }
            let mut answer = [0];
            plugged
                .read_slice(&mut answer, MemoryRegionAddress(BYTES - 1))
                .unwrap();
            assert_eq!(u32::from(answer[0]), OK);
            assert_eq!(queue.read_disk(64, 4096), [round; 4096]);

            keep_busy(&mut vmm.queues[0]);
            vmm.frontend().remove_mem_region(&info).unwrap();
            keep_busy(&mut vmm.queues[0]);
            let queue = &mut vmm.queues[0];
            while queue.outstanding() > 0 {
                assert_eq!(status(&queue.wait()), OK);
            }
            // The memory is gone: the request fails, and its chain comes back.
            let page = queue.slot_page(0);
            let mut header = [0; 16];
            header[0] = 1;
            header[8] = 64;
            vmm.memory()
                .write_slice(&header, GuestAddress(page))
                .unwrap();
            vmm.memory()
                .write_slice(&[0xee], GuestAddress(page + 16))
                .unwrap();
            let at = |address, len, writable| Segment {
                address,
                len,
                writable,
            };
            let chain = [
                at(page, 16, false),
                segment(8192, 4096, false),
                at(page + 16, 1, true),
            ];
            let queue = &mut vmm.queues[0];
            queue.add_segments(&chain, None);
            if queue.publish() {
                queue.kick();
            }
            queue.wait();
            vmm.memory()
                .read_slice(&mut answer, GuestAddress(page + 16))
                .unwrap();
            assert_eq!(u32::from(answer[0]), IOERR);
            assert_eq!(vmm.queues[0].read_disk(64, 4096), [round; 4096]);
            assert!(busy > 16);
        }
    }
    setup.end();
}
