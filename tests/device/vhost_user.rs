//! The daemon with the frontend and the driver of testkit: what QEMU's qtests expect of a
//! vhost-user-blk device, what only cloud-hypervisor does, and what neither does.

use std::fs;
use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use testkit::HANG_LIMIT;

use tempfile::TempDir;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::frontend::{
    Completion, Cut, EVENT_IDX, INDIRECT_DESCRIPTORS, Layout, Plan, Queue, Range, Request, Segment,
    Style, Vmm, memfd, region,
};
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::{Random, are_identical, create_images};
use testkit::process::{Process, wait_until};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const DISK_BYTES: u64 = 4 << 20;
const DISK_SECTORS: u64 = DISK_BYTES / 512;
const OK: u32 = VIRTIO_BLK_S_OK;
const IOERR: u32 = VIRTIO_BLK_S_IOERR;
const UNSUPP: u32 = VIRTIO_BLK_S_UNSUPP;

/// A daemon over three new images.
struct Setup {
    images: Vec<PathBuf>,
    daemon: Daemon,
    directory: TempDir,
}

impl Setup {
    fn new(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), 3, DISK_BYTES);
        let mut arguments = replica_arguments(&images);
        arguments.extend(options.iter().map(Into::into));
        Self {
            daemon: Daemon::start(directory.path(), arguments),
            images,
            directory,
        }
    }

    fn start(&self, plan: &Plan) -> Vmm {
        Vmm::start(self.daemon.socket(), plan)
    }

    /// A new frontend is served.
    fn assert_serves(&mut self, after: &str) {
        assert!(self.daemon.is_alive(), "the daemon has ended after {after}");
        let mut vmm = Vmm::new(&Plan::default());
        let connected = vmm
            .connect(self.daemon.socket())
            .and_then(|()| vmm.activate());
        connected.unwrap_or_else(|error| panic!("after {after}: {error}"));
        vmm.queues[0].write_disk(0, &[7; 4096]);
        assert_eq!(vmm.queues[0].read_disk(0, 4096), [7; 4096], "after {after}");
    }

    /// Ends the daemon; all images hold the same.
    fn end(mut self) -> Vec<u8> {
        assert!(self.daemon.terminate().success());
        assert!(are_identical(&self.images));
        fs::read(&self.images[0]).unwrap()
    }
}

fn both_styles() -> [Plan; 2] {
    [Style::Qemu, Style::CloudHypervisor].map(|style| Plan {
        style,
        ..Plan::default()
    })
}

fn status(completion: &Completion) -> u32 {
    u32::from(completion.status)
}

// ---- Requests and virtqueues

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

// ---- Discard and write zeroes

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

// ---- Memory

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

// ---- Configuration space

#[test]
fn the_config_space_describes_the_disk() {
    let setup = Setup::new(&["--num-queues", "3", "--queue-size", "64"]);
    for plan in both_styles() {
        let mut vmm = Vmm::new(&plan);
        vmm.connect(setup.daemon.socket()).unwrap();
        for bit in [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ] {
            assert!(vmm.has_feature(bit), "feature {bit}");
        }
        assert_eq!(vmm.config[..8], DISK_SECTORS.to_le_bytes());
        assert_eq!(vmm.config_u32(12), 62, "seg_max");
        let block_bytes = vmm.config_u32(20);
        assert!(block_bytes == 512 || block_bytes == 4096);
        assert_eq!(vmm.config[32], 1, "writeback");
        assert_eq!(vmm.config[34..36], [3, 0], "num_queues");
        // Any window, also behind the end of the known fields.
        let config = vmm.config.clone();
        for (offset, size) in [
            (0, 8),
            (20, 4),
            (32, 1),
            (56, 4),
            (0, 256),
            (60, 196),
            (255, 1),
        ] {
            let nothing = vec![0; size];
            let window = vmm.frontend().get_config(
                offset,
                u32::try_from(size).unwrap(),
                VhostUserConfigFlags::empty(),
                &nothing,
            );
            let window = window.unwrap().1;
            let start = offset as usize;
            for (index, byte) in window
                .iter()
                .enumerate()
                .filter(|(index, _)| start + index < 60)
            {
                assert_eq!(*byte, config[start + index]);
            }
        }
    }
}

/// The driver switches the write cache off and on (virtio 1.3, 5.2.5.2), and only that may be
/// written.
#[test]
fn the_driver_switches_the_write_cache() {
    let mut setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut vmm = setup.start(&plan);
        for writeback in [0, 1, 0, 1] {
            let flags = VhostUserConfigFlags::empty();
            vmm.frontend().set_config(32, flags, &[writeback]).unwrap();
            let (_, now) = vmm.frontend().get_config(32, 1, flags, &[0]).unwrap();
            assert_eq!(now, [writeback]);
            vmm.queues[0].write_disk(0, &[writeback; 4096]);
            let done = vmm.queues[0].run(&Request::flush(), Layout::DIRECT);
            assert_eq!(status(&done), OK);
        }
        // The driver may not write the capacity.
        let _ = vmm
            .frontend()
            .set_config(0, VhostUserConfigFlags::empty(), &[0; 8]);
        drop(vmm);
        setup.assert_serves("an attempt to set the capacity");
        let mut vmm = setup.start(&plan);
        assert_eq!(vmm.config[..8], DISK_SECTORS.to_le_bytes());
        assert_eq!(vmm.config[32], 1, "a new connection is a new device");
        vmm.queues[0].read_disk(DISK_SECTORS - 8, 4096);
    }
    setup.end();
}

// ---- The life of a connection

#[test]
fn frontends_connect_one_after_the_other() {
    let setup = Setup::new(&[]);
    for round in 0..20 {
        for plan in both_styles() {
            let mut vmm = setup.start(&plan);
            vmm.queues[0].write_disk(round * 8, &[u8::try_from(round).unwrap(); 4096]);
            for earlier in 0..=round {
                assert_eq!(
                    vmm.queues[0].read_disk(earlier * 8, 4096),
                    [u8::try_from(earlier).unwrap(); 4096]
                );
            }
            // Gone with requests in flight.
            for _ in 0..16 {
                vmm.queues[0].submit(&Request::read(0, 64 << 10), Layout::DIRECT);
            }
        }
    }
    setup.end();
}

/// A reset of the guest's driver as cloud-hypervisor does it: the same connection, no new owner,
/// and other features if another driver follows.
#[test]
fn a_driver_that_is_reset_is_followed_by_another() {
    let setup = Setup::new(&["--num-queues", "2"]);
    for style in [Style::CloudHypervisor, Style::Qemu] {
        let mut vmm = setup.start(&Plan {
            style,
            queues: 2,
            ..Plan::default()
        });
        for round in 0..10 {
            for (index, queue) in vmm.queues.iter_mut().enumerate() {
                for place in 0..12 {
                    let sector = (index as u64 * 12 + place) * 8;
                    queue.submit(&Request::write(sector, vec![round; 4096]), Layout::DIRECT);
                }
            }
            let bases = vmm.stop_virtqueues().unwrap();
            for (queue, base) in vmm.queues.iter_mut().zip(bases) {
                // Accepted chains return before the virtqueue stops, the others are not touched.
                let mut came = 0;
                while let Some(done) = queue.pop() {
                    assert_eq!(status(&done), OK);
                    came += 1;
                }
                assert_eq!(base, came);
                assert_eq!(queue.outstanding(), 12 - came as usize);
            }
            vmm.reset_driver();
            if round == 4 {
                vmm.restrict_features(!EVENT_IDX);
            }
            vmm.activate().unwrap();
            for queue in &mut vmm.queues {
                queue.write_disk(0, &[round; 4096]);
                assert_eq!(queue.read_disk(0, 4096), [round; 4096]);
            }
            vmm.stop_virtqueues().unwrap();
            vmm.reset_driver();
            vmm.activate().unwrap();
        }
    }
    setup.end();
}

/// Virtqueues resume where they were stopped, as after a pause of the VM.
#[test]
fn stopped_virtqueues_resume_where_they_stopped() {
    let setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut vmm = setup.start(&plan);
        for round in 0..20 {
            let data = vec![round; 4096];
            for place in 0..12 {
                vmm.queues[0].submit(&Request::write(place * 8, data.clone()), Layout::DIRECT);
            }
            vmm.stop_virtqueues().unwrap();
            vmm.activate().unwrap();
            while vmm.queues[0].outstanding() > 0 {
                assert_eq!(status(&vmm.queues[0].wait()), OK);
            }
            assert_eq!(vmm.queues[0].read_disk(88, 4096), data);
        }
    }
    setup.end();
}

#[test]
fn reset_device_returns_the_device_to_its_initial_state() {
    let setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut vmm = setup.start(&plan);
        let mut other = setup.start(&plan);
        let reset = VhostUserProtocolFeatures::RESET_DEVICE;
        assert!(vmm.protocol_features.contains(reset), "it is not offered");
        for round in 0..10 {
            let data = vec![round; 4096];
            vmm.queues[0].write_disk(8, &data);
            for _ in 0..16 {
                vmm.queues[0].submit(&Request::read(0, 64 << 10), Layout::DIRECT);
            }
            vmm.frontend().reset_device().unwrap();
            // Messages are handled one after the other.
            vmm.frontend().get_features().unwrap();
            // The device does not look at the virtqueue any more.
            vmm.queues[0].submit(&Request::read(0, 4096), Layout::DIRECT);
            vmm.queues[0].kick();
            let before = vmm.memory_content();
            other.queues[0].write_disk(16, &data);
            assert_eq!(other.queues[0].read_disk(16, 4096), data);
            assert!(
                vmm.memory_content() == before,
                "memory was written after a reset"
            );
            vmm.reset_driver();
            vmm.activate().unwrap();
            assert_eq!(vmm.queues[0].read_disk(8, 4096), data);
        }
    }
    setup.end();
}

/// Another process holds the socket while daemons start and end: a connection waits for
/// the next.
#[test]
fn a_passed_socket_outlives_a_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, DISK_BYTES);
    let socket = directory.path().join("passed.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let start = || {
        use std::os::unix::process::CommandExt;
        let descriptor = listener.as_raw_fd();
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blkd"));
        command.args(replica_arguments(&images));
        command.args(["--fd", &descriptor.to_string()]);
        // SAFETY: fcntl is async-signal-safe; the closure touches no memory of the parent.
        unsafe {
            command.pre_exec(move || match libc::fcntl(descriptor, libc::F_SETFD, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        Process::spawn(&mut command).unwrap()
    };
    for plan in both_styles() {
        let mut vmm = Vmm::new(&plan);
        for (round, signal) in [libc::SIGKILL, libc::SIGTERM, libc::SIGKILL]
            .into_iter()
            .enumerate()
        {
            let mut daemon = start();
            vmm.connect(&socket).unwrap();
            vmm.activate().unwrap();
            let data = vec![u8::try_from(round).unwrap(); 4096];
            vmm.queues[0].write_disk(8, &data);
            assert_eq!(vmm.queues[0].read_disk(8, 4096), data);
            daemon.signal(signal);
            let status = daemon.wait_within(HANG_LIMIT).expect("its end");
            assert_eq!(status.success(), signal == libc::SIGTERM);
        }
    }
    assert!(are_identical(&images));
}

// ---- Replicas that hang

/// Two of three replicas hang, so that no request can complete, and the VMM stops the virtqueue. It
/// must not wait for the replicas, and the daemon does not write to its memory after that.
#[test]
fn a_virtqueue_stops_while_replicas_hang() {
    for plan in both_styles() {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), 3, DISK_BYTES);
        let hanging = [1, 2].map(|index: usize| FuseImage::serve(&images[index]));
        let served = [images[0].clone(), hanging[0].path(), hanging[1].path()];
        let mut daemon = Daemon::start(directory.path(), replica_arguments(&served));
        let _fault_guards = hanging.each_ref().map(FuseImage::fault_guard);
        let mut vmm = Vmm::start(daemon.socket(), &plan);
        vmm.queues[0].write_disk(0, &[1; 64 << 10]);
        for image in &hanging {
            image.inject(Operation::Read, Fault::Hang);
            image.inject(Operation::Write, Fault::Hang);
        }
        let asked = |operation| {
            hanging
                .iter()
                .map(|image| image.asked(operation))
                .sum::<u64>()
        };
        let before = [Operation::Read, Operation::Write].map(asked);
        for place in 0..4 {
            let queue = &mut vmm.queues[0];
            queue.submit(&Request::read(place * 8, 4096), Layout::DIRECT);
            queue.submit(
                &Request::write((place + 8) * 8, vec![2; 4096]),
                Layout::DIRECT,
            );
        }
        // The replicas have received them.
        let are_there = wait_until(HANG_LIMIT, || {
            asked(Operation::Read) >= before[0] + 8 && asked(Operation::Write) >= before[1] + 8
        });
        assert!(are_there);
        // They hang until after this, which waits for them within a limit.
        vmm.frontend().get_vring_base(0).unwrap();
        let stopped = vmm.memory_content();
        for image in &hanging {
            image.clear_faults();
        }
        let all_done = wait_until(HANG_LIMIT, || {
            hanging.iter().all(|image| {
                [Operation::Read, Operation::Write]
                    .into_iter()
                    .all(|operation| image.done(operation) >= image.asked(operation))
            })
        });
        assert!(all_done);
        // When later requests have completed, nothing is left of the old ones.
        let mut other = Vmm::new(&plan);
        vmm.disconnect();
        other.connect(daemon.socket()).unwrap();
        other.activate().unwrap();
        other.queues[0].write_disk(0, &[3; 4096]);
        assert_eq!(other.queues[0].read_disk(0, 4096), [3; 4096]);
        assert!(
            vmm.memory_content() == stopped,
            "memory was written after the virtqueue had stopped"
        );
        drop(other);

        // The guest continues, and none of its requests is lost.
        vmm.connect(daemon.socket()).unwrap();
        vmm.activate().unwrap();
        while vmm.queues[0].outstanding() > 0 {
            assert_eq!(status(&vmm.queues[0].wait()), OK);
        }
        assert_eq!(vmm.queues[0].read_disk(64, 16384), [2; 16384]);
        drop(vmm);
        assert!(daemon.terminate().success());
    }
}

// ---- Hostile frontends

/// A connection for invalid bytes.
struct Raw(UnixStream);

impl Raw {
    fn connect(setup: &Setup) -> Self {
        Self(UnixStream::connect(setup.daemon.socket()).unwrap())
    }

    /// Sends a message whose header says what it wants. The daemon may have closed the connection.
    fn send(&self, request: u32, flags: u32, size: u32, body: &[u8], descriptors: &[RawFd]) {
        let header = [request, flags, size].map(u32::to_ne_bytes).concat();
        let _ = self.0.send_with_fds(&[&header[..], body], descriptors);
    }

    /// Ends the connection from this side and waits until the daemon has ended it, too.
    fn end(mut self, what: &str) {
        let _ = self.0.shutdown(Shutdown::Write);
        self.0.set_read_timeout(Some(HANG_LIMIT)).unwrap();
        let mut replies = Vec::new();
        if let Err(error) = self.0.read_to_end(&mut replies) {
            let reset = error.kind() == std::io::ErrorKind::ConnectionReset;
            assert!(reset, "the connection stays open after {what}: {error}");
        }
    }
}

#[test]
fn malformed_messages_harm_only_their_sender() {
    let mut setup = Setup::new(&[]);
    for request in 0..48 {
        for size in [0, 1, 7, 8, 12, 16, 20, 40, 4096] {
            for byte in [0, 0xff] {
                let raw = Raw::connect(&setup);
                let body = vec![byte; size];
                raw.send(request, 1, u32::try_from(size).unwrap(), &body, &[]);
                raw.send(request, 9, u32::try_from(size).unwrap(), &body, &[]);
                raw.end(&format!("message {request} of {size} bytes"));
            }
        }
        // A body that is cut, too long, and one that never ends; no version, another one, a reply.
        for (flags, size, body) in [
            (1, 8, 4),
            (1, 8, 100),
            (1, u32::MAX, 4096),
            (1, 0x1001, 0x1001),
            (0, 8, 8),
            (2, 8, 8),
            (5, 8, 8),
            (u32::MAX, 8, 8),
        ] {
            let raw = Raw::connect(&setup);
            raw.send(request, flags, size, &vec![0; body], &[]);
            raw.end(&format!(
                "message {request} with flags {flags} and size {size}"
            ));
        }
        // Descriptors with a message that takes none.
        let descriptor = setup.directory.path().join("0.raw");
        let descriptor = fs::File::open(descriptor).unwrap();
        let raw = Raw::connect(&setup);
        raw.send(request, 9, 8, &[0; 8], &[descriptor.as_raw_fd(); 20]);
        raw.end(&format!("message {request} with descriptors"));
        setup.assert_serves(&format!("message {request}"));
    }
    // Half a header, and nothing.
    let raw = Raw::connect(&setup);
    let _ = raw.0.send_with_fds(&[&[1u8, 0, 0][..]], &[]);
    raw.end("half a header");
    Raw::connect(&setup).end("no message");
    setup.assert_serves("half a header");
    setup.end();
}

/// A message, in words and as a function.
type Case = (&'static str, fn(&mut Vmm));

/// Well-formed messages with invalid content.
#[test]
fn invalid_messages_harm_only_their_sender() {
    let mut setup = Setup::new(&["--num-queues", "2"]);
    let cases: Vec<Case> = vec![
        ("a virtqueue that is too large", |vmm| {
            ignore(vmm.frontend().set_vring_num(0, 32768))
        }),
        ("a virtqueue of size 0", |vmm| {
            ignore(vmm.frontend().set_vring_num(0, 0))
        }),
        ("a virtqueue of size 3", |vmm| {
            ignore(vmm.frontend().set_vring_num(0, 3))
        }),
        ("addresses outside of memory", |vmm| {
            for place in 0..3 {
                for address in [0, 1, u64::MAX, u64::MAX - 15, 1 << 62] {
                    set_addresses(vmm, |addresses| addresses[place] = address);
                }
            }
        }),
        ("a virtqueue across the end of memory", |vmm| {
            let (start, bytes) = host_memory(vmm);
            for place in 0..3 {
                set_addresses(vmm, |addresses| addresses[place] = start + bytes - 16);
            }
        }),
        ("addresses that are not aligned", |vmm| {
            for place in 0..3 {
                set_addresses(vmm, |addresses| addresses[place] += 1);
            }
        }),
        ("virtqueues that overlap", |vmm| {
            set_addresses(vmm, |addresses| *addresses = [addresses[0]; 3]);
            vmm.queues[0].kick();
        }),
        ("memory that wraps around", |vmm| {
            table(vmm, &[(u64::MAX - 4095, 8192, 0, 4096)]);
            table(vmm, &[(0, u64::MAX, 0, 4096)]);
            table(vmm, &[(0, 1 << 62, 0, 4096)]);
            table(vmm, &[(4096, 8192, u64::MAX - 4095, 4096)]);
        }),
        ("regions on top of each other", |vmm| {
            table(vmm, &[(0, 8192, 0, 8192), (4096, 8192, 0, 8192)])
        }),
        ("a region that is there already", |vmm| {
            let info =
                VhostUserMemoryRegionInfo::from_guest_region(&region(1 << 20, 8192)).unwrap();
            ignore(vmm.frontend().add_mem_region(&info).map(drop));
        }),
        ("a region that is not there", |vmm| {
            let info =
                VhostUserMemoryRegionInfo::from_guest_region(&region(1 << 40, 8192)).unwrap();
            ignore(vmm.frontend().remove_mem_region(&info));
        }),
        (
            "memory that is removed below the virtqueues",
            remove_all_memory,
        ),
        ("features that were not offered", |vmm| {
            ignore(vmm.frontend().set_features(u64::MAX))
        }),
        ("a second owner", |vmm| ignore(vmm.frontend().set_owner())),
        ("an invalid inflight region", |vmm| {
            for (bytes, offset, queues, size) in [
                (1, 0, 2, 128),
                (1 << 62, 0, 2, 128),
                (4096, 4096, 2, 128),
                (4096, 1, 1, 128),
                (4096, u64::MAX - 4095, 1, 128),
                (1 << 20, 0, u16::MAX, u16::MAX),
                (1 << 20, 0, 2, 3),
                (4096, 0, 64, 128),
            ] {
                let inflight = VhostUserInflight::new(bytes, offset, queues, size);
                let file = memfd(4096);
                ignore(vmm.frontend().set_inflight_fd(&inflight, file.as_raw_fd()));
                vmm.queues[0].kick();
            }
        }),
        ("an inflight region that can not be mapped", |vmm| {
            let inflight = VhostUserInflight::new(8192, 0, 2, 128);
            let event = EventFd::new(0).unwrap();
            ignore(vmm.frontend().set_inflight_fd(&inflight, event.as_raw_fd()));
        }),
        ("inflight regions for queues that are not there", |vmm| {
            for (queues, size) in [
                (3, 128),
                (u16::MAX, 128),
                (1, u16::MAX),
                (1, 3),
                (u16::MAX, u16::MAX),
            ] {
                let wanted = VhostUserInflight::new(0, 0, queues, size);
                ignore(vmm.frontend().get_inflight_fd(&wanted).map(drop));
            }
        }),
    ];
    for (what, case) in cases {
        for plan in both_styles() {
            // Before the device is active, while it is, and when its virtqueues are stopped.
            for stage in 0..3 {
                let mut vmm = Vmm::new(&Plan {
                    queues: 2,
                    ..plan.clone()
                });
                vmm.connect(setup.daemon.socket()).unwrap();
                if stage > 0 {
                    vmm.activate().unwrap();
                    vmm.queues[0].submit(&Request::read(0, 4096), Layout::DIRECT);
                }
                if stage > 1 {
                    vmm.stop_virtqueues().unwrap();
                }
                case(&mut vmm);
                drop(vmm);
                setup.assert_serves(&format!("{what}, stage {stage}, {:?}", plan.style));
            }
        }
    }
    // Indices out of range, which the crate's frontend refuses to send.
    for request in [8, 9, 10, 11, 12, 13, 14, 18] {
        for index in [2u32, 63, 64, 255, 256, 65535, u32::MAX] {
            let raw = Raw::connect(&setup);
            let event = EventFd::new(0).unwrap();
            let mut body = [0; 40];
            body[..4].copy_from_slice(&index.to_ne_bytes());
            let (size, descriptors) = match request {
                9 => (40, &[][..]),
                12..=14 => (8, &[event.as_raw_fd()][..]),
                _ => (8, &[][..]),
            };
            raw.send(
                request,
                1,
                u32::try_from(size).unwrap(),
                &body[..size],
                descriptors,
            );
            raw.end(&format!("message {request} of virtqueue {index}"));
        }
    }
    setup.assert_serves("virtqueues out of range");
    setup.end();
}

fn ignore<E>(_: Result<(), E>) {}

/// Sends changed virtqueue addresses of this process.
fn set_addresses(vmm: &mut Vmm, change: impl FnOnce(&mut [u64; 3])) {
    let data = testkit::frontend::virtqueue_data(vmm.memory(), &vmm.queues[0]);
    let mut addresses = [
        data.desc_table_addr,
        data.avail_ring_addr,
        data.used_ring_addr,
    ];
    change(&mut addresses);
    let data = VringConfigData {
        desc_table_addr: addresses[0],
        avail_ring_addr: addresses[1],
        used_ring_addr: addresses[2],
        ..data
    };
    ignore(vmm.frontend().set_vring_addr(0, &data));
}

/// Where memory is in this process.
fn host_memory(vmm: &Vmm) -> (u64, u64) {
    let info = testkit::frontend::regions(vmm.memory())[0];
    (info.userspace_addr, info.memory_size)
}

/// Sends a memory table: guest address, size, address in the frontend, size of the file.
fn table(vmm: &mut Vmm, regions: &[(u64, u64, u64, u64)]) {
    let files: Vec<_> = regions.iter().map(|region| memfd(region.3)).collect();
    let regions = regions.iter().zip(&files);
    let regions = regions.map(|(region, file)| VhostUserMemoryRegionInfo {
        guest_phys_addr: region.0,
        memory_size: region.1,
        userspace_addr: region.2,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    });
    let regions: Vec<_> = regions.collect();
    ignore(vmm.frontend().set_mem_table(&regions).map(drop));
}

fn remove_all_memory(vmm: &mut Vmm) {
    for info in testkit::frontend::regions(vmm.memory()) {
        ignore(vmm.frontend().remove_mem_region(&info));
    }
    vmm.queues[0].submit(&Request::read(0, 4096), Layout::DIRECT);
    vmm.queues[0].kick();
    ignore(vmm.frontend().get_features().map(drop));
}

/// Memory that is shorter than the frontend says: an access behind its end raises SIGBUS.
#[test]
fn truncated_memory_harms_only_its_sender() {
    let mut setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut vmm = setup.start(&plan);
        vmm.queues[0].write_disk(0, &[1; 4096]);
        let info = testkit::frontend::regions(vmm.memory())[0];
        let short = memfd(4096);
        let info = VhostUserMemoryRegionInfo {
            mmap_handle: short.as_raw_fd(),
            ..info
        };
        // Refused, or served as far as it goes.
        let _ = vmm.stop_virtqueues();
        ignore(vmm.frontend().set_mem_table(&[info]).map(drop));
        let _ = vmm.activate_virtqueues();
        let queue = &mut vmm.queues[0];
        queue.submit(&Request::read(0, 4096), Layout::DIRECT);
        queue.kick();
        wait_until(Duration::from_secs(1), || queue.has_used());
        drop(vmm);
        setup.assert_serves("memory that is shorter than it is said to be");
    }
    setup.end();
}

/// A frontend that sends an eventfd that blocks harms at most itself.
#[test]
fn a_call_eventfd_that_blocks_harms_only_its_sender() {
    let mut setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut vmm = setup.start(&plan);
        // The next write to it would wait for ever.
        let full = EventFd::new(0).unwrap();
        full.write(u64::MAX - 1).unwrap();
        ignore(vmm.frontend().set_vring_call(0, &full));
        let queue = &mut vmm.queues[0];
        queue.ask_for_calls();
        queue.submit(&Request::read(0, 4096), Layout::DIRECT);
        wait_until(Duration::from_secs(1), || queue.has_used());
        drop(vmm);
        setup.assert_serves("a call that blocks");
    }
    setup.end();
}

/// A guest that breaks its virtqueues: at most its own requests fail, and the next guest is served.
#[test]
fn broken_virtqueues_harm_only_their_guest() {
    let mut setup = Setup::new(&[]);
    for plan in both_styles() {
        for case in 0..6 {
            let mut vmm = setup.start(&plan);
            let queue = &mut vmm.queues[0];
            queue.submit(&Request::read(0, 4096), Layout::DIRECT);
            let [table, ..] = queue.virtqueue_addresses();
            let page = queue.slot_page(3);
            match case {
                0 => (0..1000).for_each(|_| queue.add_head(0)),
                1 => queue.add_head(u16::MAX),
                2 => {
                    // A chain that is its own next.
                    queue.write_raw_descriptor(table, 5, Descriptor::new(page, 16, 1, 5));
                    queue.add_head(5);
                }
                3 => {
                    // A table within itself.
                    queue.write_raw_descriptor(page, 0, Descriptor::new(page, 16, 4, 0));
                    queue.write_raw_descriptor(table, 5, Descriptor::new(page, 16, 4, 0));
                    queue.add_head(5);
                }
                4 => {
                    queue.write_raw_descriptor(
                        table,
                        5,
                        Descriptor::new(u64::MAX - 3, u32::MAX, 2, 0),
                    );
                    queue.add_head(5);
                }
                _ => {
                    queue.write_raw_descriptor(table, 5, Descriptor::new(page, 0, 0, 0));
                    queue.add_head(5);
                }
            }
            queue.publish();
            queue.kick();
            let bases = vmm.stop_virtqueues().unwrap();
            assert_eq!(bases.len(), 1);
            drop(vmm);
            setup.assert_serves(&format!("a broken virtqueue, {case}"));
        }
    }
    setup.end();
}
