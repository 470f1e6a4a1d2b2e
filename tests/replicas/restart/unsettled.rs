//! What an unclean end has left, on replicas that cannot be made equal (S5).

use std::fs;

use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::machine;

use super::{BLOCK, Host, block, in_image, modify, read, write};

/// A disk has failed for good, and the other image alone has no quorum: the guest gets an error. It
/// got no answer while the daemon wrote and flushed without end.
#[test]
fn a_replica_whose_flushes_all_fail_holds_up_no_read() {
    let _machine = machine::shared();
    let host = Host::new(2);
    let fuse = FuseImage::serve(&host.images[1]);
    let images = [host.images[0].clone(), fuse.path()];
    let state = host.path("state");
    fs::create_dir(&state).unwrap();
    let more = ["--state-dir", state.to_str().unwrap()];

    let running = host.start_with(&images, &more);
    let mut client = running.client();
    write(&mut client, 1, 1);
    client.write(0, 0, &block(1)).unwrap();
    drop(client);
    running.kill();
    // One of them has lost the last write.
    modify(&host.images[1], 0, 2);

    fuse.inject(Operation::Sync, Fault::Fail(libc::EIO));
    let running = host.start_with(&images, &more);
    let mut client = running.client();
    assert!(client.read(0, 0, BLOCK).is_err(), "one copy is no quorum");
    let flushes = fuse.asked(Operation::Sync);
    assert!(flushes < 100, "{flushes} flushes for a few votes");
    assert_eq!(running.blkctl(&["status"]).0, 1);

    fuse.clear_faults();
    let number = read(&mut client, 0);
    running.wait_until_healthy();
    // What the killed daemon had not flushed may be undone: one flush fails for that (W7).
    let _ = client.flush(0);
    client.flush(0).unwrap();
    drop(client);
    running.end();
    for image in &host.images {
        assert_eq!((in_image(image, 0), in_image(image, 1)), (number, 1));
    }
}
