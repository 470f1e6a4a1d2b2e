//! `quorum-blkctl`: shows and maintains a voted disk over the monitor of its `quorum-blkd`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    quorum_blk::client::run(std::env::args_os())
}
