//! The daemon as a program: how it starts, what it refuses, what `make install` installs.

mod aio;
mod aliases;
mod completion;
mod descriptors;
mod error_texts;
mod installation;
mod logging;
mod panics;
mod place;
mod refusals;
mod sandbox;
mod socket_activation;
mod spawner;
mod stalled_log;
mod start_up;
mod watchdog;
