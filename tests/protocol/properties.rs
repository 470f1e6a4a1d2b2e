//! What must hold in every state, and the model as the checker explores it.

use stateright::{Model, Property};

use crate::daemon::Daemon;
use crate::disk::{REPLICAS_MAX, Replica};
use crate::guest::Guest;
use crate::keeper::Keeper;
use crate::record::{Epoch, Record, Table};
use crate::sets::{elements, has, len};
use crate::world::{Action, Faults, State, World};

/// I1, I5: what counts is legal.
fn only_what_is_legal_counts(world: &World, state: &State) -> bool {
    let Some(daemon) = &state.daemon else {
        return true;
    };
    world.sectors().all(|sector| {
        let mut fresh = elements(daemon.fresh(sector));
        let legal = state.guest.legal[sector];
        fresh.all(|replica| has(legal, state.replicas[replica].copies[sector].now.into()))
    })
}

/// I4: what counts is the same, except where a write or a vote is to come.
fn what_counts_is_equal(world: &World, state: &State) -> bool {
    let Some(daemon) = &state.daemon else {
        return true;
    };
    world.sectors().all(|sector| {
        let is_writing = daemon
            .write
            .is_some_and(|write| usize::from(write.sector) == sector);
        let is_open = is_writing || has(daemon.undecided, sector);
        let fresh = elements(daemon.fresh(sector));
        let mut copies = fresh.map(|replica| state.replicas[replica].copies[sector].now);
        let first = copies.next();
        is_open || copies.all(|version| Some(version) == first)
    })
}

/// S2: what is doubtful is no older than what a flush has covered.
fn what_is_doubtful_is_legal(world: &World, state: &State) -> bool {
    let Some(daemon) = state.daemon.filter(|daemon| !daemon.serves) else {
        return true;
    };
    world.sectors().all(|sector| {
        let mut doubtful = elements(daemon.active & daemon.doubtful(sector));
        let legal = state.guest.after_power_cut[sector];
        doubtful.all(|replica| has(legal, state.replicas[replica].copies[sector].now.into()))
    })
}

/// S3: with all images, a disk is served.
fn all_images_can_be_started(world: &World, state: &State) -> bool {
    state.daemon.is_some() || world.start(state, world.rules.members()).is_ok()
}

/// I5: with all images, each sector has a copy that counts, except for what
/// [`State::gaps`] says.
fn each_sector_has_a_good_copy(world: &World, state: &State) -> bool {
    if state.daemon.is_some() {
        return true;
    }
    let Ok(start) = world.start(state, world.rules.members()) else {
        return true;
    };
    let daemon = Daemon::start(&world.rules, &start.record);
    // As long as nothing fails and no replica is evicted, there are as many as a flush needs.
    let any_failure = state.left.failures < world.budget.failures
        || state.left.evictions < world.budget.evictions;
    let needed = if any_failure {
        1
    } else {
        world.rules.threshold
    };
    let has_copies = |sector: usize| {
        let copies = daemon.fresh(sector) | daemon.active & daemon.doubtful(sector);
        has(state.gaps, sector) || len(copies) >= needed
    };
    world.sectors().all(has_copies)
}

/// W6: as long as nothing has failed, there are t copies that count.
fn enough_copies_count(world: &World, state: &State) -> bool {
    let has_failed = state.run > 0 || state.left.failures < world.budget.failures;
    let Some(daemon) = state.daemon.filter(|_| !has_failed) else {
        return true;
    };
    let is_writing = |sector: usize| {
        let writes = daemon.write;
        writes.is_some_and(|write| usize::from(write.sector) == sector)
    };
    let mut sectors = world.sectors().filter(|sector| !is_writing(*sector));
    sectors.all(|sector| len(daemon.fresh(sector)) >= world.rules.threshold)
}

/// W3, S5: what the guest has an answer to has t copies.
fn no_answer_is_of_few(_: &World, state: &State) -> bool {
    !state.faults.answered_by_few
}

/// W5: what a flush has covered is durable on t replicas.
fn no_flush_is_of_few(_: &World, state: &State) -> bool {
    !state.faults.flushed_by_few
}

/// S3: a start without some images makes nothing stale of which only they have a good copy.
fn no_start_loses_a_copy(_: &World, state: &State) -> bool {
    !state.faults.lost_by_start
}

/// W6: the records can say who is in service.
fn records_can_be_changed(_: &World, state: &State) -> bool {
    state.daemon.is_none_or(|daemon| !daemon.is_blocked)
}

/// S3: some of the images are served after a crash, and the others return later.
fn some_are_served(world: &World, state: &State) -> bool {
    let daemon = state.daemon.as_ref();
    daemon.is_some_and(|daemon| {
        daemon.serves && state.run > 0 && len(daemon.active) < world.rules.replicas
    })
}

/// S5: a winner is being written.
fn a_winner_is_settled(_: &World, state: &State) -> bool {
    let daemon = state.daemon.as_ref();
    daemon.is_some_and(|daemon| daemon.settling.is_some())
}

/// A crash leaves a sector of which no good copy is left, as [`State::gaps`] says.
fn a_gap_is_left(_: &World, state: &State) -> bool {
    state.gaps != 0
}

impl Model for World {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let active = self.rules.members();
        let record = Record {
            table: Table {
                epoch: Epoch { number: 1, run: 0 },
                active,
            },
            ..Record::default()
        };
        let mut replicas = [Replica::default(); REPLICAS_MAX];
        for replica in self.replicas() {
            replicas[replica].record = record;
        }
        let daemon = Daemon {
            serves: true,
            active,
            keeper: Keeper::agreed(record),
            ..Daemon::default()
        };
        vec![State {
            replicas,
            daemon: Some(daemon),
            guest: Guest::default(),
            left: self.budget,
            run: 0,
            gaps: 0,
            faults: Faults::default(),
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.steps(state, actions);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = *last;
        self.step(&mut state, action);
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("only what is legal counts", only_what_is_legal_counts),
            Property::always("what counts is equal", what_counts_is_equal),
            Property::always("what is doubtful is legal", what_is_doubtful_is_legal),
            Property::always("all images can be started", all_images_can_be_started),
            Property::always("each sector has a good copy", each_sector_has_a_good_copy),
            Property::always("the records can be changed", records_can_be_changed),
            Property::always("enough copies count", enough_copies_count),
            Property::always("no answer is of few", no_answer_is_of_few),
            Property::always("no flush is of few", no_flush_is_of_few),
            Property::always("no start loses a copy", no_start_loses_a_copy),
            Property::sometimes("some images are served", some_are_served),
            Property::sometimes("a winner is settled", a_winner_is_settled),
            Property::sometimes("a gap is left", a_gap_is_left),
        ]
    }
}
