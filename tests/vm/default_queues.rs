//! QEMU without `num-queues`: it asks for a queue for each processor of the guest.

use std::thread;

use testkit::daemon::{Daemon, replica_arguments};
use testkit::guest::GuestBuilder;
use testkit::images::create_images;

#[test]
fn a_guest_has_a_queue_for_each_processor() {
    thread::scope(|scope| {
        for cpus in [1, 2, 4] {
            scope.spawn(move || {
                let directory = tempfile::tempdir().expect("creating a directory");
                let images = create_images(directory.path(), 3, 16 << 20);
                let mut daemon = Daemon::start(directory.path(), replica_arguments(&images));
                let mut guest = GuestBuilder::new(directory.path(), daemon.socket())
                    .cpus(cpus)
                    .start();
                let queues = guest.answer("ls /sys/block/vda/mq | wc -l");
                assert_eq!(queues, cpus.to_string());
                let write = "dd if=/dev/zero of=/dev/vda bs=1M count=16 conv=fsync";
                guest.run_successfully(write);
                guest.poweroff();
                assert!(daemon.terminate().success(), "{}", daemon.log());
            });
        }
    });
}
