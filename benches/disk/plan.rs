//! What is measured: every row of the benchmark.

use std::fmt;

/// Bytes of an image, so that the largest working set fits memory several times.
pub const IMAGE_BYTES: u64 = 256 << 20;

/// Where the images lie, and how they are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// A directory's file system, through the page cache, which holds all of it.
    Cache,
    /// /dev/shm.
    Tmpfs,
    /// The same directory with O_DIRECT.
    Disk,
}

impl Storage {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cache, Self::Tmpfs, Self::Disk];

    /// As a row names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cache => "cache",
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
        }
    }

    /// For a reader.
    pub fn title(self) -> &'static str {
        match self {
            Self::Cache => "page cache",
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk (O_DIRECT)",
        }
    }
}

/// How reads are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadPattern {
    /// All replicas are read.
    Quorum,
    /// As many as make a quorum. The peer has nothing like it.
    Threshold,
}

/// What requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads and writes anywhere, so many of 100 being reads.
    Random {
        /// 0 to 100.
        reads_percent: u64,
    },
    /// Reads, one after the other on the disk.
    SequentialReads,
    /// Writes, one after the other on the disk.
    SequentialWrites,
    /// Writes anywhere, with a flush after each; the two together count as one request.
    WriteAndFlush,
}

/// A load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// As a row names it, in fio's words.
    pub name: &'static str,
    /// For a reader.
    pub title: &'static str,
    /// What requests do.
    pub access: Access,
    /// Bytes of a request.
    pub len: usize,
    /// Requests in flight on each queue.
    pub depth: usize,
}

impl Pattern {
    /// Is it measured in bytes rather than requests a second?
    pub fn is_sequential(&self) -> bool {
        matches!(
            self.access,
            Access::SequentialReads | Access::SequentialWrites
        )
    }
}

/// One line of the result: a load on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// What the images lie on.
    pub storage: Storage,
    /// How many replicas, N.
    pub replicas: usize,
    /// How many queues, each with a thread of the client.
    pub queues: usize,
    /// How reads are served by ours.
    pub read_pattern: ReadPattern,
    /// The load.
    pub pattern: Pattern,
}

impl Row {
    /// More than half.
    pub fn threshold(&self) -> usize {
        self.replicas / 2 + 1
    }

    /// Replicas that a read needs when they agree.
    pub fn replicas_read(&self) -> usize {
        match self.read_pattern {
            ReadPattern::Quorum => self.replicas,
            ReadPattern::Threshold => self.threshold(),
        }
    }

    /// Does the load write?
    pub fn writes(&self) -> bool {
        !matches!(
            self.pattern.access,
            Access::SequentialReads | Access::Random { reads_percent: 100 }
        )
    }

    /// Is it of the disk on which everything is measured: three replicas, one queue?
    pub fn is_main(&self) -> bool {
        (self.replicas, self.queues, self.read_pattern) == (3, 1, ReadPattern::Quorum)
    }

    /// The disk, for a reader.
    pub fn disk(&self) -> String {
        let mut text = format!("{} replica", self.replicas);
        if self.replicas > 1 {
            text += "s";
        }
        if self.queues > 1 {
            text += &format!(", {} queues", self.queues);
        }
        if self.read_pattern == ReadPattern::Threshold {
            text += ", read-pattern threshold";
        }
        text
    }
}

/// Its name: `cache/3x/randread/32`, `tmpfs/3x/2q/randwrite/32`, `cache/3x/threshold/randread/1`.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}x/", self.storage.name(), self.replicas)?;
        if self.queues > 1 {
            write!(f, "{}q/", self.queues)?;
        }
        if self.read_pattern == ReadPattern::Threshold {
            f.write_str("threshold/")?;
        }
        write!(f, "{}/{}", self.pattern.name, self.pattern.depth)
    }
}

/// Every load, in the order of the tables.
pub fn patterns() -> Vec<Pattern> {
    let random = [
        ("randread", "4 KiB random reads", 100),
        ("randwrite", "4 KiB random writes", 0),
        ("randrw", "4 KiB random, 70 % reads", 70),
    ];
    let random = random.into_iter().flat_map(|(name, title, reads_percent)| {
        [1, 32, 128].map(|depth| Pattern {
            name,
            title,
            access: Access::Random { reads_percent },
            len: 4 << 10,
            depth,
        })
    });
    let flush = Pattern {
        name: "write-flush",
        title: "4 KiB write, then flush",
        access: Access::WriteAndFlush,
        len: 4 << 10,
        depth: 1,
    };
    let (reads, writes) = (Access::SequentialReads, Access::SequentialWrites);
    let sequential = [
        ("read-128k", "128 KiB sequential reads", reads, 128 << 10),
        ("write-128k", "128 KiB sequential writes", writes, 128 << 10),
        ("read-1m", "1 MiB sequential reads", reads, 1 << 20),
        ("write-1m", "1 MiB sequential writes", writes, 1 << 20),
    ];
    let sequential = sequential.map(|(name, title, access, len)| Pattern {
        name,
        title,
        access,
        len,
        depth: 8,
    });
    random.chain([flush]).chain(sequential).collect()
}

/// Is the load also measured with other numbers of replicas and queues?
pub fn is_varied(pattern: &Pattern) -> bool {
    matches!(
        (pattern.name, pattern.depth),
        ("randread", _) | ("randwrite", 32) | ("read-1m", _)
    )
}

/// Every row, in the order in which they are measured: by storage, then by falling number of
/// replicas, because images that a smaller disk has written to are no longer equal to the others.
pub fn rows() -> Vec<Row> {
    use ReadPattern::{Quorum, Threshold};
    let disks = [
        (5, 1, Quorum),
        (3, 1, Quorum),
        (3, 2, Quorum),
        (3, 1, Threshold),
        (1, 1, Quorum),
    ];
    let mut rows = Vec::new();
    for storage in Storage::ALL {
        for (replicas, queues, read_pattern) in disks {
            let row = |pattern| Row {
                storage,
                replicas,
                queues,
                read_pattern,
                pattern,
            };
            // A disk is slower than anything that the others could show.
            let is_wanted = |row: &Row| {
                let differs = row.storage != Storage::Disk && is_varied(&row.pattern);
                row.is_main() || differs && (row.read_pattern == Quorum || !row.writes())
            };
            rows.extend(patterns().into_iter().map(row).filter(is_wanted));
        }
    }
    rows
}
