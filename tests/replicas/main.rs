//! What the disk promises while replicas differ, fail, hang, grow and are replaced.

mod bad_blocks;
mod blkverify;
mod block_sizes;
mod busy_file_systems;
mod failed_flushes;
mod failed_writes;
mod faults;
mod faulty_replicas;
mod flapping;
mod full_disks;
mod growth;
mod image_locks;
mod jobs;
mod lost_writeback;
mod missed_writes;
mod missing;
mod preferred;
mod restart;
mod same_as_qemu;
mod silent_images;
mod slow_replicas;
mod sparse_images;
mod voting;
