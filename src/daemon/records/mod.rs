//! The start of a disk whose replicas have records, and its end (S2, S3, S7, S8).
//!
//! Invariants:
//! - Nothing is served before the records of all replicas in service say durably with which table
//!   the disk goes on, and where its replicas may differ.
//! - An image that is no member of the disk is never written to, nor is its record.
//! - No thread of the daemon waits for a file system that does not answer, except at the end.

mod close;
mod image;
mod recognition;
mod unwritten;

use log::{debug, warn};
use uuid::Uuid;

pub(super) use self::close::close;
use self::image::{Image, each};
pub(super) use self::recognition::Members;
pub(super) use self::unwritten::open_without;
use super::Error;
use super::replicas::{Memory, Replicas};
use crate::admin::records::blank_record;
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet, SECTOR_BYTES};
use crate::config::{Config, Records};
use crate::quorum::health::{Copies, Remembered, Wanted};
use crate::record::start::{Candidate, Decision, Options, Refusal, Start, Why, decide};
use crate::record::{
    Creation, Extents, Holder, Keeper, Layout, Record, Stale, Threshold, format, short_name,
};
use crate::replica::file::{
    EmptyImages, OpenError, Opening, ReplicaFile, checked_size, compare_first, open_each,
    warn_of_larger,
};
use crate::replica::record_file::{RecordAccess, RecordError};
use crate::replica::table::MissingReplica;

/// Opens the images of the disk, and has their records say that it goes on with these. Those of a
/// read-only disk are only read.
///
/// # Errors
/// If the records do not allow that, or cannot be made or written.
pub(super) fn open(config: &Config) -> Result<Replicas, Error> {
    let records = &config.records;
    let opened = open_each(&config.replicas, config.open_options(), Opening::Apart)?;
    let images = config.replicas.iter().zip(opened);
    let mut images: Vec<Image> = images
        .map(|(source, opened)| Image::new(source.clone(), opened))
        .collect();
    // Each time that an image is left out, it is decided again.
    loop {
        read_all(&mut images, records)?;
        let candidates: Vec<Candidate> = images.iter().map(Image::candidate).collect();
        let decision = decide_on(&candidates, &options(config, records));
        let decision = decision.map_err(|refusal| refused(refusal, &images))?;
        match decision {
            Decision::Create => return create(config, images),
            Decision::Start(mut start) => {
                if leave_out_short(&mut images, &start) {
                    continue;
                }
                distrust_shorter(&images, &mut start);
                if config.read_only {
                    unwritten::leave_out_stale(&mut images, &start)?;
                    return Ok(started(config, images, &start, None));
                }
                if let Some(keeper) = begin(&mut images, &start)? {
                    return Ok(started(config, images, &start, Some(keeper)));
                }
            }
        }
    }
}

fn empty_images(config: &Config) -> EmptyImages {
    match config.empty_anyway {
        true => EmptyImages::Accepted,
        false => EmptyImages::Refused,
    }
}

/// Decides with the vote threshold that is wanted, or, if too few replicas are up to date for it,
/// with the one that the records have: that is raised when more are (W10).
fn decide_on(candidates: &[Candidate], options: &Options) -> Result<Decision, Refusal> {
    let decision = decide(candidates, options);
    let Some(wanted) = options.votes else {
        return decision;
    };
    let is_too_high = match &decision {
        Ok(Decision::Start(start)) => start.complete() < usize::from(wanted),
        Ok(Decision::Create) => false,
        Err(refusal) => matches!(refusal, Refusal::TooFewCopies { .. }),
    };
    if !is_too_high {
        return decision;
    }
    let votes = None;
    let options = Options {
        votes,
        ..options.clone()
    };
    match decide(candidates, &options) {
        Ok(Decision::Start(start)) if start.record.threshold.votes < wanted => {
            Ok(Decision::Start(start))
        }
        _ => decision,
    }
}

fn refused(refusal: Refusal, images: &[Image]) -> Error {
    let left_out = match refusal {
        Refusal::NotOpened { .. } => Vec::new(),
        _ => images.iter().filter_map(Image::why_left_out).collect(),
    };
    let refusal = Box::new(refusal);
    Error::Refused { refusal, left_out }
}

fn options(config: &Config, records: &Records) -> Options {
    let votes = u8::try_from(config.vote_threshold).expect("few replicas");
    Options {
        force: records.force_start,
        adopt: records.adopt.clone(),
        votes: (!config.threshold_follows).then_some(votes),
        run: Uuid::new_v4(),
        branch: Uuid::new_v4(),
    }
}

/// Reads all records. An image whose record cannot be found or read is left out: it is not known
/// what it holds.
fn read_all(images: &mut [Image], records: &Records) -> Result<(), Error> {
    let found = each(images.iter_mut(), |image| image.find(&records.directory))?;
    for (image, found) in images.iter_mut().zip(found) {
        if let Err(error) = found {
            image.leave_out(&error.to_string());
        }
    }
    Ok(())
}

/// Leaves out images that are shorter than the disk. Returns whether there is one.
fn leave_out_short(images: &mut [Image], start: &Start) -> bool {
    let disk_bytes = start.record.capacity * SECTOR_BYTES;
    let mut is_any_short = false;
    for (image, verdict) in images.iter_mut().zip(&start.images) {
        let Some(file) = image.file().filter(|file| file.size_bytes < disk_bytes) else {
            continue;
        };
        let error = OpenError::ShorterThanDisk {
            path: file.path.clone(),
            size_bytes: file.size_bytes,
            disk_bytes,
        };
        match file.size_bytes {
            // It has the place of an image whose file system is not there.
            0 => image.leave_out(&error.of_missing()),
            _ => image.leave_out_short(verdict.member, &error.of_missing()),
        }
        is_any_short = true;
    }
    is_any_short
}

/// Another program has modified an image that is shorter than the disk. That is no longer to be
/// seen when it has its length again, unless it has the fingerprint of a clean end (S7). So it is
/// stale everywhere from now on.
fn distrust_shorter(images: &[Image], start: &mut Start) {
    for (image, verdict) in images.iter().zip(&mut start.images) {
        if !image.is_shorter_image_of(verdict.member) {
            continue;
        }
        (verdict.stale, verdict.doubtful) = (Stale::All, Stale::None);
        if let Some(member) = start.record.member_mut(verdict.member) {
            (member.stale, member.doubtful) = (Stale::All, Stale::None);
        }
    }
}

/// A new disk.
fn create(config: &Config, images: Vec<Image>) -> Result<Replicas, Error> {
    let opened = images.iter().filter_map(Image::file);
    let size_bytes = checked_size(&opened.collect::<Vec<_>>(), config.open_options())?;
    let mut images: Vec<Image> = images;
    let mut open: Vec<(&ReplicaFile, &mut RecordAccess)> =
        images.iter_mut().filter_map(Image::parts).collect();
    compare_first(&mut open, size_bytes, empty_images(config))?;
    if config.read_only {
        let members = images.into_iter().map(Image::into_member);
        return Ok(Replicas::all(config, size_bytes, members.collect()));
    }
    let members = images
        .iter()
        .map(|image| (Uuid::new_v4(), image.node_name()));
    let record = Record::create(&Creation {
        disk: Uuid::new_v4(),
        branch: Uuid::new_v4(),
        run: Uuid::new_v4(),
        layout: Layout::new(size_bytes / SECTOR_BYTES),
        threshold: Threshold {
            votes: u8::try_from(config.vote_threshold).expect("few replicas"),
            follows_majority: config.threshold_follows,
        },
        members: members.collect(),
    });
    let unmarked = Extents::new(record.layout());
    let ids: Vec<Uuid> = record.members.iter().map(|member| member.id).collect();
    let made = each(images.iter_mut().zip(&ids), |(image, id)| {
        let content = content(&record.for_replica(*id, 1), &unmarked);
        image.make(&config.records.directory, &content)
    })?;
    made.into_iter().collect::<Result<(), _>>()?;
    let holders = ids.iter().map(|id| {
        Some(Holder {
            member: *id,
            sequence: 1,
        })
    });
    let mut keeper = Keeper::new(record.clone(), holders.collect(), unmarked);
    if let Some((_, error)) = drive(&mut keeper, &mut images)?.into_iter().next() {
        return Err(error.into());
    }
    check_agreed(&keeper)?;
    debug!("disk-uuid":% = record.disk, replicas = images.len(); "records of a new disk are made");
    let memory = Memory {
        remembered: Remembered {
            members: ReplicaSet::first(images.len()),
            in_service: ReplicaSet::first(images.len()),
            copies: vec![Copies::default(); images.len()],
            ..Remembered::default()
        },
        keeper: Some(keeper),
        unsettled: RangeSet::default(),
        is_new: true,
    };
    let members = images.into_iter().map(Image::into_member);
    Ok(Replicas {
        memory: Some(memory),
        ..Replicas::all(config, size_bytes, members.collect())
    })
}

/// Has the records say with which table the disk goes on. `None`: an image had to be left out,
/// since its record cannot be written.
fn begin(images: &mut [Image], start: &Start) -> Result<Option<Keeper>, Error> {
    let made = each(images.iter_mut().zip(&start.images), |(image, verdict)| {
        if verdict.why != Why::NoRecord {
            return Ok(());
        }
        let record = start.record.for_replica(verdict.member, 1);
        image.make_instead(&content(&record, &start.unsettled))
    })?;
    let made = made.into_iter().enumerate();
    let mut failed: Vec<_> = made
        .filter_map(|(place, made)| Some((place, made.err()?)))
        .collect();
    let holders = images.iter().zip(&start.images).map(|(image, verdict)| {
        Some(Holder {
            member: verdict.member,
            sequence: image.sequence(),
        })
    });
    let absent = start.absent.iter().map(|id| {
        Some(Holder {
            member: *id,
            sequence: 0,
        })
    });
    let holders = holders.chain(absent).collect();
    let mut keeper = Keeper::new(start.record.clone(), holders, start.unsettled.clone());
    if failed.is_empty() {
        failed = drive(&mut keeper, images)?;
    }
    for (place, error) in &failed {
        images[*place].leave_out(&error.to_string());
    }
    if !failed.is_empty() {
        return Ok(None);
    }
    check_agreed(&keeper)?;
    Ok(Some(keeper))
}

/// The replicas of a disk that goes on.
fn started(config: &Config, images: Vec<Image>, start: &Start, keeper: Option<Keeper>) -> Replicas {
    let layout = start.record.layout();
    let size_bytes = layout.capacity() * SECTOR_BYTES;
    warn_of_larger(
        &images.iter().filter_map(Image::file).collect::<Vec<_>>(),
        size_bytes,
    );
    tell(&images, start, &config.records);
    let votes = usize::from(start.record.threshold.votes);
    // One that was taken as the truth decides until it is copied.
    let voting = start
        .images
        .iter()
        .filter(|verdict| verdict.votes())
        .count();
    let is_truth_alone = voting < votes;
    let absent = start
        .absent
        .iter()
        .filter_map(|id| start.record.member(*id));
    let count = images.len() + absent.clone().count();
    let is_there = |index: &ReplicaIndex| {
        let image = images.get(index.as_usize());
        image.is_some_and(|image| image.file().is_some())
    };
    let copies = |stale: &Stale, doubtful: &Stale| Copies {
        stale: stale.to_ranges(layout),
        doubtful: doubtful.to_ranges(layout),
    };
    let of_images = start
        .images
        .iter()
        .map(|verdict| copies(&verdict.stale, &verdict.doubtful));
    let of_absent = absent
        .clone()
        .map(|member| copies(&member.stale, &member.doubtful));
    let names: Vec<String> = images.iter().map(Image::node_name).collect();
    let absent_members = absent.map(|member| {
        let is_taken = names
            .iter()
            .any(|name| short_name(name) == member.node_name);
        let name = match is_taken || member.node_name.is_empty() {
            true => member.id.to_string(),
            false => member.node_name.clone(),
        };
        Err(MissingReplica::absent(&name))
    });
    let absent_members: Vec<_> = absent_members.collect();
    Replicas {
        size_bytes,
        votes: match is_truth_alone {
            true => 1,
            false => votes,
        },
        wanted_votes: match config.threshold_follows {
            false => Wanted::Given(config.vote_threshold),
            true if start.record.threshold.follows_majority => Wanted::Majority,
            true => Wanted::Given(votes),
        },
        memory: Some(Memory {
            remembered: Remembered {
                members: ReplicaSet::first(count),
                in_service: ReplicaSet::first(count).iter().filter(is_there).collect(),
                copies: of_images.chain(of_absent).collect(),
                ..Remembered::default()
            },
            keeper,
            unsettled: Stale::of_extents(&start.unsettled, layout).to_ranges(layout),
            is_new: false,
        }),
        members: images
            .into_iter()
            .map(Image::into_member)
            .chain(absent_members)
            .collect(),
    }
}

/// Logs what the records have said.
fn tell(images: &[Image], start: &Start, records: &Records) {
    let layout = start.record.layout();
    let unsettled = Stale::of_extents(&start.unsettled, layout).to_ranges(layout);
    debug!(
        "disk-uuid":% = start.record.disk, epoch = start.record.epoch.number,
        "unrecovered-sectors" = unsettled.sectors(), clean = start.was_clean;
        "the records of the disk allow its start"
    );
    if let Some(name) = &records.adopt {
        match start.adopted {
            None => warn!(
                replica:% = name;
                "--adopt has no effect: the replica may vote, and so may the others"
            ),
            Some(_) => warn!(
                replica:% = name;
                "the image of a replica is taken as the truth: all others are overwritten with it"
            ),
        }
    } else if start.forced {
        warn!("the start is forced: replicas that are missing are overwritten when they come back");
    }
    for (image, verdict) in images.iter().zip(&start.images) {
        if !matches!(verdict.why, Why::Fresh | Why::Missing) {
            warn!(
                replica = image.node_name(), reason:% = verdict.why,
                "stale-sectors" = verdict.stale.to_ranges(layout).sectors();
                "replica is not up to date at the start"
            );
        }
    }
}

/// Writes what `keeper` wants to the records, one round after the other, until all is durable or
/// some cannot be written. Returns those.
fn drive(keeper: &mut Keeper, images: &mut [Image]) -> Result<Vec<(usize, RecordError)>, Error> {
    while let Some(round) = keeper.next_round() {
        let writes = images.iter_mut().enumerate().filter_map(|(place, image)| {
            let mut writes = round.writes.iter();
            let (_, write) = writes.find(|(replica, _)| replica.as_usize() == place)?;
            Some((place, image, write))
        });
        let written = each(writes, |(place, image, write)| {
            (place, image.write(write.offset_bytes, &write.bytes))
        })?;
        let (mut succeeded, mut failed) = (ReplicaSet::EMPTY, Vec::new());
        for (place, written) in written {
            match written {
                Ok(()) => succeeded.insert(ReplicaIndex(u8::try_from(place).expect("few"))),
                Err(error) => failed.push((place, error)),
            }
        }
        keeper.ended(succeeded);
        if !failed.is_empty() {
            return Ok(failed);
        }
    }
    Ok(Vec::new())
}

/// Checks that the records say all that they are to say.
fn check_agreed(keeper: &Keeper) -> Result<(), Error> {
    match keeper.is_durable() {
        true => Ok(()),
        false => Err(Error::Broken(
            "the replicas that are there cannot agree on the members of the disk".to_owned(),
        )),
    }
}

/// All bytes of a record file, which has room for the maps of any capacity.
fn content(record: &Record, intent: &Extents) -> Vec<u8> {
    let layout = record.layout();
    let slot = record.slot();
    let pages = format::pages(record.disk, record.replica, intent, 0..layout.pages());
    let mut content = blank_record();
    let mut put = |offset: u64, bytes: &[u8]| {
        let start = usize::try_from(offset).expect("a record is small");
        content[start..start + bytes.len()].copy_from_slice(bytes);
    };
    put(slot.offset, &slot.bytes);
    put(Layout::page_offset(0), &pages);
    content
}
