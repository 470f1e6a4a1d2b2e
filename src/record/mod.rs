//! The records: what is kept on disk about each replica. Pure: no file, clock or thread.
//!
//! [`format`](mod@format) turns a [`Record`] into the bytes of a file and back (S11), and
//! [`start`] decides from all records what may be served, and which replica is stale where (S3).
//!
//! A record holds the *table*: all members of the disk, which of them are active, and where each is
//! stale. A table has an [`Epoch`]. A change of it is made in two rounds: the new table is proposed
//! to all that will be active ([`Record::propose`]). If enough of them hold it durably
//! ([`Record::may_agree`]), it is agreed upon ([`Record::agree`]) and written to them again. Only
//! then may anything depend on it. So a table on which a record says that it was agreed upon is
//! known to all its active members, and an active member with an older record was restored from a
//! copy; after a crash in the first round nothing has depended on the new table.

#![forbid(unsafe_code)]

mod epoch;
mod extents;
pub mod format;
mod keeper;
mod layout;
mod member;
mod past_job;
mod stale;
pub mod start;
mod table;

pub use self::epoch::{Branch, Epoch};
pub use self::extents::Extents;
pub use self::keeper::{Holder, Keeper, RecordWrite, Round, Wanted, WantedMember};
pub use self::layout::{Layout, PAGE_BYTES, PAGE_EXTENTS};
pub use self::member::{Member, MemberState, short_name};
pub use self::past_job::PastJob;
pub use self::stale::Stale;
pub use self::table::{Before, Creation, Fingerprint, Record, Table, Threshold};
