//! The region itself: its fields, its file, and what a start finds in it.

use super::*;

#[test]
fn the_region_has_the_size_and_the_fields_of_the_specification() {
    // As libvhost-user reckons it: ALIGN_UP(16 * entries + 2, 64).
    for (entries, bytes) in [
        (1, 64),
        (2, 64),
        (4, 128),
        (128, 2112),
        (256, 4160),
        (1024, 16448),
    ] {
        assert_eq!(Layout::new(1, entries, 1).unwrap().bytes(), bytes);
        assert_eq!(Layout::new(3, entries, 4).unwrap().bytes(), 3 * bytes);
    }
    let (_, file) = region();
    let (mut tracker, begun) = queue(&file).begin(state_at(7, 7)).unwrap();
    assert_eq!(begun, Begun::New);
    tracker.accepted(3);
    tracker.accepted(5);
    tracker.completing(3);
    tracker.completed(3, 8);
    tracker.completing(5);
    let mut bytes = vec![0; 16 + 16 * 6];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let field = |place: usize| u16::from_ne_bytes([bytes[place], bytes[place + 1]]);
    assert_eq!(bytes[..8], [0; 8], "features");
    assert_eq!([8, 10, 12, 14].map(field), [1, QUEUE_SIZE, 5, 8]);
    let state = |head: usize| &bytes[16 + 16 * head..][..16];
    assert_eq!((state(3)[0], state(5)[0]), (0, 1));
    assert_eq!(state(5)[6..8], 3u16.to_ne_bytes(), "what was last before");
    assert_eq!(state(3)[8..], 0u64.to_ne_bytes());
    assert_eq!(state(5)[8..], 1u64.to_ne_bytes());
}

#[test]
fn a_new_region_cannot_be_truncated() {
    let (_, file) = region();
    assert!(file.set_len(64).is_err());
    assert!(file.set_len(1 << 20).is_err());
}

#[test]
fn regions_of_another_layout_are_rejected() {
    for (num_queues, queue_size) in [
        (0, 16),
        (5, 16),
        (1, 0),
        (1, QUEUE_SIZE_MAX + 1),
        (u16::MAX, u16::MAX),
    ] {
        let refused = Layout::new(num_queues, queue_size, 4);
        assert!(matches!(refused, Err(Error::Layout { .. })));
    }
    let bytes = layout().bytes() as u64;
    let file = layout().create_file().unwrap();
    for (offset, len) in [
        (0, bytes - 1),
        (1 << 12, bytes),
        (0, bytes + 1),
        (u64::MAX - 4095, bytes),
        (0, u64::MAX),
    ] {
        let refused = region_of(layout(), file.try_clone().unwrap(), offset, len);
        assert!(
            matches!(refused, Err(Error::TooShort { .. })),
            "{offset} {len}"
        );
    }
    // Not on a page.
    let file = Layout::new(1, 1024, 1).unwrap().create_file().unwrap();
    assert!(matches!(
        region_of(layout(), file, 64, bytes),
        Err(Error::Map(_))
    ));
    // No file at all.
    let pipe = std::io::pipe().unwrap().0;
    assert!(
        region_of(
            layout(),
            File::from(std::os::fd::OwnedFd::from(pipe)),
            0,
            bytes
        )
        .is_err()
    );
}

/// A file that is no memory file cannot be sealed, but used.
#[test]
fn a_region_may_be_an_ordinary_file_and_begin_anywhere_in_it() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 16).unwrap();
    let map = || {
        region_of(
            layout(),
            file.try_clone().unwrap(),
            1 << 12,
            layout().bytes() as u64,
        )
        .unwrap()
    };
    let (mut tracker, _) = map().queue(0).unwrap().begin(state_at(0, 0)).unwrap();
    tracker.accepted(9);
    let (_, begun) = map().queue(0).unwrap().begin(state_at(0, 1)).unwrap();
    assert_eq!(begun, Begun::Resumed(vec![9]));
    let mut flag = [0];
    file.read_exact_at(&mut flag, (1 << 12) + 16 + 16 * 9)
        .unwrap();
    assert_eq!(flag, [1]);
    assert!(map().queue(1).is_none());
}

/// A memory file that is not sealed yet is sealed when it is mapped.
#[test]
fn regions_of_other_processes_are_sealed() {
    let file = File::from(memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap());
    file.set_len(1 << 12).unwrap();
    map(&file);
    assert!(file.set_len(64).is_err());
}

#[test]
fn batches_of_any_length_are_understood() {
    // Five were accepted, and the last batch was 4, 2 and 9.
    for batch in 0..=3u16 {
        let (_, file) = region();
        queue(&file).begin(state_at(100, 100)).unwrap();
        for (head, counter, next) in [(1, 14, 0), (9, 13, 0), (2, 12, 9), (4, 11, 2), (7, 10, 0)] {
            mark(&file, head, counter, next);
        }
        put(&file, 12, 4);
        let (_, begun) = queue(&file).begin(state_at(100 + batch, 105)).unwrap();
        let all = [7, 4, 2, 9, 1].into_iter();
        let given_back = &[4, 2, 9][..usize::from(batch)];
        let left: Vec<u16> = all.filter(|head| !given_back.contains(head)).collect();
        assert_eq!(begun, Begun::Resumed(left.clone()));
        // That is settled now.
        let (_, begun) = queue(&file).begin(state_at(100 + batch, 105)).unwrap();
        assert_eq!(begun, Begun::Resumed(left));
    }
}

#[test]
fn a_batch_list_out_of_the_table_ends_there() {
    for (last, next) in [(QUEUE_SIZE, 0), (u16::MAX, 0), (3, u16::MAX), (3, 3)] {
        let (_, file) = region();
        queue(&file).begin(state_at(0, 0)).unwrap();
        mark(&file, 3, 0, next);
        mark(&file, 5, u64::MAX, 0);
        put(&file, 12, last);
        let (mut tracker, begun) = queue(&file).begin(state_at(10, 14)).unwrap();
        let expected = if last == 3 { vec![5] } else { vec![3, 5] };
        assert_eq!(begun, Begun::Resumed(expected));
        // After the greatest counter comes the least; nothing breaks.
        tracker.accepted(6);
    }
}

/// The driver was reset, and the frontend has given the same region.
#[test]
fn a_virtqueue_that_was_set_up_again_begins_empty() {
    // With nothing in flight, and with something that an earlier life has left.
    for left_over in [0, 3] {
        let (_, file) = region();
        queue(&file).begin(state_at(5000, 5000)).unwrap();
        for head in 0..left_over {
            mark(&file, head, 0, 0);
        }
        let (_, begun) = queue(&file).begin(state_at(0, 4)).unwrap();
        assert_eq!(begun, Begun::Resumed(vec![]));
        assert_eq!(
            queue(&file).begin(state_at(0, 4)).unwrap().1,
            Begun::Resumed(vec![])
        );
    }
    // More than the driver has asked for.
    let (_, file) = region();
    queue(&file).begin(state_at(0, 0)).unwrap();
    (0..3).for_each(|head| mark(&file, head, 0, 0));
    assert_eq!(
        queue(&file).begin(state_at(0, 2)).unwrap().1,
        Begun::Resumed(vec![])
    );
}

#[test]
fn regions_that_do_not_fit_the_virtqueue_are_rejected() {
    let (_, file) = region();
    put(&file, 8, 2);
    assert_eq!(
        queue(&file).begin(state_at(0, 0)).unwrap_err(),
        BeginError::Version(2)
    );
    let larger = VirtqueueState {
        size: 32,
        ..state_at(0, 0)
    };
    let refused = queue(&file).begin(larger).unwrap_err();
    assert_eq!(
        refused,
        BeginError::TooSmall {
            entries: 16,
            size: 32
        }
    );
    // A smaller virtqueue uses a part of it.
    put(&file, 8, 1);
    mark(&file, 9, 0, 0);
    mark(&file, 7, 0, 0);
    let smaller = VirtqueueState {
        size: 8,
        ..state_at(0, 8)
    };
    assert_eq!(
        queue(&file).begin(smaller).unwrap().1,
        Begun::Resumed(vec![7])
    );
}

#[test]
fn a_cleared_region_is_new() {
    let (region, file) = region();
    queue(&file).begin(state_at(0, 0)).unwrap();
    mark(&file, 3, 0, 0);
    region.clear();
    assert_eq!(queue(&file).begin(state_at(0, 1)).unwrap().1, Begun::New);
    assert_eq!(
        queue(&file).begin(state_at(0, 1)).unwrap().1,
        Begun::Resumed(vec![])
    );
}
