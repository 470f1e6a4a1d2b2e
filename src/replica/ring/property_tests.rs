//! The ring against a naive account of each operation: whatever the kernel returns, and in whatever
//! order, each operation covers its bytes once, from the first to the last, and has one reply.

use proptest::collection::vec;
use proptest::prelude::*;

use super::fake_tests::{Setup, write};
use super::operation::RETRIES_MAX;
use super::*;
use crate::common::{SECTOR_BYTES, SectorRange};

/// Sectors between the starts of two operations, so that the offset names the operation.
const STRIDE: u64 = 100;

/// What the test knows of an operation.
#[derive(Debug)]
struct Account {
    /// Where its buffer is.
    address: u64,
    bytes: u64,
    done: u64,
    interrupted: u32,
    result: Option<Result<(), Errno>>,
}

/// A result of the kernel.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    All,
    /// This part of the bytes, in 256ths.
    Some(u8),
    Interrupted,
    Error,
}

fn outcomes() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        2 => Just(Outcome::All),
        4 => any::<u8>().prop_map(Outcome::Some),
        8 => Just(Outcome::Interrupted),
        1 => Just(Outcome::Error),
    ]
}

impl Account {
    /// Takes in a result for what is left. Returns what the kernel says.
    fn take(&mut self, outcome: Outcome) -> i32 {
        let left = self.bytes - self.done;
        let (done, result) = match outcome {
            Outcome::All => (left, None),
            Outcome::Some(part) => (left * u64::from(part) / 256, None),
            Outcome::Interrupted => (0, Some(libc::EINTR)),
            Outcome::Error => (0, Some(libc::ENOSPC)),
        };
        self.done += done;
        if done > 0 {
            self.interrupted = 0;
        }
        self.result = match result {
            None if done == left => Some(Ok(())),
            // The end of the file.
            None if done == 0 => Some(Err(Errno(libc::EIO))),
            Some(libc::EINTR) if self.interrupted < RETRIES_MAX => {
                self.interrupted += 1;
                None
            }
            None => None,
            Some(errno) => Some(Err(Errno(errno))),
        };
        result.map_or_else(|| i32::try_from(done).unwrap(), |errno| -errno)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_results_in_any_order_end_each_operation_once(
        operations in vec((any::<bool>(), any::<bool>(), 1..16_u64), 1..10),
        choices in vec((any::<prop::sample::Index>(), outcomes()), 0..150),
    ) {
        let mut setup = Setup::new();
        let mut accounts = Vec::new();
        for (number, (is_read, in_arena, sectors)) in (0..).zip(operations) {
            let range = SectorRange::new(number * STRIDE, sectors);
            let buffer = setup.buffer(in_arena, usize::try_from(range.bytes()).unwrap());
            accounts.push(Account {
                address: buffer.as_ptr() as u64,
                bytes: range.bytes(),
                done: 0,
                interrupted: 0,
                result: None,
            });
            setup.push(if is_read {
                Action::Read { range, into: buffer }
            } else {
                write(buffer, 0, range)
            });
        }
        let mut replies = 0;
        let mut choices = choices.into_iter();
        while setup.ring.operations() > 0 {
            prop_assert!(setup.enter().is_empty());
            let in_flight = setup.kernel.operations();
            prop_assert_eq!(in_flight.len(), setup.ring.operations());
            for submission in &in_flight {
                let number = submission.offset / (STRIDE * SECTOR_BYTES);
                let account = &accounts[usize::try_from(number).unwrap()];
                let start = number * STRIDE * SECTOR_BYTES;
                prop_assert_eq!(account.result, None);
                prop_assert_eq!(submission.offset, start + account.done);
                prop_assert_eq!(submission.address, account.address + account.done);
                prop_assert_eq!(u64::from(submission.len), account.bytes - account.done);
            }
            let (submission, outcome) = match choices.next() {
                Some((index, outcome)) => (index.get(&in_flight), outcome),
                None => (&in_flight[0], Outcome::All),
            };
            let number = submission.offset / (STRIDE * SECTOR_BYTES);
            let account = &mut accounts[usize::try_from(number).unwrap()];
            let result = account.take(outcome);
            setup.kernel.complete(submission, result);
            let ended: Vec<_> = setup
                .enter()
                .into_iter()
                .map(|completion| match completion {
                    Completion::Reply(reply, _) => (reply.action.describe().1.start, reply.result),
                    Completion::Readable(_) => panic!("nothing is watched"),
                    Completion::Progress(_) => panic!("nothing is zeroed"),
                })
                .collect();
            let expected = account.result.map(|result| (number * STRIDE, result));
            prop_assert_eq!(ended, Vec::from_iter(expected));
            replies += usize::from(account.result.is_some());
        }
        prop_assert_eq!(replies, accounts.len());
        prop_assert!(accounts.iter().all(|account| account.result.is_some()));
    }
}
