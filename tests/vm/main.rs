//! Linux guests under QEMU on a voted disk. `make guest firmware` prepares them.

mod boot;
mod corrupt_replica;
mod daemon_restart;
mod device_features;
mod full_host;
mod migration;
mod new_size;
mod operator;
mod queues;
mod readme;
mod repair;
mod slow_flushes;
mod two_guests;
mod verified_work;
