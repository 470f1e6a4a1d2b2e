//! Every bound of the program in one place.
//!
//! Each queue, pool and table that a guest, a client or a failing file could make grow has its
//! limit here, with the reason for the figure.

use std::time::Duration;

/// Bytes in a sector: virtio's unit and the unit of the vote (virtio 1.3, 5.2.2).
pub const SECTOR_BYTES: u64 = 512;

/// Frontends connected at the same time; a further connection is closed. A migration on one host
/// needs two: the destination connects while the source still runs.
pub const CONNECTIONS_MAX: usize = 4;

/// Descriptors that one frontend may hold: three for each virtqueue, those of one message twice,
/// its socket, its back channel, the dirty log and the inflight region.
pub const DESCRIPTORS_OF_FRONTEND: u64 = 3 * QUEUES_MAX as u64 + 2 * 253 + 16;

/// Descriptors that no frontend gets: for all clients of the monitor, readers of events, clients of
/// the metrics and images that are opened, and for what frontends pass while they are refused.
pub const DESCRIPTORS_RESERVED: u64 = 256;

/// Descriptors that the process may need: also for the workers, and for images and their records.
pub const DESCRIPTORS_NEEDED: u64 = CONNECTIONS_MAX as u64 * DESCRIPTORS_OF_FRONTEND
    + DESCRIPTORS_RESERVED
    + 8 * QUEUES_MAX as u64
    + 4 * REPLICAS_MAX as u64;

/// Replicas of one disk. A set of replicas is a 32-bit mask.
pub const REPLICAS_MAX: usize = 32;

/// How long the index of a removed and closed replica stays unused: longer than the replica's last
/// events take to be sent, since events carry the index until then.
pub const PLACE_RESTS: Duration = Duration::from_millis(2 * EVENT_WINDOW_MS);

/// Virtqueues of the device. vhost-user allows more, but no guest uses them.
pub const QUEUES_MAX: u16 = 64;

/// Entries of one virtqueue (virtio 1.3, 2.7: a power of two, at most 32768; QEMU stops at 1024).
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Descriptors of one chain that are looked at. A chain has no more than its virtqueue has entries
/// (virtio 1.3, 2.7.5.3.1), but a driver that breaks this rule waits for the status at the end.
pub const CHAIN_DESCRIPTORS_MAX: u16 = 4096;

/// Data segments of one guest request, `seg_max` of the config space: with the header and the
/// status descriptor a request fills the 128 entries of QEMU's default queue.
pub const SEGMENTS_MAX: u32 = 126;

/// Bytes of one fragment of a guest request. A longer request is served in fragments, each voted on
/// its own, so that a guest cannot make the backend hold larger buffers.
pub const FRAGMENT_BYTES_MAX: u64 = 1 << 20;

/// Bytes of one fragment of a discard or write-zeroes request. It needs no buffer, but it locks its
/// range, and a replica that can only write zeroes must write them well within `--replica-timeout`.
pub const ZERO_BYTES_MAX: u64 = 8 << 20;

/// Bytes that one fallocate zeroes. A device without hardware support writes that many, and what
/// else waits for it waits as long.
pub const ZERO_STEP_BYTES: usize = 4 << 20;

/// Fragments of one discard or write-zeroes request in flight at a time, so that a large request
/// delays no other one and gets no replica evicted.
pub const ZERO_FRAGMENTS_IN_FLIGHT_MAX: usize = 4;

/// Sectors of one segment of a discard or write-zeroes request: `max_discard_sectors` and
/// `max_write_zeroes_sectors` of the config space. 2 GiB, as QEMU allows.
pub const ZERO_SECTORS_MAX: u32 = 1 << 22;

/// Segments of one discard or write-zeroes request: `max_discard_seg` and `max_write_zeroes_seg`.
pub const ZERO_SEGMENTS_MAX: u32 = 32;

/// Runs of corrupt sectors listed in one event; further runs are counted only.
pub const BAD_SECTOR_RUNS_MAX: usize = 16;

/// Events of one kind (event, replica, operation, errno) sent one by one within
/// [`EVENT_WINDOW_MS`]; the rest are folded into one event with a count.
pub const EVENT_BURST: u32 = 128;

/// Length of the window over which events of one kind are counted, in milliseconds.
pub const EVENT_WINDOW_MS: u64 = 1000;

/// Readers of the event socket served at the same time; a further connection is closed.
pub const EVENT_READERS_MAX: usize = 64;

/// Bytes queued for a reader of events that does not keep up. Events that do not fit are counted as
/// missed.
pub const EVENT_READER_BACKLOG_BYTES: usize = 256 << 10;

/// Clients of the monitor served at the same time; a further connection is closed.
pub const QMP_CLIENTS_MAX: usize = 16;

/// Bytes of one message to the monitor. A client that sends a longer one is disconnected.
pub const QMP_MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Bytes of one line that `quorum-blkctl` accepts from a monitor: twice as long as a map of 32
/// replicas in 1024 buckets each.
pub const CLIENT_LINE_BYTES_MAX: usize = 8 << 20;

/// Job events that `quorum-blkctl` queues while it waits for a reply.
pub const CLIENT_EVENTS_KEPT_MAX: usize = 256;

/// Time in which the daemon must have answered a `quorum-blkctl` that completes a command line.
pub const CLIENT_COMPLETION_LIMIT: Duration = Duration::from_secs(1);

/// Connections on which metrics are served at the same time; further ones wait in the kernel.
pub const METRICS_CONNECTIONS_MAX: usize = 4;

/// Bytes of one HTTP request for metrics.
pub const METRICS_REQUEST_BYTES_MAX: usize = 8 << 10;

/// Time in which a client must have sent its request for metrics and received the response.
pub const METRICS_LIMIT: Duration = Duration::from_secs(5);

/// Buckets of the map of corruption and errors: more than a terminal has columns.
pub const MAP_BUCKETS: usize = 1024;

/// Bytes of log lines that wait until stderr takes them. Lines that do not fit are dropped; those
/// for debugging may fill half of it.
pub const LOG_QUEUE_BYTES_MAX: usize = 256 << 10;

/// How long the end of the process waits until they are written.
pub const LOG_FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Log lines of one kind, which frontends, guests or clients can cause, in one [`LOG_WINDOW`].
pub const LOG_BURST: u32 = 32;

/// See [`LOG_BURST`].
pub const LOG_WINDOW: Duration = Duration::from_secs(30);

/// Jobs that have ended and whose results are kept.
pub const ENDED_JOBS_MAX: usize = 32;

/// Runs of sectors of one kind that a job lists for a replica; further ones are counted only.
pub const JOB_PLACES_MAX: usize = 16;

/// Ranges of one kind that `query-quorum-map` lists for a replica: the longest ones.
pub const MAP_RANGES_LISTED_MAX: usize = 64;

/// Changes of what is fresh where, beyond which a decision on an earlier state is made again: as
/// many as take less than 100 µs to look at.
pub const CHANGES_SINCE_SNAPSHOT_MAX: usize = 512;

/// Requests that one engine works on at a time, those of jobs included. At the bound the worker
/// takes no more from the guest until some are retired.
pub const REQUESTS_MAX: usize = 2048;

/// Default of `--memory-max`: bytes of private buffers that the requests of all workers may use at
/// a time, and that are kept for reuse. At the bound a worker takes no more from the guest until
/// some are free.
pub const BUFFER_BYTES_MAX: u64 = 512 << 20;

/// Bytes of free buffers that a worker keeps for reuse, within [`BUFFER_BYTES_MAX`].
pub const BUFFER_BYTES_KEPT: usize = 64 << 20;

/// Bytes of buffers of one length that a worker has registered with its io_uring, for each length
/// from 4 KiB to 64 KiB; for 4 KiB twice as much. The kernel pins them: for a process without
/// CAP_IPC_LOCK they count towards RLIMIT_MEMLOCK, and if that is too low, none are registered.
pub const ARENA_SHARE_BYTES: usize = 1 << 20;

/// Entries of the io_uring submission queue of one worker. More operations than this need several
/// submissions.
pub const RING_ENTRIES: u32 = 1024;

/// Threads of one worker for one replica, with `--aio threads`. What is more waits for them.
pub const REPLICA_THREADS_MAX: usize = 16;

/// Regions of guest memory. QEMU's own limit, from what KVM once allowed.
pub const MEMORY_SLOTS_MAX: usize = 509;

/// How long a frontend may leave a reply unread that the socket has no room for.
pub const REPLY_LIMIT: Duration = Duration::from_secs(1);

/// How long the end of a connection waits until what the frontend has passed is closed.
pub const CLOSE_LIMIT: Duration = Duration::from_millis(200);

/// Threads that may hang in closing what frontends have passed.
pub const CLOSING_THREADS_MAX: usize = 64;

/// Memory that one frontend may share at a time, in bytes: all of them together do not use up the
/// addresses of a process. Memory that is replaced counts until no worker uses it any more.
pub const MAPPED_BYTES_MAX: u64 = 16 << 40;

/// Mappings of one frontend at a time: as many regions of guest memory as it may have, twice while
/// they are replaced, the dirty log and the inflight region.
pub const MAPPINGS_MAX: usize = 2 * MEMORY_SLOTS_MAX + 4;

/// Operations of one worker that a replica may have in flight and still be asked in reads. Above
/// this the replica lags, and reads do not ask it until it has caught up.
pub const LAG_OPERATIONS_MAX: usize = 256;

/// The same bound in bytes.
pub const LAG_BYTES_MAX: u64 = 64 << 20;

/// Reads of one worker that are being confirmed under a range lock. At the bound the worker takes
/// no more from the guest.
pub const CONFIRMATIONS_MAX: usize = 256;

/// Parts of a range that a replica may fail to read, beyond eight for each part that it can read,
/// before a job or a repair gives up on the rest: a range, its quarters and their quarters.
pub const FAILED_PARTS_MAX: u64 = 20;

/// The same for a job: down to parts of 16 KiB, of which there are 4 + 16 + 64 in 1 MiB. One
/// unreadable block in each of them costs no other block its copy.
pub const FAILED_PARTS_JOB_MAX: u64 = 100;

/// Ranges on which the jobs of one worker search a replica that far in vain. After that, one more
/// for each [`LONG_SEARCHES_EVERY`].
pub const LONG_SEARCHES_BURST: u32 = 16;

/// See [`LONG_SEARCHES_BURST`].
pub const LONG_SEARCHES_EVERY: Duration = Duration::from_secs(1);

/// Reads of the guest on which a replica may fail and which one worker follows up: with
/// `rewrite-corrupted` a repair, in any case a scrub of the surroundings. A replica that fails
/// every read must not cost the others many times its reads.
pub const FOLLOWED_ERRORS_BURST: u32 = 128;

/// After that, one more for each such time.
pub const FOLLOWED_ERRORS_EVERY: Duration = Duration::from_millis(250);

/// For how long none is followed up after a repair of the replica has failed.
pub const FOLLOWED_ERRORS_REST: Duration = Duration::from_secs(60);

/// Fragments of requests that one turn of a worker takes. Reads from the page cache are done when
/// the turn's system call returns. A small batch is then still in the processor's cache, and the
/// guest makes new requests while the next batch is served.
pub const BATCH_MAX: usize = 16;

/// Bytes after which one turn of a worker takes no further fragment.
pub const BATCH_BYTES_MAX: u64 = 256 << 10;

/// Turns of a worker after which it signals drivers, even if they have enough in flight to be
/// signalled later.
pub const UNSIGNALLED_TURNS_MAX: usize = 8;

/// How long a worker polls for work before it sleeps, in microseconds, where that has paid off
/// recently.
pub const SPIN_MICROSECONDS_MAX: u64 = 50;

/// How long a worker sleeps between two looks at virtqueues whose drivers do not kick, in
/// microseconds: after a request, and after none for a while.
pub const POLL_MICROSECONDS_MIN: u64 = 50;
/// See [`POLL_MICROSECONDS_MIN`].
pub const POLL_MICROSECONDS_MAX: u64 = 1600;

/// Jobs at a time: a resync of every replica, and as many scrubs. Also the number of corrupt ranges
/// remembered until their neighbourhood is scrubbed.
pub const JOBS_MAX: usize = 64;

/// Chunks of a job in flight at a time while the guest does not use the disk.
pub const JOB_CHUNKS_IN_FLIGHT_MAX: usize = 4;

/// The same for a recovery of which those in flight are short: of all that is unrecovered, it reads
/// a block here and there.
pub const RECOVERY_CHUNKS_IN_FLIGHT_MAX: usize = 32;

/// For how long a recovery takes half of the time for itself, however busy the guest is. Then it is
/// as slow as any job.
pub const RECOVERY_PRIORITY: Duration = Duration::from_secs(30);

/// The longest pause that a job makes for the guest, so that the job is never starved.
pub const JOB_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Bytes for which a scrub asks at a time where the replicas have holes: short enough for the job
/// to be paused or cancelled in between.
pub const HOLE_BYTES_MAX: u64 = 1 << 30;

/// The same for a resync and a recovery, which lock the range meanwhile: a guest that writes there
/// waits as long as the answers take.
pub const HOLE_LOCK_BYTES_MAX: u64 = 64 << 20;

/// How long an answer may take where the file system is slow to find where data begins and ends.
/// Then it has what is known, of one run of data at least.
pub const HOLES_ANSWER_TIME: Duration = Duration::from_millis(2);

/// Runs of data in one answer.
pub const HOLES_PER_ANSWER_MAX: usize = 256;

/// A hole between data that is shorter is read with it: that takes no longer than a read of its
/// own.
pub const HOLE_BYTES_MIN: u64 = 32 << 10;

/// Bytes that a job reads where it has found no hole, before it asks for the next one. Twice as
/// many each time that there was none. So much is not asked for: it is read.
pub const HOLE_READ_BYTES_MIN: u64 = 1 << 20;

/// And at most so many: where there are no holes, the questions cost nothing in comparison.
pub const HOLE_READ_BYTES_MAX: u64 = 256 << 20;

/// While the guest waits for a replica longer than the limit of the operation, jobs begin one chunk
/// in so many replica timeouts.
pub const JOB_GIVES_WAY: u32 = LATE_LONG_LIMIT;

/// Failed flushes after which a resync ends with an error.
pub const FAILED_FLUSHES_MAX: u32 = 3;

/// Default of `--scrub-around`: how much of the disk is scrubbed on either side of corruption.
pub const NEIGHBOURHOOD_BYTES: u64 = 4 << 20;

/// The least value of `--repair-limit`: a block.
pub const REPAIR_LIMIT_MIN: u64 = 4096;

/// For how long a neighbourhood that was scrubbed is not scrubbed again: a guest may read a corrupt
/// range over and over, and it may never be repaired.
pub const NEIGHBOURHOOD_REST: Duration = Duration::from_secs(60);

/// How often a worker looks for slow replicas while requests are in flight, in microseconds.
pub const TICK_MICROSECONDS: u64 = 2000;

/// A flush or a zeroing may take so many times the replica timeout before the replica is late, and
/// background work evicts a replica that has ended nothing at all for as long: a flush may have to
/// write back much of the page cache.
pub const LATE_LONG_LIMIT: u32 = 10;

/// A replica may need twice as long as its peers have needed, up to so many times the limit of the
/// operation.
pub const LATE_MOST: u32 = 10;

/// The longest that a replica may keep an operation if it is not needed, whatever else it does and
/// however slow its peers are, in replica timeouts.
pub const LATE_PATIENCE_MOST: u32 = LATE_LONG_LIMIT * LATE_MOST;

/// How long a virtqueue that is being stopped, or the whole daemon at its end, waits for replicas.
/// After `replica_timeout` a replica that is not needed is evicted. Requests that waited for it
/// continue with the others, which get the same time once more. Then the remaining requests are
/// abandoned, unless a replica is at something long (see [`drain_overtime`]).
pub fn drain_limit(replica_timeout: Duration) -> Duration {
    replica_timeout
        .saturating_mul(2)
        .saturating_add(Duration::from_secs(1))
}

/// How much longer that is as long as a replica in service has a flush or a zeroing in flight,
/// which may take so long without being late.
pub fn drain_overtime(replica_timeout: Duration) -> Duration {
    replica_timeout.saturating_mul(LATE_LONG_LIMIT)
}

/// Threads that the watchdog watches: workers, frontends, the one that accepts them, the monitor
/// and the events.
pub const WATCHED_THREADS_MAX: usize = QUEUES_MAX as usize + CONNECTIONS_MAX + 3;

/// How often the watchdog looks at the threads.
pub const WATCHDOG_TICK: Duration = Duration::from_secs(1);

/// For how long a thread may not turn before the process aborts. Longer than all that a thread
/// waits for in a turn: [`OPEN_LIMIT`], [`DISK_USE_LIMIT`] and others, and
/// [`drain_limit`] of those who change the replicas.
pub fn watchdog_limit(replica_timeout: Duration) -> Duration {
    let drained = drain_limit(replica_timeout).saturating_add(drain_overtime(replica_timeout));
    drained.saturating_add(Duration::from_secs(60))
}

/// How long a frontend that starts its virtqueues waits until another one has stopped its own.
pub const DISK_USE_LIMIT: Duration = Duration::from_secs(5);

/// How long a frontend that connects waits for the connection of an idle one to end.
pub const GIVE_WAY_LIMIT: Duration = Duration::from_secs(1);

/// How long a virtqueue waits, after a restart, until the other virtqueues have resubmitted their
/// in-flight chains. A frontend starts its virtqueues in quick succession; one that never starts
/// again must not delay the others.
pub const RESUBMIT_LIMIT: Duration = Duration::from_secs(1);

/// How long the daemon waits at its end for the last flush of the replicas, which may have to write
/// back much of the page cache. Less than the 90 s after which systemd kills a service.
pub const LAST_FLUSH_LIMIT: Duration = Duration::from_secs(60);

/// How long threads whose work has ended may take to be gone, before the daemon gives up rights.
pub const THREADS_END_LIMIT: Duration = Duration::from_secs(5);

/// How long the file system of an image may take for each step of opening it: longer than a disk
/// takes to start to spin, and less than the 60 s that `quorum-blkctl` waits for an answer.
pub const OPEN_LIMIT: Duration = Duration::from_secs(20);

/// How long the opening of an image waits for the page cache to forget it: much less than
/// [`OPEN_LIMIT`], because a slow disk may have minutes of writing back to do.
pub const FORGET_LIMIT: Duration = Duration::from_secs(1);

/// Bytes of an image that the page cache forgets at a time, at least: whole pages of any
/// size that is usual, and so few that a process that is killed meanwhile ends soon.
pub const FORGET_BYTES_MIN: u64 = 4 << 20;

/// And in at most about so many calls.
pub const FORGETS_MAX: u64 = 1 << 12;

/// Samples of an image that are taken anywhere when the images of a new disk are compared, and as
/// many where some image has data, besides those at its ends.
pub const FIRST_LOOK_PLACES: usize = 64;

/// How many samples of two images must differ before they are taken for images of different disks.
pub const FIRST_LOOK_DIFFERENT_MIN: usize = 4;

/// Bytes of a record. What one holds depends on the size of the disk, and is less than half of it.
pub const RECORD_BYTES_MAX: u64 = 4 << 20;

/// Bytes of a part of an image that `quorum-blkctl verify` compares at once. It has up to three of
/// them of each image in memory.
pub const VERIFY_CHUNK_BYTES: usize = 512 << 10;

/// Places that `quorum-blkctl verify` keeps of each kind. It counts those that follow.
pub const VERIFY_RANGES_MAX: usize = 1000;

/// Symbolic links that the path of an image leads through at its end, as the kernel allows.
pub const SYMBOLIC_LINKS_MAX: usize = 40;

/// Links in `/dev/disk/by-id` that are looked at for the names of a block device: more than a host
/// with thousands of volumes has.
pub const DEVICE_LINKS_MAX: usize = 1 << 17;

/// How long udev may take to name a block device: less than [`OPEN_LIMIT`].
pub const DEVICE_NAMED_LIMIT: Duration = Duration::from_secs(10);

/// A replica is flapping when it was evicted this often in [`FLAPPING_WINDOW`].
pub const FLAPPING_EVICTIONS: usize = 3;

/// See [`FLAPPING_EVICTIONS`].
pub const FLAPPING_WINDOW: Duration = Duration::from_secs(600);

/// How often the daemon looks whether an image was truncated, deleted or moved.
pub const IMAGE_LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// How often the daemon tries to open the image of a missing replica.
pub const MISSING_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// The longest time between two tries of one whose file system does not answer, so that a process
/// that tries it cannot even be killed: two dozen of them in a day.
pub const SILENT_RETRY_INTERVAL_MAX: Duration = Duration::from_secs(3600);

/// Bytes of the path of a UNIX socket: `sockaddr_un.sun_path` without its final NUL.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Bytes from the start of one slot of a record to that of the other, more than the text and the
/// maps of [`REPLICAS_MAX`] members can take. A file system stores only what is written.
pub const RECORD_SLOT_BYTES: u64 = 1 << 20;

/// Bytes of the text of a record: 32 members with names of which each byte is escaped, 64 branches.
pub const RECORD_TEXT_BYTES_MAX: usize = 64 << 10;

/// Bytes of one map of extents in a record. Two for each of 32 members and the text fit one slot.
pub const RECORD_MAP_BYTES_MAX: u64 = 14 << 10;

/// The least extent of a record, in bytes. Smaller ones would have to be marked more often.
pub const RECORD_EXTENT_BYTES_MIN: u64 = 1 << 20;

/// Bytes that an exact list of stale runs may take in a record, even if a map of extents is smaller
/// than that.
pub const RECORD_RUNS_BYTES_MIN: u64 = 4 << 10;

/// How often marks are taken from the records where nothing was changed for so long, in replica
/// timeouts.
pub const SWEEP_TIMEOUTS: u32 = 8;

/// Extents that are marked ahead of a write, if as many before it are marked.
pub const MARKS_AHEAD_MAX: u64 = 63;

/// Where so many extents in a row were written since the last sweep, those that follow are marked
/// before they are reached.
pub const MARKS_ROW: u64 = 8;

/// As soon as fewer extents than this are marked ahead.
pub const MARKS_EARLY: u64 = 32;

/// And at most so many: twice as many each time that a row catches up before they are marked.
pub const MARKS_EARLY_MAX: u64 = 1024;

/// Each time that marks were made so often since the last sweep, twice as many extents around a
/// write are marked with it.
pub const MARKING_ROUNDS_DOUBLING: u64 = 16;

/// And at most so many: a power of two.
pub const MARKS_AROUND_MAX: u64 = 64;

/// If marks were made more often than this since the last sweep, none are taken away.
pub const MARKING_ROUNDS_MAX: u64 = 64;

/// Writes that a replica may miss, each known to the records exactly before the guest has its
/// answer. With more of them it is coarse until it is complete again.
pub const MISSES_EXACT_MAX: u64 = 4;

/// The greatest number in a record, the capacity in sectors included: a reader that keeps numbers
/// as floating point loses nothing.
pub const RECORD_NUMBER_MAX: u64 = 1 << 53;

/// Bytes of a node-name in a record, where it serves people; a longer one is cut.
pub const RECORD_NAME_BYTES_MAX: usize = 63;

/// Branches of a lineage, one for the creation of the disk and each forced start. The oldest ones
/// are dropped.
pub const RECORD_BRANCHES_MAX: usize = 64;

/// Jobs that have ended, of which a record keeps the results.
pub const RECORD_JOBS_MAX: usize = 8;

/// Bytes of the name and of the type of such a job.
pub const RECORD_JOB_ID_BYTES_MAX: usize = 32;

/// Bytes of the reason why it has failed; a longer one is cut.
pub const RECORD_JOB_ERROR_BYTES_MAX: usize = 200;

/// Feature names of a record that a message lists, and the bytes of each.
pub const RECORD_FEATURES_MAX: usize = 16;

/// Tables that a record may have proposed, each at a start that was cut short while other replicas
/// were missing, before one is agreed upon.
pub const RECORD_TABLES_MAX: usize = 8;
