//! The frontend's messages as bytes on a socket.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use virtio_queue::QueueT;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::super::connection::{CacheMode, ConnectionSlot, DriverChoices};
use super::super::frontend::{Frontend, VirtqueueServer};
use super::super::inflight::{Begun, Layout, QueueRegion, Region, VirtqueueState};
use super::*;
use crate::untrusted::mapping::Share;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const RESET_DEVICE: u32 = 34;
const GET_MAX_MEM_SLOTS: u32 = 36;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

const REPLY_ACK: u64 = 1 << 3;
const INFLIGHT_SHMFD: u64 = 1 << 12;
const RESET_DEVICE_FEATURE: u64 = 1 << 13;

const QUEUES: u16 = 2;

/// Records which virtqueues were refreshed, and whether with a region.
struct Recorder(mpsc::Sender<(u16, bool)>);

impl VirtqueueServer for Recorder {
    fn refresh(&self, queues: Vec<(u16, Option<QueueRegion>)>) {
        for (queue, region) in queues {
            let _ = self.0.send((queue, region.is_some()));
        }
    }

    fn flush(&self) -> bool {
        true
    }
}

/// A connected frontend, with the protocol features negotiated.
struct Connection {
    socket: UnixStream,
    vrings: Vec<Vring>,
    choices: Arc<DriverChoices>,
    refreshed: mpsc::Receiver<(u16, bool)>,
    device: JoinHandle<()>,
}

impl Connection {
    fn new() -> Self {
        let info = DiskInfo {
            num_queues: QUEUES,
            ..disk_info()
        };
        let slot = ConnectionSlot::new(QUEUES, 64, CacheMode::default()).unwrap();
        let (vrings, choices) = (slot.vrings.clone(), Arc::clone(&slot.choices));
        let (sender, refreshed) = mpsc::channel();
        let frontend = Frontend::new(info, slot, Box::new(Recorder(sender)));
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let device = std::thread::spawn(move || {
            _ = Frontend::serve(&Arc::new(Mutex::new(frontend)), theirs)
        });
        let mut connection = Self {
            socket,
            vrings,
            choices,
            refreshed,
            device,
        };
        connection.send(SET_OWNER, 0, &[], None);
        let features = connection.ask_u64(GET_FEATURES);
        connection.send(SET_FEATURES, 0, &features.to_ne_bytes(), None);
        let offered = connection.ask_u64(GET_PROTOCOL_FEATURES);
        assert_eq!(
            offered & (INFLIGHT_SHMFD | RESET_DEVICE_FEATURE),
            INFLIGHT_SHMFD | RESET_DEVICE_FEATURE
        );
        connection.send(SET_PROTOCOL_FEATURES, 0, &offered.to_ne_bytes(), None);
        assert_eq!(offered & REPLY_ACK, REPLY_ACK);
        assert_eq!(connection.ask_u64(GET_QUEUE_NUM), u64::from(QUEUES));
        while connection.refreshed.try_recv().is_ok() {}
        connection
    }

    fn send(&mut self, code: u32, flags: u32, payload: &[u8], file: Option<&File>) {
        use std::os::fd::AsRawFd;
        let size = u32::try_from(payload.len()).unwrap();
        let mut message = [code, VERSION | flags, size].map(u32::to_ne_bytes).concat();
        message.extend(payload);
        match file {
            None => self.socket.write_all(&message).unwrap(),
            Some(file) => {
                let sent = self
                    .socket
                    .send_with_fd(&message[..], file.as_raw_fd())
                    .unwrap();
                assert_eq!(sent, message.len());
            }
        }
    }

    /// The next message from the device, which must be the reply to `code`.
    fn reply(&mut self, code: u32) -> (Vec<u8>, Option<File>) {
        let mut header = [0; 12];
        let (count, file) = self.socket.recv_with_fd(&mut header).unwrap();
        assert_eq!(count, header.len());
        let field = |index: usize| u32::from_ne_bytes(header[4 * index..][..4].try_into().unwrap());
        assert_eq!((field(0), field(1)), (code, VERSION | REPLY));
        let mut payload = vec![0; usize::try_from(field(2)).unwrap()];
        self.socket.read_exact(&mut payload).unwrap();
        (payload, file)
    }

    fn ask_u64(&mut self, code: u32) -> u64 {
        self.send(code, 0, &[], None);
        u64::from_ne_bytes(self.reply(code).0.try_into().unwrap())
    }

    /// Sends a message that is acknowledged, with this result.
    fn ack(&mut self, code: u32, payload: &[u8], result: u64) {
        self.send(code, NEED_REPLY, payload, None);
        assert_eq!(self.reply(code).0, result.to_ne_bytes());
    }

    fn inflight(&self, mmap_size: u64, num_queues: u16, queue_size: u16) -> Vec<u8> {
        let mut payload = mmap_size.to_ne_bytes().to_vec();
        payload.extend(0u64.to_ne_bytes());
        payload.extend(num_queues.to_ne_bytes());
        payload.extend(queue_size.to_ne_bytes());
        // The structure's tail.
        payload.extend([0; 4]);
        payload
    }

    /// Requests a region and passes it back, as frontends do.
    fn agree_on_a_region(&mut self) -> File {
        let asked = self.inflight(0, QUEUES, 64);
        self.send(GET_INFLIGHT_FD, 0, &asked, None);
        let (payload, file) = self.reply(GET_INFLIGHT_FD);
        let file = file.unwrap();
        self.send(SET_INFLIGHT_FD, NEED_REPLY, &payload, Some(&file));
        assert_eq!(self.reply(SET_INFLIGHT_FD).0, 0u64.to_ne_bytes());
        file
    }

    /// Closes it and waits until the device has noticed.
    fn close(self) -> Vec<(u16, bool)> {
        drop(self.socket);
        self.device.join().unwrap();
        self.refreshed.try_iter().collect()
    }
}

fn state(index: u32, value: u32) -> Vec<u8> {
    [index, value].map(u32::to_ne_bytes).concat()
}

/// cloud-hypervisor asks for an acknowledgement of everything.
#[test]
fn a_message_with_a_reply_of_its_own_is_answered_once() {
    let mut connection = Connection::new();
    let config = [[0u32, 60, 1].map(u32::to_ne_bytes).concat(), vec![0; 60]].concat();
    let inflight = connection.inflight(0, QUEUES, 64);
    for (code, payload, reply_bytes) in [
        (GET_FEATURES, vec![], 8),
        (GET_PROTOCOL_FEATURES, vec![], 8),
        (GET_QUEUE_NUM, vec![], 8),
        (GET_MAX_MEM_SLOTS, vec![], 8),
        (GET_CONFIG, config, 72),
        (GET_VRING_BASE, state(0, 0), 8),
        (GET_INFLIGHT_FD, inflight, 24),
    ] {
        connection.send(code, NEED_REPLY, &payload, None);
        let (reply, file) = connection.reply(code);
        assert_eq!(reply.len(), reply_bytes, "message {code}");
        assert_eq!(file.is_some(), code == GET_INFLIGHT_FD);
        // What comes next is the answer to the next message.
        connection.ack(SET_VRING_BASE, &state(1, 0), 0);
    }
    connection.close();
}

#[test]
fn a_region_has_room_for_every_size_and_reaches_the_virtqueues() {
    let mut connection = Connection::new();
    let asked = connection.inflight(0, QUEUES, 128);
    connection.send(GET_INFLIGHT_FD, 0, &asked, None);
    let (payload, file) = connection.reply(GET_INFLIGHT_FD);
    // Two queues of 16 448 bytes: the driver may choose larger ones than were asked for.
    assert_eq!(payload[..20], connection.inflight(32896, QUEUES, 128)[..20]);
    assert_eq!(file.unwrap().metadata().unwrap().len(), 32896);
    connection.ack(SET_VRING_ENABLE, &state(1, 1), 0);
    assert_eq!(connection.refreshed.try_recv(), Ok((1, false)));
    connection.agree_on_a_region();
    connection.ack(SET_VRING_ENABLE, &state(1, 1), 0);
    assert_eq!(connection.refreshed.try_recv(), Ok((1, true)));
    // The next frontend may have none.
    assert_eq!(connection.close(), [(0, false), (1, false)]);
}

#[test]
fn regions_that_lie_about_their_size_are_refused() {
    for mmap_size in [4223, 4225, u64::MAX] {
        let mut connection = Connection::new();
        let file = Layout::new(QUEUES, 128, QUEUES)
            .unwrap()
            .create_file()
            .unwrap();
        let payload = connection.inflight(mmap_size, QUEUES, 128);
        connection.send(SET_INFLIGHT_FD, NEED_REPLY, &payload, Some(&file));
        assert_eq!(connection.reply(SET_INFLIGHT_FD).0, 1u64.to_ne_bytes());
        connection.close();
    }
}

#[test]
fn a_reset_clears_virtqueues_and_features_but_not_the_owner() {
    let mut connection = Connection::new();
    let file = connection.agree_on_a_region();
    let queue = Layout::new(QUEUES, QUEUE_SIZE_MAX, QUEUES).unwrap();
    let region = || {
        let region = Region::map(queue, &file, (0, queue.bytes() as u64), &Share::default());
        region.unwrap().queue(1).unwrap()
    };
    let queue = VirtqueueState {
        size: 64,
        used_idx: 0,
        available_idx: 1,
    };
    let (mut tracker, _) = region().begin(queue).unwrap();
    tracker.accepted(5);
    connection.ack(SET_VRING_NUM, &state(1, 16), 0);
    connection.ack(SET_VRING_BASE, &state(1, 77), 0);
    connection.ack(SET_VRING_ENABLE, &state(1, 1), 0);
    let _ = connection.refreshed.try_recv();
    assert_ne!(connection.choices.features(), 0);
    connection.ack(RESET_DEVICE, &[], 0);
    // All virtqueues at once.
    let refreshed: Vec<_> = connection.refreshed.try_iter().collect();
    assert_eq!(refreshed, [(0, false), (1, false)]);
    assert_eq!(connection.choices.features(), 0);
    {
        let vring = connection.vrings[1].get_ref();
        assert!(!vring.is_enabled());
        assert_eq!(
            (vring.get_queue().size(), vring.get_queue().next_avail()),
            (64, 0)
        );
    }
    // Requests in flight are forgotten.
    assert_eq!(region().begin(queue).unwrap().1, Begun::New);
    // It is still claimed, so it is set up again on this connection, without another claim.
    let features = connection.ask_u64(GET_FEATURES);
    connection.ack(SET_FEATURES, &features.to_ne_bytes(), 0);
    assert_eq!(connection.choices.features(), features);
    connection.ack(SET_OWNER, &[], 1);
}
