//! Several frontends at a time on one disk, as during a migration on one host, and in what order
//! they come.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;
use testkit::HANG_LIMIT;

use quorum_blk::limits::CONNECTIONS_MAX;
use serde_json::Value;
use testkit::client::{Client, Request};
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::{Random, are_identical, create_images};
use testkit::process::wait_until;

const DISK_BYTES: u64 = 4 << 20;
/// Long enough for a daemon that would answer.
const SILENCE: Duration = Duration::from_millis(300);

/// Random writes and reads in a part of the disk of its own, then, as all others, writes all over
/// it.
fn work(socket: &Path, worker: u64, mut random: Random, all: &Barrier) {
    const PART_BYTES: usize = 1 << 20;
    let mut client = Client::connect(socket, 2);
    all.wait();
    let base = worker * PART_BYTES as u64;
    let mut model = vec![0; PART_BYTES];
    for _ in 0..300 {
        let len = usize::try_from(random.within(1..64)).unwrap() * 512;
        let place =
            usize::try_from(random.within(0..(PART_BYTES - len) as u64 / 512)).unwrap() * 512;
        let queue = usize::from(random.within(0..2) == 1);
        let part = place..place + len;
        if random.within(0..2) == 0 {
            let byte = random.mask();
            client
                .write(queue, base + place as u64, &vec![byte; len])
                .unwrap();
            model[part].fill(byte);
        } else {
            let read = client.read(queue, base + place as u64, len).unwrap();
            assert!(read == model[part], "a read returns other data");
        }
    }
    all.wait();
    for _ in 0..50 {
        client.memory(0)[..65536].fill(random.mask());
        let offsets = (0..8).map(|_| random.within(0..DISK_BYTES / 512 - 128) * 512);
        let write = |offset| Request::Write {
            offset,
            memory: 0,
            len: 65536,
        };
        let writes: Vec<_> = offsets.map(write).collect();
        assert!(client.run(0, &writes).iter().all(Result::is_ok));
    }
    client.flush(1).unwrap();
}

#[test]
fn frontends_work_at_the_same_time() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, DISK_BYTES);
    let mut arguments = replica_arguments(&images);
    arguments.push("--shared".into());
    let mut daemon = Daemon::start(directory.path(), arguments);
    let events = EventReader::connect(daemon.events_socket());
    let mut random = Random::from_environment();
    let all = Barrier::new(CONNECTIONS_MAX);
    thread::scope(|scope| {
        for worker in 0..CONNECTIONS_MAX {
            let (socket, all, random) = (daemon.socket(), &all, random.fork());
            scope.spawn(move || work(socket, worker as u64, random, all));
        }
    });
    assert!(daemon.terminate().success(), "{}", daemon.log());
    assert_eq!(events.all(), [] as [Value; 0]);
    assert!(are_identical(&images));
}

/// Sends GET_FEATURES. The reply comes when the daemon serves the connection.
fn ask(socket: &Path) -> UnixStream {
    const GET_FEATURES: u32 = 1;
    const VERSION: u32 = 1;
    let mut connection = UnixStream::connect(socket).unwrap();
    let message = [GET_FEATURES, VERSION, 0].map(u32::to_le_bytes).concat();
    // A daemon that refuses the connection may close it before this.
    let _ = connection.write_all(&message);
    connection
}

/// Whether the daemon answers within `limit`; `None` if it closes the connection.
fn is_served(connection: &mut UnixStream, limit: Duration) -> Option<bool> {
    connection.set_read_timeout(Some(limit)).unwrap();
    match connection.read(&mut [0; 20]) {
        Ok(0) => None,
        Ok(20) => Some(true),
        Ok(bytes) => panic!("an answer of {bytes} bytes"),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Some(false),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_connection_above_the_limit_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 1, DISK_BYTES);
    let mut arguments = replica_arguments(&images);
    arguments.push("--shared".into());
    let mut daemon = Daemon::start(directory.path(), arguments);
    let connect = || {
        let mut client = Client::connect(daemon.socket(), 1);
        client.read(0, 0, 512).expect("it is served");
        client
    };
    let mut clients: Vec<_> = (0..CONNECTIONS_MAX).map(|_| connect()).collect();
    assert_eq!(is_served(&mut ask(daemon.socket()), HANG_LIMIT), None);
    assert!(
        daemon.log().contains("connections are served already"),
        "{}",
        daemon.log()
    );
    for _ in 0..3 {
        clients.remove(1);
        // Its place is free at once.
        clients.push(connect());
    }
    assert!(daemon.terminate().success(), "with all of them connected");
}

/// A program that connects and does nothing does not keep a virtual machine from its disk.
#[test]
fn idle_connections_give_way() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 1, DISK_BYTES);
    let mut daemon = Daemon::start(directory.path(), replica_arguments(&images));
    let mut idle: Vec<_> = (0..CONNECTIONS_MAX).map(|_| ask(daemon.socket())).collect();
    for connection in &mut idle {
        assert_eq!(is_served(connection, HANG_LIMIT), Some(true));
    }
    let mut client = Client::connect(daemon.socket(), 1);
    client.read(0, 0, 512).expect("it is served");
    // The one that had connected first is gone.
    assert_eq!(is_served(&mut idle[0], HANG_LIMIT), None);
    assert_eq!(is_served(&mut idle[1], SILENCE), Some(false));
    for _ in 0..CONNECTIONS_MAX {
        assert_eq!(is_served(&mut ask(daemon.socket()), HANG_LIMIT), Some(true));
    }
    client.read(0, 0, 512).expect("it is still served");
    assert!(daemon.terminate().success());
}

/// Two guests would destroy each other's file systems.
#[test]
fn a_second_frontend_is_turned_away() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, DISK_BYTES);
    let mut daemon = Daemon::start(directory.path(), replica_arguments(&images));
    let mut first = Client::connect(daemon.socket(), 2);
    first.write(1, 0, &[1; 4096]).unwrap();
    assert!(Client::try_connect(daemon.socket(), 1, 256).is_err());
    let is_logged = || daemon.log().contains("another one uses the disk");
    assert!(wait_until(HANG_LIMIT, is_logged), "{}", daemon.log());
    let log = daemon.log();
    assert!(log.contains("--shared"), "{log}");
    assert!(first.read(1, 0, 4096).unwrap() == [1; 4096]);
    drop(first);
    let mut next = Client::connect(daemon.socket(), 1);
    assert!(next.read(0, 0, 4096).unwrap() == [1; 4096]);
    assert!(daemon.terminate().success(), "{}", daemon.log());
}

/// The requests of a frontend that is gone end before the next one is served, which may be the same
/// guest after a restart.
#[test]
fn the_next_frontend_waits_for_the_writes_of_the_last() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 1, DISK_BYTES);
    let image = FuseImage::serve(&images[0]);
    let mut arguments = replica_arguments(&[image.path()]);
    arguments.extend(["--replica-timeout", "60000", "--shared"].map(Into::into));
    let daemon = Daemon::start(directory.path(), arguments);
    let mut stays = Client::connect(daemon.socket(), 1);
    let mut goes = Client::connect(daemon.socket(), 1);

    image.inject(Operation::Write, Fault::Hang);
    goes.memory(0)[..4096].fill(7);
    goes.send(0, &Request::writes(1, 4096));
    assert!(wait_until(HANG_LIMIT, || image.asked(Operation::Write) == 1));
    drop(goes);
    let mut next = ask(daemon.socket());
    assert_eq!(is_served(&mut next, SILENCE), Some(false));
    assert!(stays.read(0, 0, 4096).is_ok(), "others are served");
    image.clear_faults();
    assert_eq!(is_served(&mut next, HANG_LIMIT), Some(true));
    assert!(stays.read(0, 0, 4096).unwrap() == [7; 4096]);
}
