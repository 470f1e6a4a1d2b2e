//! File systems that cannot do something at the moment (EAGAIN), or have no room (ENOSPC).

use std::thread;
use std::time::Duration;

use testkit::HANG_LIMIT;
use testkit::client::Request;
use testkit::disk::{Disk, Plan, System};
use testkit::fuse::{Fault, Operation};
use testkit::images::are_identical;
use testkit::machine::{measure, shared};
use testkit::process::wait_until;

const BLOCK: usize = 4096;

/// The disk when each of its replicas answers `operation` with EAGAIN for a moment, and whether
/// that was a moment: the file system is asked this often before the test lets it answer.
fn refuses_for_a_moment(operation: Operation) -> Result<(), String> {
    const TIMES: u64 = 5;
    let disk = Disk::start(
        System::Ours,
        &Plan {
            faulty: vec![0, 1, 2],
            direct: false,
            ..Plan::default()
        },
    );
    let mut client = disk.connect();
    client.write(0, 0, &[7; BLOCK]).expect("a write");
    for index in 0..3 {
        disk.faulty(index)
            .inject(operation, Fault::Fail(libc::EAGAIN));
    }
    let before = [0, 1, 2].map(|index| disk.faulty(index).asked(operation));
    let result = thread::scope(|scope| {
        let request = scope.spawn(|| match operation {
            Operation::Read => client.read(0, 0, BLOCK).map(drop),
            _ => client.write(0, 0, &[8; BLOCK]),
        });
        let refused = |index: usize| disk.faulty(index).asked(operation) >= before[index] + TIMES;
        assert!(wait_until(HANG_LIMIT, || (0..3).all(refused)));
        (0..3).for_each(|index| disk.faulty(index).clear_faults());
        request.join().expect("the client")
    });
    let events = disk.end();
    match result {
        Ok(()) if events.is_empty() => Ok(()),
        // After 700 ms EAGAIN is an error. A busy machine can be that slow.
        result => Err(format!("{operation:?}: {result:?}, {events:?}")),
    }
}

#[test]
fn what_a_file_system_cannot_do_at_the_moment_is_repeated() {
    let _machine = shared();
    for operation in [Operation::Read, Operation::Write] {
        measure(|| refuses_for_a_moment(operation));
    }
}

#[test]
fn a_write_without_room_is_reported_as_such() {
    let _machine = shared();
    let disk = Disk::start(
        System::Ours,
        &Plan {
            faulty: vec![0],
            ..Plan::default()
        },
    );
    let mut client = disk.connect();
    let image = disk.faulty(0);
    image.inject(Operation::Write, Fault::Fail(libc::ENOSPC));
    let requests = [
        Request::Write {
            offset: 0,
            memory: 0,
            len: BLOCK,
        },
        Request::WriteZeroes {
            offset: BLOCK as u64,
            len: BLOCK as u64,
            unmap: false,
        },
    ];
    for request in requests {
        client.run(0, &[request])[0].expect("the others have room");
    }
    let events = disk.end();
    // A resync that starts by itself may fail too.
    assert!(events.len() >= 2, "{events:?}");
    for event in &events {
        let data = &event["data"];
        assert_eq!(data["ret"], -libc::ENOSPC, "{event}");
        assert_eq!(data["error"], "No space left on device", "{event}");
    }
}

/// Discards the whole disk on these replicas, which have no holes and do 8 writes in a second. The
/// discard takes longer than the replica may take for one (W6), and each of its steps less.
fn is_discarded_slowly(slow: &[usize]) {
    let disk = Disk::start(
        System::Ours,
        &Plan {
            faulty: vec![0, 1, 2],
            size_bytes: 32 << 20,
            replica_timeout: Duration::from_millis(300),
            ..Plan::default()
        },
    );
    let mut client = disk.connect();
    client.write(0, 0, &[7; BLOCK]).expect("a write");
    for index in slow {
        disk.faulty(*index)
            .inject(Operation::Write, Fault::PerSecond(8));
    }
    let discard = Request::Discard {
        offset: 0,
        len: 32 << 20,
    };
    client.run(0, &[discard])[0].expect("a discard");
    for replica in disk.state()["replicas"].as_array().expect("replicas") {
        assert_eq!(replica["evictions"], 0, "{slow:?}: {replica}");
    }
    assert_eq!(disk.end(), Vec::<serde_json::Value>::new());
    assert!(are_identical(&disk.images));
}

#[test]
fn a_slow_discard_evicts_no_replica() {
    let _machine = shared();
    thread::scope(|scope| {
        scope.spawn(|| is_discarded_slowly(&[2]));
        scope.spawn(|| is_discarded_slowly(&[0, 1, 2]));
    });
}
