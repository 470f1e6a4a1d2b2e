//! Starts that write no records: of a disk that has none, and of a read-only one.

use super::image::{Image, each};
use super::{Error, Replicas, empty_images};
use crate::config::Config;
use crate::record::Stale;
use crate::record::start::Start;
use crate::replica::file::{Opening, Unopenable, disk_size, open_all_with_records};
use crate::replica::record_file::RecordError;

/// Opens the images of a disk about which nothing is remembered.
///
/// # Errors
/// If they do not fit each other, or one that is not read-only has a record, or may have one that
/// cannot be opened: that would not know of what changes now.
pub(in crate::daemon) fn open_without(config: &Config) -> Result<Replicas, Error> {
    let opened = open_all_with_records(
        &config.replicas,
        config.open_options(),
        Opening::Apart,
        empty_images(config),
        Unopenable::Refused,
    )?;
    let images = config.replicas.iter().zip(opened);
    let mut images: Vec<Image> = images
        .map(|(source, opened)| Image::new(source.clone(), opened))
        .collect();
    if !config.read_only {
        check_no_records(config, &mut images)?;
    }
    let files = images.iter().filter_map(Image::file);
    let size_bytes = disk_size(&files.collect::<Vec<_>>())?;
    let members = images.into_iter().map(Image::into_member);
    Ok(Replicas::all(config, size_bytes, members.collect()))
}

fn check_no_records(config: &Config, images: &mut [Image]) -> Result<(), Error> {
    let directory = &config.records.directory;
    for found in each(images.iter_mut(), |image| image.find(directory))? {
        match found {
            // There can be none.
            Err(RecordError::NoName { .. } | RecordError::NoLastingName { .. }) => {}
            Err(RecordError::NoDirectory { .. }) => {}
            // It may have one.
            found => found?,
        }
    }
    let recorded = images.iter().find_map(Image::record_path);
    recorded.map_or(Ok(()), |(image, record)| {
        let option = match config.blkverify {
            true => "--blkverify",
            false => "--state none",
        };
        Err(Error::Recorded {
            image,
            record,
            option,
        })
    })
}

/// Leaves out of a read-only disk what is not up to date everywhere: nothing is copied to it.
///
/// # Errors
/// If too few others are left, or the replicas may differ since the last end was not clean.
pub(super) fn leave_out_stale(images: &mut [Image], start: &Start) -> Result<(), Error> {
    let (mut left, is_settled) = (0, start.unsettled.is_empty());
    for (image, verdict) in images.iter_mut().zip(&start.images) {
        match (&verdict.stale, &verdict.doubtful) {
            (Stale::None, Stale::None) => left += usize::from(image.file().is_some()),
            _ if image.file().is_some() => {
                image.leave_out("not up to date, and nothing is copied to it on a read-only disk");
            }
            _ => {}
        }
    }
    match is_settled && left >= usize::from(start.record.threshold.votes) {
        true => Ok(()),
        false => Err(Error::Uncopied),
    }
}
