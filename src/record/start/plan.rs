//! The plan of a start: what each image is, whether enough of them are there, and the table with
//! which the disk goes on.

use serde::Serialize;
use uuid::Uuid;

use super::newest::{Copies, Created, Newest};
use super::{Candidate, Kept, Options, Refusal, Verdict, Why};
use crate::limits::RECORD_TABLES_MAX;
use crate::record::{
    Before, Epoch, Extents, Member, MemberState, Record, Stale, Table, Threshold, short_name,
};

/// How a disk may be served.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Start {
    /// The table to be proposed to all images that can be opened, before the first request. It is
    /// of no replica yet (see [`Record::for_replica`]).
    pub record: Record,
    /// What each image is, in the order of the command line.
    pub images: Vec<Verdict>,
    /// Members for which the command line has no image.
    pub absent: Vec<Uuid>,
    /// Where replicas may differ, since the disk was not ended cleanly.
    #[serde(serialize_with = "sectors")]
    pub unsettled: Extents,
    /// The disk was ended cleanly.
    pub was_clean: bool,
    /// The start had to be forced, and begins a branch.
    pub forced: bool,
    /// The image that is taken as the truth now.
    pub adopted: Option<usize>,
}

impl Start {
    /// How many replicas are stale and doubtful nowhere.
    pub fn complete(&self) -> usize {
        let images = self.images.iter();
        let complete = images.filter(|image| image.why == Why::Fresh);
        complete.count()
    }
}

fn sectors<S: serde::Serializer>(map: &Extents, serializer: S) -> Result<S::Ok, S::Error> {
    Stale::of_extents(map, map.layout()).serialize(serializer)
}

/// What a start would be, or why there can be none. `adopted` is taken as the truth.
pub(super) fn plan(
    candidates: &[Candidate],
    created: &Created<'_>,
    options: &Options,
    adopted: Option<usize>,
) -> Result<Start, Refusal> {
    created.check_identities()?;
    let newest = match adopted.and_then(|place| created.alone(place)) {
        Some(alone) => alone,
        None => created.newest()?,
    };
    let planner = Planner::of(candidates, created, newest, adopted);
    let images = planner.verdicts()?;
    let forced = planner.check_history(&images, options)?;
    let threshold = planner.threshold(options)?;
    planner.check_copies(&images, threshold)?;
    Ok(planner.start(images, options, threshold, forced))
}

/// What the second candidate is in the disk of the first, which is served.
pub(super) fn take_in(candidates: &[Candidate], created: &Created<'_>) -> Result<Verdict, Refusal> {
    created.check_identities()?;
    let newest = created.newest()?;
    if !newest.current.contains(&0) {
        return Err(created.split_of(0, 1));
    }
    let planner = Planner::of(candidates, created, newest, None);
    let mut verdicts = planner.verdicts()?;
    Ok(verdicts.remove(1))
}

/// Refuses to take an image as the truth that the records of the others say is old, while there is
/// one that they say is up to date, whether another program has modified it or not.
pub(super) fn check_adopted(
    candidates: &[Candidate],
    created: &Created<'_>,
    adopted: usize,
) -> Result<(), Refusal> {
    // Where two sides have gone on without each other, none of them is newer.
    let Ok(newest) = created.newest() else {
        return Ok(());
    };
    let planner = Planner::of(candidates, created, newest, None);
    let up_to_date = planner.recorded_as_fresh();
    match planner.recorded(adopted) {
        Some(why) if why != Why::Fresh && !up_to_date.is_empty() => Err(Refusal::AdoptsOldData {
            node_name: created.name(adopted),
            why,
            up_to_date: up_to_date
                .iter()
                .map(|place| created.name(*place))
                .collect(),
        }),
        _ => Ok(()),
    }
}

struct Planner<'a> {
    candidates: &'a [Candidate],
    created: &'a Created<'a>,
    newest: Newest<'a>,
    intent: Extents,
    adopted: Option<usize>,
}

impl<'a> Planner<'a> {
    fn of(
        candidates: &'a [Candidate],
        created: &'a Created<'a>,
        newest: Newest<'a>,
        adopted: Option<usize>,
    ) -> Self {
        Self {
            candidates,
            created,
            intent: newest.intent(created),
            newest,
            adopted,
        }
    }

    fn members(&self) -> &[Member] {
        &self.newest.record.members
    }

    /// What each image is.
    fn verdicts(&self) -> Result<Vec<Verdict>, Refusal> {
        let mut claimed: Vec<Uuid> = Vec::new();
        claimed.extend(self.created.records().map(|(_, record)| record.replica));
        let mut verdicts = Vec::new();
        for (place, candidate) in self.candidates.iter().enumerate() {
            let verdict = match self.created.read(place) {
                Some(read) => self.of_record(place, &read.record)?,
                None => self.without_record(candidate, &claimed)?,
            };
            claimed.push(verdict.member);
            verdicts.push(verdict);
        }
        Ok(verdicts)
    }

    /// An image with the record of a disk.
    fn of_record(&self, place: usize, record: &Record) -> Result<Verdict, Refusal> {
        let Some(member) = self.newest.record.member(record.replica) else {
            if self.is_being_added(place, record) {
                return Ok(Verdict {
                    member: record.replica,
                    why: Why::Incomplete,
                    stale: Stale::All,
                    doubtful: Stale::None,
                });
            }
            return Err(Refusal::Removed {
                node_name: self.created.name(place),
                disk: record.disk,
            });
        };
        let (why, copies) = self.state(place, member, record);
        Ok(Verdict {
            member: member.id,
            why,
            stale: copies.stale,
            doubtful: copies.doubtful,
        })
    }

    fn state(&self, place: usize, member: &Member, record: &Record) -> (Why, Copies) {
        if let Some(adopted) = self.adopted {
            return if place == adopted {
                (Why::Fresh, Copies::GOOD)
            } else {
                (Why::NotAdopted, Copies::STALE)
            };
        }
        let found = self.candidates[place].image.as_ref().ok();
        let now = found.and_then(|found| found.fingerprint);
        let is_modified = record.clean && record.image.is_some() && record.image != now;
        match self.as_recorded(place, member, record) {
            (why, _) if is_modified && why != Why::OlderBranch => (Why::Modified, Copies::STALE),
            recorded => recorded,
        }
    }

    /// What the records say of an image, whether another program has modified it or not.
    fn as_recorded(&self, place: usize, member: &Member, record: &Record) -> (Why, Copies) {
        if self.newest.older_branch.contains(&place) {
            return (Why::OlderBranch, Copies::STALE);
        }
        if self.newest.restored.contains(&place) {
            return (Why::Restored, Copies::STALE);
        }
        let is_current = self.newest.current.contains(&place);
        if !is_current && !self.newest.reaches(member, record) {
            return (Why::Restored, Copies::STALE);
        }
        // What its own record says of it holds until it has a newer one: a start that was cut short
        // may have written there that it is stale everywhere, and why is not to be seen any more.
        let layout = self.newest.record.layout();
        let mut copies = self.newest.copies(self.created, member.id, &self.intent);
        match record.member(member.id) {
            Some(own) => copies.add(own, layout),
            None => copies = Copies::STALE,
        }
        let copies = copies.apart(layout);
        let why = match (&copies.stale, &copies.doubtful) {
            (Stale::None, Stale::None) => Why::Fresh,
            (Stale::None, _) => Why::Doubtful,
            (Stale::All, _) => Why::Incomplete,
            _ => Why::MissedChanges,
        };
        (why, copies)
    }

    /// What the records say of an image that has one, if it is a member.
    fn recorded(&self, place: usize) -> Option<Why> {
        let record = &self.created.read(place)?.record;
        let member = self.newest.record.member(record.replica)?;
        Some(self.as_recorded(place, member, record).0)
    }

    /// The images that are up to date, apart from what another program has modified.
    fn recorded_as_fresh(&self) -> Vec<usize> {
        let places = 0..self.candidates.len();
        let fresh = places.filter(|place| self.recorded(*place) == Some(Why::Fresh));
        fresh.collect()
    }

    /// Whether the image was about to become a member when the daemon ended: its record proposes
    /// that, after the table in force. It has it before any other one, and nothing has depended on
    /// it.
    fn is_being_added(&self, place: usize, record: &Record) -> bool {
        let is_member = record.member(record.replica).is_some();
        self.newest.current.contains(&place) && record.before.is_some() && is_member
    }

    /// An image that cannot be opened, or without a record: a member of its name, if there is one.
    fn without_record(&self, candidate: &Candidate, claimed: &[Uuid]) -> Result<Verdict, Refusal> {
        let name = short_name(&candidate.node_name);
        let mut members = self.members().iter();
        let member = members.find(|member| member.node_name == name);
        let member = member.filter(|member| !claimed.contains(&member.id));
        let why = match &candidate.image {
            Err(reason) if member.is_none() => return Err(Refusal::not_opened(reason)),
            Err(_) => Why::Missing,
            Ok(found) => match &found.kept {
                Kept::Unusable(_) if member.is_some() => Why::NoRecord,
                _ => {
                    return Err(Refusal::NotAMember {
                        node_name: candidate.node_name.clone(),
                        path: candidate.path.clone(),
                        instead_of: member.map(|member| member.node_name.clone()),
                    });
                }
            },
        };
        let member = member.expect("refused without one").id;
        let Copies { stale, doubtful } = match why {
            Why::Missing => self.copies(member),
            _ => Copies::STALE,
        };
        Ok(Verdict {
            member,
            why,
            stale,
            doubtful,
        })
    }

    /// Where the copies of a member are no good, as the records of the newest table say.
    fn copies(&self, member: Uuid) -> Copies {
        let copies = self.newest.copies(self.created, member, &self.intent);
        copies.apart(self.newest.record.layout())
    }

    /// Whether all that was acknowledged is known, or the start is forced. A table can be left with
    /// a lower vote threshold only by as many as it asks for, unless all its members are there: as
    /// many as are left out may else be started with a lower one as well.
    fn check_history(&self, images: &[Verdict], options: &Options) -> Result<bool, Refusal> {
        if self.adopted.is_some() {
            return Ok(true);
        }
        let current = self.newest.current.iter();
        let seen: Vec<Uuid> = current.map(|place| images[*place].member).collect();
        let there = Self::there(images);
        let may_go_on = |table: &&Table| table.is_known_to(&seen) && table.is_bound_by(&there);
        let tables = self.tables_before(images);
        let unknown = tables.iter().find(|table| !may_go_on(table));
        let voting = images.iter().filter(|image| image.votes()).count();
        let is_lowered = |table: &&Table| {
            let wanted = options.votes.unwrap_or(table.votes);
            let others = table.active.iter().filter(|id| !seen.contains(id));
            let others = others.chain(table.inactive.iter().filter(|id| !there.contains(id)));
            wanted < table.votes && voting < usize::from(table.votes) && others.count() > 0
        };
        let lowered = tables.iter().find(is_lowered);
        let lacking = |table: &Table| {
            let lacking = table.active.iter().filter(|id| !seen.contains(id));
            lacking.map(|id| self.name(*id)).collect()
        };
        let holders = self.only_holders(images);
        match (unknown, lowered) {
            (None, None) if tables.len() <= RECORD_TABLES_MAX && holders.is_empty() => Ok(false),
            _ if options.force => Ok(true),
            (Some(table), _) => Err(Refusal::HistoryUnknown {
                missing: lacking(table),
                votes: table.votes,
            }),
            (None, Some(table)) => Err(Refusal::ThresholdLowered {
                missing: lacking(table),
                voting,
                votes: table.votes,
            }),
            (None, None) if !holders.is_empty() => Err(Refusal::OnlyCopies {
                missing: holders.iter().map(|id| self.name(*id)).collect(),
            }),
            (None, None) => Err(Refusal::CutShort {
                starts: RECORD_TABLES_MAX,
            }),
        }
    }

    /// The members that are missing, and may have the only good copy of something that was being
    /// changed. Without them that could not be recovered; and they would be stale there when they
    /// return, like everything that was out of service while the rest was recovered (S5).
    fn only_holders(&self, images: &[Verdict]) -> Vec<Uuid> {
        let layout = self.newest.record.layout();
        let mut lost = Stale::of_extents(&self.intent, layout).to_ranges(layout);
        for image in images.iter().filter(|image| image.why != Why::Missing) {
            let mut good = lost.clone();
            good.remove_all(&image.stale.to_ranges(layout));
            lost.remove_all(&good);
            if lost.is_empty() {
                return Vec::new();
            }
        }
        let there = Self::there(images);
        let members = self.members().iter().map(|member| member.id);
        let missing = members.filter(|id| !there.contains(id));
        let holds = |id: &Uuid| {
            let mut held = lost.clone();
            held.remove_all(&self.copies(*id).stale.to_ranges(layout));
            !held.is_empty()
        };
        missing.filter(holds).collect()
    }

    /// The tables before the next one. A proposed table was never agreed upon if all its members
    /// are there, and it is not the one in force.
    fn tables_before(&self, images: &[Verdict]) -> Vec<Table> {
        let with_record = images
            .iter()
            .filter(|image| !matches!(image.why, Why::Missing | Why::NoRecord));
        let there: Vec<Uuid> = with_record.map(|image| image.member).collect();
        let (first, proposed) = self.newest.tables.split_first().expect("one is in force");
        let is_there = |id: &Uuid| there.contains(id);
        let may_be_agreed = |table: &&Table| {
            let mut members = table.active.iter().chain(&table.inactive);
            !members.all(is_there)
        };
        let mut tables = vec![first.clone()];
        tables.extend(proposed.iter().filter(may_be_agreed).cloned());
        tables
    }

    fn there(images: &[Verdict]) -> Vec<Uuid> {
        let there = images.iter().filter(|image| image.why != Why::Missing);
        there.map(|image| image.member).collect()
    }

    /// The vote threshold from now on.
    fn threshold(&self, options: &Options) -> Result<Threshold, Refusal> {
        let members = self.members().len();
        let threshold = match options.votes {
            // One that was only proposed may be higher than that of the table in force, and is then
            // raised again when enough replicas are up to date (W10).
            None => Threshold {
                votes: (self.newest.record.threshold.votes).min(self.newest.in_force().votes),
                ..self.newest.record.threshold
            },
            Some(votes) => Threshold {
                votes,
                follows_majority: false,
            },
        };
        if (1..=members).contains(&usize::from(threshold.votes)) {
            Ok(threshold)
        } else {
            Err(Refusal::VotesOutOfRange {
                votes: threshold.votes,
                members,
            })
        }
    }

    /// Whether enough images may vote. One that was taken as the truth decides alone.
    fn check_copies(&self, images: &[Verdict], threshold: Threshold) -> Result<(), Refusal> {
        let votes = usize::from(threshold.votes);
        let voting: Vec<&Verdict> = images.iter().filter(|image| image.votes()).collect();
        let there = images.iter().filter(|image| image.why != Why::Missing);
        let truth = self.adopted.map(|place| images[place].member);
        let truth = truth.or(self.newest.record.adopted);
        let has_truth = voting
            .iter()
            .any(|image| Some(image.member) == truth && image.stale.is_none());
        if voting.len() >= votes || has_truth && there.count() >= votes {
            return Ok(());
        }
        // Those that would vote if what another program has modified were undone.
        let hindered = (0..images.len()).filter(|place| {
            let recorded = self.recorded(*place);
            images[*place].why == Why::Modified && recorded.is_some_and(Why::votes)
        });
        if voting.len() + hindered.count() >= votes {
            let modified = images.iter().filter(|image| image.why == Why::Modified);
            let fresh = self.recorded_as_fresh().into_iter();
            let fresh = fresh.filter(|place| images[*place].why == Why::Modified);
            return Err(Refusal::Modified {
                up_to_date: fresh.map(|place| self.name(images[place].member)).collect(),
                names: modified.map(|image| self.name(image.member)).collect(),
                voting: voting.len(),
                votes,
            });
        }
        let names = voting.iter().map(|image| self.name(image.member));
        let others = self.members().iter();
        let others = others.filter(|member| voting.iter().all(|image| image.member != member.id));
        let others = others.map(|member| {
            let image = images.iter().find(|image| image.member == member.id);
            let why = image.map_or(Why::Missing, |image| image.why);
            (member.node_name.clone(), why)
        });
        Err(Refusal::TooFewCopies {
            voting: names.collect(),
            others: others.collect(),
            votes,
        })
    }

    fn start(
        self,
        images: Vec<Verdict>,
        options: &Options,
        threshold: Threshold,
        forced: bool,
    ) -> Start {
        let mut record = self.newest.record.clone();
        record.replica = Uuid::nil();
        record.sequence = 0;
        record.threshold = threshold;
        record.lineage.clone_from(&self.newest.lineage);
        record.epoch = Epoch {
            number: self.created.highest_number() + 1,
            run: options.run,
        };
        let mut tables = self.tables_before(&images);
        if forced {
            tables.truncate(1);
        }
        record.before = Some(Before { tables, forced });
        if forced {
            record.branch(options.branch);
        }
        if let Some(place) = self.adopted {
            record.adopted = Some(images[place].member);
        }
        record.clean = false;
        record.image = None;
        let current = self.newest.current.iter();
        let jobs = current.filter_map(|place| Some(&self.created.read(*place)?.record.jobs));
        let latest = jobs.max_by_key(|jobs| jobs.iter().map(|job| job.ended).max());
        record.jobs = latest.cloned().unwrap_or_default();
        let members = self.members().iter();
        record.members = members
            .map(|member| self.next_state(member, &images))
            .collect();
        let known: Vec<Uuid> = record.members.iter().map(|member| member.id).collect();
        for (place, image) in images.iter().enumerate() {
            if !known.contains(&image.member) {
                record.members.push(Member {
                    stale: Stale::All,
                    ..Member::new(image.member, &self.candidates[place].node_name)
                });
            }
        }
        let ids = self.members().iter().map(|member| member.id);
        let is_absent = |id: &Uuid| images.iter().all(|image| image.member != *id);
        let mut believed = self.newest.believed(self.created);
        let was_clean = believed.all(|read| read.record.clean) && self.intent.is_empty();
        Start {
            absent: ids.filter(is_absent).collect(),
            record,
            images,
            unsettled: self.intent,
            was_clean,
            forced,
            adopted: self.adopted,
        }
    }

    /// A member in the table with which the disk goes on.
    fn next_state(&self, member: &Member, images: &[Verdict]) -> Member {
        let place = images.iter().position(|image| image.member == member.id);
        let place = place.filter(|place| images[*place].why != Why::Missing);
        if let Some(place) = place {
            return Member {
                stale: images[place].stale.clone(),
                doubtful: images[place].doubtful.clone(),
                ..Member::new(member.id, &self.candidates[place].node_name)
            };
        }
        let in_force = self.newest.in_force();
        let (holds, copies) = if self.adopted.is_some() {
            (None, Copies::STALE)
        } else if in_force.active.contains(&member.id) {
            (Some(in_force.epoch), self.copies(member.id))
        } else {
            match member.state {
                MemberState::Inactive { holds } => (holds, self.copies(member.id)),
                // It was to become active, and what it held before is not known any more.
                MemberState::Active => (None, Copies::STALE),
            }
        };
        Member {
            state: MemberState::Inactive { holds },
            stale: copies.stale,
            doubtful: copies.doubtful,
            stale_where_changed: true,
            ..member.clone()
        }
    }

    fn name(&self, id: Uuid) -> String {
        let member = self.newest.record.member(id);
        member.map_or_else(|| id.to_string(), |member| member.node_name.clone())
    }
}
