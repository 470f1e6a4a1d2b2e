//! Requests and virtqueues, discard and write-zeroes.

use std::os::fd::{AsRawFd, BorrowedFd};
use testkit::HANG_LIMIT;

use testkit::frontend::{
    Cut, EVENT_IDX, INDIRECT_DESCRIPTORS, Layout, Plan, Queue, Range, Request, Vmm,
};
use testkit::images::Random;
use testkit::process::wait_until;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES};

use super::{DISK_SECTORS, IOERR, OK, Setup, UNSUPP, both_styles, status};

#[test]
fn requests_work_in_every_descriptor_layout() {
    let serial = "a serial number";
    let setup = Setup::new(&["--serial", serial]);
    let mut random = Random::from_environment();
    for plan in both_styles() {
        for refused in [
            0,
            EVENT_IDX,
            INDIRECT_DESCRIPTORS,
            EVENT_IDX | INDIRECT_DESCRIPTORS,
        ] {
            let plan = Plan {
                features: plan.features & !refused,
                ..plan.clone()
            };
            let mut vmm = Vmm::new(&plan);
            // So that the indices wrap around soon.
            vmm.queues[0].reset_to(u16::MAX - 20);
            vmm.connect(setup.daemon.socket()).unwrap();
            vmm.activate().unwrap();
            let queue = &mut vmm.queues[0];
            let cuts = [Cut::Fields, Cut::Joined, Cut::Parts(2), Cut::Parts(7)];
            for layout in cuts.into_iter().flat_map(|cut| {
                let may_be_indirect = [false, refused & INDIRECT_DESCRIPTORS == 0];
                may_be_indirect.map(|indirect| Layout { cut, indirect })
            }) {
                let what = format!("{plan:?} {layout:?}");
                let blocks = random.within(1..17);
                let sector = random.within(0..DISK_SECTORS / 8 - blocks + 1) * 8;
                let bytes = usize::try_from(blocks * 4096).unwrap();
                let data: Vec<u8> = (0..bytes).map(|_| random.mask()).collect();

                let done = queue.run(&Request::write(sector, data.clone()), layout);
                assert_eq!((status(&done), done.written), (OK, 1), "{what}");
                let done = queue.run(&Request::read(sector, bytes), layout);
                assert_eq!(
                    (status(&done), done.written as usize),
                    (OK, bytes + 1),
                    "{what}"
                );
                assert!(done.data == data, "{what}");
                let done = queue.run(&Request::flush(), layout);
                assert_eq!((status(&done), done.written), (OK, 1), "{what}");
                let done = queue.run(&Request::get_id(), layout);
                assert_eq!((status(&done), done.written), (OK, 21), "{what}");
                assert_eq!(done.data[..serial.len()], *serial.as_bytes(), "{what}");
                assert_eq!(done.data[serial.len()..], [0; 5], "{what}");

                // Its end, one sector behind it, and far away.
                let done = queue.run(&Request::read(DISK_SECTORS - 8, 4096), layout);
                assert_eq!(status(&done), OK, "{what}");
                for sector in [DISK_SECTORS, DISK_SECTORS - 7, u64::MAX - 7, u64::MAX] {
                    for request in [
                        Request::read(sector, 4096),
                        Request::write(sector, vec![1; 4096]),
                    ] {
                        let done = queue.run(&request, layout);
                        assert_eq!((status(&done), done.written <= 1), (IOERR, true), "{what}");
                    }
                }
                for kind in [2, 3, 6, 10, u32::MAX] {
                    let done = queue.run(&Request::new(kind, 0, vec![0; 512], 512), layout);
                    assert_eq!(status(&done), UNSUPP, "{what}: type {kind}");
                }
            }
        }
    }
    setup.end();
}

/// A driver may choose its size, as that of virtio-mmio does, after the VMM has asked for a region.
#[test]
fn virtqueues_larger_than_the_vmm_expects_are_served_and_tracked() {
    let setup = Setup::new(&["--queue-size", "128"]);
    for plan in both_styles() {
        let mut vmm = setup.start(&Plan {
            queue_size: 1024,
            ..plan
        });
        vmm.queues[0].write_disk(0, &[1; 4096]);
        vmm.stop_virtqueues().unwrap();
        let expected = VhostUserInflight::new(0, 0, 1, 128);
        let (region, file) = vmm.frontend().get_inflight_fd(&expected).unwrap();
        let descriptor = file.as_raw_fd();
        vmm.frontend().set_inflight_fd(&region, descriptor).unwrap();
        vmm.activate_virtqueues().unwrap();
        assert_eq!(vmm.queues[0].read_disk(0, 4096), [1; 4096]);
    }
    setup.end();
}

/// Each power of two that `--queue-size` takes, with a descriptor of the virtqueue for each part of
/// a request and with indirect tables: the longest chains, a full virtqueue, and indices that wrap
/// around.
#[test]
fn virtqueues_of_every_size_work_with_and_without_indirect_tables() {
    for size in (2..=10).map(|exponent| 1u16 << exponent) {
        let setup = Setup::new(&["--queue-size", &size.to_string()]);
        for refused in [0, INDIRECT_DESCRIPTORS] {
            let plan = Plan {
                queue_size: size,
                features: Plan::default().features & !refused,
                ..Plan::default()
            };
            let indirect = refused == 0;
            let what = format!("size {size}, indirect {indirect}");
            let mut vmm = Vmm::new(&plan);
            vmm.queues[0].reset_to(u16::MAX - 2);
            vmm.connect(setup.daemon.socket()).unwrap();
            vmm.activate().unwrap();
            assert_eq!(vmm.config_u32(12), u32::from(size - 2).min(126), "{what}");
            let queue = &mut vmm.queues[0];

            let segments = usize::from(size).min(128);
            let [write, read] = [segments - 1, segments / 2].map(Cut::Parts);
            let data: Vec<u8> = (0..plan.data_bytes)
                .map(|at| u8::try_from(at % 251).unwrap())
                .collect();
            let layout = |cut| Layout { cut, indirect };
            let done = queue.run(&Request::write(8, data.clone()), layout(write));
            assert_eq!(status(&done), OK, "{what}");
            let done = queue.run(&Request::read(8, data.len()), layout(read));
            assert_eq!(status(&done), OK, "{what}");
            assert!(done.data == data, "{what}");

            let layout = layout(Cut::Joined);
            let mut left = 2 * u32::from(size);
            while left > 0 || queue.outstanding() > 0 {
                while left > 0 && queue.has_room(layout) {
                    queue.add(&Request::read(8, 4096), layout);
                    left -= 1;
                }
                if queue.publish() {
                    queue.kick();
                }
                let done = queue.wait();
                assert_eq!(status(&done), OK, "{what}");
                assert!(done.data == data[..4096], "{what}");
            }
        }
        setup.end();
    }
}

/// Reads this often, one at a time, and polls the used ring instead of waiting for calls.
fn poll(queue: &mut Queue, count: usize) {
    for _ in 0..count {
        queue.submit(&Request::read(0, 4096), Layout::DIRECT);
        assert!(wait_until(HANG_LIMIT, || queue.has_used()));
        assert_eq!(status(&queue.pop().unwrap()), OK);
    }
}

/// QEMU's `idx` case: with EVENT_IDX the driver names the chain for which it wants a call.
#[test]
fn a_call_comes_when_the_driver_asked_for_one_and_only_then() {
    let setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut vmm = setup.start(&plan);
        assert!(vmm.features & EVENT_IDX != 0);
        let queue = &mut vmm.queues[0];
        queue.refuse_calls();
        queue.run_dry();
        poll(queue, 20);
        queue.ask_for_call_after(3);
        // The device calls before it accepts the next chain, so it has decided on three of these.
        poll(queue, 4);
        assert!(queue.wait_for_call(HANG_LIMIT), "the fourth was asked for");
        poll(queue, 20);
        vmm.stop_virtqueues().unwrap();
        assert_eq!(vmm.queues[0].take_calls(), 0, "that was past");
    }
}

#[test]
fn no_call_comes_before_the_chain_that_the_driver_named() {
    let setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut vmm = setup.start(&plan);
        let queue = &mut vmm.queues[0];
        queue.refuse_calls();
        queue.run_dry();
        queue.ask_for_call_after(20);
        poll(queue, 20);
        vmm.stop_virtqueues().unwrap();
        assert_eq!(vmm.queues[0].take_calls(), 0);
    }
}

/// Without EVENT_IDX the driver only says whether it wants any.
#[test]
fn calls_come_without_event_idx() {
    let setup = Setup::new(&[]);
    for plan in both_styles() {
        let features = plan.features & !EVENT_IDX;
        let mut vmm = setup.start(&Plan { features, ..plan });
        let queue = &mut vmm.queues[0];
        queue.run_dry();
        queue.ask_for_calls();
        for _ in 0..20 {
            queue.submit(&Request::read(0, 4096), Layout::DIRECT);
            assert!(queue.wait_for_call(HANG_LIMIT));
            assert!(wait_until(HANG_LIMIT, || queue.has_used()));
            assert_eq!(status(&queue.pop().unwrap()), OK);
        }
    }
}

/// virtio 1.3, 2.7.7.2: with VRING_AVAIL_F_NO_INTERRUPT a device should send none.
#[test]
fn suppressed_calls_do_not_come_without_event_idx() {
    let setup = Setup::new(&[]);
    for plan in both_styles() {
        let features = plan.features & !EVENT_IDX;
        let mut vmm = setup.start(&Plan { features, ..plan });
        let queue = &mut vmm.queues[0];
        queue.refuse_calls();
        queue.run_dry();
        poll(queue, 20);
        vmm.stop_virtqueues().unwrap();
        assert_eq!(vmm.queues[0].take_calls(), 0);
    }
}

/// vhost-user, VHOST_USER_SET_VRING_KICK: without a descriptor the virtqueue is polled.
#[test]
fn a_virtqueue_without_a_kick_is_served() {
    let setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut vmm = setup.start(&plan);
        vmm.stop_virtqueues().unwrap();
        vmm.activate_virtqueues().unwrap();
        // SET_VRING_KICK of version 1 for virtqueue 0, with the flag for no descriptor.
        let words = [12_u32, 1, 8, 0x100, 0];
        let message = words.map(u32::to_ne_bytes).concat();
        let connection = vmm.frontend().as_raw_fd();
        // SAFETY: the connection stays open meanwhile.
        let connection = unsafe { BorrowedFd::borrow_raw(connection) };
        assert_eq!(rustix::io::write(connection, &message), Ok(message.len()));
        // The kick that it had before leads nowhere now.
        let queue = &mut vmm.queues[0];
        for sector in 0..4 {
            queue.write_disk(sector, &[3; 512]);
            assert_eq!(queue.read_disk(sector, 512), [3; 512]);
        }
    }
    setup.end();
}

#[test]
fn several_virtqueues_work_at_once() {
    const QUEUES: usize = 5;
    const REQUESTS: usize = 30;
    let setup = Setup::new(&["--num-queues", "5"]);
    for plan in both_styles() {
        let mut vmm = setup.start(&Plan {
            queues: QUEUES,
            ..plan
        });
        assert_eq!(vmm.device_queues, QUEUES as u64);
        let place = |queue: usize, request: usize| (queue * REQUESTS + request) * 8;
        let data = |queue: usize, request: usize| {
            vec![u8::try_from(queue * REQUESTS + request).unwrap(); 4096]
        };
        for is_read in [false, true] {
            let mut heads = vec![Vec::new(); QUEUES];
            for request in 0..REQUESTS {
                for (index, queue) in vmm.queues.iter_mut().enumerate() {
                    let sector = place(index, request) as u64;
                    let request = if is_read {
                        Request::read(sector, 4096)
                    } else {
                        Request::write(sector, data(index, request))
                    };
                    heads[index].push(queue.submit(&request, Layout::INDIRECT));
                }
            }
            for (index, queue) in vmm.queues.iter_mut().enumerate() {
                for _ in 0..REQUESTS {
                    let done = queue.wait();
                    let request = heads[index].iter().position(|head| *head == done.head);
                    assert_eq!(status(&done), OK);
                    if is_read {
                        assert!(done.data == data(index, request.unwrap()));
                    }
                }
            }
        }
    }
    setup.end();
}

/// A guest may use fewer queues than the device has.
#[test]
fn a_driver_may_use_one_virtqueue_of_several() {
    let setup = Setup::new(&["--num-queues", "4"]);
    for plan in both_styles() {
        let mut vmm = setup.start(&Plan { queues: 2, ..plan });
        vmm.queues[1].write_disk(0, &[9; 4096]);
        assert_eq!(vmm.queues[0].read_disk(0, 4096), [9; 4096]);
    }
    setup.end();
}

fn range(sector: u64, sectors: u32) -> Range {
    Range {
        sector,
        sectors,
        flags: 0,
    }
}

#[test]
fn discard_and_write_zeroes_follow_the_specification() {
    const BYTES: usize = 32 << 10;
    let setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut vmm = setup.start(&plan);
        assert!(
            vmm.has_feature(VIRTIO_BLK_F_DISCARD) && vmm.has_feature(VIRTIO_BLK_F_WRITE_ZEROES)
        );
        // virtio_blk_config: max_discard_seg, discard_sector_alignment, max_write_zeroes_seg.
        let [segments, alignment, zero_segments] =
            [40, 44, 52].map(|offset| vmm.config_u32(offset));
        assert!(vmm.config_u32(36) >= 64 && vmm.config_u32(48) >= 64);
        assert!((1..=8).contains(&alignment), "{alignment} sectors");
        let queue = &mut vmm.queues[0];
        let run = |queue: &mut Queue, request: &Request| {
            queue.write_disk(0, &[5; BYTES]);
            let done = queue.run(request, Layout::DIRECT);
            assert!(done.written <= 1);
            (status(&done), queue.read_disk(0, BYTES))
        };
        let zeroed = |ranges: &[Range]| {
            let mut data = vec![5; BYTES];
            for range in ranges {
                let start = usize::try_from(range.sector).unwrap() * 512;
                data[start..start + range.sectors as usize * 512].fill(0);
            }
            data
        };
        for (new, most) in [
            (Request::discard as fn(&[Range]) -> Request, segments),
            (Request::write_zeroes, zero_segments),
        ] {
            let one = [range(8, 16)];
            assert_eq!(run(queue, &new(&one)), (OK, zeroed(&one)));
            let several = [range(0, 8), range(16, 8), range(32, 24)];
            let several = &several[..several.len().min(most as usize)];
            assert_eq!(run(queue, &new(several)), (OK, zeroed(several)));
            // As many segments as the device accepts; they overlap.
            let many = vec![range(8, 8); most.min(2048) as usize];
            assert_eq!(run(queue, &new(&many)), (OK, zeroed(&[range(8, 8)])));
            // One more than that.
            if most < 2048 {
                let more = vec![range(8, 8); most as usize + 1];
                assert_ne!(run(queue, &new(&more)).0, OK);
            }
            // A range behind the end, or a part of a segment, changes nothing.
            let untouched = vec![5; BYTES];
            for bad in [
                range(DISK_SECTORS, 8),
                range(DISK_SECTORS - 8, 16),
                range(u64::MAX - 7, 8),
                range(u64::MAX, u32::MAX),
            ] {
                assert_eq!(
                    run(queue, &new(&[bad])),
                    (IOERR, untouched.clone()),
                    "{bad:?}"
                );
            }
            let mut cut = new(&[range(8, 8)]);
            cut.out.pop();
            assert_eq!(run(queue, &cut), (IOERR, untouched.clone()));
            cut.out.clear();
            assert_eq!(run(queue, &cut).1, untouched);
            for flags in [2, 4, 1 << 31, u32::MAX] {
                let unknown = [Range {
                    flags,
                    ..range(8, 8)
                }];
                assert_eq!(run(queue, &new(&unknown)), (UNSUPP, untouched.clone()));
            }
        }
        let unmap = [Range {
            flags: 1,
            ..range(8, 8)
        }];
        assert_eq!(
            run(queue, &Request::discard(&unmap)),
            (UNSUPP, vec![5; BYTES])
        );
        assert_eq!(
            run(queue, &Request::write_zeroes(&unmap)),
            (OK, zeroed(&unmap))
        );
    }
    setup.end();
}
