//! What the guest does: it writes like a database, in place and at the end of a log, and flushes.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use testkit::client::{Client, Failed, Request};
use testkit::fuse::logged::{Clock, Moment};
use testkit::images::Random;
use testkit::sectors::{SECTOR, number_of};
use testkit::size;

use crate::history::History;

const BLOCK_SECTORS: usize = 8;
/// Bytes of memory for each request of a batch.
const SLOT: usize = 64 << 10;
/// Requests of a batch.
const BATCH_MAX: u64 = 8;

/// A guest on a disk.
pub(crate) struct Guest<'a> {
    socket: PathBuf,
    client: Client,
    clock: Clock,
    history: History,
    random: &'a mut Random,
    sectors: usize,
    /// Where its log continues.
    log_end: usize,
    /// What no disk may do.
    problems: Vec<String>,
}

/// A request in flight.
#[derive(Debug)]
enum Sent {
    Change(Range<usize>, Moment),
    Flush(Moment),
}

impl<'a> Guest<'a> {
    /// Connects to the disk.
    pub(crate) fn connect(
        socket: &Path,
        clock: Clock,
        history: History,
        random: &'a mut Random,
    ) -> Self {
        let client = Client::connect(socket, 1);
        let sectors = usize::try_from(client.capacity_bytes()).expect("small") / SECTOR;
        Self {
            socket: socket.into(),
            client,
            clock,
            history,
            sectors,
            log_end: size(random.within(0..sectors as u64 / 8)) * BLOCK_SECTORS,
            random,
            problems: Vec::new(),
        }
    }

    /// Works for some batches of requests. If it is to `pause`, so long that marks are cleared.
    /// `between` is called before each batch, with its number, and returns the size of the disk.
    pub(crate) fn work(
        &mut self,
        batches: u64,
        pause: Option<Duration>,
        between: &mut dyn FnMut(u64) -> u64,
    ) {
        let pauses_at = self.random.within(0..batches + 1);
        // A database has pages that it writes more often than others.
        let hot = self.random.within(0..self.sectors as u64 / 64 - 8);
        for batch in 0..batches {
            self.notice(between(batch));
            if let Some(pause) = pause.filter(|_| batch == pauses_at) {
                self.flush();
                thread::sleep(pause);
            }
            match self.random.within(0..8) {
                0..2 => self.append(),
                _ => self.write_in_place(hot),
            }
            if self.random.within(0..5) < 2 {
                self.flush();
            }
        }
    }

    /// The disk has grown to so many bytes. With another connection a part of it can be used that
    /// was not there at the first.
    fn notice(&mut self, bytes: u64) {
        let sectors = size(bytes) / SECTOR;
        if sectors > self.sectors {
            self.client = Client::connect(&self.socket, 1);
            self.sectors = sectors;
        }
    }

    /// Reads the whole disk before anything is written, in an order of its own. What it sees must
    /// be permitted, and stays.
    pub(crate) fn look(&mut self) {
        const PART: usize = 128;
        let parts = self.sectors / PART;
        let first = size(self.random.within(0..parts as u64));
        for part in (0..parts).map(|part| (part * 7 + first) % parts) {
            let offset = (part * PART * SECTOR) as u64;
            let Ok(bytes) = self.client.read(0, offset, PART * SECTOR) else {
                let text = format!("{PART} sectors at {offset} cannot be read");
                self.problems.push(text);
                continue;
            };
            let now = self.clock.tick();
            for (bytes, sector) in bytes.chunks_exact(SECTOR).zip(part * PART..) {
                let version = number_of(bytes, sector);
                if !version.is_some_and(|version| self.history.saw(sector, version, now)) {
                    let text = format!("sector {sector} is read as {version:?}");
                    self.problems.push(text);
                }
            }
        }
    }

    /// What it has done and seen, and what is wrong with that.
    pub(crate) fn finish(self) -> (History, Vec<String>) {
        (self.history, self.problems)
    }

    fn append(&mut self) {
        let sectors = size(self.random.within(1..9)) * BLOCK_SECTORS;
        if self.log_end + sectors > self.sectors {
            self.log_end = 0;
        }
        let range = self.log_end..self.log_end + sectors;
        self.log_end = range.end;
        let mut sent = Vec::new();
        let request = self.write(range, 0, &mut sent);
        self.run(&[request], sent);
        self.flush();
    }

    fn write_in_place(&mut self, hot: u64) {
        let count = self.random.within(1..BATCH_MAX + 1);
        let (mut requests, mut sent) = (Vec::new(), Vec::new());
        for slot in 0..size(count) {
            let block = match self.random.within(0..3) {
                0 => self
                    .random
                    .within(0..(self.sectors / BLOCK_SECTORS) as u64 - 8),
                _ => hot * 8 + self.random.within(0..16),
            };
            let start = size(block) * BLOCK_SECTORS;
            let blocks = size(self.random.within(1..5)) * BLOCK_SECTORS;
            let few = size(self.random.within(1..8));
            let request = match self.random.within(0..20) {
                0..14 => self.write(start..start + blocks, slot, &mut sent),
                14..17 => self.write(start + 1..start + 1 + few, slot, &mut sent),
                kind => {
                    let range = start..start + blocks;
                    let now = self.clock.tick();
                    self.history.begin_zero(range.clone(), now);
                    sent.push(Sent::Change(range.clone(), now));
                    let offset = (range.start * SECTOR) as u64;
                    let len = (range.len() * SECTOR) as u64;
                    match kind {
                        17 => Request::Discard { offset, len },
                        _ => Request::WriteZeroes {
                            offset,
                            len,
                            unmap: kind == 18,
                        },
                    }
                }
            };
            requests.push(request);
        }
        if self.random.within(0..3) == 0 {
            requests.push(Request::Flush);
            sent.push(Sent::Flush(self.clock.tick()));
        }
        self.run(&requests, sent);
    }

    fn write(&mut self, range: Range<usize>, slot: usize, sent: &mut Vec<Sent>) -> Request {
        let (memory, len) = (slot * SLOT, range.len() * SECTOR);
        let now = self.clock.tick();
        let data = &mut self.client.memory(0)[memory..memory + len];
        self.history.begin_write(range.clone(), data, now);
        let offset = (range.start * SECTOR) as u64;
        sent.push(Sent::Change(range, now));
        Request::Write {
            offset,
            memory,
            len,
        }
    }

    fn flush(&mut self) {
        let begin = self.clock.tick();
        self.run(&[Request::Flush], vec![Sent::Flush(begin)]);
    }

    /// Sends requests and waits for all of them.
    fn run(&mut self, requests: &[Request], mut sent: Vec<Sent>) {
        self.client.send(0, requests);
        let mut waiting = requests.len();
        while waiting > 0 {
            for (index, result) in self.client.poll(0, 1) {
                waiting -= 1;
                let now = self.clock.tick();
                self.answered(&mut sent[index], result, now);
            }
        }
    }

    /// What failed may have happened or not: nothing is known of it.
    fn answered(&mut self, sent: &mut Sent, result: Result<(), Failed>, now: Moment) {
        match (sent, result) {
            (Sent::Change(range, begin), Ok(())) => {
                self.history.end_write(range.clone(), *begin, now);
            }
            (Sent::Flush(begin), Ok(())) => self.history.flushed(*begin, now),
            (sent, Err(failed)) => {
                let text = format!("{sent:?} fails: {failed:?}");
                self.problems.push(text);
            }
        }
    }
}
