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

impl ImageChanges {
    /// The words for what was done, as operators see them.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        let words = [
            (self.truncated, "truncated"),
            (self.unlinked, "unlinked"),
            (self.moved, "moved"),
        ];
        let holding = words.into_iter().filter(|(holds, _)| *holds);
        holding.map(|(_, word)| word)
    }
}
