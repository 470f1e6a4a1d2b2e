//! docs/restarting.md shows real output: its commands are one session, repeated here with real
//! daemons, which are killed, and whose images disappear, come back and are changed meanwhile.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::json;
use testkit::HANG_LIMIT;
use testkit::client::{Client, Request};
use testkit::process::{run, wait_until};

use crate::session::{Session, Step, steps};

const PAGE: &str = include_str!("../../docs/restarting.md");
const SIZE_BYTES: u64 = 64 << 20;
/// Where the guest writes.
const MODIFIED: u8 = 99;
const OFFSET: u64 = 20 << 20;

/// The session of the page.
struct Page {
    session: Session,
    /// The directory of the images: each host of the page has its own.
    images: &'static str,
    /// Written by the guest last.
    newest: u8,
}

impl Page {
    fn new() -> Self {
        let mut session = Session::new();
        let images = "images";
        fs::create_dir(session.path(images)).unwrap();
        for name in ["a.raw", "b.raw", "c.raw"] {
            let image = File::create_new(session.path(images).join(name)).unwrap();
            image.set_len(SIZE_BYTES).unwrap();
        }
        let directory = session.path(images).to_str().unwrap().to_owned();
        session.name("/images", &directory, &directory);
        Self {
            session,
            images,
            newest: 0,
        }
    }

    fn guest(&self) -> Client {
        Client::connect(&self.session.path("disk.sock"), 1)
    }

    fn image(&self, name: &str) -> PathBuf {
        self.session.path(self.images).join(name)
    }

    /// Moves an image and its record, or copies them with their times.
    fn put(&self, program: &[&str], from: &Path, to: &Path) {
        for suffix in ["", ".quorum"] {
            let [from, to] = [from, to].map(|path| format!("{}{suffix}", path.display()));
            let mut arguments = program[1..].to_vec();
            arguments.extend([from.as_str(), to.as_str()]);
            run(program[0], &arguments);
        }
    }

    /// Moves an image and its record out of the directory of the images.
    fn move_away(&self, name: &str) {
        self.put(&["mv"], &self.image(name), &self.session.path(name));
    }

    /// Copies an image and its record there.
    fn copy_away(&self, name: &str) {
        let to = self.session.path(name);
        self.put(&["cp", "--preserve=timestamps"], &self.image(name), &to);
    }

    /// Moves them back, over others of these names.
    fn put_back(&self, name: &str) {
        self.put(&["mv"], &self.session.path(name), &self.image(name));
    }

    /// The guest writes something new, and has it flushed.
    fn write(&mut self) {
        self.newest += 1;
        let mut guest = self.guest();
        guest.write(0, OFFSET, &[self.newest; 4096]).unwrap();
        guest.flush(0).unwrap();
    }

    /// The guest reads what it has written last, whatever has happened since.
    fn check(&self) {
        let read = self.guest().read(0, OFFSET, 4096).unwrap();
        let expected = self.newest;
        assert!(
            read == [expected; 4096],
            "{} instead of {expected}\n{}",
            read[0],
            self.session.transcript()
        );
    }

    /// Another program writes to an image, the same to each.
    fn modify(&mut self, name: &str) {
        let file = File::options().write(true).open(self.image(name)).unwrap();
        file.write_all_at(&[MODIFIED; 4096], OFFSET).unwrap();
        file.sync_all().unwrap();
    }

    /// Waits until all replicas are in service and up to date.
    fn wait_until_complete(&self) {
        let mut monitor = self.session.monitor();
        let is_complete = wait_until(HANG_LIMIT, || {
            let state = monitor.execute("query-quorum", json!({}));
            let mut replicas = state["replicas"].as_array().unwrap().iter();
            replicas.all(|replica| replica["state"] == "in-service")
        });
        assert!(is_complete, "{}", self.session.log());
        self.session.wait_until_settled();
    }

    /// Copies all images and records of the first host to another one, and goes there.
    fn copy_all(&mut self, preserved: &str, to: &'static str) {
        let preserve = format!("--preserve={preserved}");
        let from = self.session.path("images");
        self.images = to;
        let to = self.session.path(to);
        let [from, to] = [&from, &to].map(|path| path.to_str().unwrap());
        run("cp", &["--recursive", &preserve, from, to]);
        self.session.name_again("/images", to);
    }

    /// The guest writes, on the replicas that are there.
    fn serve_alone(&mut self, line: &str) {
        self.session.start_daemon(line);
        self.write();
        self.session.end_daemon();
    }

    fn happens(&mut self, what: &str) {
        self.session.note_event(what);
        match what {
            "the guest writes" => self.write(),
            "power cut" => {
                let mut guest = self.guest();
                // Not flushed, so it stays marked.
                guest.write(0, OFFSET, &[self.newest; 4096]).unwrap();
                guest.write(0, 0, &[1; 65536]).unwrap();
                guest.send(0, &Request::writes(16, 65536));
                self.session.kill_daemon();
                drop(guest);
                // The kernel of a host that has lost power has no file open. This one may keep
                // those of the dead daemon open, and locked, until it has ended its operations.
                for name in ["a.raw", "b.raw", "c.raw"] {
                    self.copy_away(name);
                    self.put_back(name);
                }
            }
            "c.raw is gone" => self.move_away("c.raw"),
            "c.raw comes back" => {
                self.put_back("c.raw");
                self.wait_until_complete();
            }
            "c.raw was not lost" => self.put_back("c.raw"),
            "a copy of b.raw is made" => self.copy_away("b.raw"),
            "the old b.raw is put back" => self.put_back("b.raw"),
            "another program writes to a.raw" => self.modify("a.raw"),
            "another program writes to b.raw" => {
                self.modify("b.raw");
                // The operator decides for it.
                self.newest = MODIFIED;
            }
            "moved without times" => self.copy_all("mode", "moved"),
            "moved" => self.copy_all("timestamps", "moved again"),
            "a.raw and b.raw are gone" => {
                self.move_away("a.raw");
                self.move_away("b.raw");
            }
            "a.raw and b.raw come back" => {
                self.put_back("a.raw");
                self.put_back("b.raw");
                self.wait_until_complete();
            }
            "each half goes on without the other" => {
                self.move_away("d.raw");
                self.serve_alone("$vm1");
                self.move_away("a.raw");
                self.move_away("b.raw");
                self.put_back("d.raw");
                self.serve_alone("$vm1 --force-start --vote-threshold 1");
                self.put_back("a.raw");
                self.put_back("b.raw");
            }
            other => panic!("unknown step {other}"),
        }
    }
}

#[test]
fn the_stories_match_the_output() {
    let mut page = Page::new();
    for step in steps(PAGE) {
        match step {
            Step::Happens(what) => page.happens(&what),
            Step::Command(line, in_page) if line == "quorum-blkctl status" => {
                page.session.wait_until_settled();
                page.session.step(&line, &in_page);
                page.check();
            }
            Step::Command(line, in_page) => {
                if line == "quorum-blkctl jobs --all" {
                    page.session.wait_until_settled();
                }
                page.session.step(&line, &in_page);
            }
        }
    }
    if let Some(path) = std::env::var_os("QUORUM_BLK_TEST_TRANSCRIPT") {
        fs::write(path, page.session.transcript()).unwrap();
    }
    let differences = page.session.differences();
    assert!(
        differences.is_empty(),
        "not in docs/restarting.md: {differences:#?}\nAll of it:\n{}\nThe log:\n{}",
        page.session.transcript(),
        page.session.log()
    );
}
