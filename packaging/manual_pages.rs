//! Writes the man pages and the shell completions of the programs into a directory: `make man`.
//!
//! `NAME.1.in` beside this file is the hand-written part of a page. The definition of the command
//! line replaces `@NAME@`, `@SYNOPSIS@`, `@OPTIONS@` and `@COMMANDS@` in it.

use std::error::Error;
use std::fs;
use std::io;
use std::path::Path;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

/// The longest line that `mandoc -Tlint` accepts.
const COLUMNS_MAX: usize = 80;

/// A program with a man page.
struct Program {
    command: Command,
    page: &'static str,
    /// Its completions, by the names of their files. Without, they come from the definition of the
    /// command line, which knows no names of replicas and jobs.
    completions: &'static [(&'static str, &'static str)],
}

const COMPLETIONS_OF_CLIENT: [(&str, &str); 3] = [
    (
        "quorum-blkctl.bash",
        include_str!("completions/quorum-blkctl.bash"),
    ),
    ("_quorum-blkctl", include_str!("completions/_quorum-blkctl")),
    (
        "quorum-blkctl.fish",
        include_str!("completions/quorum-blkctl.fish"),
    ),
];

fn programs() -> [Program; 2] {
    [
        Program {
            command: quorum_blk::config::command_line(),
            page: include_str!("quorum-blkd.1.in"),
            completions: &[],
        },
        Program {
            command: quorum_blk::client::command_line(),
            page: include_str!("quorum-blkctl.1.in"),
            completions: &COMPLETIONS_OF_CLIENT,
        },
    ]
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory] = &arguments[..] else {
        return Err("usage: manual_pages DIRECTORY".into());
    };
    let (pages, completions) = (
        Path::new(directory).join("man"),
        Path::new(directory).join("completions"),
    );
    fs::create_dir_all(&pages)?;
    fs::create_dir_all(&completions)?;
    for mut program in programs() {
        let name = program.command.get_name().to_owned();
        fs::write(pages.join(format!("{name}.1")), page(&program)?)?;
        for (file, script) in program.completions {
            fs::write(completions.join(file), script)?;
        }
        if program.completions.is_empty() {
            for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
                clap_complete::generate_to(shell, &mut program.command, &name, &completions)?;
            }
        }
    }
    Ok(())
}

/// The page with the sections from the definition of the command line.
fn page(program: &Program) -> io::Result<String> {
    let version = program.command.get_version().unwrap_or_default().to_owned();
    let commands = commands(&program.command, "")?;
    let man = Man::new(program.command.clone());
    let mut page = program.page.replace("@VERSION@", &version);
    let name = rendered(|text| man.render_name_section(text))?;
    let synopsis = rendered(|text| man.render_synopsis_section(text))?;
    let options = rendered(|text| man.render_options_section(text))?;
    for (place, section) in [
        ("@NAME@\n", name),
        ("@SYNOPSIS@\n", synopsis),
        ("@OPTIONS@\n", one_section(&options)),
        ("@COMMANDS@\n", commands),
    ] {
        page = page.replace(place, &section);
    }
    Ok(wrapped(&page))
}

/// Wraps the text, but not examples, to the width that `mandoc -Tlint` accepts.
fn wrapped(page: &str) -> String {
    let mut wrapped = String::new();
    let mut is_example = false;
    for line in page.lines() {
        is_example = line == ".EX" || is_example && line != ".EE";
        if is_example || line.starts_with('.') {
            wrapped.push_str(line);
        } else {
            wrap(line, &mut wrapped);
        }
        wrapped.push('\n');
    }
    wrapped
}

fn wrap(line: &str, wrapped: &mut String) {
    let mut columns = 0;
    for word in line.split_whitespace() {
        // A line that starts with one of these would be a request.
        let is_request = word.starts_with(['.', '\'']);
        if columns > 0 && columns + 1 + word.len() > COLUMNS_MAX && !is_request {
            wrapped.push('\n');
            columns = 0;
        } else if columns > 0 {
            wrapped.push(' ');
            columns += 1;
        }
        wrapped.push_str(word);
        columns += word.len();
    }
}

/// A subsection for each command below `parent`, whose full name is `path`.
fn commands(parent: &Command, path: &str) -> io::Result<String> {
    let mut text = String::new();
    for command in parent.get_subcommands() {
        let path = format!("{path} {}", command.get_name())
            .trim_start()
            .to_owned();
        let about = command.get_about().unwrap_or_default().to_string();
        let alone = command
            .clone()
            .disable_help_flag(true)
            .bin_name(path.clone());
        let man = Man::new(alone.disable_help_subcommand(true));
        let synopsis = rendered(|text| man.render_synopsis_section(text))?;
        let mut options = Vec::new();
        if command.get_arguments().next().is_some() {
            let rendered = rendered(|text| man.render_options_section(text))?;
            options.push(rendered.replace(".SH OPTIONS\n", ""));
        }
        text += &format!(
            ".SS {path}\n{about}.\n.PP\n{}",
            synopsis.replace(".SH SYNOPSIS\n", "")
        );
        text.extend(options);
        if let Some(notes) = command.get_after_help() {
            let notes = notes.to_string().replace('-', r"\-");
            text += &format!(".PP\n.EX\n{notes}\n.EE\n");
        }
        text += &commands(command, &path)?;
    }
    Ok(text)
}

/// The output of `render`, with the usual formatting of man pages.
fn rendered(render: impl Fn(&mut dyn io::Write) -> io::Result<()>) -> io::Result<String> {
    let mut text = Vec::new();
    render(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    // Each section defines a string for the apostrophe again, for old formatters.
    let lines = text.lines().filter(|line| !line.contains(".ds Aq"));
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    let changes = [
        (r"\*(Aq", r"\(aq"),
        // Italics mark a placeholder; brackets are not needed too.
        (r"\fI<", r"\fI"),
        (r">\fR", r"\fR"),
        // Two breaks and an empty line give too much space.
        (".br\n\n.br\n", ".sp\n"),
        (".RS 14\n", ".RS\n"),
    ];
    Ok(changes
        .into_iter()
        .fold(text, |text, (from, to)| text.replace(from, to)))
}

/// Turns the sections of the options, one per heading and first those without a heading, into the
/// subsections of one section.
fn one_section(options: &str) -> String {
    if options.matches(".SH ").count() < 2 {
        return options.to_owned();
    }
    let mut sections = options.split(".SH ").filter(|section| !section.is_empty());
    let without_heading = sections.next().unwrap_or_default();
    let others = without_heading.replacen("OPTIONS", "OTHER", 1);
    let subsections = sections.chain([&others[..]]).map(|section| {
        let (heading, options) = section.split_once('\n').unwrap_or((section, ""));
        let (initial, rest) = heading.split_at(1);
        format!(".SS {initial}{}\n{options}", rest.to_lowercase())
    });
    [".SH OPTIONS\n".to_owned()]
        .into_iter()
        .chain(subsections)
        .collect()
}
