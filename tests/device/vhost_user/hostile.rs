//! Hostile frontends harm only themselves.

use std::fs;
use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use testkit::HANG_LIMIT;

use testkit::frontend::{Layout, Plan, Request, Vmm, memfd, region};
use testkit::process::wait_until;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::split::Descriptor;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{Setup, both_styles};

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
