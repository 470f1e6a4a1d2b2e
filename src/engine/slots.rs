//! The requests of an engine, by id.
//!
//! A request is large and lives shortly, so it is dropped where it lies: a slab would move it out.

use super::buffer_share::Charge;
use super::request::Request;
use crate::common::operation::RequestId;

/// A request, or an orphaned one's place.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) request: Request,
    /// The buffers that the request may hold at a time.
    pub(super) charge: Charge,
}

#[derive(Debug, Default)]
pub(super) struct Slots {
    slots: Vec<Option<Slot>>,
    /// The empty ones, the one that was emptied last at the end.
    free: Vec<RequestId>,
}

impl Slots {
    /// Takes an empty slot, to be filled by [`Self::fill`].
    pub(super) fn take(&mut self) -> RequestId {
        self.free.pop().unwrap_or_else(|| {
            let index = u32::try_from(self.slots.len()).expect("slots are bounded");
            self.slots.push(None);
            RequestId(index)
        })
    }

    #[inline(always)]
    pub(super) fn fill(&mut self, id: RequestId, charge: Charge, request: Request) {
        let place = &mut self.slots[id.0 as usize];
        assert!(place.is_none(), "a slot holds one request");
        *place = Some(Slot { request, charge });
    }

    pub(super) fn empty(&mut self, id: RequestId) {
        self.slots[id.0 as usize] = None;
        self.free.push(id);
    }

    pub(super) fn get_mut(&mut self, id: RequestId) -> &mut Slot {
        let slot = self.slots[id.0 as usize].as_mut();
        slot.expect("a request in flight has a slot")
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (RequestId, &Slot)> {
        let ids = (0..).map(RequestId);
        let slots = ids.zip(&self.slots);
        slots.filter_map(|(id, slot)| Some((id, slot.as_ref()?)))
    }
}
