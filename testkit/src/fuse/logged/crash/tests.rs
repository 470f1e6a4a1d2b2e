use std::collections::BTreeSet;
use std::ffi::OsStr;

use super::super::log::{Change, DIRECTORY, Log, NameChange};
use super::*;
use crate::sectors::SECTOR;

/// So many that what can be left is left.
const SEEDS: u64 = 400;
const LENGTH: usize = 4 * SECTOR;
const A: FileNumber = DIRECTORY + 1;
const B: FileNumber = A + 1;

/// Of files that are full of zeroes, and were changed at time 1.
fn log(names: &[&str]) -> Log {
    let file = FileContent {
        bytes: Arc::new(vec![0; LENGTH]),
        modified_ns: 1,
    };
    let files = names.iter().map(|name| (name.into(), file.clone()));
    Log::of(&Content {
        files: files.collect(),
    })
}

fn begin(log: &mut Log, file: FileNumber, byte: u8) -> usize {
    begin_durable(log, file, byte, false)
}

fn begin_durable(log: &mut Log, file: FileNumber, byte: u8, is_durable: bool) -> usize {
    let bytes = Arc::from(vec![byte; LENGTH]);
    let change = Change::Write { offset: 0, bytes };
    log.begin(file, change, is_durable, byte.into())
}

fn write(log: &mut Log, file: FileNumber, byte: u8) {
    let place = begin(log, file, byte);
    log.end(place);
}

fn sync(log: &mut Log, file: FileNumber, with_time: bool) {
    let place = log.begin_sync(file, with_time);
    log.end_sync(place);
}

/// Everything that may be left at `moment`, as `seen` shows it.
fn left<T: Ord>(
    log: &Log,
    moment: Moment,
    atom: usize,
    seen: impl Fn(&Content) -> T,
) -> BTreeSet<T> {
    let crash = |seed| log.crash(moment, |_| atom, &mut Random::from_seed(seed));
    (0..SEEDS).map(|seed| seen(&crash(seed))).collect()
}

/// The first byte of each sector.
fn sectors(content: &Content, name: &str) -> Vec<u8> {
    let bytes = &content.files[OsStr::new(name)].bytes;
    bytes.iter().step_by(SECTOR).copied().collect()
}

fn now(log: &Log) -> Moment {
    log.end_moment() - 1
}

#[test]
fn what_was_synced_is_left_and_nothing_that_began_later() {
    let mut log = log(&["a"]);
    write(&mut log, A, 1);
    sync(&mut log, A, false);
    let moment = now(&log);
    write(&mut log, A, 2);
    let all = left(&log, moment, 1, |content| sectors(content, "a"));
    assert_eq!(all, BTreeSet::from([vec![1; 4]]));
}

#[test]
fn of_what_was_not_synced_anything_is_left() {
    let mut log = log(&["a"]);
    write(&mut log, A, 1);
    write(&mut log, A, 2);
    let all = left(&log, now(&log), 1, |content| sectors(content, "a"));
    for wanted in [[0; 4], [1; 4], [2; 4], [1, 1, 0, 0], [2, 2, 1, 1]] {
        assert!(all.contains(&wanted[..]), "{wanted:?} is never left");
    }
    let parts: BTreeSet<u8> = all.iter().map(|bytes| bytes[1]).collect();
    assert_eq!(parts, BTreeSet::from([0, 1, 2]));
    // The second one without the first, and not as a whole.
    assert!(
        all.iter()
            .any(|bytes| bytes.contains(&0) && bytes.contains(&2))
    );
}

#[test]
fn an_atom_is_not_torn() {
    let mut log = log(&["a"]);
    write(&mut log, A, 1);
    let all = left(&log, now(&log), 2, |content| sectors(content, "a"));
    assert!(
        all.iter()
            .all(|bytes| bytes[0] == bytes[1] && bytes[2] == bytes[3])
    );
    assert!(all.contains(&vec![1, 1, 0, 0]));
}

#[test]
fn a_sync_covers_what_had_ended_when_it_began() {
    let mut log = log(&["a"]);
    let early = begin(&mut log, A, 1);
    let place = log.begin_sync(A, false);
    log.end(early);
    let before_its_end = now(&log);
    log.end_sync(place);
    let both = BTreeSet::from([0, 1]);
    let first = |content: &Content| sectors(content, "a")[0];
    assert_eq!(left(&log, now(&log), 4, first), both);
    sync(&mut log, A, false);
    assert_eq!(left(&log, before_its_end, 4, first), both);
    assert_eq!(left(&log, now(&log), 4, first), BTreeSet::from([1]));
}

#[test]
fn a_durable_write_is_left_when_it_has_ended() {
    let mut log = log(&["a"]);
    let place = begin_durable(&mut log, A, 1, true);
    let first = |content: &Content| sectors(content, "a")[0];
    assert_eq!(left(&log, now(&log), 4, first), BTreeSet::from([0, 1]));
    log.end(place);
    assert_eq!(left(&log, now(&log), 4, first), BTreeSet::from([1]));
}

#[test]
fn what_a_failed_sync_may_have_dropped_no_later_sync_makes_durable() {
    let mut log = log(&["a"]);
    write(&mut log, A, 1);
    log.fail_sync(A);
    sync(&mut log, A, false);
    let first = |content: &Content| sectors(content, "a")[0];
    assert_eq!(left(&log, now(&log), 4, first), BTreeSet::from([0, 1]));
    write(&mut log, A, 2);
    sync(&mut log, A, false);
    assert_eq!(left(&log, now(&log), 4, first), BTreeSet::from([2]));
}

#[test]
fn of_a_write_that_failed_any_part_is_left_even_after_a_sync() {
    let mut log = log(&["a"]);
    let place = begin(&mut log, A, 1);
    log.fail(place);
    sync(&mut log, A, false);
    let all = left(&log, now(&log), 1, |content| sectors(content, "a"));
    assert!(all.contains(&vec![0; 4]) && all.contains(&vec![1; 4]));
    assert!(
        all.iter()
            .any(|bytes| bytes.contains(&0) && bytes.contains(&1))
    );
}

#[test]
fn each_file_keeps_something_else() {
    let mut log = log(&["a", "b"]);
    write(&mut log, A, 1);
    write(&mut log, B, 1);
    let firsts = |content: &Content| [sectors(content, "a")[0], sectors(content, "b")[0]];
    let all = left(&log, now(&log), 4, firsts);
    assert_eq!(all, BTreeSet::from([[0, 0], [0, 1], [1, 0], [1, 1]]));
    // A sync is of one file.
    sync(&mut log, A, false);
    let all = left(&log, now(&log), 4, firsts);
    assert_eq!(all, BTreeSet::from([[1, 0], [1, 1]]));
}

#[test]
fn the_time_of_the_last_change_is_left_where_a_sync_was_with_it() {
    let mut log = log(&["a"]);
    let time = |content: &Content| content.files[OsStr::new("a")].modified_ns;
    write(&mut log, A, 5);
    sync(&mut log, A, false);
    assert_eq!(left(&log, now(&log), 1, time), BTreeSet::from([1, 5]));
    sync(&mut log, A, true);
    assert_eq!(left(&log, now(&log), 1, time), BTreeSet::from([5]));
}

#[test]
fn names_are_left_in_the_order_of_their_changes() {
    let mut log = log(&["a"]);
    log.create(OsStr::new("new"), 1).expect("the name is free");
    let [from, to] = ["new", "a"].map(OsString::from);
    log.rename_as(NameChange::Rename { from, to });
    let names = |content: &Content| -> Vec<OsString> { content.files.keys().cloned().collect() };
    let [one, two] = [vec!["a".into()], vec!["a".into(), "new".into()]];
    let all = left(&log, now(&log), 1, names);
    assert_eq!(all, BTreeSet::from([one.clone(), two]));
    let lengths = |content: &Content| content.files[OsStr::new("a")].bytes.len();
    assert_eq!(
        left(&log, now(&log), 1, lengths),
        BTreeSet::from([0, LENGTH])
    );
    let begin = log.tick();
    let end = log.tick();
    log.name_syncs.push((begin, end));
    assert_eq!(left(&log, now(&log), 1, names), BTreeSet::from([one]));
    assert_eq!(left(&log, now(&log), 1, lengths), BTreeSet::from([0]));
}
