//! What a frontend and its guest can rely on: the protocol, the virtqueues, memory, and the end of
//! the daemon.

mod daemon_killed;
mod discard_and_zeroes;
mod held_requests;
mod memory_limits;
mod several_frontends;
mod shutdown;
mod vhost_user;
