//! The ring with real files, io_uring and threads. `fake_tests.rs` checks what it submits.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::rc::Rc;

use vmm_sys_util::eventfd::EventFd;

use super::operation::len_of;
use super::*;
use crate::common::operation::RequestId;
use crate::common::{SECTOR_BYTES, SectorRange};
use crate::limits::RING_ENTRIES;
use crate::replica::zero::{Way, ZEROES_BYTES};
use crate::statistics::Recorder;

/// How a test makes its rings.
type New<K> = fn(&[RingFile]) -> io::Result<Ring<K>>;

/// Makes each function two tests.
macro_rules! with_both_kernels {
    ($($name:ident)*) => {
        mod with_io_uring {
            $(#[test] fn $name() { super::$name(super::Ring::new); })*
        }
        mod with_threads {
            $(#[test] fn $name() { super::$name(super::Ring::with_threads); })*
        }
    };
}

with_both_kernels! {
    writes_reads_and_flushes
    zeroes_in_every_way_and_nothing_else
    unmapping_frees_the_space
    a_read_beyond_the_end_of_a_cut_file_is_an_error
    takes_more_operations_than_the_queue_has_entries
    kernel_threads_do_long_writes_through_the_page_cache
    a_file_is_added_and_removed_while_others_are_in_use
    a_record_is_written_beside_its_image
    reports_every_write_to_a_watched_eventfd_until_it_is_unwatched
    a_failed_watch_does_not_end_another_one
}

fn operation(action: Action) -> Operation {
    Operation {
        request: RequestId(7),
        replica: ReplicaIndex(0),
        action,
    }
}

fn push<K: Kernel>(ring: &mut Ring<K>, operation: Operation) -> io::Result<()> {
    ring.push(operation, Recorder::detached().now())
}

fn reply_of<K: Kernel>(ring: &mut Ring<K>) -> Reply {
    loop {
        if let Some(Completion::Reply(reply, _)) = ring.enter(Wait::Forever).unwrap().pop_front() {
            return reply;
        }
    }
}

fn writes_reads_and_flushes<K: Kernel>(new: New<K>) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mut ring = new(&[RingFile::of(&file)]).unwrap();
    let pool = BufferPool::default();
    let mut data = pool.take(4096);
    data.fill(0xa5);
    push(
        &mut ring,
        operation(Action::Write {
            range: SectorRange::new(9, 2),
            data: Rc::new(data),
            offset_bytes: 512,
        }),
    )
    .unwrap();
    assert_eq!(reply_of(&mut ring).result, Ok(()));
    let mut bytes = [0; 4 * 512];
    file.read_exact_at(&mut bytes, 8 * 512).unwrap();
    assert!(bytes[512..1536].iter().all(|b| *b == 0xa5));
    assert!(bytes[..512].iter().chain(&bytes[1536..]).all(|b| *b == 0));

    let into = pool.take(512);
    push(
        &mut ring,
        operation(Action::Read {
            range: SectorRange::new(10, 1),
            into,
        }),
    )
    .unwrap();
    let reply = reply_of(&mut ring);
    assert_eq!((reply.request, reply.result), (RequestId(7), Ok(())));
    assert!(matches!(reply.action, Action::Read { into, .. } if into.iter().all(|b| *b == 0xa5)));

    push(&mut ring, operation(Action::Flush)).unwrap();
    assert_eq!(reply_of(&mut ring).result, Ok(()));
    assert_eq!(ring.operations(), 0);
}

fn zero<K: Kernel>(ring: &mut Ring<K>, range: SectorRange, unmap: bool) -> Result<(), Errno> {
    push(ring, operation(Action::Zero { range, unmap })).unwrap();
    reply_of(ring).result
}

fn zeroes_in_every_way_and_nothing_else<K: Kernel>(new: New<K>) {
    let file = tempfile::tempfile().unwrap();
    let len = 3 * ZEROES_BYTES;
    let lacks_none = |_: &mut Ways| {};
    let lacks_holes = |ways: &mut Ways| {
        ways.after(
            ReplicaIndex(0),
            true,
            Way::PunchHole,
            Errno(libc::EOPNOTSUPP),
        );
    };
    let lacks_both = |ways: &mut Ways| {
        for way in [Way::PunchHole, Way::ZeroRange] {
            ways.after(ReplicaIndex(0), true, way, Errno(libc::EOPNOTSUPP));
        }
    };
    let kinds: [&dyn Fn(&mut Ways); 3] = [&lacks_none, &lacks_holes, &lacks_both];
    for (lacks, unmap) in kinds
        .into_iter()
        .flat_map(|lacks| [(lacks, true), (lacks, false)])
    {
        file.write_all_at(&vec![7; len], 0).unwrap();
        let mut ring = new(&[RingFile::of(&file)]).unwrap();
        lacks(&mut ring.ways);
        // Neither end is at a page boundary.
        let range = SectorRange::new(3, 2 * ZEROES_BYTES as u64 / SECTOR_BYTES + 77);
        assert_eq!(zero(&mut ring, range, unmap), Ok(()));
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let start = len_of(range.start * SECTOR_BYTES);
        let (before, rest) = bytes.split_at(start);
        let (zeroed, after) = rest.split_at(len_of(range.bytes()));
        assert!(
            before.iter().chain(after).all(|byte| *byte == 7),
            "unmap: {unmap}"
        );
        assert!(zeroed.iter().all(|byte| *byte == 0), "unmap: {unmap}");
        assert_eq!(ring.operations(), 0);
    }
}

fn unmapping_frees_the_space<K: Kernel>(new: New<K>) {
    use std::os::unix::fs::MetadataExt;
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
    let mut ring = new(&[RingFile::of(&file)]).unwrap();
    assert_eq!(zero(&mut ring, SectorRange::new(0, 2048), true), Ok(()));
    assert_eq!(file.metadata().unwrap().blocks(), 0);
}

fn a_read_beyond_the_end_of_a_cut_file_is_an_error<K: Kernel>(new: New<K>) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(768).unwrap();
    let mut ring = new(&[RingFile::of(&file)]).unwrap();
    let into = BufferPool::default().take(1024);
    push(
        &mut ring,
        operation(Action::Read {
            range: SectorRange::new(0, 2),
            into,
        }),
    )
    .unwrap();
    assert_eq!(reply_of(&mut ring).result, Err(Errno(libc::EIO)));
}

fn takes_more_operations_than_the_queue_has_entries<K: Kernel>(new: New<K>) {
    let file = tempfile::tempfile().unwrap();
    let mut ring = new(&[RingFile::of(&file)]).unwrap();
    let count = RING_ENTRIES as usize * 3 + 1;
    for _ in 0..count {
        push(&mut ring, operation(Action::Flush)).unwrap();
    }
    for _ in 0..count {
        assert_eq!(reply_of(&mut ring).result, Ok(()));
    }
}

fn kernel_threads_do_long_writes_through_the_page_cache<K: Kernel>(new: New<K>) {
    let directory = tempfile::tempdir().unwrap();
    let open = |flags| {
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .create(true)
            .custom_flags(flags);
        options.open(directory.path().join("image")).unwrap()
    };
    let (cached, direct) = (open(0), open(libc::O_DIRECT));
    let mut ring = new(&[RingFile::of(&cached), RingFile::of(&direct)]).unwrap();
    let data = Rc::new(BufferPool::default().take(len_of(LONG_WRITE_BYTES)));
    let writing_long = |ring: &mut Ring<K>, replica, bytes, count: usize| {
        for _ in 0..count {
            let action = Action::Write {
                range: SectorRange::new(0, bytes / SECTOR_BYTES),
                data: Rc::clone(&data),
                offset_bytes: 0,
            };
            let write = Operation {
                replica: ReplicaIndex(replica),
                ..operation(action)
            };
            push(ring, write).unwrap();
        }
        let long_writes = ring.table.long_writes();
        for _ in 0..count {
            assert_eq!(reply_of(ring).result, Ok(()));
        }
        assert!(!ring.is_writing_long(), "all writes have ended");
        long_writes
    };
    assert_eq!(writing_long(&mut ring, 0, LONG_WRITE_BYTES, 3), 3);
    assert_eq!(writing_long(&mut ring, 0, 4096, 3), 0);
    assert_eq!(writing_long(&mut ring, 1, LONG_WRITE_BYTES, 3), 0);
    assert_eq!(
        writing_long(&mut ring, 0, LONG_WRITE_BYTES, 3 * LONG_WRITES_MAX),
        LONG_WRITES_MAX
    );
    ring.set_file(ReplicaIndex(1), Some(RingFile::of(&cached)))
        .unwrap();
    assert_eq!(writing_long(&mut ring, 1, LONG_WRITE_BYTES, 1), 1);
    ring.set_file(ReplicaIndex(0), Some(RingFile::of(&direct)))
        .unwrap();
    assert_eq!(writing_long(&mut ring, 0, LONG_WRITE_BYTES, 1), 0);
}

fn a_file_is_added_and_removed_while_others_are_in_use<K: Kernel>(new: New<K>) {
    let (first, second) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    second.write_all_at(&[9; 512], 0).unwrap();
    let mut ring = new(&[RingFile::of(&first)]).unwrap();
    let read = |ring: &mut Ring<K>| {
        let into = BufferPool::default().take(512);
        let range = SectorRange::new(0, 1);
        let read = Operation {
            replica: ReplicaIndex(7),
            ..operation(Action::Read { range, into })
        };
        push(ring, read).unwrap();
        reply_of(ring)
    };
    assert_eq!(read(&mut ring).result, Err(Errno(libc::EBADF)));
    ring.set_file(ReplicaIndex(7), Some(RingFile::of(&second)))
        .unwrap();
    let reply = read(&mut ring);
    assert_eq!(reply.result, Ok(()));
    assert!(
        matches!(reply.action, Action::Read { into, .. } if into.iter().all(|byte| *byte == 9))
    );
    ring.set_file(ReplicaIndex(7), None).unwrap();
    assert_eq!(read(&mut ring).result, Err(Errno(libc::EBADF)));
}

fn a_record_is_written_beside_its_image<K: Kernel>(new: New<K>) {
    let [image, record, other] = std::array::from_fn(|_| tempfile::tempfile().unwrap());
    let lengths = || [&image, &record, &other].map(|file| file.metadata().unwrap().len());
    let mut ring = new(&[RingFile::of(&image)]).unwrap();
    let write = |ring: &mut Ring<K>, byte| {
        let record = Action::Record {
            offset_bytes: 4096,
            bytes: Arc::from([byte; 1000]),
        };
        push(ring, operation(record)).unwrap();
        reply_of(ring).result
    };
    assert_eq!(write(&mut ring, 1), Err(Errno(libc::EBADF)), "none");
    let first = ReplicaIndex(0);
    let with = RingFile::of(&image).with_record(&record);
    ring.set_file(first, Some(with.clone())).unwrap();
    assert_eq!(write(&mut ring, 2), Ok(()));
    assert_eq!(lengths(), [0, 5096, 0]);
    let mut bytes = [0; 1000];
    record.read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(bytes, [2; 1000]);

    let another = RingFile::of(&image).with_record(&other);
    ring.set_file(first, Some(another)).unwrap();
    assert_eq!(write(&mut ring, 3), Ok(()));
    assert_eq!(lengths(), [0, 5096, 5096]);
    ring.set_file(first, None).unwrap();
    assert_eq!(write(&mut ring, 4), Err(Errno(libc::EBADF)));

    drop(ring);
    let mut ring = new(&[with]).unwrap();
    assert_eq!(write(&mut ring, 5), Ok(()));
    push(&mut ring, operation(Action::Flush)).unwrap();
    assert_eq!(reply_of(&mut ring).result, Ok(()));
    record.read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(bytes, [5; 1000]);
}

fn reports_every_write_to_a_watched_eventfd_until_it_is_unwatched<K: Kernel>(new: New<K>) {
    let mut ring = new(&[RingFile::of(&tempfile::tempfile().unwrap())]).unwrap();
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let watch = ring.watch(&event, WatchToken(3)).unwrap();
    for _ in 0..3 {
        event.write(1).unwrap();
        let completion = ring.enter(Wait::Forever).unwrap().pop_front();
        assert!(matches!(
            completion,
            Some(Completion::Readable(WatchToken(3)))
        ));
    }
    ring.unwatch(watch).unwrap();
    event.write(1).unwrap();
    while !ring.table.is_empty() {
        assert!(ring.enter(Wait::Forever).unwrap().is_empty());
    }
}

fn a_failed_watch_does_not_end_another_one<K: Kernel>(new: New<K>) {
    let mut ring = new(&[RingFile::of(&tempfile::tempfile().unwrap())]).unwrap();
    // A descriptor of this kind cannot be polled.
    let path = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open("/")
        .unwrap();
    let failed = ring.watch(&path, WatchToken(1)).unwrap();
    ring.enter(Wait::Forever).unwrap().clear();
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let _watch = ring.watch(&event, WatchToken(2)).unwrap();
    ring.unwatch(failed).unwrap();
    ring.enter(Wait::AtMost(Duration::from_millis(1)))
        .unwrap()
        .clear();
    event.write(1).unwrap();
    let completion = ring
        .enter(Wait::AtMost(Duration::from_secs(20)))
        .unwrap()
        .pop_front();
    assert!(
        matches!(completion, Some(Completion::Readable(WatchToken(2)))),
        "{completion:?}"
    );
}
