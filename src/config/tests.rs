//! Unit tests: what the command line accepts and rejects.

use super::*;
use crate::limits::QUEUES_MAX;
use crate::replica::record_file::StateDirectory;

const SOCKET: [&str; 2] = ["--socket-path", "/run/disk.sock"];

fn parse<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Parsed, ConfigError> {
    parse_with(arguments, &[])
}

/// As `parse`, with sockets that the service manager passed.
fn parse_with<S: AsRef<OsStr>>(
    arguments: &[S],
    passed: &[(&str, RawFd)],
) -> Result<Parsed, ConfigError> {
    let program = OsString::from("quorum-blkd");
    let passed = passed.iter().map(|&(name, fd)| PassedSocket {
        name: name.to_owned(),
        fd,
    });
    let arguments = arguments
        .iter()
        .map(|argument| argument.as_ref().to_owned());
    Config::from_args(std::iter::once(program).chain(arguments), passed.collect())
}

/// A disk of `count` replicas with further options.
fn disk(count: usize, more: &[&str]) -> Vec<String> {
    let mut arguments: Vec<String> = SOCKET.map(str::to_owned).to_vec();
    for index in 0..count {
        arguments.push(format!("--blk-file=/images/{index}.raw"));
    }
    arguments.extend(more.iter().map(|&a| a.to_owned()));
    arguments
}

fn config<S: AsRef<OsStr>>(arguments: &[S]) -> Config {
    match parse(arguments) {
        Ok(Parsed::Run(config)) => *config,
        other => panic!("{other:?}"),
    }
}

fn printed(arguments: &[&str]) -> String {
    match parse(arguments) {
        Ok(Parsed::Print(text)) => text,
        other => panic!("{other:?}"),
    }
}

/// The error's line.
fn rejection<S: AsRef<OsStr>>(arguments: &[S]) -> String {
    let line = parse(arguments).expect_err("must be rejected").to_string();
    assert!(
        !line.contains(char::is_control) && !line.is_empty(),
        "{line:?}"
    );
    assert!(!line.starts_with("error"), "{line:?}");
    line
}

fn assert_rejected<S: AsRef<OsStr>>(arguments: &[S], expected: &str) {
    let line = rejection(arguments);
    assert!(
        line.contains(expected),
        "{line:?} does not say {expected:?}"
    );
}

#[test]
fn the_definition_of_the_options_is_valid() {
    Options::command().debug_assert();
}

#[test]
fn defaults() {
    let config = config(&disk(3, &[]));
    assert_eq!(config.listen, Listen::Path("/run/disk.sock".into()));
    let names: Vec<&str> = config
        .replicas
        .iter()
        .map(|r| r.node_name.as_str())
        .collect();
    assert_eq!(names, ["0.raw", "1.raw", "2.raw"]);
    assert_eq!(config.vote_threshold, 2);
    assert_eq!(
        (
            config.read_pattern,
            config.cache,
            config.replica_timeout.as_millis()
        ),
        (ReadPattern::Quorum, Cache::None, 1000)
    );
    assert_eq!(config.scrub_around_bytes, 4 << 20);
    assert!(!config.rewrite_corrupted && !config.blkverify && !config.read_only);
    assert!(!config.empty_anyway);
    assert_eq!(config.repair_limit_bytes, 16 << 20);
    assert_eq!(config.memory_bytes_max, None);
    assert_eq!(
        (config.node_name.as_str(), config.serial.as_str()),
        ("quorum0", "")
    );
    assert_eq!((config.queue_count, config.queue_size), (QUEUES_MAX, 256));
    assert_eq!((config.events.as_ref(), config.verbosity), (None, 0));
    assert_eq!(
        config.open_options(),
        OpenOptions {
            read_only: false,
            direct: true,
            raw_anyway: false,
            block_bytes: 512,
        }
    );
    assert_eq!(config.segments_max(), 126);
}

#[test]
fn every_option() {
    let arguments = "--fd 3 --blk-file a.raw,node-name=a --blk-file b.raw --vote-threshold 1 \
        --read-pattern fifo --rewrite-corrupted --node-name usr1 --serial QB-1 --num-queues 64 \
        --queue-size 64 --cache writeback --events /run/events.sock -vv";
    let config = config(&arguments.split_whitespace().collect::<Vec<_>>());
    assert_eq!(config.listen, Listen::Fd(3));
    assert_eq!(
        config.replicas[0],
        ReplicaSource {
            path: "a.raw".into(),
            node_name: "a".into()
        }
    );
    assert_eq!(
        (config.vote_threshold, config.read_pattern),
        (1, ReadPattern::Fifo)
    );
    assert!(config.rewrite_corrupted);
    assert_eq!(
        (config.node_name.as_str(), config.serial.as_str()),
        ("usr1", "QB-1")
    );
    assert_eq!(
        (config.queue_count, config.queue_size, config.segments_max()),
        (64, 64, 62)
    );
    assert_eq!(
        config.open_options(),
        OpenOptions {
            read_only: false,
            direct: false,
            raw_anyway: false,
            block_bytes: 512,
        }
    );
    assert_eq!(
        (config.events, config.verbosity),
        (Some(Listen::Path("/run/events.sock".into())), 2)
    );
    let read_only = super::tests::config(&disk(2, &["--read-only", "--blkverify"]));
    assert!(read_only.open_options().read_only && read_only.blkverify);
}

#[test]
fn the_default_threshold_is_a_majority() {
    for (replicas, threshold) in [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (32, 17)] {
        assert_eq!(config(&disk(replicas, &[])).vote_threshold, threshold);
    }
}

#[test]
fn print_capabilities_ignores_every_other_option() {
    for arguments in [
        &["--print-capabilities"][..],
        &["--nonsense", "--print-capabilities"],
    ] {
        let text = printed(arguments);
        assert_eq!(
            text,
            "{\"type\": \"block\", \"features\": [\"read-only\", \"blk-file\"]}\n"
        );
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
    }
}

#[test]
fn help_and_version_are_printed() {
    let help = printed(&["--help"]);
    for option in [
        "--blk-file",
        "--vote-threshold",
        "--cache",
        "QUORUM_BLKD_LOG",
    ] {
        assert!(help.contains(option), "{help}");
    }
    assert_eq!(
        printed(&["--version"]),
        format!("quorum-blkd {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn the_help_names_the_limits() {
    let help = printed(&["--help"])
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    assert!(help.contains(&format!("Request queues offered, 1 to {QUEUES_MAX}")));
    assert!(help.contains(&format!("from {QUEUE_SIZE_MIN} to {QUEUE_SIZE_MAX}")));
    assert!(help.contains(&format!("at most {SEGMENTS_MAX} data segments")));
}

#[test]
fn two_commas_are_a_literal_one() {
    let cases: [(&str, &str, &str); 6] = [
        ("/i/1.raw", "/i/1.raw", "1.raw"),
        ("/i/a,,b", "/i/a,b", "a,b"),
        ("/i/a,,,node-name=n", "/i/a,", "n"),
        ("/i/a,node-name=x,,y", "/i/a", "x,y"),
        (",,,,", ",,", ",,"),
        ("a=b", "a=b", "a=b"),
    ];
    for (value, path, node_name) in cases {
        let replica = parse_blk_file(OsStr::new(value)).unwrap();
        assert_eq!(
            replica,
            ReplicaSource {
                path: path.into(),
                node_name: node_name.into()
            }
        );
    }
}

#[test]
fn rejects_bad_images() {
    assert_rejected(&SOCKET, "give --blk-file PATH");
    assert_rejected(&disk(33, &[]), "33 replicas; a disk can have at most 32");
    let cases = [
        ("", "the path is empty"),
        (",node-name=x", "the path is empty"),
        (
            "a,",
            "the only option after the path is node-name=NAME, not ''",
        ),
        ("a,b", "not 'b'; write a comma in the path as two commas"),
        ("a,node-name=", "at least one character"),
        ("a,node-name=x,node-name=y", "node-name is given twice"),
        ("a,node-name=x\ny", "no control characters"),
        ("/images/..", "no file name"),
    ];
    for (value, expected) in cases {
        let value = format!("--blk-file={value}");
        assert_rejected(&disk(1, &[&value]), expected);
    }
    let long = format!("--blk-file=a,node-name={}", "x".repeat(256));
    assert_rejected(&disk(1, &[&long]), "at most 255 bytes");
    let mut arguments: Vec<OsString> = disk(0, &[]).into_iter().map(OsString::from).collect();
    arguments.push(OsString::from_vec(b"--blk-file=/i/\xff".to_vec()));
    assert_rejected(&arguments, "is not valid UTF-8");
}

#[test]
fn rejects_names_that_are_not_unique() {
    assert_rejected(
        &disk(1, &["--blk-file=/other/0.raw"]),
        "both have the node-name '0.raw'; give",
    );
    assert_rejected(
        &disk(1, &["--blk-file=/images/0.raw,node-name=x"]),
        "is given twice",
    );
    assert_rejected(
        &disk(1, &["--node-name=0.raw"]),
        "the node-name of the voted disk",
    );
    assert_rejected(&disk(1, &["--node-name="]), "at least one character");
}

#[test]
fn rejects_thresholds_out_of_range() {
    assert_rejected(
        &disk(3, &["--vote-threshold=0"]),
        "with 3 replicas it can be 1 to 3",
    );
    assert_rejected(
        &disk(1, &["--vote-threshold=2"]),
        "with 1 replica it can be 1 to 1",
    );
    assert_rejected(&disk(3, &["--vote-threshold", "-1"]), "invalid value '-1'");
    assert_rejected(&disk(3, &["--vote-threshold=two"]), "invalid value 'two'");
}

#[test]
fn rejects_options_that_blkverify_excludes() {
    assert_rejected(&disk(3, &["--blkverify"]), "not 3 with a threshold of 2");
    assert_rejected(
        &disk(2, &["--blkverify", "--vote-threshold=1"]),
        "not 2 with a threshold of 1",
    );
    assert_rejected(
        &disk(2, &["--blkverify", "--rewrite-corrupted"]),
        "--blkverify cannot be used with --rewrite-corrupted",
    );
    assert_rejected(
        &disk(2, &["--blkverify", "--read-pattern=fifo"]),
        "--blkverify cannot be used with --read-pattern fifo",
    );
}

#[test]
fn rejects_rewrite_corrupted_with_read_only() {
    assert_rejected(
        &disk(3, &["--rewrite-corrupted", "--read-only"]),
        "--rewrite-corrupted cannot be used with --read-only",
    );
}

#[test]
fn records_are_kept_unless_they_are_unwanted() {
    let records = |more: &[&str]| config(&disk(2, more)).records;
    let found = records(&[]);
    assert!(matches!(found.directory, StateDirectory::Usual(_)));
    assert!(found.are_kept);
    assert_eq!((found.force_start, found.adopt), (false, None));
    assert_eq!(records(&["--state=records"]), records(&[]));
    let given = records(&["--state-dir=/s", "--force-start", "--adopt=1.raw"]);
    let expected = Records {
        are_kept: true,
        directory: StateDirectory::Given("/s".into()),
        force_start: true,
        adopt: Some("1.raw".into()),
    };
    assert_eq!(given, expected);
    assert!(!records(&["--state=none"]).are_kept);
    assert!(records(&["--read-only", "--state-dir=/s"]).are_kept);
}

#[test]
fn rejects_options_of_records_that_do_not_fit() {
    for option in ["--state-dir=/s", "--force-start", "--adopt=0.raw"] {
        let name = option.split('=').next().unwrap();
        let expected = format!("{name} cannot be used with --state none: ");
        assert_rejected(&disk(2, &["--state=none", option]), &expected);
    }
    for option in ["--force-start", "--adopt=0.raw"] {
        let name = option.split('=').next().unwrap();
        let expected = format!("{name} cannot be used with --read-only: ");
        assert_rejected(
            &disk(2, &["--read-only", "--state-dir=/s", option]),
            &expected,
        );
    }
    for name in ["2.raw", "/images/0.raw", "quorum0", ""] {
        let option = format!("--adopt={name}");
        assert_rejected(&disk(2, &[&option]), "--adopt");
    }
    let unknown = "--adopt '2.raw': no --blk-file has this node-name";
    assert_rejected(&disk(2, &["--adopt=2.raw"]), unknown);
    assert_rejected(&disk(2, &["--state-dir="]), "--state-dir");
    assert_rejected(&disk(2, &["--state=all"]), "use one of records, none");
}

#[test]
fn rejects_invalid_sockets() {
    assert_rejected(&["--blk-file=a"], "give --socket-path PATH or --fd N");
    assert_rejected(&disk(1, &["--fd=3"]), "cannot be used with");
    for option in ["--socket-mode=660", "--socket-group=0"] {
        assert_rejected(&["--fd=3", "--blk-file=a", option], "cannot be used with");
    }
    assert_rejected(&["--fd=-1", "--blk-file=a"], "--fd");
    assert_rejected(&["--fd=x", "--blk-file=a"], "invalid value 'x'");
    assert_rejected(&["--socket-path=", "--blk-file=a"], "--socket-path");
    let long = format!("--events=/{}", "x".repeat(107));
    assert_rejected(&disk(1, &[&long]), "1 to 107 bytes");
    for sockets in [
        &["--events=/run/disk.sock"] as &[_],
        &["--qmp=/run/disk.sock"],
        &["--events=/e", "--qmp=/e"],
    ] {
        assert_rejected(&disk(1, sockets), "each socket needs its own path");
    }
}

#[test]
fn passed_sockets_are_identified_by_name() {
    let sockets = |options: &[&str], passed: &[(&str, RawFd)]| {
        let arguments = [&["--blk-file=a"], options].concat();
        match parse_with(&arguments, passed) {
            Ok(Parsed::Run(config)) => {
                [Some(config.listen), config.events, config.qmp].map(|listen| {
                    listen.map(|listen| match listen {
                        Listen::Path(path) => path.display().to_string(),
                        Listen::Fd(fd) => format!("--fd {fd}"),
                        Listen::Passed(socket) => format!("{} {}", socket.name, socket.fd),
                    })
                })
            }
            other => panic!("{other:?}"),
        }
    };
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(
        sockets(&[], &[("qmp", 3), ("vhost-user", 4), ("events", 5)]),
        [some("vhost-user 4"), some("events 5"), some("qmp 3")]
    );
    assert_eq!(
        sockets(&["--socket-path=/d", "--qmp=/q"], &[("events", 3)]),
        [some("/d"), some("events 3"), some("/q")]
    );
    // A single socket can have any name, and so can the one that --fd identifies.
    for name in ["unknown", "disk.socket", "", "vhost-user"] {
        assert_eq!(sockets(&[], &[(name, 3)])[0], some("vhost-user 3"));
        assert_eq!(
            sockets(&["--fd=4"], &[("qmp", 3), (name, 4)]),
            [some("--fd 4"), None, some("qmp 3")]
        );
    }
}

#[test]
fn rejects_passed_sockets_without_a_use() {
    let rejected = |options: &[&str], passed: &[(&str, RawFd)], expected: &str| {
        let arguments = [&["--blk-file=a"], options].concat();
        let line = parse_with(&arguments, passed).unwrap_err().to_string();
        assert!(line.contains(expected) && !line.contains('\n'), "{line}");
    };
    rejected(&[], &[("qmp", 3)], "no socket to serve the disk on");
    rejected(
        &[],
        &[("vhost-user", 3), ("other", 4)],
        "named 'other' (descriptor 4)",
    );
    rejected(
        &[],
        &[("a\nb", 3), ("other", 4)],
        "named 'a\\nb' (descriptor 3)",
    );
    rejected(&["--socket-path=/d"], &[("unknown", 3)], "named 'unknown'");
    rejected(
        &[],
        &[("vhost-user", 3), ("vhost-user", 4)],
        "more than one",
    );
    for (options, name) in [
        (&["--socket-path=/d"][..], "vhost-user"),
        (&["--fd=9"], "vhost-user"),
        (&["--fd=9", "--events=/e"], "events"),
        (&["--fd=9", "--qmp=/q"], "qmp"),
    ] {
        rejected(options, &[(name, 3)], "cannot be used with it");
    }
}

#[test]
fn metrics_are_local_unless_an_address_is_given() {
    let address = |value: &str| {
        config(&disk(1, &["--metrics", value]))
            .metrics
            .unwrap()
            .to_string()
    };
    assert_eq!(address("9000"), "127.0.0.1:9000");
    assert_eq!(address("0.0.0.0:9000"), "0.0.0.0:9000");
    assert_eq!(address("[::1]:0"), "[::1]:0");
    for value in ["", "/m", "65536", "localhost:9000", "127.0.0.1", ":9000"] {
        assert_rejected(&disk(1, &["--metrics", value]), "--metrics");
    }
}

#[test]
fn rejects_serial_numbers_that_virtio_cannot_carry() {
    assert_eq!(
        config(&disk(1, &["--serial=12345678901234567890"]))
            .serial
            .len(),
        20
    );
    assert_rejected(
        &disk(1, &["--serial=123456789012345678901"]),
        "at most 20 bytes",
    );
    assert_rejected(&disk(1, &["--serial=é"]), "printable ASCII");
    assert_rejected(&disk(1, &["--serial=a\nb"]), "printable ASCII");
}

#[test]
fn rejects_queues_out_of_range() {
    for value in ["0", "2", "3", "255", "2048"] {
        let option = format!("--queue-size={value}");
        assert_rejected(&disk(1, &[&option]), "is not a power of two from 4 to 1024");
    }
    assert_rejected(&disk(1, &["--queue-size=65536"]), "--queue-size");
    assert_rejected(&disk(1, &["--num-queues=0"]), "--num-queues");
    assert_rejected(&disk(1, &["--num-queues=65"]), "--num-queues");
}

#[test]
fn rejects_unknown_options_and_invalid_values() {
    for option in ["--nonsense", "-x"] {
        assert_rejected(&disk(3, &[option]), "unexpected argument");
    }
    assert_rejected(
        &disk(3, &["--read-pattern=single"]),
        "invalid value 'single'",
    );
    for value in ["0", "9", "3600001", "-1", "9ms", "2h", "0.5", "5 m"] {
        let option = format!("--replica-timeout={value}");
        assert_rejected(&disk(3, &[&option]), "--replica-timeout");
    }
    for value in ["-1", "1048577", "4M"] {
        let option = format!("--scrub-around={value}");
        assert_rejected(&disk(3, &[&option]), "--scrub-around");
    }
    assert_rejected(&disk(3, &["--cache=unsafe"]), "invalid value 'unsafe'");
    assert_rejected(&disk(3, &["stray"]), "unexpected argument 'stray'");
    assert_rejected(&disk(3, &["--serial"]), "a value is required");
    assert_rejected(
        &disk(3, &["--serial=a", "--serial=b"]),
        "cannot be used multiple times",
    );
    assert_rejected(&disk(3, &["--two\n\nlines"]), "unexpected argument");
    assert_rejected::<&str>(&[], "no socket");
}

#[test]
fn errors_of_the_parser_say_what_to_do() {
    for (arguments, line) in [
        (
            "--read-pattern=first",
            "invalid value 'first' for --read-pattern <PATTERN>; use one of quorum, threshold, \
             fifo",
        ),
        (
            "--replica-timeout=9",
            "invalid value '9' for --replica-timeout <TIME>: expected a time from 10ms to 1h, such \
             as 500ms, 5s, or 1000 for milliseconds; see quorum-blkd --help",
        ),
        (
            "--metrics=x",
            "invalid value 'x' for --metrics <ADDR>: expected a port, or address:port such as \
             127.0.0.1:9000 or [::1]:9000; see quorum-blkd --help",
        ),
        (
            "--blk-fil",
            "unexpected argument '--blk-fil'; did you mean --blk-file?",
        ),
        (
            "--fd=3",
            "--socket-path <PATH> cannot be used with --fd <N>; see quorum-blkd --help",
        ),
        (
            "--serial",
            "a value is required for --serial <S>; see quorum-blkd --help",
        ),
        (
            "--qmp=a\n --qmp=b",
            "--qmp <PATH> cannot be used multiple times; see quorum-blkd --help",
        ),
        (
            "a\u{1b}",
            "unexpected argument 'a\\u{1b}'; see quorum-blkd --help",
        ),
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        assert_eq!(rejection(&disk(1, &arguments)), line);
    }
}
