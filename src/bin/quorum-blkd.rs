//! `quorum-blkd`: serves several disk images as one voted disk over vhost-user-blk.

#![forbid(unsafe_code)]

use std::io::Write as _;
use std::process::ExitCode;

use quorum_blk::config::{Config, Parsed};
use quorum_blk::daemon::{self, logging, service_manager};
use quorum_blk::replica::file::serve_opener;

fn main() -> ExitCode {
    // The daemon starts this program once more for each image.
    match serve_opener(std::env::args_os()) {
        None => {}
        Some(Ok(())) => return ExitCode::SUCCESS,
        Some(Err(error)) => return fail(&error),
    }
    let passed = match service_manager::take_passed_sockets() {
        Ok(passed) => passed,
        Err(error) => return fail(&error),
    };
    let config = match Config::from_args(std::env::args_os(), passed) {
        Ok(Parsed::Run(config)) => config,
        Ok(Parsed::Print(text)) => return print(&text),
        Ok(Parsed::PrintSandbox(config)) => {
            return print(&daemon::print_sandbox(config.as_deref()));
        }
        Err(error) => return fail(&error),
    };
    if let Err(error) = daemon::start_log(&config.node_name, config.verbosity) {
        return fail(&error);
    }
    match daemon::run(&config) {
        Ok(()) => {
            logging::flush();
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error),
    }
}

fn print(text: &str) -> ExitCode {
    // print! would panic when the reader has seen enough: `quorum-blkd --help | head`.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    logging::print_error(error);
    ExitCode::FAILURE
}
