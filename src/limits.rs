//! Every bound of the program in one place.
//!
//! Each queue, pool and table that a guest, a client or a failing file could make grow has its
//! limit here, with the reason for the figure.

use std::time::Duration;

/// Bytes in a sector: virtio's unit and the unit of the vote (virtio 1.3, 5.2.2).
pub const SECTOR_BYTES: u64 = 512;

/// Frontends connected at the same time; another one is turned away. A migration on one host needs
/// two: the destination connects while the source still runs.
pub const CONNECTIONS_MAX: usize = 4;

/// Replicas of one disk. A set of replicas is a 32-bit mask.
pub const REPLICAS_MAX: usize = 32;

/// How long after a replica was removed and closed its place is not taken by another one: longer
/// than its last events take to be sent.
pub const PLACE_RESTS: Duration = Duration::from_millis(2 * EVENT_WINDOW_MS);

/// Virtqueues of the device; vhost-user allows more, no guest has use for them.
pub const QUEUES_MAX: u16 = 64;

/// Entries of one virtqueue (virtio 1.3, 2.7: a power of two, at most 32768; QEMU stops at 1024).
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Data segments of one guest request, `seg_max` of the config space: with the header and the
/// status descriptor a request fills the 128 entries of QEMU's default queue.
pub const SEGMENTS_MAX: u32 = 126;

/// Bytes of one fragment of a guest request. A longer request is served in fragments, each voted on
/// its own, so that a guest can not make the backend hold more than fragments of this size.
pub const FRAGMENT_BYTES_MAX: u64 = 1 << 20;

/// Bytes of one fragment of a discard or write-zeroes request. It needs no buffer, but a replica
/// that can only write zeroes must get them written well within `--replica-timeout`, and its range
/// is locked meanwhile.
pub const ZERO_BYTES_MAX: u64 = 8 << 20;

/// Fragments of one discard or write-zeroes request in flight at a time, so that a large one does
/// not keep everything else waiting, and no replica late.
pub const ZERO_FRAGMENTS_IN_FLIGHT_MAX: usize = 4;

/// Sectors of one segment of a discard or write-zeroes request: `max_discard_sectors` and
/// `max_write_zeroes_sectors` of the config space. 2 GiB, as QEMU allows.
pub const ZERO_SECTORS_MAX: u32 = 1 << 22;

/// Segments of one discard or write-zeroes request: `max_discard_seg` and `max_write_zeroes_seg`.
pub const ZERO_SEGMENTS_MAX: u32 = 32;

/// Runs of bad sectors named in one event; more are counted, not listed.
pub const BAD_SECTOR_RUNS_MAX: usize = 16;

/// Events of one kind (event, replica, operation, errno) sent one by one within
/// [`EVENT_WINDOW_MS`]; what comes above is folded into one event with a count.
pub const EVENT_BURST: u32 = 128;

/// Length of the window over which events of one kind are counted, in milliseconds.
pub const EVENT_WINDOW_MS: u64 = 1000;

/// Readers of the event socket served at the same time; another one is turned away.
pub const EVENT_READERS_MAX: usize = 64;

/// Bytes kept for one reader of events that does not keep up. What does not fit is counted as
/// missed.
pub const EVENT_READER_BACKLOG_BYTES: usize = 256 << 10;

/// Clients of the monitor served at the same time; another one is turned away.
pub const QMP_CLIENTS_MAX: usize = 16;

/// Bytes of one message to the monitor. A client that sends a longer one is dropped.
pub const QMP_MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Bytes of one line that `quorum-blkctl` takes from a monitor: a map of 32 replicas in 1024
/// buckets each has half of it.
pub const CLIENT_LINE_BYTES_MAX: usize = 8 << 20;

/// Ends of jobs that `quorum-blkctl` keeps while it waits for something else.
pub const CLIENT_EVENTS_KEPT_MAX: usize = 256;

/// Connections on which metrics are served at the same time; others wait in the kernel.
pub const METRICS_CONNECTIONS_MAX: usize = 4;

/// Bytes of one request for metrics.
pub const METRICS_REQUEST_BYTES_MAX: usize = 8 << 10;

/// Time in which a client must have sent its request for metrics and taken the answer.
pub const METRICS_LIMIT: Duration = Duration::from_secs(5);

/// Buckets of the map that tells where a replica was bad: more than a line of a terminal has
/// characters.
pub const MAP_BUCKETS: usize = 1024;

/// Ranges kept apart of what is damaged on a replica; above it neighbours are joined.
pub const MAP_RANGES_MAX: usize = 1024;

/// Ranges of a kind that `query-quorum-map` lists for a replica, the longest.
pub const MAP_RANGES_LISTED_MAX: usize = 64;

/// Ranges kept apart in one [`RangeSet`](crate::common::ranges::RangeSet); above it neighbours are
/// joined.
pub const RANGES_MAX: usize = 16 << 10;

/// Requests that one engine works on at a time, background checks included. At the bound no more is
/// taken from the guest until some are retired.
pub const REQUESTS_MAX: usize = 2048;

/// Bytes of private buffers that one worker lends to the kernel at a time. At the bound no more is
/// taken from the guest until some are back.
pub const BUFFER_BYTES_MAX: u64 = 512 << 20;

/// Bytes of free buffers that a worker keeps for reuse.
pub const BUFFER_BYTES_KEPT: usize = 64 << 20;

/// Bytes of buffers of one length that a worker has registered with its io_uring, for each of the
/// lengths from 4 KiB to 64 KiB; of those of 4 KiB twice as many. They are pinned: without
/// privilege RLIMIT_MEMLOCK counts them, and where it is too low there are none.
pub const ARENA_SHARE_BYTES: usize = 1 << 20;

/// Entries of the io_uring submission queue of one worker. More operations than this are in flight
/// in several submissions.
pub const RING_ENTRIES: u32 = 1024;

/// Regions of guest memory. QEMU's own limit, from what KVM once allowed.
pub const MEMORY_SLOTS_MAX: usize = 509;

/// Operations that one worker leaves with a replica while it goes on asking it in reads. Above that
/// the replica lags, and reads do without it until it has caught up.
pub const LAG_OPERATIONS_MAX: usize = 256;

/// The same in bytes.
pub const LAG_BYTES_MAX: u64 = 64 << 20;

/// Reads of one worker that are being repeated under a lock. At the bound no more is taken from the
/// guest.
pub const CONFIRMATIONS_MAX: usize = 256;

/// Fragments of requests that one turn of a worker takes. What is read from the page cache is there
/// when the turn's system call returns: a small batch is still in the cache of the processor then,
/// and its guest makes new requests while the next one is served.
pub const BATCH_MAX: usize = 16;

/// Bytes that one turn of a worker takes, but for the last of its fragments.
pub const BATCH_BYTES_MAX: u64 = 256 << 10;

/// Turns of a worker after which it tells drivers of what is done, even if they have enough in
/// flight to be told later.
pub const UNSIGNALLED_TURNS_MAX: usize = 8;

/// How long a worker looks for work before it sleeps, in microseconds, where that has been worth
/// it.
pub const SPIN_MICROSECONDS_MAX: u64 = 50;
/// Jobs at a time: a resync of every replica, and as many scrubs. Also how many places of damage
/// are remembered until their neighbourhood is looked at.
pub const JOBS_MAX: usize = 64;

/// Chunks of a job in flight at a time while the guest has no use for the disk.
pub const JOB_CHUNKS_IN_FLIGHT_MAX: usize = 4;

/// The longest pause of a job for the guest's sake: it is never starved.
pub const JOB_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Flushes that may fail before a resync is given up.
pub const FAILED_FLUSHES_MAX: u32 = 3;

/// How far around damage the disk is scrubbed at once, on either side.
pub const NEIGHBOURHOOD_BYTES: u64 = 4 << 20;

/// For how long what was scrubbed near to damage is not scrubbed again for the same reason: a guest
/// may read what is damaged over and over, and nobody may mend it.
pub const NEIGHBOURHOOD_REST: Duration = Duration::from_secs(60);

/// How often a worker looks for slow replicas while requests are in flight, in microseconds.
pub const TICK_MICROSECONDS: u64 = 2000;

/// How long a ring that is stopped waits for the replicas, and the whole daemon when it ends. After
/// `replica_timeout` a replica that nobody needs is out of the set, and what waited for it goes on
/// with the others, which have as long once more. What is in flight even then is abandoned.
pub fn drain_limit(replica_timeout: Duration) -> Duration {
    replica_timeout
        .saturating_mul(2)
        .saturating_add(Duration::from_secs(1))
}

/// How long a ring waits after a restart for other rings, until these have begun again what was in
/// flight there. A frontend starts its rings one right after the other; one that never starts again
/// must not hold up the rest.
pub const RESUBMIT_LIMIT: Duration = Duration::from_secs(1);

/// How long the daemon waits in the end until what the host's page cache holds is on the disks,
/// which takes its time. Less than the 90 s after which systemd kills a service.
pub const LAST_FLUSH_LIMIT: Duration = Duration::from_secs(60);

/// Bytes of the path of a UNIX socket: `sockaddr_un.sun_path` without its final NUL.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
