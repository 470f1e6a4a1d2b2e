//! `quorum-blkctl` as a process, with a real daemon and real images, in a pipe and on a terminal;
//! and with servers that do not follow the protocol.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use testkit::HANG_LIMIT;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::{Value, json};
use testkit::client::Client;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::{are_identical, corrupt_sectors, create_images};
use testkit::process::{Process, wait_until};

const SIZE_BYTES: u64 = 64 << 20;

/// A daemon with three images.
struct Served {
    daemon: Daemon,
    images: Vec<PathBuf>,
    directory: tempfile::TempDir,
}

/// The result of a run of the program.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    /// Asserts its exit status; returns its output.
    #[track_caller]
    fn with(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(!self.stdout.contains('\x1b'), "{self:#?}");
        if code < 2 {
            assert_eq!(self.stderr, "");
            self.stdout
        } else {
            assert!(self.stderr.starts_with("quorum-blkctl: "), "{self:#?}");
            self.stderr
        }
    }
}

/// The program, with the socket of its daemon.
fn program(socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blkctl"));
    command
        .env_clear()
        .env("QUORUM_BLK_QMP", socket)
        .env("TERM", "xterm");
    command.stdin(Stdio::null());
    command
}

fn run_command(command: &mut Command) -> Ran {
    let directory = tempfile::tempdir().unwrap();
    let [stdout, stderr] = ["out", "err"].map(|name| directory.path().join(name));
    command
        .stdout(File::create(&stdout).unwrap())
        .stderr(File::create(&stderr).unwrap());
    let status = Process::spawn(command).unwrap().wait_within(HANG_LIMIT);
    let text = |path: &Path| String::from_utf8(fs::read(path).unwrap()).unwrap();
    Ran {
        code: status.expect("it goes on running").code(),
        stdout: text(&stdout),
        stderr: text(&stderr),
    }
}

fn run<S: AsRef<OsStr>>(socket: &Path, arguments: &[S]) -> Ran {
    run_command(program(socket).args(arguments))
}

impl Served {
    fn new(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), 3, SIZE_BYTES);
        let mut arguments = replica_arguments(&images);
        arguments.extend(["--cache", "writeback"].map(Into::into));
        arguments.extend(["--qmp".into(), directory.path().join("qmp.sock").into()]);
        arguments.extend(options.iter().map(Into::into));
        Self {
            daemon: Daemon::start(directory.path(), arguments),
            images,
            directory,
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("qmp.sock")
    }

    fn run(&self, line: &str) -> Ran {
        let arguments: Vec<_> = line.split(' ').collect();
        run(&self.socket(), &arguments)
    }

    /// Some data on the disk, so that its images differ from empty ones.
    fn write_something(&self) {
        let mut client = Client::connect(self.daemon.socket(), 1);
        for megabyte in 0..64 {
            client.write(0, megabyte << 20, &[0x35; 65536]).unwrap();
        }
        client.flush(0).unwrap();
    }

    /// Starts it with its output in a file, which is read while it is written.
    fn start(&self, line: &str, output: &str) -> (Process, PathBuf) {
        let output = self.directory.path().join(output);
        let mut command = program(&self.socket());
        command
            .args(line.split(' '))
            .stdout(File::create(&output).unwrap());
        command.stderr(File::options().append(true).open(&output).unwrap());
        (Process::spawn(&mut command).unwrap(), output)
    }
}

#[track_caller]
fn wait_for_text(path: &Path, text: &str) {
    let comes = wait_until(HANG_LIMIT, || {
        fs::read_to_string(path).unwrap().contains(text)
    });
    assert!(
        comes,
        "no {text:?} in {}",
        fs::read_to_string(path).unwrap()
    );
}

/// The line of a map that belongs to a replica, without its ends.
fn map_line(map: &str, name: &str) -> String {
    let line = map.lines().find(|line| line.starts_with(name)).unwrap();
    line.split('|').nth(1).unwrap().to_owned()
}

#[test]
fn corruption_is_found_shown_and_repaired() {
    let served = Served::new(&[]);
    served.write_something();
    let healthy = served.run("status").with(0);
    assert!(
        healthy.starts_with("quorum0  healthy  64 MiB, 2 of 3 must agree"),
        "{healthy}"
    );
    assert!(
        served
            .run("scrub")
            .with(0)
            .contains("no corrupt sectors found")
    );
    corrupt_sectors(&served.images[1], 98304..98306, 0xff);
    let found = served.run("scrub").with(1);
    assert!(
        found.contains("2 corrupt sectors found, not repaired"),
        "{found}"
    );
    let degraded = served.run("status").with(1);
    assert!(
        degraded.contains("degraded") && degraded.contains("1.raw is corrupt in 2 sectors"),
        "{degraded}"
    );

    // 48 MiB of 64, in characters of 64 / 54 MiB, rounded up to what the daemon's buckets allow.
    let map = served.run("map").with(1);
    let (line, clean) = (map_line(&map, "1.raw"), map_line(&map, "0.raw"));
    let reply: Value = serde_json::from_str(&served.run("map --json").with(1)).unwrap();
    assert_eq!(reply["bucket-bytes"], 65536);
    assert_eq!(reply["replicas"][1]["buckets"][0]["offset"], 48 << 20);
    assert_eq!(
        reply["replicas"][1]["corrupt"],
        json!([{ "sector-num": 98304, "sector-count": 2 }])
    );
    assert_eq!(line.find('#'), Some(clean.len() * 3 / 4), "{map}");
    assert_eq!(line.matches('#').count(), 1, "{map}");
    assert!(clean.chars().all(|character| character == '.'), "{map}");
    let place = "1.raw: corrupt: bytes 50331648-50332671 (1 KiB, sectors 98304-98305)";
    assert!(map.contains(place), "{map}");

    let repaired = served.run("scrub --repair").with(0);
    assert!(
        repaired.contains("2 corrupt sectors found, 2 sectors written"),
        "{repaired}"
    );
    assert!(served.run("status").with(0).contains("healthy"));
    let map = served.run("map").with(0);
    assert_eq!(map_line(&map, "1.raw"), line.replace('#', "+"));
    assert!(are_identical(&served.images));

    // A removed replica is not in it any more.
    served.run("remove 1.raw").with(0);
    assert!(!served.run("map").with(1).contains("1.raw"), "degraded");
    served.run("clear").with(0);
    served.run("status").with(0);
}

#[test]
fn undecided_sectors_make_the_disk_fail() {
    let served = Served::new(&[]);
    for (image, mask) in served.images.iter().zip([1, 2, 4]) {
        corrupt_sectors(image, 65536..65537, mask);
    }
    let scrubbed = served.run("scrub --repair").with(1);
    assert!(scrubbed.contains("no quorum for 1 sector"), "{scrubbed}");
    let status = served.run("status").with(1);
    assert!(
        status.contains("failing") && status.contains("no quorum"),
        "{status}"
    );
    let map = served.run("map").with(1);
    assert!(map_line(&map, "no quorum").contains('#'), "{map}");
    // Written again it has a quorum.
    Client::connect(served.daemon.socket(), 1)
        .write(0, 65536 * 512, &[7; 4096])
        .unwrap();
    served.run("status").with(0);
    served.run("scrub").with(0);
}

#[test]
fn a_replica_is_replaced() {
    let served = Served::new(&[]);
    served.write_something();
    let new = served.directory.path().join("new.raw");
    let replaced = served
        .run(&format!("replace 1.raw {} --create", new.display()))
        .with(0);
    assert!(replaced.ends_with(&format!(
        "replaced 1.raw by new.raw; its image {} keeps its data\n\
         replace it in the daemon's command line too: its data gets old\n",
        served.images[1].display()
    )));
    assert!(
        replaced.contains("job0 (resync of new.raw) completed, 64 MiB"),
        "{replaced}"
    );
    let status: Value = serde_json::from_str(&served.run("status --json").with(0)).unwrap();
    let replicas = status["query-quorum"]["replicas"].as_array().unwrap();
    let names: Vec<_> = replicas
        .iter()
        .map(|replica| &replica["node-name"])
        .collect();
    assert_eq!(names, ["0.raw", "2.raw", "new.raw"]);
    assert_eq!(status["query-jobs"], json!([]));
    assert!(are_identical(&[served.images[0].clone(), new]));
}

/// Perhaps it is the disk of another guest.
#[test]
fn an_image_that_holds_data_is_overwritten_only_if_that_is_asked_for() {
    let served = Served::new(&[]);
    served.write_something();
    let other = served.directory.path().join("other.raw");
    let mut content = vec![0; 64 << 20];
    content[50_000_000] = 1;
    std::fs::write(&other, &content).unwrap();
    for command in ["add", "replace 1.raw"] {
        let refused = served
            .run(&format!("{command} {}", other.display()))
            .with(3);
        assert!(
            refused.contains("other.raw' holds data") && refused.contains("nothing has changed"),
            "{refused}"
        );
    }
    assert!(std::fs::read(&other).unwrap() == content);
    served
        .run(&format!("replace 1.raw {} --force", other.display()))
        .with(0);
    assert!(are_identical(&[served.images[0].clone(), other]));
}

/// A daemon of another user could not open it otherwise.
#[test]
fn what_is_created_belongs_to_the_user_of_the_other_images() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let served = Served::new(&["--user", "1234:5678"]);
    for image in &served.images {
        chown(image, Some(1234), Some(5678)).unwrap();
        std::fs::set_permissions(image, PermissionsExt::from_mode(0o640)).unwrap();
    }
    std::fs::set_permissions(served.directory.path(), PermissionsExt::from_mode(0o711)).unwrap();
    let new = served.directory.path().join("new.raw");
    served
        .run(&format!("add {} --create", new.display()))
        .with(0);
    let made = std::fs::metadata(&new).unwrap();
    assert_eq!(
        (made.uid(), made.gid(), made.mode() & 0o777),
        (1234, 5678, 0o640)
    );
}

#[test]
fn a_replacement_takes_the_name_of_its_predecessor() {
    let served = Served::new(&[]);
    served.write_something();
    let directory = served.directory.path().join("other");
    std::fs::create_dir(&directory).unwrap();
    let new = directory.join("1.raw");
    // Twice: the second time the path is that of the replica, which is another file now.
    for number in 1..=2 {
        let replaced = served
            .run(&format!("replace 1.raw {} --create", new.display()))
            .with(0);
        assert!(
            replaced.contains(&format!("replaced 1.raw by {}", new.display())),
            "{replaced}"
        );
        let status: Value = serde_json::from_str(&served.run("status --json").with(0)).unwrap();
        let replicas = status["query-quorum"]["replicas"].as_array().unwrap();
        let names: Vec<_> = replicas
            .iter()
            .map(|replica| (&replica["node-name"], &replica["file"]))
            .collect();
        let place = |image: &std::path::Path| json!(image);
        assert_eq!(names[0].1, &place(&served.images[0]), "{number}");
        assert!(
            names.contains(&(&json!("1.raw"), &place(&new))),
            "{names:?}"
        );
        assert_eq!(names.len(), 3);
        std::fs::remove_file(&new).unwrap();
    }
    let taken = served
        .run(&format!("replace 0.raw {} --create", new.display()))
        .with(3);
    assert!(taken.contains("there is a node 1.raw already"), "{taken}");
}

#[test]
fn replicas_are_added_and_removed() {
    let served = Served::new(&["--vote-threshold", "2"]);
    let path = |name: &str| served.directory.path().join(name);
    let add = |name: &str, options: &str| {
        let line = format!("add {}{options}", path(name).display());
        served.run(&line)
    };
    assert!(
        add("new.raw", " --create --detach")
            .with(0)
            .contains("new.raw is a replica of quorum0")
    );
    assert!(wait_until(HANG_LIMIT, || served.run("status").code == Some(0)));
    let there = add("new.raw", " --create --node-name other").with(3);
    assert!(
        there.contains("File exists") && there.contains("nothing has changed"),
        "{there}"
    );
    let clash = add("1.raw", "").with(3);
    assert!(
        clash.contains("there is a node 1.raw already") && clash.contains("--node-name NAME"),
        "{clash}"
    );
    // An image of another size; the created file and its node name are removed again.
    File::create_new(path("short.raw"))
        .unwrap()
        .set_len(4096)
        .unwrap();
    for _ in 0..2 {
        let short = add("short.raw", "").with(3);
        assert!(
            short.contains("short.raw") && short.contains("nothing has changed"),
            "{short}"
        );
    }
    let unwanted = add("unwanted.raw", " --create --node-name quorum0").with(3);
    assert!(
        unwanted.contains("--node-name") && !path("unwanted.raw").exists(),
        "{unwanted}"
    );
    served.run("remove 0.raw").with(0);
    served.run("remove 1.raw").with(0);
    let needed = served.run("remove 2.raw").with(3);
    assert!(
        needed.contains("fewer replicas than the vote threshold"),
        "{needed}"
    );
    let unknown = served.run("replace unknown x.raw").with(3);
    assert!(
        unknown.contains("there is no replica unknown; the replicas are 2.raw, new.raw"),
        "{unknown}"
    );
}

#[test]
fn jobs_are_listed_changed_and_waited_for() {
    let served = Served::new(&[]);
    assert_eq!(served.run("jobs").with(0), "no jobs\n");
    assert_eq!(
        served.run("scrub --speed 4K --detach").with(0),
        "job0 started\n"
    );
    let listed = served.run("jobs").with(0);
    assert!(
        listed.contains("job0") && listed.contains("4 KiB/s"),
        "{listed}"
    );
    assert!(served.run("status").with(0).contains("job0"));
    let status = || {
        let jobs: Value = serde_json::from_str(&served.run("jobs --json").with(0)).unwrap();
        jobs[0]["status"].clone()
    };
    served.run("jobs pause job0").with(0);
    assert_eq!(status(), "paused");
    served.run("jobs resume job0").with(0);
    assert_eq!(status(), "running");
    let (mut waiting, output) = served.start("jobs wait job0", "wait");
    wait_for_text(&output, "job0 (scrub)   0 %");
    served.run("jobs cancel job0").with(0);
    assert_eq!(waiting.wait_within(HANG_LIMIT).unwrap().code(), Some(1));
    wait_for_text(&output, "job0 (scrub) was cancelled");

    // A client may stop waiting; the job continues.
    let (mut waiting, output) = served.start("scrub --speed 4K", "interrupted");
    wait_for_text(&output, "job1 (scrub)   0 %");
    waiting.signal(libc::SIGINT);
    assert_eq!(waiting.wait_within(HANG_LIMIT).unwrap().code(), Some(130));
    wait_for_text(
        &output,
        "job1 continues; to wait for it again: quorum-blkctl jobs wait job1",
    );
    assert_eq!(status(), "running");
    let (mut waiting, output) = served.start("jobs wait job1", "again");
    wait_for_text(&output, "job1 (scrub)   0 %");
    served.run("jobs speed job1 0").with(0);
    assert_eq!(waiting.wait_within(HANG_LIMIT).unwrap().code(), Some(0));
    wait_for_text(&output, "no corrupt sectors found");
    // One that has ended has its result and exit status still.
    let again = served.run("jobs wait job1").with(0);
    assert!(
        again.starts_with("job1 (scrub) completed, 64 MiB; no corrupt sectors found\n"),
        "{again}"
    );
    let cancelled = served.run("jobs wait job0").with(1);
    assert!(
        cancelled.starts_with("job0 (scrub) was cancelled"),
        "{cancelled}"
    );
    let unknown = served.run("jobs wait job9").with(3);
    assert!(unknown.contains("there is no job job9"), "{unknown}");
    assert!(
        served
            .run("jobs pause job1")
            .with(3)
            .contains("no job has this id")
    );
    assert!(
        served.run("resync 0.raw").code == Some(0),
        "it has nothing to do"
    );
}

#[test]
fn a_pipe_gets_a_line_for_each_tenth() {
    let served = Served::new(&[]);
    let told = served.run("scrub --speed 32M").with(0);
    let percents: Vec<u64> = told
        .lines()
        .filter_map(|line| line.split(" %").next()?.rsplit(' ').next()?.parse().ok())
        .collect();
    assert!(percents.len() > 3 && percents.len() <= 11, "{told}");
    assert!(
        percents.windows(2).all(|pair| pair[0] / 10 < pair[1] / 10),
        "{told}"
    );
}

#[test]
fn events_are_followed_until_the_daemon_ends() {
    let mut served = Served::new(&[]);
    let (mut text, text_output) = served.start("events", "text");
    let (mut raw, raw_output) = served.start("events --json", "raw");
    // A client that has not connected yet misses them.
    let hears = wait_until(HANG_LIMIT, || {
        served.run("scrub").with(0);
        [&text_output, &raw_output]
            .iter()
            .all(|path| fs::metadata(path).unwrap().len() > 0)
    });
    assert!(hears);
    corrupt_sectors(&served.images[2], 8..9, 1);
    served.run("scrub").with(1);
    wait_for_text(
        &text_output,
        "Z  2.raw: corrupt data in sector 8, from byte 4096, found by a read of sectors ",
    );
    wait_for_text(
        &raw_output,
        r#"{"event":"QUORUM_REPORT_BAD","data":{"ret":0,"node-name":"2.raw""#,
    );
    assert!(served.daemon.terminate().success());
    for (events, path) in [(&mut text, &text_output), (&mut raw, &raw_output)] {
        assert_eq!(events.wait_within(HANG_LIMIT).unwrap().code(), Some(3));
        wait_for_text(path, "quorum-blkctl: the daemon closed the connection");
        assert!(!fs::read_to_string(path).unwrap().contains('\x1b'));
    }
    let raw = fs::read_to_string(raw_output).unwrap();
    let objects = raw
        .lines()
        .filter(|line| !line.starts_with("quorum-blkctl"));
    for line in objects {
        let event: Value = serde_json::from_str(line).unwrap();
        assert!(event["event"].is_string() && event["timestamp"]["seconds"].is_u64());
    }
    let gone = served.run("status").with(3);
    assert!(gone.contains("cannot connect to"), "{gone}");
}

#[test]
fn a_closed_pipe_ends_it_without_an_error() {
    let served = Served::new(&[]);
    let mut command = program(&served.socket());
    let mut child = command
        .args(["status", "--watch", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.contains("healthy"));
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), output.stderr.as_slice()),
        (Some(0), &b""[..])
    );
}

/// Runs it on a terminal of 100 columns; returns its output until it ends or `enough` has come.
fn on_terminal(
    served: &Served,
    line: &str,
    variables: &[(&str, &str)],
    enough: Option<&str>,
) -> String {
    on_terminal_of(100, served, line, variables, enough)
}

fn on_terminal_of(
    columns: u16,
    served: &Served,
    line: &str,
    variables: &[(&str, &str)],
    enough: Option<&str>,
) -> String {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let size = Winsize {
        ws_row: 30,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&terminal, size).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let slave = File::options()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    let mut command = program(&served.socket());
    command
        .args(line.split(' '))
        .envs(variables.iter().copied());
    command.stdout(slave.try_clone().unwrap()).stderr(slave);
    let mut process = Process::spawn(&mut command).unwrap();
    // Else its end would be open here.
    drop(command);
    let written = Arc::new(Mutex::new(Vec::new()));
    let reader = thread::spawn({
        let written = Arc::clone(&written);
        move || {
            let mut terminal = File::from(terminal);
            let mut bytes = [0; 4096];
            // An error when the last one that could write is gone.
            while let Ok(count @ 1..) = terminal.read(&mut bytes) {
                written.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        }
    });
    let text = || String::from_utf8_lossy(&written.lock().unwrap()).into_owned();
    let ends = wait_until(HANG_LIMIT, || match enough {
        Some(enough) => text().contains(enough),
        None => !process.is_alive(),
    });
    assert!(ends, "{}", text());
    drop(process);
    reader.join().unwrap();
    text()
}

#[test]
fn a_terminal_gets_bars_and_colours() {
    let served = Served::new(&[]);
    let utf8 = [("LANG", "C.UTF-8")];
    let drawn = on_terminal(&served, "scrub --speed 48M", &utf8, None);
    let bars: Vec<_> = drawn
        .split("\r\x1b[2K")
        .filter(|bar| bar.contains('%'))
        .collect();
    assert!(bars.len() > 2, "{drawn:?}");
    assert!(
        bars.iter()
            .all(|bar| bar.contains('░') && bar.contains("\x1b[32m") && !bar.contains('\n'))
    );
    assert!(
        drawn.contains("MiB/s") && drawn.ends_with("no corrupt sectors found\r\n"),
        "{drawn:?}"
    );
    let ascii = on_terminal(&served, "scrub --speed 48M", &[("NO_COLOR", "1")], None);
    assert!(
        ascii.contains("\r\x1b[2K") && ascii.contains("#...") && !ascii.contains("\x1b[3"),
        "{ascii:?}"
    );
    assert!(on_terminal(&served, "status", &utf8, None).contains("\x1b[32mhealthy\x1b[0m"));
    let dumb = on_terminal(&served, "status", &[("TERM", "dumb")], None);
    assert!(!dumb.contains('\x1b'), "{dumb:?}");
    // As wide as the terminal: 100 columns without the name and the ends.
    let map = on_terminal(&served, "map", &utf8, None);
    assert_eq!(map_line(&map, "0.raw").chars().count(), 74, "{map}");
    // Drawn over in place, again and again.
    let watched = on_terminal(&served, "status --watch 1", &utf8, Some("\x1b[J\x1b[H"));
    assert!(watched.starts_with("\x1b[2J\x1b[H"), "{watched:?}");
}

#[test]
fn a_terminal_of_any_width_gets_lines_that_fit() {
    let served = Served::new(&[]);
    corrupt_sectors(&served.images[1], 8..9, 1);
    served.run("scrub").with(1);
    let colourless = [("LANG", "C.UTF-8"), ("NO_COLOR", "1")];
    for columns in [80, 120, 200] {
        let status = on_terminal_of(columns, &served, "status", &colourless, None);
        let progress = on_terminal_of(columns, &served, "scrub --speed 48M", &colourless, None);
        let drawn = progress.split("\r\x1b[2K").flat_map(str::lines);
        for line in status.lines().chain(drawn) {
            assert!(line.chars().count() <= columns.into(), "{columns}: {line}");
        }
        let shows_all = status.contains("detections") && status.contains("in flight");
        assert_eq!(shows_all, columns > 80, "{status}");
    }
}

/// A server on a socket of its own, with a function for its first connection.
fn serve(
    with: impl FnOnce(UnixStream) + Send + 'static,
) -> (tempfile::TempDir, thread::JoinHandle<()>) {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("qmp.sock")).unwrap();
    let thread = thread::spawn(move || with(listener.accept().unwrap().0));
    (directory, thread)
}

/// The output of the program when a server sends this and nothing more.
fn with_server(sent: impl Into<Vec<u8>>, line: &str) -> Ran {
    let sent = sent.into();
    let (directory, thread) = serve(move |mut stream| {
        // The program may have disconnected.
        let _ = stream.write_all(&sent);
        // Until it disconnects.
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let arguments: Vec<_> = line.split(' ').collect();
    let ran = run(&directory.path().join("qmp.sock"), &arguments);
    thread.join().unwrap();
    ran
}

const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n{\"return\": {}}\r\n";

#[test]
fn a_server_that_is_no_monitor_is_an_error() {
    let after_greeting = |text: &str| format!("{GREETING}{text}\r\n");
    for (sent, line, expected) in [
        (
            "SSH-2.0-OpenSSH\r\n".to_owned(),
            "status",
            "a message of the server is invalid: expected value",
        ),
        ("[1]\n".into(), "status", "not a JSON object"),
        ("{}\n".into(), "status", "this is not a monitor"),
        (
            "\u{1b}[2J\n".into(),
            "status",
            "a message of the server is invalid",
        ),
        (
            after_greeting("{\"return\": 5}"),
            "status",
            "no answer to query-jobs",
        ),
        (
            after_greeting(&format!(
                "{{\"return\": {{\"size\": \"\\u001b[31m\"}}}}{}",
                "\r\n{\"return\": []}".repeat(2)
            )),
            "status",
            "the reply to query-quorum is invalid",
        ),
        (
            after_greeting("{\"return\": [{\"id\": 5}]}"),
            "jobs",
            "the reply to query-jobs is invalid",
        ),
        (
            after_greeting("{\"nothing\": 5}"),
            "jobs",
            "it has neither return nor error",
        ),
        (
            after_greeting("{\"error\": {}}"),
            "jobs",
            "the daemon gives no reason",
        ),
        (
            after_greeting(
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"\\u001b[31mred\"}}",
            ),
            "jobs",
            "quorum-blkctl: \\u{1b}[31mred",
        ),
        (
            after_greeting(
                "{\"return\": {\"node-name\": \"d\", \"size\": 9223372036854775807, \
                 \"bucket-bytes\": 1, \"health\": \"healthy\", \
                            \"failures\": {\"buckets\": [], \"undecided\": []}, \"replicas\": []}}",
            ),
            "map",
            "more buckets than requested",
        ),
        (
            after_greeting(&"[".repeat(100_000)),
            "jobs",
            "recursion limit",
        ),
    ] {
        let said = with_server(sent, &format!("{line} --timeout 1")).with(3);
        assert!(
            said.contains(expected) && !said.contains('\x1b'),
            "{said:?}, not {expected}"
        );
    }
}

#[test]
fn a_silent_or_absent_server_is_an_error() {
    assert!(
        with_server("", "status --timeout 1")
            .with(3)
            .contains("does not begin to speak within 1 s")
    );
    assert!(
        with_server(GREETING, "jobs --timeout 1")
            .with(3)
            .contains("no answer to query-jobs within 1 s")
    );
    let (directory, thread) = serve(drop);
    let closed = run(&directory.path().join("qmp.sock"), &["status"]).with(3);
    assert!(
        closed.contains("the daemon closed the connection"),
        "{closed}"
    );
    thread.join().unwrap();
    let nowhere = run(&directory.path().join("nowhere"), &["status"]).with(3);
    assert!(
        nowhere.contains("cannot connect to") && nowhere.contains("No such file"),
        "{nowhere}"
    );
    let unknown = run_command(
        program(Path::new(""))
            .env_remove("QUORUM_BLK_QMP")
            .arg("status"),
    )
    .with(2);
    assert!(
        unknown.contains("--qmp PATH") && unknown.contains("QUORUM_BLK_QMP"),
        "{unknown}"
    );
    assert_eq!(run(Path::new("x"), &["frobnicate"]).code, Some(2));
}

#[test]
fn a_server_that_accepts_no_connection_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp.sock");
    let server = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&server, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&server, 0).unwrap();
    // The queue of the server holds one connection.
    let _queued = UnixStream::connect(&path).unwrap();
    let said = run(&path, &["status", "--timeout", "1"]).with(3);
    assert!(
        said.contains("no answer to a connection attempt within 1 s"),
        "{said}"
    );
}

#[test]
fn an_endless_reply_is_refused_in_bounded_memory() {
    for part in [
        // One line.
        "x".repeat(1 << 16),
        // Events, and no answer.
        "{\"event\": \"BLOCK_JOB_COMPLETED\", \"data\": {\"device\": \"job1\"}}\n".repeat(1000),
    ] {
        let (directory, thread) = serve(move |mut stream| {
            let _ = stream.write_all(GREETING.as_bytes());
            while stream.write_all(part.as_bytes()).is_ok() {}
        });
        let mut command = Command::new("sh");
        command
            .args(["-c", "ulimit -v 200000; exec \"$0\" --timeout 2 jobs"])
            .arg(env!("CARGO_BIN_EXE_quorum-blkctl"))
            .env("QUORUM_BLK_QMP", directory.path().join("qmp.sock"));
        let said = run_command(&mut command).with(3);
        assert!(
            said.contains("the line is longer than 8 MiB") || said.contains("no answer to"),
            "{said}"
        );
        thread.join().unwrap();
    }
}

#[test]
fn a_disk_is_resized_by_its_name_and_never_shrunk() {
    let state = |size: u64| {
        json!({ "return": {
            "node-name": "disk", "size": size, "vote-threshold": 1, "read-pattern": "quorum",
            "rewrite-corrupted": false, "read-only": false, "undecided-sectors": 0,
            "requests": { "rejected": 0 }, "replicas": [], "health": "healthy", "conditions": [],
            "errors": { "read": 0, "write": 0, "flush": 0 },
        }})
    };
    for (argument, expected) in [("+1G", 11_u64 << 30), ("12G", 12 << 30)] {
        let (directory, thread) = serve(move |stream| {
            let mut stream = BufReader::new(stream);
            stream.get_mut().write_all(GREETING.as_bytes()).unwrap();
            let mut asked = Vec::new();
            for reply in [state(10 << 30), json!({ "return": {} }), state(expected)] {
                let mut line = String::new();
                // The first one is the negotiation, which has its answer.
                while line.is_empty() || line.contains("qmp_capabilities") {
                    line.clear();
                    stream.read_line(&mut line).unwrap();
                }
                asked.push(serde_json::from_str::<Value>(&line).unwrap());
                stream
                    .get_mut()
                    .write_all(format!("{reply}\r\n").as_bytes())
                    .unwrap();
            }
            assert_eq!(
                asked[1],
                json!({
                    "execute": "block_resize",
                    "arguments": { "node-name": "disk", "size": expected },
                })
            );
        });
        let said = run(&directory.path().join("qmp.sock"), &["resize", argument]).with(0);
        assert_eq!(
            said,
            format!("disk now has {} GiB ({expected} bytes)\n", expected >> 30)
        );
        thread.join().unwrap();
    }
    let served = Served::new(&[]);
    assert!(
        served
            .run("resize 1M")
            .with(3)
            .contains("a disk can only grow")
    );
}
