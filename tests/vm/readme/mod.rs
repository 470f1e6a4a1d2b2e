//! The README's commands for a first disk work as they stand: typed into terminals of 80 columns,
//! on a host whose /ssd1 to /ssd4 are ext4, XFS or tmpfs. The guest makes a partition, which the
//! next start of the daemon still has; the operator looks, scrubs and replaces a replica.
//!
//! Needs root, for a mount namespace; `make guest` and `make clients`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use testkit::HANG_LIMIT;
use testkit::process::wait_until;
use testkit::programs;
use testkit::terminal::Terminal;

const PAGE: &str = include_str!("../../../README.md");
const COLUMNS: u16 = 80;

/// Blocks of the page that are not part of a first disk, by their beginnings.
const OTHERS: [&str; 4] = [
    // Another test runs it.
    "make demo",
    // Tests of the installation do, elsewhere than in /usr/local.
    "make build man",
    // Debian has none.
    "cloud-hypervisor",
    // The form of an event.
    "{\"event\":",
];

/// What stands for `...` in the command of QEMU: a guest for tests.
fn options_of_guest() -> String {
    let part = |name| programs::guest_part(name).display().to_string();
    format!(
        "-nodefaults -display none -accel tcg -kernel {} -initrd {} -append 'console=ttyS0 \
         panic=-1 no_timer_check' -serial file:/run/console.log -serial stdio",
        part("vmlinuz"),
        part("initramfs.cpio.gz")
    )
}

/// The blocks of the page, each without its language.
fn blocks() -> Vec<&'static str> {
    let parts = PAGE.split("\n```").skip(1).step_by(2);
    parts.map(|part| part.split_once('\n').unwrap().1).collect()
}

/// The block that begins like this.
fn block(begin: &str) -> &'static str {
    let mut found = blocks()
        .into_iter()
        .filter(|block| block.starts_with(begin));
    let block = found.next().unwrap_or_else(|| panic!("no block {begin}"));
    assert_eq!(found.next(), None, "blocks that begin with {begin}");
    block
}

/// A terminal with a shell on the host.
struct Shell {
    terminal: Terminal,
    /// The exit status of each command, as seen from outside the host.
    statuses: PathBuf,
    /// What was drawn before the last command.
    drawn_before: usize,
}

impl Shell {
    fn start(mut command: Command, number: usize, run_of: impl Fn(u32) -> PathBuf) -> Self {
        let tools = programs::client_program("venv").join("bin");
        let programs = programs::program(programs::DAEMON);
        let programs = programs.parent().unwrap();
        let path = std::env::var("PATH").unwrap();
        command
            .env_clear()
            .env("HOME", "/run")
            .env("TERM", "xterm")
            .env("LANG", "C.UTF-8")
            .env("NO_COLOR", "1")
            .env(
                "PATH",
                format!("{}:{}:{path}", programs.display(), tools.display()),
            )
            .env("PS1", "$ ")
            .env("INPUTRC", "/dev/null")
            .env("PROMPT_COMMAND", format!("echo $? >>/run/statuses{number}"));
        let terminal = Terminal::start(command, COLUMNS);
        let statuses = run_of(terminal.id()).join(format!("statuses{number}"));
        let mut shell = Self {
            terminal,
            statuses,
            drawn_before: 0,
        };
        shell.wait(1);
        shell
    }

    fn statuses(&self) -> Vec<i32> {
        let text = fs::read_to_string(&self.statuses).unwrap_or_default();
        let lines = text.lines().map(str::parse);
        lines.map(Result::unwrap).collect()
    }

    /// Waits for the end of so many commands.
    fn wait(&mut self, count: usize) {
        let terminal = &self.terminal;
        terminal.wait_until("the command goes on running", || {
            self.statuses().len() >= count
        });
    }

    fn type_in(&mut self, keys: &str) {
        self.drawn_before = self.terminal.drawn().len();
        self.terminal.type_in(keys);
    }

    /// Types a command and waits for its end; returns its exit status and what was drawn.
    fn run(&mut self, command: &str) -> (i32, String) {
        let count = self.statuses().len() + 1;
        self.type_in(&format!("{command}\n"));
        self.wait(count);
        (*self.statuses().last().unwrap(), self.drawn())
    }

    fn drawn(&self) -> String {
        shown(&self.terminal.drawn()[self.drawn_before..])
    }

    /// Waits until this has been drawn since the last command.
    fn wait_for(&self, text: &str) {
        let what = format!("no {text:?}");
        self.terminal
            .wait_until(&what, || self.drawn().contains(text));
    }
}

/// What is left of drawn text on a terminal: without bars that were drawn over and escape codes.
fn shown(drawn: &str) -> String {
    let mut shown = String::new();
    for line in drawn.split_inclusive('\n') {
        let line = line.rsplit("\r\u{1b}[2K").next().unwrap();
        let mut parts = line.split("\u{1b}[");
        shown.push_str(parts.next().unwrap());
        for part in parts {
            let end = part.find(|code: char| code.is_ascii_alphabetic());
            shown.push_str(end.map_or("", |end| &part[end + 1..]));
        }
    }
    shown.replace('\r', "")
}

/// A host with a kind of file system, and its terminals.
struct Host {
    daemon: Shell,
    guest: Shell,
    operator: Shell,
    run: PathBuf,
}

impl Host {
    fn new(kind: &str) -> Self {
        let mut command = Command::new("unshare");
        let set_up = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm/readme/host.sh");
        command.args(["--mount", "sh"]).arg(set_up).arg(kind);
        let run_of = |id: u32| PathBuf::from(format!("/proc/{id}/root/run"));
        let daemon = Shell::start(command, 1, run_of);
        let id = daemon.terminal.id();
        let run = run_of(id);
        let shell = |number| {
            let mut command = Command::new("nsenter");
            command
                .arg(format!("--mount=/proc/{id}/ns/mnt"))
                .arg(format!("--root=/proc/{id}/root"))
                .arg(format!("--wd=/proc/{id}/root"))
                .args(["bash", "--noprofile", "--norc", "-i"]);
            Shell::start(command, number, |_| run_of(id))
        };
        Self {
            guest: shell(2),
            operator: shell(3),
            daemon,
            run,
        }
    }

    /// Types the block that creates the images.
    fn create_images(&mut self) {
        let (status, drawn) = self.daemon.run(block("truncate ").trim_end());
        assert_eq!(status, 0, "{drawn}");
    }

    /// Types the block that starts the daemon.
    fn start_daemon(&mut self) {
        self.daemon.type_in(&format!("{}\n", block("quorum-blkd ")));
        let (sockets, shell) = (
            ["disk.sock", "disk-events.sock", "disk-qmp.sock"],
            &self.daemon,
        );
        shell.terminal.wait_until("no sockets", || {
            sockets.iter().all(|name| self.run.join(name).exists())
        });
    }

    /// Ctrl-C.
    fn stop_daemon(&mut self) {
        let count = self.daemon.statuses().len() + 1;
        self.daemon.terminal.type_in("\x03");
        self.daemon.wait(count);
        assert_eq!(self.daemon.statuses().last(), Some(&0));
    }

    /// Types the block of QEMU and waits until its guest takes commands.
    fn boot(&mut self) {
        let command = block("qemu-system-x86_64 ").replacen("...", &options_of_guest(), 1);
        self.guest.type_in(&format!("{command}\n"));
        self.guest.wait_for("@@ ready");
    }

    /// What the guest answers to a command that has to succeed.
    fn in_guest(&mut self, command: &str) -> String {
        self.guest.type_in(&format!("{command}\n"));
        let shell = &self.guest;
        shell.terminal.wait_until(command, || {
            let drawn = shell.drawn();
            let mark = drawn.split_once("\n@@ ");
            mark.is_some_and(|(_, status)| status.contains('\n'))
        });
        let drawn = self.guest.drawn();
        assert!(drawn.contains("\n@@ 0\n"), "{command}: {drawn}");
        drawn
    }

    fn power_off(&mut self) {
        let count = self.guest.statuses().len() + 1;
        self.guest.type_in("poweroff -f\n");
        self.guest.wait(count);
        assert_eq!(self.guest.statuses().last(), Some(&0));
    }
}

fn a_first_disk_on(kind: &str) {
    let mut host = Host::new(kind);
    host.create_images();
    host.start_daemon();
    host.boot();
    let size = host.in_guest("cat /sys/block/vda/queue/logical_block_size");
    assert!(size.lines().any(|line| line == "512"), "{size}");
    host.in_guest(r"printf 'n\np\n1\n\n\nw\n' | fdisk /dev/vda >/dev/null; sync; ls /dev/vda1");
    host.power_off();
    // The daemon has nothing to do with what its images hold, and the guest finds its partition.
    host.stop_daemon();
    host.start_daemon();
    host.boot();
    host.in_guest("ls /dev/vda1");

    let commands = block("$ export ");
    for line in commands.split("$ ").skip(1) {
        let (status, drawn) = host.operator.run(line.trim_end());
        let is_status = line.starts_with("quorum-blkctl status");
        assert!(status == 0 || is_status, "{line}: {drawn}");
        let output = drawn.split_once('\n').map_or("", |(_, output)| output);
        for line in output.lines() {
            assert!(line.chars().count() <= usize::from(COLUMNS), "{line}");
        }
    }
    // On a busy machine a replica may be late, be evicted and rejoin.
    let mut drawn = String::new();
    let is_healthy = wait_until(HANG_LIMIT, || {
        let (status, now) = host.operator.run("quorum-blkctl status");
        drawn = now;
        status == 0
    });
    assert!(
        is_healthy && drawn.contains("quorum0  healthy") && drawn.contains("/ssd4/d.raw"),
        "{drawn}"
    );
    let monitor = block("$ qmp-shell ");
    let mut lines = monitor.lines();
    let command = lines.next().unwrap().strip_prefix("$ ").unwrap();
    host.operator.type_in(&format!("{command}\n"));
    host.operator.wait_for("(QEMU) ");
    let question = lines.next().unwrap().strip_prefix("(QEMU) ").unwrap();
    host.operator.type_in(&format!("{question}\n"));
    for part in lines.next().unwrap().split("...") {
        // The client folds long lines at the width of the terminal.
        let folded = |text: &str| text.split_whitespace().collect::<String>();
        let (part, shell) = (folded(part), &host.operator);
        shell
            .terminal
            .wait_until(&part, || folded(&shell.drawn()).contains(&part));
    }
    host.in_guest("ls /dev/vda1");
    host.power_off();
    host.stop_daemon();
    if let Some(path) = std::env::var_os("QUORUM_BLK_TEST_TRANSCRIPT") {
        let texts = [&host.daemon, &host.guest, &host.operator];
        let texts = texts.map(|shell| shown(&shell.terminal.drawn()));
        fs::write(path, texts.join("\n\n")).unwrap();
    }
}

#[test]
fn a_first_disk_works_on_ext4() {
    a_first_disk_on("ext4");
}

#[test]
fn a_first_disk_works_on_xfs() {
    a_first_disk_on("xfs");
}

#[test]
fn a_first_disk_works_on_tmpfs() {
    a_first_disk_on("tmpfs");
}

#[test]
fn no_block_of_the_page_is_left_out() {
    let typed = [
        "truncate ",
        "quorum-blkd ",
        "qemu-system-x86_64 ",
        "$ export ",
        "$ qmp-shell ",
    ];
    for block in blocks() {
        let is_known = |begin: &&str| block.starts_with(*begin);
        assert!(
            typed.iter().chain(&OTHERS).any(is_known),
            "a block that no test types: {block}"
        );
    }
    for line in typed[..4].iter().flat_map(|begin| block(begin).lines()) {
        assert!(line.len() <= usize::from(COLUMNS), "{line}");
    }
}

#[test]
fn the_man_page_has_the_same_commands() {
    let page = include_str!("../../../packaging/quorum-blkd.1.in");
    let page = page.replace(r"\-", "-").replace(r"\e", r"\");
    for begin in ["truncate ", "quorum-blkd ", "qemu-system-x86_64 "] {
        let block = block(begin);
        assert!(page.contains(block), "not in the man page: {block}\n{page}");
    }
}

#[test]
fn the_page_names_every_option_and_every_command() {
    let (daemon, client) = (
        quorum_blk::config::command_line(),
        quorum_blk::client::command_line(),
    );
    let options = daemon.get_arguments().filter_map(clap::Arg::get_long);
    let options = options.map(|long| format!("--{long}"));
    let commands = client.get_subcommands();
    let commands = commands.map(|command| command.get_name().to_owned());
    let mut missing: Vec<_> = options.chain(commands).collect();
    missing.retain(|name| !PAGE.contains(name.as_str()));
    // Of management software; and `-v`, which the page has.
    assert_eq!(missing, ["--print-capabilities", "--verbose"]);
}
