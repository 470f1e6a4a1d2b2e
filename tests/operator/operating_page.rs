//! docs/operating.md shows real output: its commands are one session, repeated here with a real
//! daemon.

use std::fs::{self, File};

use serde_json::json;
use testkit::HANG_LIMIT;
use testkit::client::Client;
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::corrupt_sectors;
use testkit::process::{Process, wait_until};

use crate::session::{Session, Step, comparable, steps};

const PAGE: &str = include_str!("../../docs/operating.md");
const SIZE_BYTES: u64 = 64 << 20;

/// The session of the page.
struct Page {
    session: Session,
    dying: FuseImage,
    events: Option<Process>,
}

impl Page {
    fn new() -> Self {
        let mut session = Session::new();
        for name in ["a.raw", "b.raw", "backing.raw", "new.raw", "short.raw"] {
            let image = File::create_new(session.path(name)).unwrap();
            image
                .set_len(if name == "short.raw" {
                    SIZE_BYTES / 2
                } else {
                    SIZE_BYTES
                })
                .unwrap();
        }
        let dying = FuseImage::serve(&session.path("backing.raw"));
        let file = dying.path().to_str().unwrap().to_owned();
        session.name("/images/c.raw", &format!("{file},node-name=c.raw"), &file);
        // The file system of the dying replica has this one file only.
        let state = session.path("state");
        fs::create_dir(&state).unwrap();
        session.hidden_options = format!("--state-dir {}", state.display());
        let directory = session.path("").to_str().unwrap().to_owned();
        session.name("/images/", &directory, &directory);
        Self {
            session,
            dying,
            events: None,
        }
    }

    /// Starts to follow events.
    fn follow_events(&mut self) {
        let line = "quorum-blkctl events";
        self.events = Some(self.session.spawn(line, "events"));
        // It follows events from here on: it has seen those of a job without work.
        let mut monitor = self.session.monitor();
        self.session.hidden_jobs = 1..1;
        let hears = wait_until(HANG_LIMIT, || {
            monitor.execute("quorum-resync", json!({ "node-name": "a.raw" }));
            self.session.hidden_jobs.end += 1;
            !self.events().is_empty()
        });
        assert!(hears);
    }

    /// The events so far.
    fn events(&self) -> String {
        let events = fs::read_to_string(self.session.path("events")).unwrap();
        self.session.shown(&events)
    }

    fn happens(&mut self, what: &str) {
        let mut guest = Client::connect(&self.session.path("disk.sock"), 1);
        match what {
            "corruption" => {
                corrupt_sectors(&self.session.path("b.raw"), 40000..40008, 0xff);
                corrupt_sectors(&self.session.path("b.raw"), 100_000..100_024, 0xff);
                guest.read(0, 40000 * 512, 4096).unwrap();
                // The sectors around it are scrubbed at once.
                let is_scrubbed = || self.events().contains("(neighbourhood-scrub) completed");
                assert!(wait_until(HANG_LIMIT, is_scrubbed));
                let mut monitor = self.session.monitor();
                assert!(wait_until(HANG_LIMIT, || monitor
                    .execute("query-jobs", json!({}))
                    == json!([])));
            }
            "unreadable" => {
                self.dying.make_unreadable(2 << 20..(2 << 20) + 4096);
                guest.read(0, 2 << 20, 4096).unwrap();
                // The answer does not wait for the error, nor for the scrub of what is around it.
                let mut monitor = self.session.monitor();
                assert!(wait_until(HANG_LIMIT, || {
                    let state = monitor.execute("query-quorum", json!({}));
                    let has_errors = state["replicas"][2]["conditions"] == json!(["errors"]);
                    has_errors && monitor.execute("query-jobs", json!({})) == json!([])
                }));
            }
            "hang" => {
                for operation in [Operation::Read, Operation::Write, Operation::Sync] {
                    self.dying.inject(operation, Fault::Hang);
                }
                guest.write(0, 1 << 20, &[1; 65536]).unwrap();
                guest.flush(0).unwrap();
            }
            other => panic!("unknown step {other}"),
        }
    }
}

/// Whether all of `shown` is in `printed`, in this order.
fn contains_in_order(printed: &[String], shown: &[String]) -> bool {
    let mut printed = printed.iter();
    shown.iter().all(|line| printed.any(|other| other == line))
}

#[test]
fn the_examples_match_the_output() {
    let mut page = Page::new();
    let mut events_in_page = Vec::new();
    for step in steps(PAGE) {
        match step {
            Step::Happens(what) => page.happens(&what),
            Step::Command(line, in_page) if line == "quorum-blkctl events" => {
                page.follow_events();
                events_in_page = comparable(&in_page);
            }
            Step::Command(line, in_page) => {
                page.session.step(&line, &in_page);
                if line.ends_with(" &") {
                    // The images of a new disk are compared.
                    page.session.wait_until_settled();
                }
            }
        }
    }
    let all_came = wait_until(HANG_LIMIT, || {
        contains_in_order(&comparable(&page.events()), &events_in_page)
    });
    page.dying.clear_faults();
    let differences = page.session.differences();
    assert!(
        differences.is_empty() && all_came && !events_in_page.is_empty(),
        "not in docs/operating.md: {differences:#?}, the events: {}\nAll of \
         it:\n{}\nEvents:\n{}",
        !all_came,
        page.session.transcript(),
        page.events()
    );
}
