//! What an operator sees and does: the monitor, the events, the metrics, quorum-blkctl, and the
//! pages that document them.

mod admin;
mod admin_failures;
mod blkctl;
mod conditions;
mod disk_state;
mod event_socket;
mod forget;
mod inspect;
mod job_results;
mod metrics;
mod offline_disk;
mod operating_page;
mod qmp_clients;
mod qmp_page;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "the unit tests and the fuzz targets share it"
)]
mod recorder;
mod repair_limit;
mod restarting_page;
mod session;
mod threshold;
mod verify;
