//! Loads for a voted disk, and a model that checks the results. Every sector holds the number of
//! the write that wrote it, so that a read shows whether it returned old data, torn data, or data
//! of another place.

use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::client::{Client, Failed, Request};
use crate::images::{BLOCK_BYTES, BLOCK_SECTORS, Random};
use crate::sectors::{SECTOR, fill, number_of};
use crate::size;

const BLOCK: usize = 4096;
/// Requests that are sent together.
const BATCH: usize = 32;
/// Blocks of the longest request.
const BLOCKS_MAX: u64 = 4;
/// Memory for one request.
const SLOT: usize = 4 * BLOCK;

/// What each sector may hold: the writes that were not replaced by one that began after they had
/// ended.
pub struct Model {
    sectors: Vec<Vec<Version>>,
    /// The newest write of zeroes to each sector.
    zeroed: Vec<u64>,
    next_tag: u64,
}

#[derive(Clone, Copy)]
struct Version {
    tag: u64,
    /// It is made of zeroes, as the disk is in the beginning.
    is_zero: bool,
    acknowledged: bool,
}

/// A write in flight.
pub struct Write {
    tag: u64,
    sectors: Range<usize>,
    /// What it replaces in each sector.
    replaces: Vec<Vec<u64>>,
}

/// A read in flight.
pub struct Read {
    sectors: Range<usize>,
    /// What each sector may hold: one of these, or what was begun to be written since.
    permitted: Vec<Vec<u64>>,
    since: u64,
}

impl Model {
    /// A disk of zeroes.
    pub fn new(sectors: usize) -> Self {
        let zero = Version {
            tag: 0,
            is_zero: true,
            acknowledged: true,
        };
        Self {
            sectors: vec![vec![zero]; sectors],
            zeroed: vec![0; sectors],
            next_tag: 1,
        }
    }

    /// A write begins; `data` becomes what it writes.
    pub fn begin_write(&mut self, sectors: Range<usize>, data: &mut [u8]) -> Write {
        let tag = self.next_tag;
        for (sector, bytes) in sectors.clone().zip(data.chunks_exact_mut(SECTOR)) {
            fill(bytes, tag, sector);
        }
        self.begin(sectors, false)
    }

    /// A write of zeroes begins, or a discard that leaves them.
    pub fn begin_zeroes(&mut self, sectors: Range<usize>) -> Write {
        self.zeroed[sectors.clone()].fill(self.next_tag);
        self.begin(sectors, true)
    }

    fn begin(&mut self, sectors: Range<usize>, is_zero: bool) -> Write {
        let tag = self.next_tag;
        self.next_tag += 1;
        let mut replaces = Vec::new();
        for sector in sectors.clone() {
            let versions = &mut self.sectors[sector];
            let old = versions.iter().filter(|version| version.acknowledged);
            replaces.push(old.map(|version| version.tag).collect());
            versions.push(Version {
                tag,
                is_zero,
                acknowledged: false,
            });
        }
        Write {
            tag,
            sectors,
            replaces,
        }
    }

    /// The write was acknowledged.
    pub fn end_write(&mut self, write: Write) {
        for (sector, replaced) in write.sectors.zip(write.replaces) {
            let versions = &mut self.sectors[sector];
            versions.retain(|version| !replaced.contains(&version.tag));
            for version in versions
                .iter_mut()
                .filter(|version| version.tag == write.tag)
            {
                version.acknowledged = true;
            }
        }
    }

    /// A read begins.
    pub fn begin_read(&self, sectors: Range<usize>) -> Read {
        let content = |version: &Version| if version.is_zero { 0 } else { version.tag };
        let tags = |versions: &Vec<Version>| versions.iter().map(content).collect();
        Read {
            permitted: self.sectors[sectors.clone()].iter().map(tags).collect(),
            since: self.next_tag,
            sectors,
        }
    }

    /// The sectors for which `read` must not return this data.
    pub fn wrong(&self, read: &Read, data: &[u8]) -> Vec<usize> {
        let sectors = read.sectors.clone().zip(data.chunks_exact(SECTOR));
        let wrong = sectors
            .zip(&read.permitted)
            .filter(|((sector, bytes), permitted)| {
                let tag = number_of(bytes, *sector);
                let since = match tag {
                    Some(0) => self.zeroed[*sector],
                    Some(tag) => tag,
                    None => 0,
                };
                !tag.is_some_and(|tag| permitted.contains(&tag)) && since < read.since
            });
        wrong.map(|((sector, _), _)| sector).collect()
    }

    /// The sectors of a disk at rest that do not hold the newest data.
    pub fn wrong_at_rest(&self, data: &[u8]) -> Vec<usize> {
        let len = (data.len() / SECTOR).min(self.sectors.len());
        self.wrong(&self.begin_read(0..len), data)
    }
}

/// What a load did and found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Requests answered.
    pub requests: usize,
    /// Requests that failed.
    pub failed: usize,
    /// Sectors that held neither the newest data nor that of a write in flight when they were
    /// read.
    pub mismatches: usize,
}

enum Pending {
    Read(Read),
    Write(Write),
}

/// Random reads and writes of whole blocks within the model's sectors, many at a time on each of
/// `queues` queues, for `time`.
pub fn race(
    client: &mut Client,
    queues: usize,
    model: &mut Model,
    random: &mut Random,
    time: Duration,
) -> Outcome {
    let mut outcome = Outcome::default();
    let mut pending: Vec<Vec<Option<Pending>>> = (0..queues).map(|_| Vec::new()).collect();
    let end = Instant::now() + time;
    loop {
        let mut is_idle = true;
        for (queue, batch) in pending.iter_mut().enumerate() {
            if batch.iter().all(Option::is_none) {
                if Instant::now() >= end {
                    continue;
                }
                send_batch(client, queue, batch, model, random);
            }
            is_idle = false;
            for (index, result) in client.poll(queue, 1) {
                let request = batch[index].take().expect("completed once");
                let data = &client.memory(queue)[index * SLOT..(index + 1) * SLOT];
                outcome.add(request, result, data, model);
            }
        }
        if is_idle {
            return outcome;
        }
    }
}

fn send_batch(
    client: &mut Client,
    queue: usize,
    batch: &mut Vec<Option<Pending>>,
    model: &mut Model,
    random: &mut Random,
) {
    batch.clear();
    let mut requests = Vec::new();
    for index in 0..BATCH {
        let blocks = random.within(1..BLOCKS_MAX + 1);
        let block = random.within(0..model.sectors.len() as u64 / BLOCK_SECTORS - blocks + 1);
        let (offset, len) = (block * BLOCK_BYTES, size(blocks) * BLOCK);
        let sectors = size(block * BLOCK_SECTORS)..size((block + blocks) * BLOCK_SECTORS);
        let memory = index * SLOT;
        if random.within(0..2) == 0 {
            let data = &mut client.memory(queue)[memory..memory + len];
            batch.push(Some(Pending::Write(model.begin_write(sectors, data))));
            requests.push(Request::Write {
                offset,
                memory,
                len,
            });
        } else {
            batch.push(Some(Pending::Read(model.begin_read(sectors))));
            requests.push(Request::Read {
                offset,
                memory,
                len,
            });
        }
    }
    client.send(queue, &requests);
}

impl Outcome {
    fn add(
        &mut self,
        request: Pending,
        result: Result<(), Failed>,
        data: &[u8],
        model: &mut Model,
    ) {
        self.requests += 1;
        match (request, result) {
            (Pending::Write(write), Ok(())) => model.end_write(write),
            (Pending::Read(read), Ok(())) => self.mismatches += model.wrong(&read, data).len(),
            // A write that failed leaves old or new bytes: its version stays permitted beside the
            // others.
            (_, Err(_)) => self.failed += 1,
        }
    }
}

/// Writes whose memory changes all the time while they are in flight, for `time`.
pub fn write_from_changing_memory(client: &mut Client, random: &mut Random, time: Duration) {
    const LEN: usize = 64 << 10;
    let end = Instant::now() + time;
    while Instant::now() < end {
        let writes = Request::writes(BATCH, LEN);
        client.send(0, &writes);
        let mut done = 0;
        while done < writes.len() {
            client.memory(0)[..BATCH * LEN].fill(random.mask());
            done += client.poll(0, 0).len();
        }
    }
}

/// How long requests took.
#[derive(Debug, Default)]
pub struct Latencies(Vec<Duration>);

impl Latencies {
    /// The time that `percent` of 100 requests did not exceed.
    pub fn percentile(&mut self, percent: usize) -> Duration {
        self.0.sort_unstable();
        self.0[(self.0.len() * percent / 100).min(self.0.len() - 1)]
    }

    /// How many requests there were.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        self.0.iter().max().copied().unwrap_or_default()
    }
}

/// Which requests [`one_by_one`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Reads,
    /// Writes.
    Writes,
}

/// Random requests of one block within `blocks`, at least one and one at a time, until `is_enough`,
/// which gets their number. None may fail.
pub fn one_by_one(
    client: &mut Client,
    kind: Kind,
    blocks: Range<u64>,
    random: &mut Random,
    mut is_enough: impl FnMut(usize) -> bool,
) -> Latencies {
    let mut latencies = Latencies::default();
    loop {
        let offset = random.within(blocks.clone()) * BLOCK_BYTES;
        let began = Instant::now();
        let result = if kind == Kind::Writes {
            client.write(0, offset, &[random.mask(); BLOCK])
        } else {
            client.read(0, offset, BLOCK).map(drop)
        };
        assert_eq!(result, Ok(()), "at byte {offset}");
        latencies.0.push(began.elapsed());
        if is_enough(latencies.count()) {
            return latencies;
        }
    }
}

/// In how many bytes the images differ from the first.
pub fn bytes_that_differ(images: &[PathBuf]) -> usize {
    let mut contents = images
        .iter()
        .map(|image| std::fs::read(image).expect("reading an image"));
    let first = contents.next().expect("at least one image");
    contents
        .map(|other| {
            first
                .iter()
                .zip(&other)
                .filter(|(left, right)| left != right)
                .count()
        })
        .sum()
}

/// Prints a measured figure.
pub fn figure(row: &str, value: &str) {
    println!("figure: {row}: {value}");
}
