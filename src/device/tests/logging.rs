//! The log of writes to guest memory: complete while it is on, silent while it is off, and no way
//! to harm us.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{
    VhostUserLog, VhostUserMemoryRegion, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags,
};
use vhost::vhost_user::{Result, VhostUserBackendReqHandlerMut};
use vm_memory::FileOffset;

use super::*;
use crate::device::config_space;
use crate::device::connection::{CacheMode, ConnectionSlot};
use crate::device::frontend::{Frontend, VirtqueueServer};
use crate::device::inflight::QueueRegion;

const PAGE_BYTES: u64 = 4096;
const PAGES: u64 = 77;
const BYTES: u64 = PAGES * PAGE_BYTES;
/// Just enough bits for all pages.
const LOG_BYTES: u64 = PAGES.div_ceil(8);
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// Where the VMM has guest memory.
const VMM: u64 = 0x7f00_0000_0000;

/// A VMM with a guest to migrate.
struct Vmm {
    machine: Machine,
    frontend: Frontend,
    features: u64,
    file: File,
    log: File,
    refreshes: Arc<AtomicUsize>,
}

/// Counts.
struct Server(Arc<AtomicUsize>);

impl VirtqueueServer for Server {
    fn flush(&self) -> bool {
        true
    }

    fn refresh(&self, queues: Vec<(u16, Option<QueueRegion>)>) {
        self.0.fetch_add(queues.len(), Ordering::Relaxed);
    }
}

impl Vmm {
    fn new() -> Self {
        let info = DiskInfo {
            capacity: Capacity::new(128),
            ..disk_info()
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        let range = (
            GuestAddress(0),
            usize::try_from(BYTES).unwrap(),
            Some(FileOffset::new(file.try_clone().unwrap(), 0)),
        );
        let memory = GuestMemory::from_ranges_with_files([range]).unwrap();
        let slot = ConnectionSlot::new(1, 64, CacheMode::default()).unwrap();
        let refreshes = Arc::<AtomicUsize>::default();
        let mut frontend = Frontend::new(
            info.clone(),
            slot.clone(),
            Box::new(Server(Arc::clone(&refreshes))),
        );
        let region = VhostUserMemoryRegion::new(0, BYTES, VMM, 0);
        frontend
            .set_mem_table(&[region], vec![file.try_clone().unwrap()], None)
            .unwrap();
        Self {
            machine: Machine::on(info.clone(), memory, slot.memory, slot.vrings, 64),
            frontend,
            features: config_space::features(&info) & !LOG_ALL,
            file,
            log: new_log(LOG_BYTES),
            refreshes,
        }
    }

    fn region(&self, from: u64, to: u64) -> (VhostUserSingleMemoryRegion, File) {
        let (from, to) = (from * PAGE_BYTES, to * PAGE_BYTES);
        let region = VhostUserSingleMemoryRegion::new(from, to - from, VMM + from, from);
        (region, self.file.try_clone().unwrap())
    }

    /// Sends the memory again: all pages up to `split` at once, the others in a message of their
    /// own.
    fn tell_memory(&mut self, split: u64) -> Result<()> {
        let (region, file) = self.region(0, split);
        self.frontend.set_mem_table(&[*region], vec![file], None)?;
        let (region, file) = self.region(split, PAGES);
        self.frontend.add_mem_region(&region, file, None)?;
        Ok(())
    }

    fn set_log(&mut self, bytes: u64, offset: u64) -> Result<()> {
        let log = self.log.try_clone().unwrap();
        self.frontend
            .set_log_base(&VhostUserLog::new(bytes, offset), log)
    }

    fn set_log_all(&mut self, on: bool) {
        let features = self.features | if on { LOG_ALL } else { 0 };
        self.frontend.set_features(features).unwrap();
    }

    /// Reads and clears the log.
    fn marked(&self) -> BTreeSet<u64> {
        let bytes = usize::try_from(self.log.metadata().unwrap().len()).unwrap();
        let mut bits = vec![0; bytes];
        self.log.read_exact_at(&mut bits, 0).unwrap();
        self.log.write_all_at(&vec![0; bytes], 0).unwrap();
        (0..bytes as u64 * 8)
            .filter(|page| bits[usize::try_from(page / 8).unwrap()] & 1 << (page % 8) != 0)
            .collect()
    }

    /// Has the device read 512 bytes to the first byte of a page, and returns what is marked.
    fn read_to(&mut self, page: u64) -> BTreeSet<u64> {
        self.machine.put_header(IN, 0);
        let data = writable(page * PAGE_BYTES, 512);
        let parts = [readable(HEADER, 16), data, writable(STATUS, 1)];
        assert_eq!(self.machine.serve_chain(&parts), 513);
        self.marked()
    }

    /// Whether the log is on.
    fn logs(&mut self) -> bool {
        let marked = self.read_to(70);
        assert!(
            marked.is_empty() || marked == BTreeSet::from([USED_PAGE, STATUS / PAGE_BYTES, 70]),
            "{marked:?}"
        );
        !marked.is_empty()
    }
}

const USED_PAGE: u64 = USED / PAGE_BYTES;

fn new_log(bytes: u64) -> File {
    let log = tempfile::tempfile().unwrap();
    log.set_len(bytes).unwrap();
    log
}

fn pages(range: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
    range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)
}

#[derive(Clone, Debug)]
enum Step {
    /// A request, where its data goes, where its status goes.
    Request(u32, u64, usize, u64),
    LogAll(bool),
    SetLog,
    TellMemory(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let request_type = prop_oneof![
        4 => Just(IN),
        2 => Just(OUT),
        1 => Just(FLUSH),
        1 => Just(GET_ID),
        1 => Just(77),
    ];
    let data = 0x2_4000..BYTES - 0x1_0000;
    let data = (data, any::<bool>()).prop_map(|(data, whole)| {
        if whole {
            data & !(PAGE_BYTES - 1)
        } else {
            data
        }
    });
    prop_oneof![
        8 => (request_type, data, 0..100usize, BYTES - 0x2000..BYTES)
            .prop_map(|(request_type, data, sectors, status)| {
                Step::Request(request_type, data, sectors, status)
            }),
        1 => any::<bool>().prop_map(Step::LogAll),
        1 => Just(Step::SetLog),
        1 => (0x2_4000 / PAGE_BYTES..PAGES).prop_map(Step::TellMemory),
    ]
}

proptest! {
    /// Whatever the device writes is marked while the log is on, and nothing else ever.
    #[test]
    fn what_changes_is_marked_and_nothing_else(steps in vec(step(), 1..40), event_idx: bool) {
        let mut vmm = Vmm::new();
        vmm.machine.vrings[0].set_queue_event_idx(event_idx);
        let (mut log_all, mut log_set) = (false, false);
        for step in steps {
            match step {
                Step::LogAll(on) => {
                    vmm.set_log_all(on);
                    vmm.machine.vrings[0].set_queue_event_idx(event_idx);
                    log_all = on;
                }
                Step::SetLog => {
                    vmm.set_log(LOG_BYTES, 0).unwrap();
                    log_set = true;
                }
                Step::TellMemory(split) => vmm.tell_memory(split).unwrap(),
                Step::Request(request_type, data, sectors, status) => {
                    let len = if request_type == GET_ID { 20 } else { sectors * 512 };
                    let flags = if request_type == OUT { 0 } else { WRITE };
                    let data = Part { flags, ..readable(data, len) };
                    vmm.machine.put(HEADER, &header(request_type, 0));
                    vmm.machine.put(data.address, &vec![7; len]);
                    vmm.machine.put(status, &[NO_STATUS]);
                    vmm.machine.offer(0, &[readable(HEADER, 16), data, writable(status, 1)]);
                    let before = vmm.machine.all_memory();
                    vmm.machine.serve();
                    vmm.machine.guest.enable_kicks();
                    let after = vmm.machine.all_memory();
                    let marked = vmm.marked();
                    let page = usize::try_from(PAGE_BYTES).unwrap();
                    let chunks = (0..).zip(before.chunks(page).zip(after.chunks(page)));
                    let changed: BTreeSet<u64> = chunks
                        .filter_map(|(page, (before, after))| (before != after).then_some(page))
                        .collect();
                    prop_assert!(changed.contains(&USED_PAGE));
                    let mut touched = BTreeSet::from([USED_PAGE, status / PAGE_BYTES]);
                    touched.extend(pages(&data.range()).filter(|_| flags == WRITE));
                    if log_all && log_set {
                        prop_assert!(changed.is_subset(&marked), "{changed:?} {marked:?}");
                        prop_assert!(marked.is_subset(&touched), "{marked:?} {touched:?}");
                    } else {
                        prop_assert!(marked.is_empty(), "{marked:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_log_takes_an_area_and_the_feature_in_either_order() {
    let mut vmm = Vmm::new();
    assert!(!vmm.logs());
    vmm.set_log(LOG_BYTES, 0).unwrap();
    assert!(!vmm.logs());
    vmm.set_log_all(true);
    assert!(vmm.logs());
    // A migration that failed, and the next.
    vmm.set_log_all(false);
    assert!(!vmm.logs());
    vmm.set_log_all(true);
    vmm.log = new_log(LOG_BYTES);
    vmm.refreshes.store(0, Ordering::Relaxed);
    vmm.set_log(LOG_BYTES, 0).unwrap();
    assert_eq!(
        vmm.refreshes.load(Ordering::Relaxed),
        1,
        "the worker knows before the frontend is answered"
    );
    assert!(vmm.logs());
    vmm.frontend.reset_owner().unwrap();
    assert!(!vmm.logs());
    vmm.set_log_all(true);
    assert!(!vmm.logs(), "the area is forgotten");
}

#[test]
fn a_log_at_an_offset_of_its_file() {
    let mut vmm = Vmm::new();
    vmm.log = new_log(PAGE_BYTES + LOG_BYTES);
    vmm.set_log_all(true);
    vmm.set_log(LOG_BYTES, PAGE_BYTES).unwrap();
    let marked = vmm.read_to(70);
    let first = PAGE_BYTES * 8;
    assert_eq!(
        marked,
        BTreeSet::from([first + USED_PAGE, first + STATUS / PAGE_BYTES, first + 70])
    );
}

#[test]
fn a_log_that_would_harm_us_is_refused() {
    let mut vmm = Vmm::new();
    vmm.set_log_all(true);
    for (bytes, offset) in [
        // Less than guest memory needs.
        (LOG_BYTES - 1, 0),
        (1, 0),
        // Beyond the end of the file.
        (LOG_BYTES + 1, 0),
        (PAGE_BYTES, 0),
        (LOG_BYTES, PAGE_BYTES),
        (LOG_BYTES, u64::MAX - PAGE_BYTES + 1),
        (u64::MAX, 0),
        (1 << 62, 1 << 62),
        // Not what can be mapped.
        (0, 0),
        (LOG_BYTES - 1, 1),
    ] {
        assert!(vmm.set_log(bytes, offset).is_err(), "{bytes} at {offset}");
    }
    let (_, pipe) = io::pipe().unwrap();
    vmm.log = File::from(std::os::fd::OwnedFd::from(pipe));
    assert!(vmm.set_log(LOG_BYTES, 0).is_err());
    vmm.log = File::open("/").unwrap();
    assert!(vmm.set_log(LOG_BYTES, 0).is_err());
    vmm.log = new_log(LOG_BYTES);
    assert!(!vmm.logs());
    // A rejected area leaves the last one in use.
    vmm.set_log(LOG_BYTES, 0).unwrap();
    assert!(vmm.set_log(LOG_BYTES, 1).is_err());
    assert!(vmm.logs());
}

#[test]
fn memory_that_the_log_does_not_cover_is_refused_while_it_is_on() {
    const FEW: u64 = 64;
    let mut vmm = Vmm::new();
    let shrink = |vmm: &mut Vmm| {
        let (region, file) = vmm.region(0, FEW);
        vmm.frontend
            .set_mem_table(&[*region], vec![file], None)
            .unwrap();
    };
    shrink(&mut vmm);
    vmm.set_log(FEW / 8, 0).unwrap();
    vmm.set_log_all(true);
    assert!(vmm.tell_memory(FEW).is_err());
    assert!(vmm.tell_memory(PAGES - 1).is_err());
    assert_eq!(
        vmm.read_to(60),
        BTreeSet::from([USED_PAGE, STATUS / PAGE_BYTES, 60])
    );
    // While the log is off, its area is dropped instead.
    vmm.set_log_all(false);
    vmm.tell_memory(FEW).unwrap();
    vmm.set_log_all(true);
    assert!(!vmm.logs());
    vmm.set_log(LOG_BYTES, 0).unwrap();
    assert!(vmm.logs());
}

#[test]
fn memory_beyond_the_end_of_its_file_is_refused() {
    let mut vmm = Vmm::new();
    for (bytes, offset) in [(BYTES, PAGE_BYTES), (BYTES + PAGE_BYTES, 0)] {
        let region = VhostUserMemoryRegion::new(0, bytes, VMM, offset);
        let file = vmm.file.try_clone().unwrap();
        assert!(
            vmm.frontend
                .set_mem_table(&[region], vec![file], None)
                .is_err()
        );
    }
}

#[test]
fn a_disconnected_frontend_takes_its_log_with_it() {
    let mut vmm = Vmm::new();
    vmm.set_log(LOG_BYTES, 0).unwrap();
    vmm.set_log_all(true);
    assert!(vmm.logs());
    let frontend = Arc::new(Mutex::new(vmm.frontend));
    let (connection, _) = UnixStream::pair().unwrap();
    Frontend::serve(&frontend, connection);
    vmm.frontend = Arc::into_inner(frontend).unwrap().into_inner().unwrap();
    // The next one, which accepts the feature before it sets an area.
    vmm.set_log_all(true);
    vmm.tell_memory(PAGES / 2).unwrap();
    let vring = &vmm.machine.vrings[0];
    vring.set_queue_info(0, AVAILABLE, USED).unwrap();
    vring.set_queue_next_avail(vmm.machine.drivers[0].available);
    vring.set_queue_next_used(vmm.machine.drivers[0].used);
    vring.get_mut().get_queue_mut().try_set_size(64).unwrap();
    vring.set_queue_event_idx(false);
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    vring.set_kick(Some(File::open("/dev/null").unwrap()));
    assert!(vmm.machine.guest.refresh(0, false));
    assert!(!vmm.logs());
}

/// Frontends send the addresses of running virtqueues again when logging begins and ends.
#[test]
fn a_running_virtqueue_keeps_its_indices_when_logging_begins() {
    let mut vmm = Vmm::new();
    vmm.read_to(70);
    // What is on the virtqueue says nothing any more while requests come back.
    vmm.machine.put(USED + 2, &[9, 9]);
    let flags = VhostUserVringAddrFlags::VHOST_VRING_F_LOG;
    vmm.frontend
        .set_vring_addr(0, flags, VMM, VMM + USED, VMM + AVAILABLE, 0)
        .unwrap();
    vmm.read_to(70);
    assert_eq!(vmm.machine.get_u16(USED + 2), 2);
}
