//! `verify`: compares images with each other. It needs no daemon, and none may have them open.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::format::{printable, printable_json, sectors, size};
use super::progress::Progress;
use super::terminal::{Style, Terminal};
use super::{Error, Outcome};
use crate::common::SECTOR_BYTES;
use crate::common::message::counted;
use crate::inspect::ReplicaSource;
use crate::inspect::verify::{Places, Verified, verify};

/// Lines of places that are shown of each kind; `--json` has more.
const PLACES_SHOWN: usize = 10;

/// Time between two lines of the progress.
const SHOW_EVERY: Duration = Duration::from_millis(200);

pub(super) fn run(
    images: &[ReplicaSource],
    state_directory: Option<PathBuf>,
    json: bool,
    out: &mut dyn Write,
) -> Result<Outcome, Error> {
    let terminal = Terminal::of_stdout();
    let mut progress = Progress::new(terminal);
    let mut shown: Option<Instant> = None;
    // A pipe gets the result only.
    let is_shown = terminal.is_terminal && !json;
    let mut failed = Ok(());
    let verified = verify(images, state_directory, |done, total| {
        let now = Instant::now();
        if is_shown && shown.is_none_or(|last| now.duration_since(last) >= SHOW_EVERY) {
            shown = Some(now);
            let result = progress.show_done(out, "verify", (done, total), now);
            failed = std::mem::replace(&mut failed, Ok(())).and(result);
        }
    });
    progress.clear(out)?;
    failed?;
    let verified = verified.map_err(|error| Error::Failed(error.to_string()))?;
    if json {
        let text = serde_json::to_string(&verified).expect("plain values become JSON");
        writeln!(out, "{}", printable_json(text))?;
    } else {
        show(&verified, terminal, out)?;
    }
    Ok(Outcome::of(verified.is_good()))
}

fn show(verified: &Verified, terminal: Terminal, out: &mut dyn Write) -> Result<(), Error> {
    for image in &verified.images {
        let path = printable(&image.path);
        let digest = image.sha256.as_deref();
        writeln!(
            out,
            "{:64}  {path}",
            digest.unwrap_or("cannot be read everywhere")
        )?;
    }
    let mut line = |style: Style, text: &str| -> Result<(), Error> {
        for line in terminal.wrapped(0, 2, text) {
            writeln!(out, "{}", terminal.paint(style, line))?;
        }
        Ok(())
    };
    if let Some(refusal) = &verified.refusal {
        let text = format!("a start would be refused: {refusal}; here all images vote everywhere");
        line(Style::Bad, &text)?;
    }
    for image in &verified.images {
        let path = printable(&image.path);
        if let Some(why) = &image.why_without_vote {
            let why = printable(why);
            line(Style::Warning, &format!("{path} has no vote: {why}"))?;
        } else if image.without_vote_sectors > 0 {
            let bytes = bytes(image.without_vote_sectors);
            let text = format!("{path} has no vote in {bytes}, where it is stale or doubtful");
            line(Style::Warning, &text)?;
        }
        for (what, places) in [
            ("differs", &image.differs),
            ("differs without a vote", &image.differs_without_vote),
            ("cannot be read", &image.unreadable),
        ] {
            if !places.is_empty() {
                line(Style::Bad, &format!("{path} {what} in {}:", amount(places)))?;
                list(places, &mut line)?;
            }
        }
    }
    if !verified.undecided.is_empty() {
        let votes = verified.vote_threshold;
        let amount = amount(&verified.undecided);
        let text = format!("no version has {votes} of {} votes", verified.images.len());
        line(Style::Bad, &format!("{text} in {amount}:"))?;
        list(&verified.undecided, &mut line)?;
    }
    if !verified.unsettled.is_empty() {
        let amount = amount(&verified.unsettled);
        let text = format!("a start would make the images equal in {amount}, changed at the end:");
        line(Style::Warning, &text)?;
        list(&verified.unsettled, &mut line)?;
    }
    if verified.is_good() {
        let compared = bytes(verified.compared_sectors);
        let images = counted(verified.images.len() as u64, "image");
        line(
            Style::Good,
            &format!("no difference in {compared} of {images}"),
        )?;
    }
    Ok(())
}

fn list(
    places: &Places,
    line: &mut dyn FnMut(Style, &str) -> Result<(), Error>,
) -> Result<(), Error> {
    for range in places.first.iter().take(PLACES_SHOWN) {
        line(
            Style::Plain,
            &format!("  {}", sectors(range.start, range.count)),
        )?;
    }
    let left = places.first.len().saturating_sub(PLACES_SHOWN) as u64 + places.more;
    if left > 0 {
        line(
            Style::Plain,
            &format!("  and {} more", counted(left, "place")),
        )?;
    }
    Ok(())
}

fn amount(places: &Places) -> String {
    let count = counted(places.sectors, "sector");
    format!("{count} ({})", bytes(places.sectors))
}

fn bytes(sectors: u64) -> String {
    size(sectors.saturating_mul(SECTOR_BYTES))
}
