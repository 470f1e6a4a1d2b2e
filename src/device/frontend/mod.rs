//! The back-end of the vhost-user protocol: what the VMM sends about memory and virtqueues.
//!
//! One [`Frontend`] serves one connection at a time. `intake` takes messages from the socket, the
//! `vhost` crate checks their form, and `messages` gives them their meaning. The daemon of
//! `vhost-user-backend` is not used, since its worker loop cannot wait for io_uring completions
//! (ARCHITECTURE.md); its vrings are.
//!
//! Invariants:
//! - A virtqueue that is stopped, disabled or lost with its connection is drained before the
//!   message is answered, so guest memory is not touched afterwards. That takes no longer than
//!   [`drain_limit`](crate::limits::drain_limit), or
//!   [`drain_overtime`](crate::limits::drain_overtime) longer behind a flush; then what is in
//!   flight is abandoned.
//! - Virtqueues run only while [`DiskUse`] allows it.
//! - A message that changes guest memory is answered when no worker uses the old map any more.

mod intake;
mod memory_map;
mod messages;

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use log::{error, info};
use vhost::vhost_user::{BackendReqHandler, Error, Result};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryAtomic;

use self::intake::Intake;
use self::memory_map::MemoryMap;
use super::back_channel::BackChannel;
use super::connection::{ConnectionSlot, DriverChoices};
use super::disk_use::DiskUse;
use super::inflight::{self, QueueRegion};
use super::memory::DirtyLog;
use super::{DiskInfo, GuestMemory, Vring};
use crate::common::{NOT_POISONED, pulse};
use crate::untrusted::close::close;
use crate::untrusted::mapping::Share;

/// Serves virtqueues: the worker threads, as a frontend sees them.
pub trait VirtqueueServer: Send {
    /// The state of these virtqueues has changed, or the region that tracks their requests from
    /// their next start on. Returns when each is served accordingly, from guest memory as it is
    /// now: one that does not run any more is drained, or what is still in flight is abandoned (see
    /// [`Guest::abandon`](super::guest::Guest::abandon)).
    fn refresh(&self, queues: Vec<(u16, Option<QueueRegion>)>);

    /// Makes everything written so far durable. Returns when that is done, has failed or takes too
    /// long.
    fn flush(&self) -> bool;
}

/// The device as the VMM sees it.
pub struct Frontend {
    info: DiskInfo,
    memory: GuestMemoryAtomic<GuestMemory>,
    memory_map: MemoryMap,
    vrings: Vec<Vring>,
    server: Box<dyn VirtqueueServer>,
    choices: Arc<DriverChoices>,
    /// Marks what is written to guest memory while the guest is migrated.
    log: Arc<DirtyLog>,
    /// What it shares.
    share: Share,
    /// Where requests in flight are tracked.
    inflight: Option<inflight::Region>,
    back_channel: BackChannel,
    disk_use: DiskUse,
    /// The frontend has negotiated that it may ask for an acknowledgement
    /// (VHOST_USER_PROTOCOL_F_REPLY_ACK).
    has_acknowledgements: bool,
    /// The descriptor of a message that passes a back channel.
    passed: Option<OwnedFd>,
    owned: bool,
}

impl Frontend {
    /// The device on the virtqueues of `slot`, which `server` serves.
    pub fn new(info: DiskInfo, slot: ConnectionSlot, server: Box<dyn VirtqueueServer>) -> Self {
        let ConnectionSlot {
            memory,
            vrings,
            choices,
            back_channel,
            disk_use,
        } = slot;
        Self {
            info,
            memory,
            memory_map: MemoryMap::default(),
            vrings,
            server,
            choices,
            log: Arc::default(),
            share: Share::default(),
            inflight: None,
            back_channel,
            disk_use,
            has_acknowledgements: false,
            passed: None,
            owned: false,
        }
    }

    /// Serves one connection until it ends, and leaves the device ready for the next one. Returns
    /// the error that ended it, `None` if the frontend disconnected.
    pub fn serve(this: &Arc<Mutex<Self>>, connection: UnixStream) -> Option<Error> {
        match Self::handle_messages(this, connection) {
            Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage => None,
            error => Some(error),
        }
    }

    /// Returns why the connection has ended. It is closed when the device is reset: a frontend that
    /// finds it closed may reuse guest memory.
    fn handle_messages(this: &Arc<Mutex<Self>>, connection: UnixStream) -> Error {
        let (intake, end) = match Intake::new(connection) {
            Ok(pair) => pair,
            Err(error) => return Error::ReqHandlerError(error),
        };
        let share = lock(this).share.clone();
        share.set_connection(Some(intake.connection()));
        let mut handler = BackendReqHandler::from_stream(end, Arc::clone(this));
        let end = loop {
            if let Err(error) = Self::handle_message(this, &intake, &mut handler) {
                break error;
            }
        };
        share.set_connection(None);
        if share.is_lost() {
            error!(
                "a frontend shares memory that is gone: its file was truncated, or there are no \
                 more huge pages; its connection ends"
            );
        }
        lock(this).reset();
        // Fails only if the connection has ended.
        let _ = intake.connection().shutdown(Shutdown::Both);
        // What lies in the socket unread may take long to close.
        close((handler, intake));
        end
    }

    fn handle_message(
        this: &Arc<Mutex<Self>>,
        intake: &Intake,
        handler: &mut BackendReqHandler<Mutex<Self>>,
    ) -> Result<()> {
        let has_acknowledgements = lock(this).has_acknowledgements;
        let mut admitted = intake.next(has_acknowledgements)?;
        lock(this).passed = admitted.back_channel.take();
        let handled = pulse::turn(|| handler.handle_request());
        // Also those of a message that ends the connection.
        intake.send_replies().and(handled)
    }

    /// Accepts no more requests, and answers those in flight. To be called before the connection is
    /// closed: a frontend that finds it closed looks how far the used ring has got, and must find
    /// all answers there.
    pub fn stop_virtqueues(&self) {
        for vring in &self.vrings {
            vring.set_enabled(false);
        }
        self.refresh_all();
    }

    /// Whether a frontend has begun to use this connection.
    pub fn is_owned(&self) -> bool {
        self.owned
    }

    /// Stops all virtqueues and forgets what the connection has set.
    fn reset(&mut self) {
        self.reset_virtqueues();
        self.replace_memory(GuestMemory::new());
        self.memory_map = MemoryMap::default();
        self.log.clear();
        self.share.clear();
        self.back_channel.clear();
        self.has_acknowledgements = false;
        if let Some(socket) = self.passed.take() {
            close(socket);
        }
        self.owned = false;
    }

    /// Stops all virtqueues, and resets them and what the driver accepted. Returns the inflight
    /// region there was.
    fn reset_virtqueues(&mut self) -> Option<inflight::Region> {
        for vring in &self.vrings {
            vring.set_enabled(false);
            vring.set_queue_ready(false);
        }
        // What is in flight is still tracked where it was accepted.
        let region = self.inflight.take();
        self.refresh_all();
        self.disk_use.end();
        for vring in &self.vrings {
            vring.set_kick(None);
            vring.set_call(None);
            vring.set_err(None);
            vring.get_mut().get_queue_mut().reset();
        }
        self.choices.set_features(0);
        self.log.set_wanted(false);
        region
    }

    /// Has a virtqueue served as it is now.
    fn refresh(&self, queue: u16) {
        self.server.refresh(vec![(queue, self.region(queue))]);
    }

    /// Has all virtqueues served as they are now. Those that are stopped drain at the same time.
    fn refresh_all(&self) {
        let queues = (0..self.info.num_queues).map(|queue| (queue, self.region(queue)));
        self.server.refresh(queues.collect());
    }

    fn region(&self, queue: u16) -> Option<QueueRegion> {
        let inflight = self.inflight.as_ref();
        inflight.and_then(|region| region.queue(queue))
    }

    fn replace_memory(&self, memory: GuestMemory) {
        self.memory.lock().expect(NOT_POISONED).replace(memory);
    }

    /// Replaces guest memory and waits until every worker serves its virtqueues from the new map.
    ///
    /// A worker looks up the map before it looks for a new chain. Without the wait, a chain that
    /// the driver makes available after the reply could meet the old map: it would fail in a region
    /// that was just added, or reach one that the frontend has unmapped.
    fn change_memory(&self, memory: GuestMemory) {
        self.replace_memory(memory);
        self.refresh_all();
    }

    /// Switches between writes that are durable when they are answered and writes that a flush
    /// makes durable. No request is in flight meanwhile, so each is of one kind.
    fn set_writeback(&self, writeback: bool) -> Result<()> {
        let enabled = |vring: &Vring| vring.get_ref().is_enabled();
        let was_enabled: Vec<bool> = self.vrings.iter().map(enabled).collect();
        self.stop_virtqueues();
        self.choices.cache_mode.set_writeback(writeback);
        if let Some(region) = &self.inflight {
            region.set_writeback(writeback);
        }
        // From now on the driver does not flush, so the daemon makes durable what it has not
        // flushed.
        let durable = writeback || self.server.flush();
        for (vring, enabled) in self.vrings.iter().zip(was_enabled) {
            vring.set_enabled(enabled);
        }
        self.refresh_all();
        let mode = ["writethrough", "writeback"][usize::from(writeback)];
        info!(mode; "the driver has switched the cache mode");
        if durable {
            Ok(())
        } else {
            Err(Error::ReqHandlerError(io::Error::other("the flush failed")))
        }
    }
}

fn lock(frontend: &Mutex<Frontend>) -> MutexGuard<'_, Frontend> {
    frontend.lock().expect(NOT_POISONED)
}
