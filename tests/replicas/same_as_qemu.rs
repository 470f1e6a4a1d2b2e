//! This daemon beside qemu-storage-daemon's quorum: the same images, the same client, the same
//! requests, corruptions and I/O errors, and the same answers and events; or better ones, for a
//! reason that [`Improvement`] names. And the faults that were found there, measured again.

use serde_json::json;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use testkit::HANG_LIMIT;
use testkit::client::{Client, Failed};
use testkit::disk::{Disk, Plan, System};
use testkit::fuse::{Fault, Operation};
use testkit::images::Random;
use testkit::load::figure;
use testkit::machine::{alone, shared};
use testkit::oracle::{
    Action, Improvement, SECTOR, Seen, Step, bad_events, bytes, expected, improvement,
    is_confirmed, text_of,
};
use testkit::process::wait_until;
use testkit::rows;

const DISK_SECTORS: usize = 128;
/// Most requests go here, so that they overlap.
const BUSY_SECTORS: usize = 24;

/// The same read of each part of its range.
fn parts(step: &Step) -> impl Iterator<Item = Step> {
    let Action::Read(range) = step.action.clone() else {
        panic!("only reads are done again in parts");
    };
    let all = range
        .clone()
        .flat_map(move |start| (start + 1..=range.end).map(move |end| start..end));
    all.map(|part| Step {
        action: Action::Read(part),
        failing: step.failing.clone(),
    })
}

/// Whether no replica has an operation in flight.
fn has_nothing_in_flight(disk: &Disk) -> bool {
    let state = disk.state();
    let replicas = state["replicas"].as_array().expect("a list of replicas");
    let mut operations = replicas.iter().flat_map(|replica| {
        let of_replica = replica["operations"].as_object();
        of_replica.expect("operations by type").values()
    });
    operations.all(|operations| operations["in-flight"] == 0)
}

/// Both systems, in step.
struct Pair {
    plan: Plan,
    ours: Disk,
    peer: Disk,
    /// `None` only while the system is started again, or ends.
    our_client: Option<Client>,
    peer_client: Option<Client>,
    /// The contents of the replicas of both.
    contents: Vec<Vec<u8>>,
    our_events: usize,
    /// The reads that replicas have failed.
    failed_reads: Vec<Step>,
    /// The peer has sent events, and holds others back for a second.
    peer_is_throttled: bool,
    next_byte: u8,
    differences: BTreeMap<Improvement, usize>,
}

impl Pair {
    fn start(plan: &Plan) -> Self {
        let [ours, peer] = [System::Ours, System::Peer].map(|system| Disk::start(system, plan));
        Self {
            plan: plan.clone(),
            our_client: Some(ours.connect()),
            peer_client: Some(peer.connect()),
            ours,
            peer,
            contents: vec![vec![0; DISK_SECTORS * SECTOR]; plan.replicas],
            our_events: 0,
            failed_reads: Vec::new(),
            peer_is_throttled: false,
            next_byte: 1,
            differences: BTreeMap::new(),
        }
    }

    /// Does `step` on both and compares what can be seen.
    fn step(&mut self, action: Action, failing: BTreeMap<usize, i32>) {
        let step = Step { action, failing };
        let barrier = self.barrier(&step);
        let mut due = expected(&self.plan, &step, &self.contents);
        if let Some(write) = &barrier {
            due.contents = expected(&self.plan, write, &due.contents).contents;
        }
        let ours = self.step_ours(&step, barrier.as_ref(), &due);
        let peer = self.step_peer(&step, barrier.as_ref());
        assert_eq!(
            Told(&ours),
            Told(&due),
            "{step:?} on {}",
            told(&self.contents)
        );
        if ours != peer {
            let reason = improvement(&self.plan, &step, &self.contents);
            let reason = reason.unwrap_or_else(|| {
                let (ours, peer) = (Told(&ours), Told(&peer));
                let before = told(&self.contents);
                panic!("no reason to differ in {step:?} on {before}\nours {ours:?}\npeer {peer:?}");
            });
            *self.differences.entry(reason).or_default() += 1;
            for (image, content) in self.peer.images.iter().zip(&ours.contents) {
                put(image, 0, content);
            }
        }
        self.contents = ours.contents;
    }

    /// What follows a read that replicas fail, if these are read again in smaller parts: a write of
    /// one sector. It waits until the read has given up the lock of its range (W2). Only then may
    /// the faults end, or a replica would be able to read some of the parts.
    fn barrier(&mut self, step: &Step) -> Option<Step> {
        let Action::Read(sectors) = &step.action else {
            return None;
        };
        let sector = sectors.start..sectors.start + 1;
        is_confirmed(&self.plan, step, &self.contents).then(|| Step {
            action: Action::Write(sector, self.another_byte()),
            failing: BTreeMap::new(),
        })
    }

    /// Each error of a replica is reported, also those it makes again when a read is repeated. Each
    /// is compared once.
    fn step_ours(&mut self, step: &Step, barrier: Option<&Step>, due: &Seen) -> Seen {
        let reads = |disk: &Disk, plan: &Plan| -> Vec<u64> {
            let image = |replica| disk.faulty(replica).done(Operation::Read);
            (0..plan.replicas).map(image).collect()
        };
        if !step.failing.is_empty() {
            self.wait_for_jobs();
        }
        let before = reads(&self.ours, &self.plan);
        if matches!(step.action, Action::Read(_)) && !step.failing.is_empty() {
            self.failed_reads.push(step.clone());
        }
        inject(&self.ours, step);
        let result = perform(self.our_client.as_mut().expect("connected"), step);
        // The guest does not wait for late replies and repairs; the next step must.
        let is_vote = matches!(step.action, Action::Read(_)) && !self.plan.fifo;
        wait_until(HANG_LIMIT, || {
            let now = reads(&self.ours, &self.plan);
            !is_vote || before.iter().zip(&now).all(|(before, now)| now > before)
        });
        wait_until(HANG_LIMIT, || {
            let events = self.new_events();
            due.events.iter().all(|event| events.contains(event))
        });
        let is_at_rest = step.failing.is_empty() || matches!(step.action, Action::Read(_));
        let contents = if let Some(write) = barrier {
            // The second error is that of the read under the lock. Where the last vote had no
            // winner there is no other read.
            let is_locked = wait_until(HANG_LIMIT, || {
                let is_over = has_nothing_in_flight(&self.ours);
                let events = self.new_events();
                let count =
                    |wanted: &String| events.iter().filter(|event| *event == wanted).count();
                let needed = if is_over { 1 } else { 2 };
                bad_events(step).all(|event| count(&event) >= needed)
            });
            assert!(
                is_locked,
                "{step:?} is not repeated: {:?}",
                self.new_events()
            );
            let written = perform(self.our_client.as_mut().expect("connected"), write);
            assert_eq!(written, Ok(Vec::new()), "{write:?}");
            contents(&self.ours)
        } else if is_at_rest {
            wait_until(HANG_LIMIT, || contents(&self.ours) == due.contents);
            contents(&self.ours)
        } else {
            // The replicas that failed are resynced while the test writes the sectors again that
            // they missed.
            due.contents.clone()
        };
        wait_until(HANG_LIMIT, || has_nothing_in_flight(&self.ours));
        clear_faults(&self.ours, step);
        let texts = self.new_events();
        self.our_events += texts.len();
        let mut events: Vec<String> = Vec::new();
        for text in texts {
            let is_again = events.contains(&text) && bad_events(step).any(|event| event == text);
            if !is_again && (due.events.contains(&text) || !self.is_repetition(&text)) {
                events.push(text);
            }
        }
        Seen {
            result,
            events,
            contents,
        }
    }

    /// A resync must not take the fault that is meant for the guest's write or flush.
    fn wait_for_jobs(&self) {
        let mut monitor = self.ours.monitor();
        let mut jobs = json!([]);
        let ended = wait_until(HANG_LIMIT, || {
            jobs = monitor.execute("query-jobs", json!({}));
            jobs == json!([])
        });
        assert!(ended, "a job does not end: {jobs}");
    }

    /// The events since the last step, sorted.
    fn new_events(&self) -> Vec<String> {
        let events = self.ours.events();
        let mut texts: Vec<_> = events[self.our_events..].iter().map(text_of).collect();
        texts.sort();
        texts
    }

    /// What a replica could not read is read again in smaller parts (R4), and these fail and are
    /// reported like the whole, perhaps late.
    fn is_repetition(&self, text: &str) -> bool {
        let mut reads = self.failed_reads.iter();
        reads.any(|step| parts(step).any(|part| bad_events(&part).any(|event| event == text)))
    }

    fn step_peer(&mut self, step: &Step, barrier: Option<&Step>) -> Seen {
        if self.peer_is_throttled {
            self.peer_client = None;
            self.peer.restart_peer();
            self.peer_client = Some(self.peer.connect());
        }
        inject(&self.peer, step);
        let client = self.peer_client.as_mut().expect("connected");
        let result = perform(client, step);
        self.peer.sync_peer();
        clear_faults(&self.peer, step);
        if let Some(write) = barrier {
            let written = perform(client, write);
            assert_eq!(written, Ok(Vec::new()), "{write:?} on the peer");
        }
        let mut events: Vec<_> = self.peer.events().iter().map(text_of).collect();
        events.sort();
        self.peer_is_throttled = !events.is_empty();
        Seen {
            result,
            events,
            contents: contents(&self.peer),
        }
    }

    /// Corrupts sectors of a replica in both systems.
    fn corrupt(&mut self, replica: usize, sectors: &Range<usize>, mask: u8) {
        let content = &mut self.contents[replica][bytes(sectors)];
        for byte in content.iter_mut() {
            *byte ^= mask;
        }
        for disk in [&self.ours, &self.peer] {
            put(&disk.images[replica], bytes(sectors).start, content);
        }
    }

    fn write(&mut self, sectors: Range<usize>, failing: BTreeMap<usize, i32>) {
        let byte = self.another_byte();
        self.step(Action::Write(sectors, byte), failing);
    }

    fn another_byte(&mut self) -> u8 {
        self.next_byte = self.next_byte % 251 + 1;
        self.next_byte
    }

    /// Writes the whole disk: afterwards no replica is stale.
    fn renew(&mut self) {
        self.write(0..DISK_SECTORS, BTreeMap::new());
    }

    fn end(mut self) -> BTreeMap<Improvement, usize> {
        self.peer_client = None;
        self.our_client = None;
        self.ours.end();
        let mut events = self.new_events();
        events.retain(|event| !self.is_repetition(event));
        assert_eq!(events, Vec::<String>::new(), "more events came");
        self.peer.end();
        self.differences
    }
}

/// [`Seen`], in a readable form.
#[derive(PartialEq)]
struct Told<'a>(&'a Seen);

impl std::fmt::Debug for Told<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let result = self
            .0
            .result
            .as_ref()
            .map(|data| told(std::slice::from_ref(data)));
        let contents = told(&self.0.contents);
        write!(f, "{result:?} {:#?} {contents}", self.0.events)
    }
}

/// The first byte of each sector of some buffers.
fn told(buffers: &[Vec<u8>]) -> String {
    let sectors = |buffer: &Vec<u8>| -> String {
        let firsts = buffer.iter().step_by(SECTOR).take(BUSY_SECTORS);
        firsts.map(|byte| format!("{byte:02x} ")).collect()
    };
    buffers
        .iter()
        .map(|buffer| format!("[{}]", sectors(buffer)))
        .collect()
}

fn perform(client: &mut Client, step: &Step) -> Result<Vec<u8>, i32> {
    let offset = |sectors: &Range<usize>| bytes(sectors).start as u64;
    let result = match &step.action {
        Action::Read(sectors) => client.read(0, offset(sectors), bytes(sectors).len()),
        Action::Write(sectors, byte) => {
            let data = vec![*byte; bytes(sectors).len()];
            client.write(0, offset(sectors), &data).map(|()| Vec::new())
        }
        Action::Flush => client.flush(0).map(|()| Vec::new()),
    };
    result.map_err(|Failed(errno)| errno)
}

fn inject(disk: &Disk, step: &Step) {
    for (replica, &errno) in &step.failing {
        let (operation, fault) = match step.action {
            Action::Read(_) => (Operation::Read, Fault::Fail(errno)),
            // The resync that follows succeeds: after a failed repair the daemon does not follow up
            // failed reads for a while (R4).
            Action::Write(..) => (Operation::Write, Fault::FailOnce(errno)),
            Action::Flush => (Operation::Sync, Fault::FailOnce(errno)),
        };
        disk.faulty(*replica).inject(operation, fault);
    }
}

fn clear_faults(disk: &Disk, step: &Step) {
    for replica in step.failing.keys() {
        disk.faulty(*replica).clear_faults();
    }
}

fn contents(disk: &Disk) -> Vec<Vec<u8>> {
    let read = |image| std::fs::read(image).expect("reading an image");
    disk.images.iter().map(read).collect()
}

fn put(image: &Path, offset: usize, content: &[u8]) {
    let file = OpenOptions::new()
        .write(true)
        .open(image)
        .expect("opening an image");
    let put = file.write_all_at(content, offset as u64);
    put.expect("writing to an image");
}

/// Some sectors, mostly in the busy range.
fn some_sectors(random: &mut Random) -> Range<usize> {
    let small = |number| usize::try_from(number).expect("small");
    let len = small(random.within(1..9));
    let within = if random.within(0..8) == 0 {
        DISK_SECTORS
    } else {
        BUSY_SECTORS
    };
    let start = small(random.within(0..(within - len + 1) as u64));
    start..start + len
}

/// Some replicas, at times all, each with an errno.
fn some_failing(random: &mut Random, replicas: usize) -> BTreeMap<usize, i32> {
    let mut failing = BTreeMap::new();
    for _ in 0..random.within(1..replicas as u64 + 1) {
        let replica = usize::try_from(random.within(0..replicas as u64)).expect("small");
        let errno = [libc::EIO, libc::ENOSPC][usize::from(random.within(0..4) == 0)];
        failing.insert(replica, errno);
    }
    failing
}

fn random_steps(pair: &mut Pair, random: &mut Random, steps: usize) {
    let replicas = pair.plan.replicas;
    for _ in 0..steps {
        let sectors = some_sectors(random);
        match random.within(0..20) {
            0..8 => pair.step(Action::Read(sectors), BTreeMap::new()),
            8..10 => pair.step(Action::Read(sectors), some_failing(random, replicas)),
            10..13 => pair.write(sectors, BTreeMap::new()),
            13 => {
                let failing = some_failing(random, replicas);
                pair.write(sectors.clone(), failing);
                // What the others wrote is copied to those that failed here, and not by the peer.
                pair.write(sectors, BTreeMap::new());
            }
            14 => {
                // The peer flushes no replica that has written nothing. And bringing a replica up
                // to date afterwards must find nothing else to report.
                pair.renew();
                pair.step(Action::Flush, some_failing(random, replicas));
                pair.renew();
            }
            15 => pair.step(Action::Flush, BTreeMap::new()),
            _ => {
                for _ in 0..random.within(1..4) {
                    let replica =
                        usize::try_from(random.within(0..replicas as u64)).expect("small");
                    // Few masks, so that corrupt replicas agree at times.
                    let mask = u8::try_from(random.within(1..3)).expect("small");
                    let sectors = some_sectors(random);
                    let end = sectors.end.min(sectors.start + 3);
                    pair.corrupt(replica, &(sectors.start..end), mask);
                }
                if random.within(0..2) == 0 {
                    pair.step(Action::Read(0..BUSY_SECTORS), BTreeMap::new());
                }
            }
        }
    }
}

fn compare(variant: impl Fn(Plan) -> Plan, steps: usize) {
    let _machine = shared();
    let mut random = Random::from_environment();
    let mut differences: BTreeMap<Improvement, usize> = BTreeMap::new();
    let mut cases = 0;
    for replicas in 2..=4 {
        for threshold in 1..=replicas {
            let plan = variant(Plan {
                replicas,
                threshold,
                faulty: (0..replicas).collect(),
                size_bytes: (DISK_SECTORS * SECTOR) as u64,
                direct: false,
                ..Plan::default()
            });
            println!("N = {replicas}, t = {threshold}");
            let mut pair = Pair::start(&plan);
            random_steps(&mut pair, &mut random, steps);
            for (reason, count) in pair.end() {
                *differences.entry(reason).or_default() += count;
            }
            cases += 1;
        }
    }
    println!("{cases} cases of {steps} steps; better than the peer: {differences:?}");
}

#[test]
fn votes_like_qemu_or_better() {
    compare(|plan| plan, 45);
}

#[test]
fn repairs_like_qemu_or_better() {
    let rewriting = |plan| Plan {
        rewrite_corrupted: true,
        ..plan
    };
    compare(rewriting, 45);
}

#[test]
fn reads_in_order_like_qemu() {
    let fifo = |plan| Plan { fifo: true, ..plan };
    compare(fifo, 30);
}

/// The peer's column of the table of figures. Nothing is asserted of the peer.
#[test]
fn figures_of_the_peer() {
    let _machine = alone();
    let peer = |row: &str, value: &str| figure(&format!("peer: {row}"), value);
    let (failed, _) = rows::bad_in_different_sectors(System::Peer, 100);
    peer(
        "two replicas bad in different sectors",
        &format!("{failed} of 100 reads fail"),
    );
    peer("racing on 64 KiB", &rows::race_on(System::Peer).figure());
    let raced = rows::race_with_rewrites(System::Peer);
    peer(
        "racing with rewrites, two replicas delayed",
        &raced.figure(),
    );
    let differing = rows::changing_memory(System::Peer);
    peer(
        "memory that changes in flight",
        &format!("replicas differ in {differing} bytes"),
    );
    let hung = rows::hang(System::Peer);
    peer(
        "one of three hangs for 4 s, the first write",
        &format!("{:.1?}", hung.first_write),
    );
    drop(hung);
    let [healthy, slow] = rows::limited(System::Peer, 5, HANG_LIMIT);
    peer(
        "one replica limited to 1 read a second",
        &format!("5 voted reads take {slow:.1?}, all healthy {healthy:.1?}"),
    );
    let took = rows::flush_of_300_ms(System::Peer);
    peer("flush, each replica takes 300 ms", &format!("{took:.0?}"));
    let (flushed, _, _) = rows::flush_without_quorum(System::Peer);
    peer(
        "a write held by {A,B}, a flush done by {B,C}",
        if flushed.is_ok() {
            "the flush succeeds"
        } else {
            "the flush fails"
        },
    );
}
