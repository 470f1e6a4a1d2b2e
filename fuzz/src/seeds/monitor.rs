//! Inputs of `monitor`: what docs/qmp.md sends, each message and all of it, and what misbehaves.

use super::super::monitor::{LEAVE, NEGOTIATE, REPEAT, SOCKET};
use super::Seed;

const MANUAL: &str = include_str!("../../../docs/qmp.md");

fn input(options: u8, sizes: [u8; 4], repeat: [u8; 2], bytes: &[u8]) -> Vec<u8> {
    [&[options], &sizes[..], &repeat[..], bytes].concat()
}

/// All of them.
pub fn all() -> Vec<Seed> {
    let messages: Vec<&str> = MANUAL
        .lines()
        .filter_map(|line| line.strip_prefix("-> "))
        .collect();
    assert!(!messages.is_empty(), "the manual has examples");
    let whole = messages.concat();
    let quoted = whole.replace('"', "'");
    let manual = messages.iter().map(|message| {
        let (_, name) = message.split_once("\"execute\": \"").expect("a command");
        let (name, _) = name.split_once('"').expect("the end of its name");
        (name, input(NEGOTIATE, [0; 4], [0; 2], message.as_bytes()))
    });
    let raw = concat!(
        r#"{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"a","#,
        r#""file":{"driver":"file","filename":"/a"}}}"#
    )
    .as_bytes();
    let child =
        br#"{"execute":"x-blockdev-change","arguments":{"parent":"quorum0","child":"children.1"}}"#;
    type Seed<'a> = (&'static str, u8, [u8; 4], [u8; 2], &'a [u8]);
    let others: [Seed<'_>; 13] = [
        ("the manual", SOCKET, [0; 4], [0; 2], whole.as_bytes()),
        (
            "the manual in bytes",
            SOCKET,
            [1; 4],
            [0; 2],
            whole.as_bytes(),
        ),
        (
            "the manual in single quotes",
            0,
            [1, 7, 0, 30],
            [0; 2],
            quoted.as_bytes(),
        ),
        (
            "a client leaves",
            NEGOTIATE | LEAVE,
            [9, 0, 0, 0],
            [0; 2],
            whole.as_bytes(),
        ),
        ("raw over file", NEGOTIATE, [0; 4], [0; 2], raw),
        ("a child by its place", NEGOTIATE, [0; 4], [0; 2], child),
        (
            "an id of any kind",
            0,
            [3, 0, 1, 2],
            [0; 2],
            b"{'id':[1.5,-1,{'a':null}],'execute':'quit'}",
        ),
        (
            "escapes",
            NEGOTIATE,
            [2; 4],
            [0; 2],
            br#"{'execute':'a\'b"\\\u00e9'}{"id":"\\"}{"id":"'\""}"#,
        ),
        (
            "a message without end",
            SOCKET,
            [0; 4],
            [128, 255],
            b"{\"x\":1}",
        ),
        (
            "many brackets",
            SOCKET | REPEAT,
            [0; 4],
            [0, 255],
            b"[]\n{}",
        ),
        ("many lines", REPEAT, [0; 4], [0, 255], b"\n{}"),
        (
            "a long message",
            SOCKET | REPEAT | NEGOTIATE,
            [0; 4],
            [200, 60],
            b"{'execute':'quit','id':'xxxxxxxxxxxxxxxxxxxxxx'}{}",
        ),
        (
            "garbage",
            SOCKET,
            [5, 0, 0, 0],
            [0; 2],
            b"GET / HTTP/1.1\r\n\0\x80\xff{\"a\xff{]\n{\"a\n{}",
        ),
    ];
    let others = others
        .into_iter()
        .map(|(name, options, sizes, repeat, bytes)| (name, input(options, sizes, repeat, bytes)));
    manual.chain(others).collect()
}
