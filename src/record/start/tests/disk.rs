//! A disk whose images can be evicted, modified and taken away, for single cases.

use uuid::Uuid;

use crate::record::format::Read;
use crate::record::start::{Candidate, Decision, Found, Kept, Options, Start, Why, decide};
use crate::record::{Creation, Extents, Fingerprint, Layout, Record, Threshold};

pub(super) const CAPACITY: u64 = 1 << 20;

pub(super) fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

pub(super) fn options() -> Options {
    Options {
        force: false,
        adopt: None,
        votes: None,
        run: id(0x51),
        branch: id(0x52),
    }
}

pub(super) fn forced() -> Options {
    Options {
        force: true,
        ..options()
    }
}

pub(super) fn adopting(name: &str) -> Options {
    Options {
        adopt: Some(name.to_owned()),
        ..options()
    }
}

/// The images a.raw, b.raw and so on of a disk that was served and killed, all of them fresh.
pub(super) fn disk(replicas: u8) -> Vec<Candidate> {
    let names = (0..replicas).map(|place| format!("{}.raw", char::from(b'a' + place)));
    let names: Vec<String> = names.collect();
    let members = (1..).map(id).zip(names.iter().cloned());
    let mut record = Record::create(&Creation {
        disk: id(0xd),
        branch: id(0xb),
        run: id(0x50),
        layout: Layout::new(CAPACITY),
        threshold: Threshold::majority(names.len()),
        members: members.collect(),
    });
    record.agree();
    let images = names.into_iter().zip(1..);
    let images = images.map(|(node_name, number)| Candidate {
        path: format!("/images/{node_name}").into(),
        node_name,
        image: Ok(Found {
            fingerprint: Some(FINGERPRINT),
            kept: Kept::Read(Box::new(Read {
                record: record.for_replica(id(number), 1),
                intent: Extents::new(record.layout()),
                slots: [None, None],
                unverified_pages: Vec::new(),
            })),
        }),
    });
    images.collect()
}

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    bytes: 512 * CAPACITY,
    modified_ns: 7,
};

pub(super) fn read(candidate: &mut Candidate) -> &mut Read {
    match &mut candidate.image.as_mut().unwrap().kept {
        Kept::Read(read) => read,
        _ => panic!("it has a record"),
    }
}

pub(super) fn keep(candidate: &mut Candidate, kept: Kept) {
    candidate.image.as_mut().unwrap().kept = kept;
}

/// Evicts `gone`, in the records of the others.
pub(super) fn evict(images: &mut [Candidate], gone: usize) {
    for (place, image) in images.iter_mut().enumerate() {
        if place != gone {
            let record = &mut read(image).record;
            record.propose();
            record.deactivate(id(gone as u128 + 1), None);
            record.agree();
        }
    }
}

pub(super) fn start(images: &[Candidate], options: &Options) -> Start {
    match decide(images, options) {
        Ok(Decision::Start(start)) => *start,
        other => panic!("{other:?}"),
    }
}

pub(super) fn whys(start: &Start) -> Vec<Why> {
    start.images.iter().map(|image| image.why).collect()
}

pub(super) fn line(images: &[Candidate], options: &Options) -> String {
    let line = decide(images, options).unwrap_err().to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}
