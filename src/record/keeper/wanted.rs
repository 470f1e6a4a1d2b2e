//! What the records are to say of the members, and whether they say it already.

use crate::common::ReplicaIndex;
use crate::common::ranges::RangeSet;
use crate::record::extents::Extents;
use crate::record::layout::Layout;
use crate::record::member::Member;
use crate::record::stale::Stale;
use crate::record::table::Threshold;

/// What the records are to say, apart from marks.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The members of the disk.
    pub members: Vec<WantedMember>,
    /// The vote threshold.
    pub threshold: Threshold,
    /// Sectors of the disk.
    pub capacity: u64,
}

/// What the records are to say of a member.
#[derive(Clone, Debug)]
pub struct WantedMember {
    /// Its place.
    pub replica: ReplicaIndex,
    /// It is in service, and its record is to be kept up to date.
    pub is_active: bool,
    /// In service, and stale also wherever something changes.
    pub is_coarse: bool,
    /// Where it is stale.
    pub stale: RangeSet,
    /// Where it is doubtful; not stale there.
    pub doubtful: RangeSet,
}

/// Whether a record says of a member what is wanted, or that it is stale in more sectors. Whether
/// an active one is coarse has to be as it is wanted.
pub(super) fn covers(
    known: &Member,
    wanted: &WantedMember,
    intent: &Extents,
    layout: Layout,
) -> bool {
    if known.is_active() && known.stale_where_changed != wanted.is_coarse {
        return false;
    }
    let marked = known.stale_where_changed.then_some(intent);
    let mut unknown = without_marked(&wanted.stale, marked);
    let mut doubtful = without_marked(&wanted.doubtful, marked);
    let stale = known.stale.to_ranges(layout);
    unknown.remove_all(&stale);
    doubtful.remove_all(&stale);
    doubtful.remove_all(&known.doubtful.to_ranges(layout));
    unknown.is_empty() && doubtful.is_empty()
}

/// The runs of a set that are not marked as a whole. There may be very many runs, and as many
/// marks: no set is made of these.
fn without_marked(ranges: &RangeSet, marked: Option<&Extents>) -> RangeSet {
    let Some(marked) = marked else {
        return ranges.clone();
    };
    let mut rest = RangeSet::default();
    for range in ranges.iter().filter(|range| !marked.contains(*range)) {
        rest.insert(range);
    }
    rest
}

/// Has a record say exactly where a member is stale and doubtful, and whether it is coarse.
pub(super) fn take(known: &mut Member, wanted: &WantedMember, layout: Layout) {
    let stale = Stale::of(&wanted.stale, layout);
    let mut doubtful = wanted.doubtful.clone();
    doubtful.remove_all(&stale.to_ranges(layout));
    let doubtful = Stale::of(&doubtful, layout);
    (known.stale, known.doubtful) = (stale, doubtful);
    if known.is_active() {
        known.stale_where_changed = wanted.is_coarse;
    }
}
