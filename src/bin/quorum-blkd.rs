//! `quorum-blkd`: serves several disk images as one voted disk over vhost-user-blk.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use log::LevelFilter;
use quorum_blk::config::{Config, Parsed};
use quorum_blk::daemon::{self, service_manager};

/// Overrides `-v`: a level, or levels by module, as `env_logger` reads them.
const LOG_VARIABLE: &str = "QUORUM_BLKD_LOG";

fn main() -> ExitCode {
    let passed = match service_manager::take_passed_sockets() {
        Ok(passed) => passed,
        Err(error) => return fail(&error),
    };
    let config = match Config::from_args(std::env::args_os(), passed) {
        Ok(Parsed::Run(config)) => config,
        Ok(Parsed::Print(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&error),
    };
    let level = match config.verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    env_logger::Builder::new()
        .filter_level(level)
        .parse_env(LOG_VARIABLE)
        .init();
    match daemon::run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("quorum-blkd: {error}");
    ExitCode::FAILURE
}
