//! The rows of the benchmark.

use std::fmt;

/// Bytes of an image: small enough that the largest working set fits memory several times.
pub const IMAGE_BYTES: u64 = 256 << 20;

/// Where the images are, and how they are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// On a directory's file system, through the page cache, which holds all of them.
    Cache,
    /// On /dev/shm.
    Tmpfs,
    /// In the same directory, with O_DIRECT.
    Disk,
}

impl Storage {
    /// Every kind of storage.
    pub const ALL: [Self; 3] = [Self::Cache, Self::Tmpfs, Self::Disk];

    /// The name in the name of a row.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cache => "cache",
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
        }
    }

    /// The name in the report.
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
    /// As many as make a quorum are read. The peer has no such mode.
    Threshold,
}

/// What the requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads and writes at random offsets.
    Random {
        /// Share of reads, 0 to 100.
        reads_percent: u64,
    },
    /// Reads at ascending offsets.
    SequentialReads,
    /// Writes at ascending offsets.
    SequentialWrites,
    /// Writes at random offsets, each followed by a flush; the two count as one request.
    WriteAndFlush,
}

/// A load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// The name in the name of a row, in fio's words.
    pub name: &'static str,
    /// The name in the report.
    pub title: &'static str,
    /// What the requests do.
    pub access: Access,
    /// Bytes of a request.
    pub len: usize,
    /// Requests in flight on each queue.
    pub depth: usize,
}

impl Pattern {
    /// Whether the result is in bytes, not requests, a second.
    pub fn is_sequential(&self) -> bool {
        matches!(
            self.access,
            Access::SequentialReads | Access::SequentialWrites
        )
    }
}

/// One row of the result: a load on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Where the images are.
    pub storage: Storage,
    /// The number of replicas, N.
    pub replicas: usize,
    /// The number of queues, each with a thread of the client.
    pub queues: usize,
    /// How quorum-blkd serves reads.
    pub read_pattern: ReadPattern,
    /// The load.
    pub pattern: Pattern,
}

impl Row {
    /// The vote threshold: more than half of the replicas.
    pub fn threshold(&self) -> usize {
        self.replicas / 2 + 1
    }

    /// The number of replicas that a read asks while they agree.
    pub fn replicas_read(&self) -> usize {
        match self.read_pattern {
            ReadPattern::Quorum => self.replicas,
            ReadPattern::Threshold => self.threshold(),
        }
    }

    /// Whether the load writes.
    pub fn writes(&self) -> bool {
        !matches!(
            self.pattern.access,
            Access::SequentialReads | Access::Random { reads_percent: 100 }
        )
    }

    /// Whether it belongs to the main disk, on which every load is measured: three replicas, one
    /// queue.
    pub fn is_main(&self) -> bool {
        (self.replicas, self.queues, self.read_pattern) == (3, 1, ReadPattern::Quorum)
    }

    /// The disk, in words.
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

/// The name of the row: `cache/3x/randread/32`, `tmpfs/3x/2q/randwrite/32`,
/// `cache/3x/threshold/randread/1`.
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

/// Whether the load is also measured with other numbers of replicas and queues.
pub fn is_varied(pattern: &Pattern) -> bool {
    matches!(
        (pattern.name, pattern.depth),
        ("randread", _) | ("randwrite", 32) | ("read-1m", _)
    )
}

/// Every row, in the order of measurement: by storage, then by falling number of replicas, because
/// images that a smaller disk has written to differ from the others.
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
            // On a disk, storage limits all systems: other disks would show no difference.
            let is_wanted = |row: &Row| {
                let differs = row.storage != Storage::Disk && is_varied(&row.pattern);
                row.is_main() || differs && (row.read_pattern == Quorum || !row.writes())
            };
            rows.extend(patterns().into_iter().map(row).filter(is_wanted));
        }
    }
    rows
}
