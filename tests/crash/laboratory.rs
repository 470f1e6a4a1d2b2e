//! Makes traces, takes crash states from them, and has them judged.

use std::path::PathBuf;
use std::thread;

use testkit::fuse::logged::{Content, LoggedDirectory, Moment};
use testkit::images::Random;
use testkit::programs::target_directory;
use testkit::size;

use crate::case::{Case, Start};
use crate::judge::{judge, scratch};
use crate::operator::Spare;
use crate::report::Figures;
use crate::trace::{Trace, new_disk, run};

/// States that are taken from a trace after a crash.
const AGAIN: usize = 3;
/// Sectors of a block that a disk with physical blocks of 4 KiB writes as a whole.
const BLOCK_SECTORS: usize = 8;
/// What is done on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A guest writes blocks, and an oracle knows each sector.
    Blocks,
    /// Programs use a file system of this kind.
    Files(&'static str),
}

/// What kind of disk is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Class {
    pub(crate) work: Work,
    pub(crate) replicas: usize,
    pub(crate) has_records: bool,
    /// For a while, writes or syncs of one of the images fail, or both, or it is so slow that its
    /// replica is evicted.
    pub(crate) has_fault: bool,
    /// An operator scrubs the disk, grows it, and adds and removes a replica.
    pub(crate) has_operator: bool,
    /// The images lose what was synced. States that fail are only counted.
    pub(crate) lies: bool,
}

impl Class {
    pub(crate) fn name(self) -> String {
        let records = if self.has_records { "records" } else { "none" };
        let work = match self.work {
            Work::Blocks => "blocks",
            Work::Files(kind) => kind,
        };
        let fault = if self.has_fault { "-fault" } else { "" };
        let operator = if self.has_operator { "-operator" } else { "" };
        format!("{work}-{}-{records}{fault}{operator}", self.replicas)
    }

    /// What a power cut leaves. File systems need blocks that are not torn: ext4 has a checksum for
    /// the two sectors of its superblock.
    pub(crate) fn crash(
        self,
        directory: &LoggedDirectory,
        moment: Moment,
        random: &mut Random,
    ) -> Content {
        let atom = |name: &str| match self.work {
            Work::Files(_) if name.ends_with(".raw") => BLOCK_SECTORS,
            _ => 1,
        };
        if self.lies {
            directory.forget_syncs();
        }
        directory.crash(moment, atom, random)
    }

    fn threshold(self) -> usize {
        self.replicas / 2 + 1
    }
}

/// Says of which trace it was, if the laboratory itself fails.
struct Named(String);

impl Drop for Named {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("{}: the laboratory has failed", self.0);
        }
    }
}

/// Makes a trace with this seed, and judges so many states of it, until `is_over`.
pub(crate) fn judge_trace(
    class: Class,
    seed: u64,
    states: usize,
    is_over: &dyn Fn() -> bool,
) -> Figures {
    let _named = Named(format!("{}-{seed}", class.name()));
    let mut random = Random::from_seed(seed);
    let mut figures = Figures::default();
    // A disk without records is refused if some of its images are empty and others are not.
    let is_empty = class.has_records && random.within(0..2) == 0;
    let (content, known) = new_disk(class, is_empty);
    let trace = run(class, &content, known, None, &mut random);
    if !class.has_records && trace.is_disturbed {
        // What an evicted replica has missed is forgotten, which is no surprise.
        return figures;
    }
    trace.report(class, &format!("{}-{seed}", class.name()), &mut figures);
    for state in 0..states {
        if state > 0 && is_over() {
            break;
        }
        // A state must not depend on how many others are judged.
        let mut random = Random::from_seed(seed ^ (state as u64 + 1) << 40);
        let moment = trace.moment(&mut random);
        let label = format!("{}-{seed}-{state}", class.name());
        judge_state(class, &trace, moment, &label, &mut random, &mut figures);
    }
    figures
}

/// Takes a crash state at `moment`, and has it judged with all replicas and with some.
fn judge_state(
    class: Class,
    trace: &Trace,
    moment: Moment,
    label: &str,
    random: &mut Random,
    figures: &mut Figures,
) {
    let case = trace.crash(class, moment, random);
    figures.states += 1;
    check(class, &case, moment, label, figures);
    // Before it was used, or without records, fewer images are another disk.
    if class.has_records && trace.is_used(moment) {
        judge_subsets(class, trace, &case, moment, label, random, figures);
    }
    if class.has_records && random.within(0..4) == 0 {
        crash_again(class, trace, moment, label, random, figures);
    }
}

/// Has a crash state judged with some of its replicas.
fn judge_subsets(
    class: Class,
    trace: &Trace,
    case: &Case,
    moment: Moment,
    label: &str,
    random: &mut Random,
    figures: &mut Figures,
) {
    let spare = trace.spare(moment);
    let has_spare = matches!(spare, Spare::Member | Spare::Removed);
    let images = class.replicas + usize::from(has_spare);
    let members = class.replicas + usize::from(spare == Spare::Member);
    let threshold = members / 2 + 1;
    for bits in 1_usize..1 << images {
        let started: Vec<usize> = (0..images).filter(|at| bits >> at & 1 == 1).collect();
        let is_all_or_first = started.len() == class.replicas && bits >> class.replicas == 0;
        if is_all_or_first && spare != Spare::Member {
            // Was judged before.
            continue;
        }
        // Two replicas of three are enough, but not of four.
        if spare == Spare::Unsure && started.len() == threshold {
            continue;
        }
        // Of the many subsets of many replicas, some.
        if images > 3 && random.within(0..4) > 0 {
            continue;
        }
        let lacks = |replica: &usize| trace.failed_at(moment) == Some(*replica);
        let mut case = case.clone();
        case.replicas = members;
        case.start_with(started, threshold, lacks);
        // That it is complete may not be in the records yet.
        case.is_sound &= !case.started.contains(&class.replicas);
        if spare == Spare::Removed && case.started.contains(&class.replicas) {
            case.start = Start::Refuse;
        }
        let may_return = case.start == Start::Serve && !case.may_lack;
        case.others_return = may_return && random.within(0..4) == 0;
        check(class, &case, moment, &format!("{label}-{bits:b}"), figures);
    }
}

/// Crashes a second time, while the daemon recovers and the guest works again.
fn crash_again(
    class: Class,
    trace: &Trace,
    moment: Moment,
    label: &str,
    random: &mut Random,
    figures: &mut Figures,
) {
    // What it is served from must start, as any other state.
    let case = trace.crash(class, moment, random);
    if !check(class, &case, moment, &format!("{label}-first"), figures) {
        return;
    }
    let first = moment;
    let known = trace.known_after(first);
    let sizes = Some(case.sizes.clone());
    let second = run(class, &case.content, known, sizes, random);
    if !trace.is_disturbed {
        second.report(class, &format!("{label}-again"), figures);
    }
    // Those that had a fault, or were being copied.
    let mut lacking = second.copied.clone();
    lacking.extend(trace.failed_at(moment));
    if trace.is_sound(moment) && !second.copied.is_empty() {
        figures.failures += usize::from(!class.lies);
        println!("{label}-again: {:?} are copied as a whole", second.copied);
    }
    for state in 0..AGAIN {
        let label = format!("{label}-again-{state}");
        let is_known = !trace.is_disturbed;
        let moment = second.moment(random);
        let mut case = second.crash(class, moment, random);
        case.is_sound &= lacking.is_empty() && is_known && trace.is_sound(first);
        figures.second_crashes += 1;
        check(class, &case, moment, &label, figures);
        let is_known = is_known && !matches!(trace.spare(first), Spare::Unsure | Spare::Member);
        if is_known && second.is_used(moment) && class.threshold() < class.replicas {
            let left_out = size(random.within(0..class.replicas as u64));
            let mut started = case.started.clone();
            started.remove(left_out);
            let lacks = |replica: &usize| lacking.contains(replica);
            case.start_with(started, class.threshold(), lacks);
            let label = format!("{label}-but-{left_out}");
            check(class, &case, moment, &label, figures);
        }
    }
}

/// Has a case judged. Returns whether all is as it must be.
fn check(class: Class, case: &Case, moment: Moment, label: &str, figures: &mut Figures) -> bool {
    let images = scratch();
    let outcome = judge(case, images.path());
    figures.starts += 1;
    figures.refusals += usize::from(case.start == Start::Refuse);
    figures.unreadable += usize::from(outcome.unreadable > 0);
    if outcome.problems.is_empty() {
        return true;
    }
    figures.failures += 1;
    if class.lies {
        return false;
    }
    let kept: PathBuf = target_directory().join("crash").join(label);
    case.save(&kept, &outcome.problems)
        .expect("keeping a state");
    let kept = kept.display();
    println!("{label} at moment {moment} fails; again: make crash STATE={kept}");
    for problem in &outcome.problems {
        println!("  {problem}");
    }
    false
}

/// The name of an image.
pub(crate) fn name(replica: usize) -> String {
    format!("{replica}.raw")
}
