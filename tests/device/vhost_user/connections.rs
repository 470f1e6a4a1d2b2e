//! The life of a connection, and a virtqueue that stops while replicas hang.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::process::Command;
use testkit::HANG_LIMIT;

use testkit::daemon::{Daemon, replica_arguments};
use testkit::frontend::{EVENT_IDX, Layout, Plan, Request, Style, Vmm};
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::{are_identical, create_images};
use testkit::process::{Process, wait_until};
use vhost::VhostBackend;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};

use super::{DISK_BYTES, OK, Setup, both_styles, status};

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
