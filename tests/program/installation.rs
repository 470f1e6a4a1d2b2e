//! `make install` installs everything, the programs that read the files accept them, and
//! `make uninstall` removes them.
//!
//! Needs systemd's tools, man, mandoc, zsh and fish, which `make clients` installs.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::RawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use quorum_blk::config::{Config, Listen, Parsed, PassedSocket, command_line};
use quorum_blk::limits::{ARENA_SHARE_BYTES, BUFFER_BYTES_MAX};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Everything but the documentation, below PREFIX.
const INSTALLED: [&str; 16] = [
    "bin/quorum-blkctl",
    "bin/quorum-blkd",
    "lib/systemd/system/quorum-blkd-events@.socket",
    "lib/systemd/system/quorum-blkd-qmp@.socket",
    "lib/systemd/system/quorum-blkd@.service",
    "lib/systemd/system/quorum-blkd@.socket",
    "lib/sysusers.d/quorum-blk.conf",
    "share/bash-completion/completions/quorum-blkctl",
    "share/bash-completion/completions/quorum-blkd",
    "share/fish/vendor_completions.d/quorum-blkctl.fish",
    "share/fish/vendor_completions.d/quorum-blkd.fish",
    "share/man/man1/quorum-blkctl.1",
    "share/man/man1/quorum-blkd.1",
    "share/qemu/vhost-user/50-quorum-blkd.json",
    "share/zsh/site-functions/_quorum-blkctl",
    "share/zsh/site-functions/_quorum-blkd",
];

const SOCKET_UNITS: [&str; 3] = ["quorum-blkd@", "quorum-blkd-events@", "quorum-blkd-qmp@"];

/// Runs a program that has to succeed; returns its output and errors.
fn run(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> String {
    run_with(program, arguments, &[])
}

fn run_with(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    environment: &[(&str, &OsStr)],
) -> String {
    let program = program.as_ref();
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(environment.iter().copied())
        // The variables of an outer make are not for this one.
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL")
        .stdin(Stdio::null());
    let output = command.output().unwrap_or_else(|error| {
        panic!("{}: {error}; run `make clients` first", program.display());
    });
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8(text).unwrap();
    assert!(output.status.success(), "{command:?}: {text}");
    text
}

/// `make`, which installs the program under test instead of an optimised one.
fn make(target: &str, variables: &[(&str, &Path)]) {
    // The first call generates the files, and the others use them.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let program = Path::new(env!("CARGO_BIN_EXE_quorum-blkd"));
    let build = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let mut arguments: Vec<OsString> = vec![
        "-C".into(),
        env!("CARGO_MANIFEST_DIR").into(),
        target.into(),
    ];
    for (name, value) in [("BUILT", program.parent().unwrap())]
        .iter()
        .chain(variables)
    {
        arguments.push(
            [OsStr::new(name), OsStr::new("="), value.as_os_str()]
                .into_iter()
                .collect(),
        );
    }
    run_with(
        "make",
        arguments,
        &[("CARGO_TARGET_DIR", build.as_os_str())],
    );
}

/// The files below a directory, by their paths from there.
fn files(directory: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(place) = directories.pop() {
        for entry in fs::read_dir(place).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                directories.push(entry.path());
            } else {
                found.insert(entry.path().strip_prefix(directory).unwrap().to_owned());
            }
        }
    }
    found
}

/// Installed without DESTDIR.
pub(crate) struct Installed(TempDir);

impl Installed {
    pub(crate) fn new() -> Self {
        let prefix = tempfile::tempdir().unwrap();
        make("install", &[("PREFIX", prefix.path())]);
        Self(prefix)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn unit(&self, name: &str) -> PathBuf {
        self.path("lib/systemd/system").join(name)
    }

    /// The value of a setting that a unit has once.
    fn setting(&self, unit: &str, name: &str) -> String {
        let text = fs::read_to_string(self.unit(unit)).unwrap();
        let mut values = text
            .lines()
            .filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let value = values
            .next()
            .unwrap_or_else(|| panic!("no {name}= in {unit}"));
        assert_eq!(values.next(), None, "{name}= in {unit}");
        value.to_owned()
    }
}

#[test]
fn everything_is_installed_and_uninstalled() {
    let directory = tempfile::tempdir().unwrap();
    let variables = [("DESTDIR", directory.path()), ("PREFIX", Path::new("/usr"))];
    make("install", &variables);
    let usr = directory.path().join("usr");
    let (documents, others): (BTreeSet<PathBuf>, _) = files(directory.path())
        .into_iter()
        .partition(|file| file.starts_with("usr/share/doc/quorum-blk"));
    let expected: BTreeSet<PathBuf> = INSTALLED
        .iter()
        .map(|name| Path::new("usr").join(name))
        .collect();
    assert_eq!(others, expected);
    for name in [
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "docs/qmp.md",
        "docs/systemd.md",
    ] {
        let document = Path::new("usr/share/doc/quorum-blk").join(name);
        assert!(documents.contains(&document), "no {name}");
    }
    for file in documents.iter().chain(&others) {
        let mode = fs::metadata(directory.path().join(file))
            .unwrap()
            .permissions()
            .mode();
        let expected = if file.starts_with("usr/bin") {
            0o755
        } else {
            0o644
        };
        assert_eq!(mode & 0o7777, expected, "{}", file.display());
        // No file contains the path of DESTDIR.
        let bytes = fs::read(directory.path().join(file)).unwrap();
        let place = directory.path().as_os_str().as_encoded_bytes();
        assert!(
            !bytes.windows(place.len()).any(|window| window == place),
            "{}",
            file.display()
        );
        let text = String::from_utf8_lossy(&bytes);
        assert!(
            expected == 0o755 || !text.contains("@BINDIR@"),
            "{}",
            file.display()
        );
    }
    // Files of other packages, which must stay.
    let others = usr.join("share/man/man1/other.1");
    fs::write(&others, "").unwrap();
    make("uninstall", &variables);
    let left: Vec<PathBuf> = files(directory.path()).into_iter().collect();
    assert_eq!(left, [Path::new("usr/share/man/man1/other.1")]);
    assert!(!usr.join("share/doc/quorum-blk").exists());
}

/// QEMU's docs/interop/vhost-user.json: the struct VhostUserBackend, and `--print-capabilities`.
#[test]
fn the_vhost_user_descriptor_matches_the_daemon() {
    let installed = Installed::new();
    let descriptor: Value =
        serde_json::from_str(&installed.text("share/qemu/vhost-user/50-quorum-blkd.json")).unwrap();
    let members: Vec<&String> = descriptor.as_object().unwrap().keys().collect();
    assert_eq!(members, ["binary", "description", "type"]);
    assert!(descriptor["description"].is_string());
    let program = installed.path("bin/quorum-blkd");
    assert_eq!(descriptor["binary"], json!(program));
    let capabilities: Value =
        serde_json::from_str(&run(&program, ["--print-capabilities"])).unwrap();
    assert_eq!(
        capabilities,
        json!({ "type": descriptor["type"], "features": ["read-only", "blk-file"] })
    );
    assert_eq!(descriptor["type"], "block");
    // The options that the features promise.
    let help = run(&program, ["--help"]);
    for option in ["--read-only", "--blk-file", "--socket-path", "--fd"] {
        assert!(help.contains(option), "{option}");
    }
}

/// The blocks below "Disks kept apart" in docs/systemd.md.
#[test]
fn systemd_accepts_a_disk_with_a_user_of_its_own() {
    let installed = Installed::new();
    let page = include_str!("../../docs/systemd.md");
    let (_, section) = page
        .split_once("\n## Disks kept apart\n")
        .expect("the section");
    let (section, _) = section.split_once("\n## ").expect("another one");
    let blocks: Vec<&str> = section.split("\n```").skip(1).step_by(2).collect();
    assert_eq!(blocks.len(), 2);
    let units = ["quorum-blkd@db.service", "quorum-blkd@db.socket"];
    for (unit, block) in units.iter().zip(&blocks) {
        let drop_ins = installed.unit(&format!("{unit}.d"));
        fs::create_dir(&drop_ins).unwrap();
        fs::write(drop_ins.join("user.conf"), block).unwrap();
        assert!(block.contains("quorum-blk-db"), "{block}");
    }
    // Those of the machine come after ours.
    let mut path = installed.path("lib/systemd/system").into_os_string();
    path.push(":");
    let said = run_with(
        "systemd-analyze",
        [OsString::from("verify")]
            .into_iter()
            .chain(units.map(OsString::from)),
        &[
            ("SYSTEMD_UNIT_PATH", &*path),
            ("MANPATH", installed.path("share/man").as_os_str()),
        ],
    );
    let ours: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("user.conf"))
        .collect();
    assert_eq!(ours, Vec::<&str>::new(), "{said}");
}

#[test]
fn systemd_accepts_the_units() {
    let installed = Installed::new();
    let units = SOCKET_UNITS.map(|unit| format!("{unit}.socket"));
    let units = units
        .iter()
        .map(String::as_str)
        .chain(["quorum-blkd@.service"]);
    let units: Vec<PathBuf> = units.map(|unit| installed.unit(unit)).collect();
    let manual = installed.path("share/man");
    // It warns of unknown settings, and of programs and man pages that are missing.
    let said = run_with(
        "systemd-analyze",
        [OsString::from("verify")]
            .into_iter()
            .chain(units.iter().map(OsString::from)),
        &[("MANPATH", manual.as_os_str())],
    );
    let ours: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("quorum-blk"))
        .collect();
    assert_eq!(ours, Vec::<&str>::new(), "{said}");
    // From 0 to 100, the less the better.
    let service = &units[3];
    let arguments =
        ["security", "--no-pager", "--offline=true", "--threshold=5"].map(OsString::from);
    let assessed = run(
        "systemd-analyze",
        arguments.into_iter().chain([service.into()]),
    );
    println!("{}", assessed.lines().last().unwrap_or_default());
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("etc")).unwrap();
    let arguments = [
        OsString::from(format!("--root={}", root.path().display())),
        installed.path("lib/sysusers.d/quorum-blk.conf").into(),
    ];
    run("systemd-sysusers", arguments);
    for (file, of_service) in [("etc/passwd", "User"), ("etc/group", "Group")] {
        let name = installed.setting("quorum-blkd@.service", of_service);
        let entries = fs::read_to_string(root.path().join(file)).unwrap();
        assert!(
            entries.starts_with(&format!("{name}:")),
            "{file}: {entries}"
        );
    }
    assert_eq!(
        installed.setting("quorum-blkd@.socket", "SocketGroup"),
        "quorum-blk"
    );
    // Its records are not for the members of that group.
    assert_eq!(
        installed.setting("quorum-blkd@.service", "StateDirectoryMode"),
        "0700"
    );
    // With room for the default of --memory-max and the buffers of 64 workers.
    let least = BUFFER_BYTES_MAX + 64 * 6 * ARENA_SHARE_BYTES as u64;
    let high = installed.setting("quorum-blkd@.service", "MemoryHigh");
    let gigabytes: u64 = high
        .strip_suffix('G')
        .expect("a size in G")
        .parse()
        .unwrap();
    assert!(gigabytes << 30 >= least, "{high}");
}

/// The program accepts the command line of the units, the variable of the options file, and the
/// names of the sockets.
#[test]
fn the_daemon_accepts_the_arguments_of_the_units() {
    let installed = Installed::new();
    let unit = "quorum-blkd@.service";
    let command = installed.setting(unit, "ExecStart").replace("%i", "db");
    let options =
        "--rewrite-corrupted --blk-file /ssd1/a.raw --blk-file /ssd2/b.raw --blk-file /ssd3/c.raw";
    assert_eq!(
        installed.setting(unit, "EnvironmentFile"),
        "/etc/quorum-blk/%i.conf"
    );
    let command = command.replace("$QUORUM_BLKD_OPTIONS", options);
    assert!(!command.contains(['%', '$']), "{command}");
    let arguments: Vec<OsString> = command.split_whitespace().map(OsString::from).collect();
    assert_eq!(arguments[0], installed.path("bin/quorum-blkd"));
    let passed = SOCKET_UNITS
        .iter()
        .zip(3 as RawFd..)
        .map(|(name, fd)| PassedSocket {
            name: installed.setting(&format!("{name}.socket"), "FileDescriptorName"),
            fd,
        });
    let Ok(Parsed::Run(config)) = Config::from_args(arguments, passed.collect()) else {
        panic!("refused: {command}");
    };
    assert_eq!(
        (config.node_name.as_str(), config.replicas.len()),
        ("db", 3)
    );
    let fd = |listen: Option<Listen>| match listen {
        Some(Listen::Passed(socket)) => socket.fd,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        [Some(config.listen), config.events, config.qmp].map(fd),
        [3, 4, 5]
    );
    let sockets = SOCKET_UNITS
        .map(|name| format!("{name}%i.socket"))
        .join(" ");
    assert_eq!(installed.setting(unit, "Sockets"), sockets);
}

#[test]
fn the_man_pages_are_valid() {
    let installed = Installed::new();
    let beginning = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS"];
    let of_daemon = [
        "ENVIRONMENT",
        "EXIT STATUS",
        "SIGNALS",
        "FILES",
        "EXAMPLES",
        "SEE ALSO",
    ];
    let of_client = [
        "COMMANDS",
        "ENVIRONMENT",
        "EXIT STATUS",
        "EXAMPLES",
        "SEE ALSO",
    ];
    is_a_man_page(
        &installed,
        command_line(),
        &[&beginning[..], &of_daemon].concat(),
    );
    let client = quorum_blk::client::command_line();
    is_a_man_page(&installed, client, &[&beginning[..], &of_client].concat());
}

/// The page of a program: without warnings, with these sections, and complete.
fn is_a_man_page(installed: &Installed, program: clap::Command, sections: &[&str]) {
    let name = program.get_name().to_owned();
    let page = installed.path(&format!("share/man/man1/{name}.1"));
    let arguments = |options: &[&str]| -> Vec<OsString> {
        let options = options.iter().map(OsString::from);
        options.chain([page.clone().into()]).collect()
    };
    assert_eq!(run("mandoc", arguments(&["-Tlint"])), "");
    // The formatted page, and the warnings, which would go to standard error.
    let width = [
        ("MANWIDTH", OsStr::new("100")),
        ("LC_ALL", OsStr::new("C.UTF-8")),
    ];
    let said = run_with(
        "man",
        arguments(&["--warnings", "-Z", "-Tutf8", "-l"]),
        &width,
    );
    assert!(
        said.starts_with("x T utf8\n") && !said.contains("warning"),
        "{said}"
    );
    let text = run_with("man", arguments(&["-l"]), &width);
    let is_heading = |line: &&str| line.starts_with(|initial: char| initial.is_ascii_uppercase());
    let headings: Vec<&str> = text.lines().filter(is_heading).map(str::trim).collect();
    // The first line has the name of the page.
    assert_eq!(headings[1..], *sections, "{text}");
    let version = program.get_version().unwrap().to_owned();
    assert!(text.contains(&format!("quorum-blk {version}")), "{text}");
    has_all(&text, &program);
}

/// The text has all options of the command and of those below it, and their names.
fn has_all(text: &str, command: &clap::Command) {
    for option in command
        .get_arguments()
        .filter_map(|argument| argument.get_long())
    {
        assert!(text.contains(&format!("--{option}")), "no --{option}");
    }
    for below in command.get_subcommands() {
        let mut words = text.split_whitespace();
        assert!(
            words.any(|word| word == below.get_name()),
            "no {}",
            below.get_name()
        );
        has_all(text, below);
    }
}
