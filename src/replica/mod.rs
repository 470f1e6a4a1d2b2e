//! Replica files: opening and locking them, making them longer, aligned buffers, and the io_uring
//! that reads and writes them.
//!
//! This room knows files, alignment and the kernel; it knows nothing of virtio, of guests or of
//! votes.

pub mod file;
pub mod grow;
pub mod image_lock;

pub mod ring;
pub mod table;
mod zero;
