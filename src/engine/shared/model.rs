//! Every interleaving of small histories, by `cargo test --features loom --lib engine::shared`.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use loom::sync::mpsc::{Receiver, channel};
use loom::thread;

use super::*;
use crate::quorum::health::WriteEnd;

const LAST: ReplicaIndex = ReplicaIndex(2);

fn shared(workers: u16) -> Arc<Shared> {
    Arc::new(Shared::new(3, 2, workers, 1 << 20))
}

fn waiter(worker: u16) -> Waiter {
    Waiter {
        worker: WorkerIndex(worker),
        request: RequestId(u32::from(worker)),
    }
}

/// Three ranges, of which the middle one overlaps both others: each waiter is granted its lock
/// once, and no waiter with an overlapping range holds one meanwhile.
#[test]
fn locks_exclude_each_other_and_are_granted_in_turn() {
    const RANGES: [(u64, u64); 3] = [(0, 8), (4, 8), (8, 8)];
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let shared = shared(3);
        // The locks protect these: two accesses at a time fail the model.
        let halves = Arc::new([UnsafeCell::new(0), UnsafeCell::new(0)]);
        let (mailboxes, mail): (Vec<_>, Vec<_>) = (0..3).map(|_| channel()).unzip();
        let worker = |index: usize, mail: Receiver<()>| {
            let (shared, halves, mailboxes) = (shared.clone(), halves.clone(), mailboxes.clone());
            move || {
                let (start, count) = RANGES[index];
                let number = u16::try_from(index).unwrap();
                let (key, granted) = shared.lock(SectorRange::new(start, count), waiter(number));
                if !granted {
                    mail.recv().unwrap();
                }
                for (half, used) in halves.iter().zip([index <= 1, index >= 1]) {
                    if used {
                        // SAFETY: the model fails if another access can happen meanwhile.
                        half.with_mut(|count| unsafe { *count += 1 });
                    }
                }
                let mut next = Vec::new();
                shared.unlock(key, &mut next);
                for waiter in next {
                    mailboxes[usize::from(waiter.worker.0)].send(()).unwrap();
                }
            }
        };
        let mut mail = mail.into_iter().enumerate();
        let (_, first) = mail.next().unwrap();
        let others: Vec<_> = mail
            .map(|(index, mail)| thread::spawn(worker(index, mail)))
            .collect();
        worker(0, first)();
        for other in others {
            other.join().unwrap();
        }
    });
}

/// A read that begins after a write was acknowledged sees which replica missed it.
#[test]
fn a_read_after_an_acknowledged_write_sees_the_stale_replica() {
    loom::model(|| {
        let shared = shared(2);
        let acknowledged = Arc::new(AtomicBool::new(false));
        let range = SectorRange::new(0, 8);
        let writer = {
            let (shared, acknowledged) = (shared.clone(), acknowledged.clone());
            thread::spawn(move || {
                let (asked, begun) =
                    shared.change_health(|h| (h.in_service(), h.write_begins(range)));
                let mut succeeded = asked;
                succeeded.remove(LAST);
                let success = true;
                let end = WriteEnd {
                    asked,
                    succeeded,
                    begun,
                    success,
                };
                shared.change_health(|health| health.write_ended(&end));
                // The completion travels through guest memory, with release and acquire.
                acknowledged.store(true, Ordering::Release);
            })
        };
        if acknowledged.load(Ordering::Acquire) {
            assert!(shared.stale_in(range).contains(LAST));
        }
        writer.join().unwrap();
    });
}

/// An evicted replica rejoins only when no worker has an operation in flight on it.
#[test]
fn an_evicted_replica_rejoins_after_its_last_operation() {
    loom::model(|| {
        let shared = shared(2);
        // Operations of the other worker on the replica.
        let outstanding = Arc::new(AtomicUsize::new(0));
        let other = {
            let (shared, outstanding) = (shared.clone(), outstanding.clone());
            thread::spawn(move || {
                // As in a read: see which replicas are in service, ask one, and get the reply
                // some time later.
                let asks = shared.in_service().contains(LAST);
                if asks {
                    outstanding.store(1, Ordering::SeqCst);
                    thread::yield_now();
                    outstanding.store(0, Ordering::SeqCst);
                }
                // The tick, with nothing outstanding.
                shared.change_health(|health| health.rejoin(LAST, 1))
            })
        };
        assert!(shared.change_health(|health| health.evict(LAST)));
        let mut rejoined = shared.change_health(|health| health.rejoin(LAST, 0));
        if rejoined {
            assert_eq!(
                outstanding.load(Ordering::SeqCst),
                0,
                "rejoined with an operation outstanding"
            );
        }
        rejoined |= other.join().unwrap();
        // The other worker may have ticked before the eviction; then its next tick decides.
        rejoined |= shared.change_health(|health| health.rejoin(LAST, 1));
        assert!(rejoined && shared.in_service().contains(LAST));
    });
}

/// A worker looks for memory, says that it waits, and looks again; another one gives memory back
/// and looks for those that wait. Either the first one has it then, or it is woken.
#[test]
fn no_worker_that_waits_for_memory_misses_that_some_is_given_back() {
    loom::model(|| {
        let shared = shared(2);
        let (taker, giver) = (WorkerIndex(0), WorkerIndex(1));
        let all = shared.buffers().take(1, u64::MAX);
        assert!(all > 0, "there is some beyond what the workers hold");
        let (mailbox, mail) = channel();
        let other = shared.clone();
        let giver = thread::spawn(move || {
            let woken = other.buffers().give_back(giver, all);
            if woken.contains(taker) {
                mailbox.send(()).unwrap();
            }
        });
        let buffers = shared.buffers();
        let mut has_it = buffers.take(all, all) > 0;
        if !has_it {
            buffers.wait(taker);
            has_it = buffers.take(all, all) > 0;
        }
        if !has_it {
            // The model fails if this waits for ever.
            mail.recv().unwrap();
            assert_eq!(buffers.take(all, all), all);
        }
        giver.join().unwrap();
    });
}
