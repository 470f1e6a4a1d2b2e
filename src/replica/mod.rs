//! Replica files: opening, locking and growing them, the files of their records, and the io_uring
//! that reads and writes them.
//!
//! This room knows files, alignment and the kernel. It does not know virtio, guests or votes.
//!
//! Unsafe code is allowed in the files that make a system call `rustix` does not have, and nowhere
//! else.

#![deny(unsafe_code)]

pub mod file;
pub mod grow;
pub mod image_lock;
mod missing;
mod ofd_lock;
pub mod record_file;
pub mod ring;
pub mod table;
mod zero;
