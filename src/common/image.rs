//! What can become of an image while it is open.

/// What other programs have done to an image that is a replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageChanges {
    /// It ends before the end of the disk.
    pub truncated: bool,
    /// It has no name any more: its data is lost when it is closed.
    pub unlinked: bool,
    /// Its path names another file, or none.
    pub moved: bool,
}
