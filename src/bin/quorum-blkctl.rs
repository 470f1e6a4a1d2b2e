//! `quorum-blkctl`: what an operator does to a voted disk, over the monitor of its `quorum-blkd`.

use std::process::ExitCode;

fn main() -> ExitCode {
    quorum_blk::client::run(std::env::args_os())
}
