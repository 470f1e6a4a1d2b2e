//! Completion: what may come next on an unfinished command line, for the scripts of the shells in
//! `packaging/completions/`.
//!
//! A script sets [`VARIABLE`] and gives as arguments the words of the line up to the cursor, the
//! name of the program among them; `quoted` says that they are as typed. The first line of the
//! answer is `files` if the shell is to complete the name of a file, otherwise `words`, followed by
//! a line for each: the word, a tab, a few words about it.
//!
//! The commands and options are those of `arguments`; names of replicas and jobs come from the
//! daemon.
//!
//! Invariants: nothing but the answer is written, errors neither; the daemon is asked only where a
//! name is wanted, is only asked what it is, and has little time for the answer.

use std::io::{self, Write};
use std::path::Path;

use clap::builder::PossibleValue;
use clap::{Arg, ArgAction, Command, ValueHint};
use serde_json::{Value, json};

use super::arguments::SOCKET_VARIABLE;
use super::connection::Connection;
use crate::limits::CLIENT_COMPLETION_LIMIT;

/// The environment variable that asks for an answer instead of a run.
pub(super) const VARIABLE: &str = "QUORUM_BLKCTL_COMPLETE";

/// A word that may come next, and what it is.
type Word = (String, String);

/// What may come next.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// The name of a file.
    File,
    /// One of these.
    Words(Vec<Word>),
}

/// The names that a daemon is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Names {
    Replicas,
    Jobs,
}

/// Writes the answer. `words` begins with the name of the program and ends with the word at the
/// cursor, which may be empty.
pub(super) fn run(command: Command, words: Vec<String>, out: &mut dyn Write) -> io::Result<()> {
    let next = next(command, words, &|names, socket| ask(names, socket));
    match next {
        Next::File => writeln!(out, "files")?,
        Next::Words(words) => {
            writeln!(out, "words")?;
            for (word, about) in words {
                writeln!(out, "{word}\t{about}")?;
            }
        }
    }
    out.flush()
}

/// A word as typed, without what quotes it. Variables and the like stay as they are.
pub(super) fn unquoted(word: &str) -> String {
    let mut text = String::new();
    let mut characters = word.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => text.extend(characters.next()),
            '\'' | '"' => {}
            other => text.push(other),
        }
    }
    text
}

/// What may come next, with `ask` to find the names of a daemon at a socket.
fn next(
    mut root: Command,
    words: Vec<String>,
    ask: &dyn Fn(Names, Option<&str>) -> Vec<Word>,
) -> Next {
    root.build();
    let mut words = words;
    let Some(current) = words.pop() else {
        return Next::Words(Vec::new());
    };
    let line = Line::read(&root, words.get(1..).unwrap_or_default());
    line.next(&current, ask)
}

/// What the words before the cursor have said.
struct Line<'a> {
    command: &'a Command,
    /// Positional arguments of the command so far.
    positionals: usize,
    /// The option that has no value yet.
    open: Option<&'a Arg>,
    /// Options so far.
    given: Vec<&'a str>,
    /// After `--` there are no options.
    has_options: bool,
    socket: Option<String>,
}

impl<'a> Line<'a> {
    fn read(root: &'a Command, words: &[String]) -> Self {
        let mut line = Self {
            command: root,
            positionals: 0,
            open: None,
            given: Vec::new(),
            has_options: true,
            socket: None,
        };
        for word in words {
            line.take(word);
        }
        line
    }

    fn take(&mut self, word: &str) {
        let is_option = self.has_options && word.len() > 1 && word.starts_with('-');
        let open = self.open.take();
        if let Some(option) = open
            && !(is_option && is_optional(option))
        {
            self.value(option, word);
        } else if is_option && word == "--" {
            self.has_options = false;
        } else if is_option {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word, None),
            };
            let Some(option) = self.option(name) else {
                return;
            };
            self.given.extend(option.get_long());
            match value {
                Some(value) => self.value(option, value),
                None if takes_value(option) => self.open = Some(option),
                None => {}
            }
        } else if let Some(below) = self.command.find_subcommand(word)
            && self.positionals == 0
        {
            self.command = below;
        } else {
            self.positionals += 1;
        }
    }

    fn value(&mut self, option: &Arg, value: &str) {
        if option.get_id() == "qmp" {
            self.socket = Some(value.to_owned());
        }
    }

    /// The option that is written like this.
    fn option(&self, name: &str) -> Option<&'a Arg> {
        let long = name.strip_prefix("--")?;
        let mut options = self.command.get_arguments();
        options.find(|option| option.get_long() == Some(long))
    }

    fn next(&self, current: &str, ask: &dyn Fn(Names, Option<&str>) -> Vec<Word>) -> Next {
        let values = |argument: &Arg| self.values(argument, ask);
        let is_option = self.has_options && current.starts_with('-');
        let mut words = match (self.open, current.split_once('=')) {
            (Some(option), _) if !(is_option && is_optional(option)) => match values(option) {
                Next::File => return Next::File,
                Next::Words(words) => words,
            },
            (_, Some((name, _))) if is_option => match self.option(name).map(values) {
                Some(Next::File) => return Next::File,
                Some(Next::Words(words)) => words
                    .into_iter()
                    .map(|(value, about)| (format!("{name}={value}"), about))
                    .collect(),
                None => Vec::new(),
            },
            _ if is_option => self.options(),
            _ => {
                let positionals: Vec<&Arg> = self.command.get_positionals().collect();
                let is_list = |last: &&&Arg| {
                    let numbers = last.get_num_args();
                    numbers.is_some_and(|numbers| numbers.max_values() > 1)
                };
                let here = positionals.get(self.positionals);
                let here = here.or(positionals.last().filter(is_list)).copied();
                let commands = match self.positionals {
                    0 => self.commands(),
                    _ => Vec::new(),
                };
                match here.map(values) {
                    Some(Next::File) => return Next::File,
                    Some(Next::Words(words)) => words.into_iter().chain(commands).collect(),
                    // Where there is nothing but options, they need not be asked for.
                    None if commands.is_empty() && current.is_empty() && self.has_options => {
                        self.options()
                    }
                    None => commands,
                }
            }
        };
        words.retain(|(word, _)| word.starts_with(current) && !word.contains(char::is_control));
        Next::Words(words)
    }

    fn commands(&self) -> Vec<Word> {
        let shown = self.command.get_subcommands();
        let shown = shown.filter(|command| !command.is_hide_set());
        let named = shown.map(|command| {
            let about = command.get_about().map(ToString::to_string);
            (command.get_name().to_owned(), first_line(about))
        });
        named.collect()
    }

    /// The options of the command that are not on the line.
    fn options(&self) -> Vec<Word> {
        let mut words = Vec::new();
        for option in self.command.get_arguments() {
            let Some(long) = option.get_long() else {
                continue;
            };
            if !option.is_hide_set() && !self.given.contains(&long) {
                let about = option.get_help().map(ToString::to_string);
                words.push((format!("--{long}"), first_line(about)));
            }
        }
        words
    }

    /// The values of an argument.
    fn values(&self, argument: &Arg, ask: &dyn Fn(Names, Option<&str>) -> Vec<Word>) -> Next {
        if argument.get_value_hint() == ValueHint::FilePath {
            return Next::File;
        }
        Next::Words(match names(argument) {
            Some(names) => ask(names, self.socket.as_deref()),
            None => possible_values(argument),
        })
    }
}

fn possible_values(argument: &Arg) -> Vec<Word> {
    let word = |value: PossibleValue| {
        let about = value.get_help().map(ToString::to_string);
        (value.get_name().to_owned(), first_line(about))
    };
    argument
        .get_possible_values()
        .into_iter()
        .map(word)
        .collect()
}

/// Which names the value of this argument is one of.
fn names(argument: &Arg) -> Option<Names> {
    match argument.get_value_names()?.first()?.as_str() {
        "NODE" | "OLD" => Some(Names::Replicas),
        "JOB" => Some(Names::Jobs),
        _ => None,
    }
}

fn takes_value(option: &Arg) -> bool {
    matches!(option.get_action(), ArgAction::Set | ArgAction::Append)
}

/// Whether the value of the option may be left out.
fn is_optional(option: &Arg) -> bool {
    let range = option.get_num_args();
    range.is_some_and(|range| range.min_values() == 0)
}

/// What is shown beside a word.
fn first_line(about: Option<String>) -> String {
    let about = about.unwrap_or_default();
    about.lines().next().unwrap_or_default().to_owned()
}

/// Asks the daemon for names. None if there is no answer.
fn ask(names: Names, socket: Option<&str>) -> Vec<Word> {
    let from_environment = std::env::var(SOCKET_VARIABLE).ok();
    let Some(socket) = socket.map(str::to_owned).or(from_environment) else {
        return Vec::new();
    };
    let Ok(mut connection) = Connection::open(Path::new(&socket), CLIENT_COMPLETION_LIMIT) else {
        return Vec::new();
    };
    let (question, list, name, about) = match names {
        Names::Replicas => ("query-quorum", "/replicas", "node-name", "file"),
        Names::Jobs => ("query-jobs", "", "id", "type"),
    };
    let reply = connection.execute(question, json!({}));
    let reply = reply.unwrap_or_default();
    let entries = reply.pointer(list).and_then(Value::as_array);
    let text = |entry: &Value, member: &str| {
        let text = entry.get(member).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    let word = |entry: &Value| (text(entry, name), text(entry, about));
    entries.into_iter().flatten().map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::command_line;

    /// What may come at the end of this line, with the socket that was asked in front.
    fn completed(line: &str) -> Next {
        let words = line.split(' ').map(str::to_owned).collect();
        next(command_line(), words, &|names, socket| {
            let socket = socket.unwrap_or("-");
            match names {
                Names::Replicas => vec![("a.raw".into(), socket.into())],
                Names::Jobs => vec![("job1".into(), socket.into())],
            }
        })
    }

    fn words(line: &str) -> Vec<String> {
        match completed(line) {
            Next::File => panic!("{line}: a file"),
            Next::Words(words) => words.into_iter().map(|(word, _)| word).collect(),
        }
    }

    #[test]
    fn what_comes_next_depends_on_what_came_before() {
        let p = "quorum-blkctl";
        for (line, expected) in [
            ("stat", &["status"][..]),
            ("--qmp s stat", &["status"]),
            ("status --js", &["--json"]),
            ("status --json --js", &[]),
            ("remove a", &["a.raw"]),
            ("remove a.raw a", &[]),
            ("remove -- a", &["a.raw"]),
            ("remove -- --q", &[]),
            ("--timeout 5 remove b", &[]),
            ("replace a", &["a.raw"]),
            ("add x --node-name a", &[]),
            ("status --watch 5 --js", &["--json"]),
            ("status --watch --js", &["--json"]),
            ("jobs wait j", &["job1"]),
            ("jobs wait job1 j", &[]),
            ("jobs pa", &["pause"]),
            ("help stat", &["status"]),
            ("scrub --speed ", &[]),
            ("nothing st", &[]),
            ("cont --", &["--qmp", "--timeout", "--help"]),
            ("cont ", &["--qmp", "--timeout", "--help"]),
            ("resize ", &[]),
        ] {
            let line = format!("{p} {line}");
            assert_eq!(words(&line), expected, "{line}");
        }
        for line in ["add ", "replace a.raw /x", "--qmp ", "status --qmp=/r"] {
            assert_eq!(completed(&format!("{p} {line}")), Next::File, "{line}");
        }
        assert!(words(p).is_empty());
    }

    #[test]
    fn the_daemon_that_the_line_names_is_asked() {
        for line in ["--qmp s remove a", "remove --qmp=s a"] {
            let expected = ("a.raw".to_owned(), "s".to_owned());
            let line = format!("quorum-blkctl {line}");
            assert_eq!(completed(&line), Next::Words(vec![expected]));
        }
    }

    #[test]
    fn quotes_are_no_part_of_a_word() {
        assert_eq!(unquoted(r#"--qmp="/a b"/c\ d'e'\"#), "--qmp=/a b/c de");
    }
}
