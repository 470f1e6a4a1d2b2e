//! The event socket as its readers see it: real sockets, real floods, readers that misbehave.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use testkit::HANG_LIMIT;
use testkit::machine::measure;

use quorum_blk::common::operation::OperationType;
use quorum_blk::common::report::{Cause, Report, Requester};
use quorum_blk::common::{Errno, ReplicaIndex, SectorRange};
use quorum_blk::control::events::Names;
use quorum_blk::control::publisher::Publisher;
use quorum_blk::control::queue::EventQueue;
use quorum_blk::control::socket::{BindError, Listener, SocketAccess, bind_unix_listener};
use quorum_blk::limits::{EVENT_BURST, EVENT_READERS_MAX, REPLICAS_MAX};
use serde_json::Value;

struct Served {
    _directory: tempfile::TempDir,
    path: PathBuf,
    queue: Arc<EventQueue>,
    publisher: Publisher,
}

fn names() -> Names {
    Names {
        reference: "quorum0".into(),
        nodes: (0..REPLICAS_MAX)
            .map(|index| format!("{index}.raw"))
            .collect(),
    }
}

fn publish_at(path: &Path) -> (Arc<EventQueue>, Publisher) {
    let queue = EventQueue::new().unwrap();
    let listener = bind_unix_listener(path, SocketAccess::OWNER).unwrap();
    let publisher = Publisher::spawn(
        Some(Listener::Bound(listener)),
        None,
        queue.clone(),
        names(),
    );
    (queue, publisher.unwrap())
}

fn serve() -> Served {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("events.sock");
    let (queue, publisher) = publish_at(&path);
    Served {
        _directory: directory,
        path,
        queue,
        publisher,
    }
}

impl Served {
    fn connect(&self) -> Lines {
        Lines::new(UnixStream::connect(&self.path).unwrap())
    }
}

fn failure(sector: u64) -> Report {
    Report::Failure {
        operation: OperationType::Read,
        range: SectorRange::new(sector, 8),
        requester: Requester::Guest,
        error: None,
        no_space: false,
    }
}

fn error(replica: u8, errno: i32, sector: u64) -> Report {
    Report::Bad {
        replica: ReplicaIndex(replica),
        operation: OperationType::Write,
        range: SectorRange::new(sector, 8),
        cause: Cause::Error(Errno(errno)),
    }
}

/// A reader that accepts only complete lines, each a JSON object.
struct Lines(BufReader<UnixStream>);

impl Lines {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(HANG_LIMIT)).unwrap();
        Self(BufReader::new(stream))
    }

    fn stream(&self) -> &UnixStream {
        self.0.get_ref()
    }

    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        if self.0.read_line(&mut line).unwrap() == 0 {
            return None;
        }
        assert!(line.ends_with('\n'), "torn: {line}");
        Some(serde_json::from_str(&line).unwrap())
    }

    fn sector(&mut self) -> u64 {
        self.next().unwrap()["data"]["sector-num"].as_u64().unwrap()
    }

    fn rest(mut self) -> Account {
        let mut account = Account::default();
        while let Some(event) = self.next() {
            account.add(&event);
        }
        account
    }
}

/// The events that a reader got, and how many it missed according to notices.
#[derive(Debug, Default, PartialEq, Eq)]
struct Account {
    lines: u64,
    suppressed: u64,
    missed: u64,
}

impl Account {
    fn add(&mut self, event: &Value) {
        let data = &event["data"];
        if event["event"] == "QUORUM_EVENTS_MISSED" {
            self.missed += data["missed"].as_u64().unwrap();
        } else {
            self.lines += 1;
            self.suppressed += data.get("suppressed").map_or(0, |n| n.as_u64().unwrap());
        }
    }

    fn total(&self) -> u64 {
        self.lines + self.suppressed + self.missed
    }
}

#[test]
fn readers_connect_and_disconnect() {
    let served = serve();
    // Nothing is kept for readers that connect later.
    let mut before = served.connect();
    served.queue.push(failure(0));
    assert_eq!(before.sector(), 0);
    drop(before);
    let mut first = served.connect();
    served.queue.push(failure(1));
    assert_eq!(first.sector(), 1);
    let mut second = served.connect();
    served.queue.push(failure(2));
    assert_eq!((first.sector(), second.sector()), (2, 2));
    drop(first);
    served.queue.push(failure(3));
    let mut third = served.connect();
    served.queue.push(failure(4));
    assert_eq!((second.sector(), second.sector()), (3, 4));
    while third.sector() != 4 {}
    served.publisher.stop();
    assert_eq!(second.rest(), Account::default());
    assert_eq!(third.rest(), Account::default());
}

#[test]
fn the_first_event_is_sent_at_once() {
    measure(|| {
        let served = serve();
        let mut reader = served.connect();
        let pushed = Instant::now();
        served.queue.push(error(1, 5, 77));
        let event = reader.next().unwrap();
        let took = pushed.elapsed();
        assert_eq!(event["event"], "QUORUM_REPORT_BAD");
        assert_eq!(event["data"]["node-name"], "1.raw");
        assert_eq!(event["data"]["ret"], -5);
        // Events are folded for a second; the first is not.
        let is_at_once = took < Duration::from_secs(1);
        if is_at_once {
            Ok(())
        } else {
            Err(format!("sent after {took:?}"))
        }
    });
}

#[test]
fn a_flood_is_folded_with_exact_counts() {
    let served = serve();
    let mut reader = served.connect();
    const FLOOD: u64 = 100_000;
    let began = Instant::now();
    let pushers: Vec<_> = (0..2)
        .map(|_| {
            let queue = served.queue.clone();
            thread::spawn(move || (0..FLOOD / 2).for_each(|n| queue.push(error(2, 5, n))))
        })
        .collect();
    // The folded event is sent when the window ends, without another event after it.
    let mut account = Account::default();
    while account.total() < FLOOD {
        account.add(&reader.next().unwrap());
    }
    for pusher in pushers {
        pusher.join().unwrap();
    }
    served.publisher.stop();
    assert_eq!(reader.rest(), Account::default());
    assert_eq!((account.total(), account.missed), (FLOOD, 0));
    // In each window of a second a burst is sent unfolded, and then one folded event.
    let windows = began.elapsed().as_secs() + 2;
    assert!(
        account.lines <= windows * (u64::from(EVENT_BURST) + 1),
        "{account:?}"
    );
    assert!(account.suppressed > 0);
}

#[test]
fn folded_events_are_sent_at_stop() {
    let served = serve();
    let reader = served.connect();
    for sector in 0..5_000 {
        served.queue.push(failure(sector));
    }
    served.publisher.stop();
    assert_eq!(reader.rest().total(), 5_000);
}

#[test]
fn a_stalled_reader_delays_no_event_and_gets_the_number_it_missed() {
    let served = serve();
    let stalled = served.connect();
    let live = served.connect();
    let live = thread::spawn(move || live.rest());

    // There are too many kinds of events for folding to thin out the flood.
    const FLOOD: u64 = 200_000;
    let kinds = (1..=100).flat_map(|errno| (0..32).map(move |replica| (replica, errno)));
    // The reader does not read before the loop ends: a push that waited for it would hang.
    for (sector, (replica, errno)) in (0..FLOOD).zip(kinds.cycle()) {
        served.queue.push(error(replica, errno, sector));
    }

    // It reads again, and gets the notice first and then all later events.
    let stalled = thread::spawn(move || {
        let (mut stalled, mut account) = (stalled, Account::default());
        while account.total() < FLOOD {
            account.add(&stalled.next().unwrap());
        }
        account
    });
    let stalled = stalled.join().unwrap();
    served.publisher.stop();
    let live = live.join().unwrap();
    assert_eq!(live.total(), FLOOD, "{live:?}");
    assert_eq!(stalled.total(), FLOOD, "{stalled:?}");
    assert!(stalled.missed > 0, "{stalled:?}");
    assert!(live.lines > stalled.lines, "{live:?} {stalled:?}");
}

#[test]
fn a_reader_that_never_reads_does_not_delay_stop() {
    let served = serve();
    let stalled = served.connect();
    for sector in 0..20_000_u64 {
        let replica = u8::try_from(sector % 32).unwrap();
        let errno = i32::try_from(sector / 32 % 100).unwrap() + 1;
        served.queue.push(error(replica, errno, sector));
    }
    // The reader does not read before this returns.
    served.publisher.stop();
    assert!(!served.path.exists());
    // The lines that reached it are complete.
    assert!(stalled.rest().lines > 0);
}

#[test]
fn readers_connect_and_disconnect_during_a_flood() {
    let served = serve();
    let done = Arc::new(AtomicBool::new(false));
    let visits: [_; 4] = std::array::from_fn(|_| Arc::new(AtomicU32::new(0)));
    let visitors = visits.each_ref().map(|visits| {
        let (path, done, visits) = (served.path.clone(), done.clone(), visits.clone());
        thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let mut reader = Lines::new(UnixStream::connect(&path).unwrap());
                reader.next().unwrap();
                visits.fetch_add(1, Ordering::Relaxed);
            }
        })
    });
    let steady = served.connect();
    let steady = thread::spawn(move || steady.rest());
    let mut pushed = 0;
    let each_came_often = || {
        let often = |visits: &Arc<AtomicU32>| visits.load(Ordering::Relaxed) >= 10;
        visits.iter().all(often)
    };
    while pushed < 100_000 || !each_came_often() {
        let replica = u8::try_from(pushed % 32).unwrap();
        let errno = i32::try_from(pushed / 32 % 100).unwrap() + 1;
        served.queue.push(error(replica, errno, pushed));
        pushed += 1;
    }
    done.store(true, Ordering::Relaxed);
    // A reader that connected after the last event waits for another.
    while !visitors.iter().all(thread::JoinHandle::is_finished) {
        served.queue.push(failure(pushed));
        pushed += 1;
        thread::sleep(Duration::from_millis(5));
    }
    for visitor in visitors {
        visitor.join().unwrap();
    }
    served.publisher.stop();
    assert_eq!(steady.join().unwrap().total(), pushed);
}

#[test]
fn a_reader_that_closed_its_writing_side_still_reads() {
    let served = serve();
    let mut half = served.connect();
    half.stream().shutdown(Shutdown::Write).unwrap();
    // When the second event comes, the publisher has seen the end of the stream from the reader.
    for sector in 1..10 {
        served.queue.push(failure(sector));
        assert_eq!(half.sector(), sector);
    }
}

#[test]
fn what_a_reader_sends_is_discarded() {
    let served = serve();
    let mut talker = served.connect();
    let mut quiet = served.connect();
    let mut talking = talker.stream().try_clone().unwrap();
    talking.set_write_timeout(Some(HANG_LIMIT)).unwrap();
    talking.write_all(&vec![b'{'; 4 << 20]).unwrap();
    served.queue.push(failure(1));
    assert_eq!((talker.sector(), quiet.sector()), (1, 1));
    talking.write_all(b"\0\n").unwrap();
    served.publisher.stop();
    assert_eq!(talker.rest(), Account::default(), "an end, not an error");
}

#[test]
fn a_reader_above_the_limit_is_refused() {
    let served = serve();
    let mut readers: Vec<Lines> = (0..EVENT_READERS_MAX).map(|_| served.connect()).collect();
    let mut refused = served.connect();
    assert!(refused.next().is_none());
    served.queue.push(failure(1));
    for reader in &mut readers {
        assert_eq!(reader.sector(), 1);
    }
    // There is room when the publisher has seen the end of a connection.
    readers.pop();
    let start = Instant::now();
    loop {
        let mut reader = served.connect();
        served.queue.push(failure(2));
        if reader.next().is_some() {
            break;
        }
        assert!(start.elapsed() < HANG_LIMIT);
    }
}

#[test]
fn the_socket_is_private_and_removed_at_stop() {
    let served = serve();
    let mode = std::fs::metadata(&served.path)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o600);
    let mut reader = served.connect();
    served.publisher.stop();
    assert!(!served.path.exists());
    assert_eq!(reader.0.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("events.sock");
    drop(UnixListener::bind(&path).unwrap());
    let (queue, publisher) = publish_at(&path);
    let refused = bind_unix_listener(&path, SocketAccess::OWNER).unwrap_err();
    assert!(matches!(refused, BindError::InUse(_)));
    assert!(!refused.to_string().contains('\n'));
    let mut reader = Lines::new(UnixStream::connect(&path).unwrap());
    queue.push(failure(9));
    assert_eq!(reader.sector(), 9, "the refused one did no harm");
    publisher.stop();
    assert!(!path.exists());
}

/// Keeps the sectors of the lines that one test logs.
struct Log(Mutex<Vec<u64>>);

static LOG: Log = Log(Mutex::new(Vec::new()));

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let field = |name: &str| record.key_values().get(name.into());
        if field("replica").is_some_and(|replica| replica.to_string() == "only-logged") {
            assert_eq!(record.level(), log::Level::Warn);
            let sector = field("sector-num").unwrap().to_string().parse();
            self.0.lock().unwrap().push(sector.unwrap());
        }
    }

    fn flush(&self) {}
}

#[test]
fn without_a_socket_each_event_sent_is_logged_once() {
    log::set_logger(&LOG).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let queue = EventQueue::new().unwrap();
    let names = Names {
        reference: "quorum0".into(),
        nodes: ["only-logged"].into_iter().collect(),
    };
    let publisher = Publisher::spawn(None, None, queue.clone(), names).unwrap();
    for sector in 0..1000 {
        queue.push(error(0, libc::EIO, sector));
    }
    publisher.stop();
    let logged = LOG.0.lock().unwrap();
    let distinct: BTreeSet<u64> = logged.iter().copied().collect();
    assert_eq!(distinct.len(), logged.len());
    assert_eq!(logged.last(), Some(&999));
    assert!(logged.len() < 1000, "folded");
}
