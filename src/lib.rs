//! quorum-blk: several image files served as one voted disk over vhost-user-blk.

pub mod config;
pub mod control;
pub mod daemon;
pub mod device;
pub mod engine;
pub mod limits;
pub mod quorum;
pub mod replica;
pub mod worker;
