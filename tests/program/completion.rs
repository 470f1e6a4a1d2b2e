//! Bash, zsh and fish complete the command lines of both programs: the installed files are used as
//! these shells use them, on a terminal, with the Tab key.
//!
//! Needs zsh and fish, which `make clients` installs.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Arg;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::create_images;
use testkit::programs;
use testkit::terminal::Terminal;

use crate::installation::Installed;

/// Ctrl-U, then the line, Tab, and the key that saves the line.
fn keys(line: &str) -> String {
    format!("\x15{line}\t\x14")
}

/// A shell on a terminal. Ctrl-T saves the line that is being typed in a file.
struct Shell {
    name: &'static str,
    terminal: Terminal,
    saved: PathBuf,
}

impl Shell {
    fn start(name: &'static str, installed: &Installed, directory: &Path) -> Self {
        let home = directory.join(name);
        fs::create_dir(&home).unwrap();
        let saved = home.join("line");
        let share = installed.path("share");
        let (options, set_up) = match name {
            "bash" => (
                &["--noprofile", "--norc", "-i"][..],
                format!(
                    "for file in {}/bash-completion/completions/*; do source $file; done; \
                     bind -x '\"\\C-t\": printf %s \"$READLINE_LINE\" >{1}.new; mv {1}.new {1}'",
                    share.display(),
                    saved.display()
                ),
            ),
            "zsh" => (
                &["-f", "-i"][..],
                format!(
                    "fpath=({}/zsh/site-functions $fpath); autoload -Uz compinit; \
                     compinit -u -D; bindkey -e; \
                     save() {{ print -rn -- $BUFFER >{1}.new; mv {1}.new {1} }}; \
                     zle -N save; bindkey '^T' save",
                    share.display(),
                    saved.display()
                ),
            ),
            "fish" => (
                &["--interactive"][..],
                format!(
                    "bind \\ct 'commandline | string collect >{0}.new; mv {0}.new {0}'; \
                     bind \\cu 'commandline \"\"'",
                    saved.display()
                ),
            ),
            other => panic!("{other}"),
        };
        let mut command = Command::new(name);
        let path = std::env::var("PATH").unwrap();
        command
            .args(options)
            .env_clear()
            .current_dir(directory)
            .env(
                "PATH",
                format!("{}:{path}", installed.path("bin").display()),
            )
            .env("HOME", &home)
            .env("XDG_DATA_DIRS", format!("{}:/usr/share", share.display()))
            .env("TERM", "xterm")
            .env("LANG", "C.UTF-8");
        let mut terminal = Terminal::start(command, 200);
        let ready = home.join("ready");
        terminal.type_in(&format!("{set_up}; echo >{}\n", ready.display()));
        terminal.wait_until("it does not start", || ready.exists());
        Self {
            name,
            terminal,
            saved,
        }
    }

    /// The line after the Tab key.
    fn complete(&mut self, line: &str) -> String {
        let _ = fs::remove_file(&self.saved);
        self.terminal.type_in(&keys(line));
        let what = format!("{}: no line after {line:?} and Tab", self.name);
        self.terminal.wait_until(&what, || self.saved.exists());
        let line = fs::read_to_string(&self.saved).unwrap();
        line.trim_end().to_owned()
    }
}

/// Lines that have one completion each, and the whole lines.
fn lines_of(command: &clap::Command, before: &str, lines: &mut Vec<(String, String)>) {
    let mut words: Vec<String> = Vec::new();
    let longs = command.get_arguments().filter_map(Arg::get_long);
    words.extend(longs.map(|long| format!("--{long}")));
    let below = command.get_subcommands();
    words.extend(below.map(|command| command.get_name().to_owned()));
    for word in &words {
        let is_unique = |length: &usize| {
            let begin = &word[..*length];
            words.iter().filter(|word| word.starts_with(begin)).count() == 1
        };
        let first = if word.starts_with("--") { 3 } else { 1 };
        // A word that another one begins with is complete, but not the only one.
        if let Some(length) = (first..word.len()).find(is_unique) {
            let begin = format!("{before} {}", &word[..length]);
            lines.push((begin, format!("{before} {word}")));
        }
    }
    for command in command.get_subcommands() {
        if command.get_name() != "help" {
            lines_of(command, &format!("{before} {}", command.get_name()), lines);
        }
    }
}

/// Lines with each place where the command or those below it want this name.
fn places_of(command: &clap::Command, before: &str, name: &str, places: &mut Vec<String>) {
    let wants = |argument: &Arg| {
        let names = argument.get_value_names().unwrap_or_default();
        names.iter().any(|of_value| of_value.as_str() == name)
    };
    for argument in command.get_arguments().filter(|argument| wants(argument)) {
        if let Some(long) = argument.get_long() {
            places.push(format!("{before} --{long} "));
        } else {
            let index = argument.get_index().unwrap();
            places.push(format!("{before} {}", "x ".repeat(index - 1)));
        }
    }
    for command in command.get_subcommands() {
        if command.get_name() != "help" {
            let before = format!("{before} {}", command.get_name());
            places_of(command, &before, name, places);
        }
    }
}

/// Checks all lines in all shells.
fn check(installed: &Installed, directory: &Path, lines: &[(String, String)]) {
    let mut wrong = Vec::new();
    for name in ["bash", "zsh", "fish"] {
        let mut shell = Shell::start(name, installed, directory);
        for (line, expected) in lines {
            let mut completed = shell.complete(line);
            // The daemon has little time for an answer, which a busy machine may exceed.
            let mut tries = if line.contains("--qmp ") { 10 } else { 0 };
            while completed != *expected && tries > 0 {
                completed = shell.complete(line);
                tries -= 1;
            }
            // zsh may write the value of an option of quorum-blkd behind an equals sign.
            if completed.trim_end_matches('=') != *expected {
                wrong.push(format!("{name}: {line:?} becomes {completed:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn shells_complete_every_command_and_option() {
    let installed = Installed::new();
    let directory = tempfile::tempdir().unwrap();
    let mut lines = Vec::new();
    for mut command in [
        quorum_blk::config::command_line(),
        quorum_blk::client::command_line(),
    ] {
        command.build();
        let name = command.get_name().to_owned();
        lines_of(&command, &name, &mut lines);
    }
    assert!(lines.len() > 60, "{lines:?}");
    fs::write(directory.path().join("some image"), "").unwrap();
    fs::write(directory.path().join("other"), "").unwrap();
    for (line, expected) in [
        ("quorum-blkd --cache w", "quorum-blkd --cache writeback"),
        (
            "quorum-blkd --blk-file so",
            r"quorum-blkd --blk-file some\ image",
        ),
        ("quorum-blkctl add so", r"quorum-blkctl add some\ image"),
        ("quorum-blkctl --qmp so", r"quorum-blkctl --qmp some\ image"),
        ("quorum-blkctl --qmp=so", r"quorum-blkctl --qmp=some\ image"),
        ("quorum-blkctl help stat", "quorum-blkctl help status"),
        ("quorum-blkctl --qmp=x stat", "quorum-blkctl --qmp=x status"),
        // Nothing that would be wrong.
        ("quorum-blkctl remove ot", "quorum-blkctl remove ot"),
        ("quorum-blkctl status x", "quorum-blkctl status x"),
    ] {
        lines.push((line.to_owned(), expected.to_owned()));
    }
    check(&installed, directory.path(), &lines);
}

#[test]
fn shells_complete_the_names_of_replicas_and_jobs() {
    let installed = Installed::new();
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 2, 64 << 20);
    let socket = directory.path().join("qmp.sock");
    let mut arguments = replica_arguments(&images);
    arguments[1].push(",node-name=first:one");
    arguments[3].push(",node-name=second one");
    arguments.extend(["--qmp".into(), socket.clone().into()]);
    let daemon = Daemon::start(directory.path(), arguments);
    let started = programs::command(programs::BLKCTL)
        .arg("--qmp")
        .arg(&socket)
        .args(["scrub", "--speed", "16K", "--detach"])
        .status();
    assert!(started.unwrap().success());
    let mut command = quorum_blk::client::command_line();
    command.build();
    let before = format!("quorum-blkctl --qmp {}", socket.display());
    let mut lines = Vec::new();
    for (of_value, begin, name) in [
        ("NODE", "f", "first:one"),
        ("OLD", "s", r"second\ one"),
        ("JOB", "j", "job0"),
    ] {
        let mut places = Vec::new();
        places_of(&command, &before, of_value, &mut places);
        assert!(!places.is_empty(), "{of_value}");
        for place in places {
            lines.push((format!("{place}{begin}"), format!("{place}{name}")));
        }
    }
    assert!(lines.len() > 8, "{lines:?}");
    check(&installed, directory.path(), &lines);
    drop(daemon);
}

/// Neither waits for a daemon that is not there or does not answer, nor says anything.
#[test]
fn without_an_answer_shells_complete_no_names() {
    let installed = Installed::new();
    let directory = tempfile::tempdir().unwrap();
    let silent = directory.path().join("silent.sock");
    let _silent = UnixListener::bind(&silent).unwrap();
    for name in ["bash", "zsh", "fish"] {
        let mut shell = Shell::start(name, &installed, directory.path());
        for socket in [silent.as_path(), Path::new("nowhere")] {
            for rest in ["remove x", "jobs wait j", "remove "] {
                let line = format!("quorum-blkctl --qmp {} {rest}", socket.display());
                let drawn_before = shell.terminal.drawn().len();
                assert_eq!(shell.complete(&line), line.trim_end(), "{name}");
                let drawn = shell.terminal.drawn().split_off(drawn_before);
                assert!(!drawn.contains("quorum-blkctl: "), "{name}: {drawn:?}");
            }
        }
    }
}
