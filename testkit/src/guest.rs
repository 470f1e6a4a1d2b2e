//! A Linux guest with a vhost-user disk: QEMU under TCG, a stock Debian kernel, busybox.
//!
//! `tests/guest/prepare.sh` (`make guest`) fetches the parts; `tests/guest/init` is the guest's
//! only program and says how commands reach it. The guest has two serial ports: the kernel writes
//! to the first, which goes to `console.log`; commands and replies use the second, a unix socket.

use crate::HANG_LIMIT;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::firmware::Firmware;
use crate::monitor::Monitor;
use crate::process::{Process, wait_until};
use crate::programs;

/// Time between two looks at the clock while the guest is silent.
const READ_INTERVAL: Duration = Duration::from_millis(200);

/// Lines of the console shown with a failure.
const CONSOLE_TAIL_LINES: usize = 40;

/// Arguments of each kernel. It does not test its timer: on a loaded machine TCG delivers the
/// timer's interrupts too late for that test, and the kernel panics.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 panic=-1 no_timer_check";

/// Sockets in the guest's directory: its second serial port, and QEMU's monitor.
const COMMANDS_SOCKET: &str = "commands.sock";
const MONITOR_SOCKET: &str = "monitor.sock";

/// Shown when the parts of the guest are missing.
const HOW_TO_PREPARE: &str = "run `make guest` (tests/guest/prepare.sh) first";

/// A running guest. QEMU is killed when it is dropped.
pub struct Guest {
    qemu: Process,
    /// The second serial port.
    commands: UnixStream,
    /// Read from it and not yet handed out.
    received: Vec<u8>,
    directory: PathBuf,
    /// Before each line that goes to stdout.
    prefix: String,
    /// The same lines, in the test's directory.
    transcript: File,
}

/// The result of a command in the guest.
#[derive(Debug)]
pub struct CommandOutput {
    /// Its exit status, as a shell sees it.
    pub status: i32,
    /// What it wrote to stdout and stderr.
    pub output: String,
}

/// The configuration of a guest. The default is one processor, one queue and 256 MiB.
#[must_use]
pub struct GuestBuilder {
    directory: PathBuf,
    socket: PathBuf,
    queues: Option<u16>,
    cpus: u16,
    memory_mib: u64,
    hot_plug: Option<HotPlug>,
    reconnect: bool,
    incoming: Option<String>,
    firmware: Option<Firmware>,
    kernel_arguments: String,
    arguments: Vec<String>,
}

/// Room for memory that is plugged into the running guest.
struct HotPlug {
    slots: u8,
    memory_mib_max: u64,
}

impl GuestBuilder {
    /// A guest with the disk behind the vhost-user `socket`. In `directory` it leaves `console.log`
    /// (of the kernel), `commands.log` (commands and their output), `qemu.log` and its sockets.
    pub fn new(directory: &Path, socket: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            socket: socket.to_owned(),
            queues: None,
            cpus: 1,
            memory_mib: 256,
            hot_plug: None,
            reconnect: false,
            incoming: None,
            firmware: None,
            kernel_arguments: String::new(),
            arguments: Vec::new(),
        }
    }

    /// Queues of the disk. Without this QEMU asks for one for each processor.
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = Some(queues);
        self
    }

    /// Processors.
    pub fn cpus(mut self, cpus: u16) -> Self {
        self.cpus = cpus;
        self
    }

    /// Memory at boot.
    pub fn memory_mib(mut self, memory_mib: u64) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Lets up to `slots` modules of memory be plugged in later, `memory_mib_max` in all with that
    /// of boot.
    pub fn hot_plug(mut self, slots: u8, memory_mib_max: u64) -> Self {
        self.hot_plug = Some(HotPlug {
            slots,
            memory_mib_max,
        });
        self
    }

    /// QEMU connects again, every second, when the backend is gone.
    pub fn reconnect(mut self) -> Self {
        self.reconnect = true;
        self
    }

    /// Does not boot: waits for a migration from `uri`, or with `defer` until the monitor gets one.
    /// [`start`](Self::start) then returns as soon as QEMU runs, and commands work when the
    /// migration is complete.
    pub fn incoming(mut self, uri: &str) -> Self {
        self.incoming = Some(uri.to_owned());
        self
    }

    /// Boots from the disk, on which [`Firmware::disk`] has to be. Without this QEMU loads the
    /// kernel itself.
    pub fn firmware(mut self, firmware: Firmware) -> Self {
        self.firmware = Some(firmware);
        self
    }

    /// More arguments for the kernel that QEMU loads.
    pub fn kernel_arguments(mut self, arguments: &str) -> Self {
        arguments.clone_into(&mut self.kernel_arguments);
        self
    }

    /// More arguments for QEMU.
    pub fn arguments(mut self, arguments: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// A second disk, `/dev/vdb`, that is not voted and only read, with the programs below
    /// `target/guest/NAME.raw`.
    pub fn programs(self, name: &str) -> Self {
        let image = prepared(&format!("{name}.raw"));
        self.arguments([
            "-drive".into(),
            format!("if=none,id={name},file={image},format=raw,readonly=on"),
            "-device".into(),
            format!("virtio-blk-pci,drive={name}"),
        ])
    }

    /// Starts QEMU and waits until the guest takes commands.
    pub fn start(self) -> Guest {
        let started = Instant::now();
        let boots = self.incoming.is_none();
        let mut guest = self.start_without_waiting();
        if boots {
            let (_, word) = guest.receive_reply();
            assert_eq!(word, "ready", "the guest did not get ready");
            let elapsed_s = started.elapsed().as_secs_f64();
            guest.say(&format!("the guest is up after {elapsed_s:.1} s"));
        }
        guest
    }

    /// Starts QEMU, for a guest that does not get as far as to take commands.
    pub fn start_without_waiting(self) -> Guest {
        let directory = &self.directory;
        let listener = UnixListener::bind(directory.join(COMMANDS_SOCKET))
            .expect("binding a socket for commands");
        let mut qemu = match Process::spawn(&mut self.command()) {
            Ok(qemu) => qemu,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                panic!("no qemu-system-x86_64: {HOW_TO_PREPARE}")
            }
            Err(error) => panic!("starting QEMU: {error}"),
        };
        let Some(commands) = accept(&listener, &mut qemu) else {
            panic!("QEMU did not start{}", evidence(directory));
        };
        commands
            .set_read_timeout(Some(READ_INTERVAL))
            .expect("setting a socket's timeout");
        Guest {
            qemu,
            commands,
            received: Vec::new(),
            directory: directory.clone(),
            prefix: format!("[{}]", thread::current().name().unwrap_or("guest")),
            transcript: File::create(directory.join("commands.log"))
                .expect("creating the log of commands"),
        }
    }

    fn command(&self) -> Command {
        let system = if let Some(firmware) = self.firmware {
            firmware.arguments()
        } else {
            let [kernel, initramfs] = ["vmlinuz", "initramfs.cpio.gz"].map(prepared);
            let append = format!("{KERNEL_ARGUMENTS} {}", self.kernel_arguments);
            let arguments = [
                "-kernel", &kernel, "-initrd", &initramfs, "-append", &append,
            ];
            arguments.map(str::to_owned).to_vec()
        };
        let directory = &self.directory;
        let paths = [
            &self.socket,
            &directory.join(COMMANDS_SOCKET),
            &directory.join(MONITOR_SOCKET),
            &directory.join("console.log"),
        ];
        let [socket, commands, monitor, console] =
            paths.map(|path| path.to_str().expect("a path in UTF-8"));
        let Self {
            queues, memory_mib, ..
        } = self;
        let hot_plug = match &self.hot_plug {
            Some(room) => format!(",slots={},maxmem={}M", room.slots, room.memory_mib_max),
            None => String::new(),
        };
        let queues = queues.map_or_else(String::new, |queues| format!(",num-queues={queues}"));
        // A kernel that QEMU loads has the first place.
        let boot = self.firmware.map_or("", |_| ",bootindex=0");
        let reconnect = if self.reconnect { ",reconnect=1" } else { "" };

        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-accel", "tcg,thread=multi"])
            .args(["-smp", &self.cpus.to_string()])
            .args(["-m", &format!("{memory_mib}M{hot_plug}")])
            // The backend maps the guest's memory: it has to be shareable.
            .args([
                "-object",
                &format!("memory-backend-memfd,id=memory,size={memory_mib}M,share=on"),
            ])
            .args(["-machine", "q35,memory-backend=memory"])
            .args(system)
            .args(["-qmp", &format!("unix:{monitor},server=on,wait=off")])
            .args(["-serial", &format!("file:{console}")])
            .args(["-chardev", &format!("socket,id=commands,path={commands}")])
            .args(["-serial", "chardev:commands"])
            .args([
                "-chardev",
                &format!("socket,id=disk,path={socket}{reconnect}"),
            ])
            .args([
                "-device",
                &format!("vhost-user-blk-pci,id=disk,chardev=disk{queues}{boot}"),
            ])
            .args(self.incoming.iter().flat_map(|uri| ["-incoming", uri]))
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(directory.join("qemu.log")).expect("creating QEMU's log"));
        command
    }
}

impl Guest {
    /// A connection to QEMU's monitor. It serves one at a time.
    pub fn monitor(&self) -> Monitor {
        Monitor::connect(&self.directory.join(MONITOR_SOCKET))
    }

    /// Runs a shell command, one line, in the guest and waits for its end. The command and its
    /// output are printed too.
    pub fn run(&mut self, command: &str) -> CommandOutput {
        self.begin(command);
        self.finish()
    }

    /// What a command that has to succeed printed, without the last line end.
    pub fn answer(&mut self, command: &str) -> String {
        self.run_successfully(command).trim_end().to_owned()
    }

    /// The SHA-512 of a file in the guest. Of the checksums that busybox has this is the fastest
    /// under TCG.
    pub fn checksum(&mut self, path: &str) -> String {
        let mut line = self.answer(&format!("sha512sum <{path}"));
        line.truncate(128);
        line
    }

    /// Begins a command and does not wait for it; [`finish`](Self::finish) does. The guest runs one
    /// at a time.
    pub fn begin(&mut self, command: &str) {
        assert!(!command.contains('\n'), "a command is one line: {command}");
        self.send(command);
    }

    /// Waits until the command that was begun has printed `text`; it has to go on running after
    /// that.
    pub fn wait_for_output(&mut self, text: &str) {
        self.receive(|guest| {
            let received = String::from_utf8_lossy(&guest.received);
            assert!(
                !received.contains("\n@@ "),
                "ended while {text:?} was waited for; it had said:\n{received}"
            );
            received.contains(text).then_some(())
        });
    }

    /// Waits for the end of the command that was begun.
    pub fn finish(&mut self) -> CommandOutput {
        let (output, word) = self.receive_reply();
        let Ok(status) = word.parse() else {
            panic!("the guest sent {word:?} for an exit status");
        };
        for line in output.lines() {
            self.say(line);
        }
        if status != 0 {
            self.say(&format!("(exit status {status})"));
        }
        CommandOutput { status, output }
    }

    /// Runs a command that has to succeed, and returns its output.
    pub fn run_successfully(&mut self, command: &str) -> String {
        let CommandOutput { status, output } = self.run(command);
        assert_eq!(
            status, 0,
            "exit status of {command:?} in the guest; it said:\n{output}"
        );
        output
    }

    /// The output of the kernel so far.
    pub fn console_log(&self) -> String {
        read_lossily(&self.directory.join("console.log"))
    }

    /// Switches the guest off and waits for QEMU's end. The guest does not sync or unmount.
    pub fn poweroff(mut self) -> ExitStatus {
        self.send("poweroff -f");
        let status = self.qemu.wait_within(HANG_LIMIT);
        status.expect("the guest did not switch itself off")
    }

    /// Ends QEMU, whatever the guest is doing (it may have been migrated away).
    pub fn quit(mut self) -> ExitStatus {
        self.monitor().execute("quit", json!({}));
        let status = self.qemu.wait_within(HANG_LIMIT);
        status.expect("QEMU did not end")
    }

    fn send(&mut self, command: &str) {
        self.say(&format!("guest# {command}"));
        self.commands
            .write_all(format!("{command}\n").as_bytes())
            .expect("sending the guest a command");
    }

    /// The bytes up to the next reply, and what the reply says (after `@@`).
    fn receive_reply(&mut self) -> (String, String) {
        self.receive(Self::take_reply)
    }

    /// Reads until `is_complete` finds what it looks for in the bytes received. A guest that sends
    /// nothing for [`HANG_LIMIT`] hangs; one that sends something only takes long.
    fn receive<T>(&mut self, mut is_complete: impl FnMut(&mut Self) -> Option<T>) -> T {
        let mut deadline = Instant::now() + HANG_LIMIT;
        loop {
            if let Some(found) = is_complete(self) {
                return found;
            }
            let is_late = Instant::now() >= deadline;
            let mut bytes = [0; 4096];
            let trouble = match self.commands.read(&mut bytes) {
                Ok(0) => "QEMU closed the guest's serial port",
                _ if is_late => "the guest did not answer in time",
                Ok(count) => {
                    self.received.extend_from_slice(&bytes[..count]);
                    deadline = Instant::now() + HANG_LIMIT;
                    continue;
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::Interrupted => continue,
                    _ => panic!("reading from the guest: {error}"),
                },
            };
            let output = String::from_utf8_lossy(&self.received);
            panic!("{trouble} ({HANG_LIMIT:?}); it had sent:\n{output}");
        }
    }

    fn take_reply(&mut self) -> Option<(String, String)> {
        let text = &self.received;
        let mark = if text.starts_with(b"@@ ") {
            0
        } else {
            1 + text.windows(4).position(|window| window == b"\n@@ ")?
        };
        let end = mark + text[mark..].iter().position(|&byte| byte == b'\n')?;
        // The line end before the mark is not the command's.
        let output = String::from_utf8_lossy(&text[..mark.saturating_sub(1)]).into_owned();
        let word = String::from_utf8_lossy(&text[mark + 3..end]).into_owned();
        self.received.drain(..=end);
        Some((output, word))
    }

    /// Writes straight to stdout, which the test harness does not capture, as it does `println!`:
    /// the log of a test run shows the guest's output.
    fn say(&mut self, line: &str) {
        let mut text = String::new();
        writeln!(text, "{} {line}", self.prefix).expect("writing to a string");
        self.transcript
            .write_all(text.as_bytes())
            .and_then(|()| io::stdout().lock().write_all(text.as_bytes()))
            .expect("writing the log");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("{}", evidence(&self.directory));
        }
    }
}

/// The path of a part of the guest.
fn prepared(name: &str) -> String {
    let path = programs::guest_part(name);
    assert!(path.exists(), "no {}: {HOW_TO_PREPARE}", path.display());
    path.into_os_string()
        .into_string()
        .expect("a path in UTF-8")
}

/// Waits for QEMU to connect.
fn accept(listener: &UnixListener, qemu: &mut Process) -> Option<UnixStream> {
    listener
        .set_nonblocking(true)
        .expect("making a socket non-blocking");
    let mut accepted = None;
    wait_until(HANG_LIMIT, || {
        accepted = listener.accept().ok();
        accepted.is_some() || !qemu.is_alive()
    });
    let (stream, _) = accepted?;
    stream
        .set_nonblocking(false)
        .expect("making a socket blocking");
    Some(stream)
}

/// The end of the console and the errors of QEMU, to show with a failure.
fn evidence(directory: &Path) -> String {
    let console = read_lossily(&directory.join("console.log"));
    let lines: Vec<&str> = console.lines().collect();
    let tail = lines[lines.len().saturating_sub(CONSOLE_TAIL_LINES)..].join("\n");
    let qemu = read_lossily(&directory.join("qemu.log"));
    format!("\n--- the end of the guest's console\n{tail}\n--- QEMU's stderr\n{qemu}---")
}

/// A log as text; empty if it is not there yet.
fn read_lossily(path: &Path) -> String {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => String::new(),
    }
}
