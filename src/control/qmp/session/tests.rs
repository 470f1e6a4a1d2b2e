//! The replies that a client gets, where they are not compared with those of QEMU.

use proptest::prelude::*;
use serde_json::json;

use self::operator::{Asked, Recorder};
use super::*;

#[path = "../../../../tests/operator/recorder.rs"]
#[allow(dead_code, unreachable_pub)]
mod operator;

/// The replies after the greeting, parsed.
fn replies(bytes: &[u8]) -> Vec<Value> {
    let lines = converse(bytes, &Recorder::default());
    let mut parsed = lines
        .iter()
        .map(|line| serde_json::from_slice(line).unwrap());
    let greeting: Value = parsed.next().unwrap();
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
    parsed.collect()
}

/// The last reply, after capabilities were negotiated.
fn answer(text: &str) -> Value {
    let mut all = replies(
        [br#"{"execute":"qmp_capabilities"}"#, text.as_bytes()]
            .concat()
            .as_slice(),
    );
    assert_eq!(all.remove(0), json!({ "return": {} }));
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

fn error(class: &str, desc: &str) -> Value {
    json!({ "error": { "class": class, "desc": desc } })
}

#[test]
fn commands_run_only_after_the_negotiation_which_happens_once() {
    let all = replies(
        br#"{"execute":"quit","id":1}
            {"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}
            {"execute":"qmp_capabilities","arguments":{"enable":[]},"id":"a"}
            {"execute":"qmp_capabilities","id":null}"#,
    );
    let mut expecting = error(
        "CommandNotFound",
        "Expecting capabilities negotiation with 'qmp_capabilities'",
    );
    expecting["id"] = json!(1);
    let mut complete = error(
        "CommandNotFound",
        "Capabilities negotiation is already complete, command ignored",
    );
    complete["id"] = json!(null);
    assert_eq!(all[0], expecting);
    assert_eq!(
        all[1],
        error("GenericError", "Capability 'oob' is not available")
    );
    assert_eq!(all[2], json!({ "return": {}, "id": "a" }));
    assert_eq!(all[3], complete);
}

#[test]
fn a_reply_has_the_id_of_its_message() {
    for id in [
        json!(null),
        json!(-1.5),
        json!("é\n"),
        json!({ "a": [true, { "b": [] }] }),
    ] {
        let reply = answer(&json!({ "execute": "query-status", "id": id }).to_string());
        assert_eq!(
            reply,
            json!({ "return": { "running": true, "status": "running" }, "id": id })
        );
        let reply = answer(&json!({ "execute": "none", "id": id }).to_string());
        assert_eq!(
            (&reply["id"], &reply["error"]["class"]),
            (&id, &json!("CommandNotFound"))
        );
    }
}

/// Even an id that the JSON parser would change.
#[test]
fn an_id_is_returned_unchanged() {
    for id in [
        r#"{"$serde_json::private::RawValue":"5"}"#,
        "5.1e-308",
        "8.988465674311583e+291",
        "31.245270191439438",
        "2.638344616030823e-256",
    ] {
        let all = converse(format!("{{\"id\":{id}}}").as_bytes(), &Recorder::default());
        let reply = String::from_utf8(all[1].clone()).unwrap();
        assert!(reply.ends_with(&format!(",\"id\":{id}}}")), "{id}: {reply}");
    }
}

#[test]
fn names_are_text_and_nodes_are_objects() {
    for arguments in [
        json!({ "driver": { "file": null }, "node-name": "a", "filename": "/a" }),
        json!({ "driver": "raw", "node-name": "a", "file": ["file", "/a"] }),
        json!({
            "driver": "raw",
            "node-name": "a",
            "file": { "driver": { "file": null }, "filename": "/a" },
        }),
    ] {
        let command = json!({ "execute": "blockdev-add", "arguments": arguments });
        let text = format!("{{'execute':'qmp_capabilities'}}{command}");
        let operator = Recorder::default();
        converse(text.as_bytes(), &operator);
        assert_eq!(operator.asked(), [], "{command}");
    }
}

/// `children.N` is a place as it is written there; anything else is a name.
#[test]
fn the_index_of_a_child_has_one_spelling() {
    for (child, wanted) in [
        ("children.1", operator::REPLICAS[1]),
        ("children.01", "children.01"),
        ("children.+1", "children.+1"),
        ("children.3", "children.3"),
        ("0.raw", "0.raw"),
    ] {
        let arguments = json!({ "parent": operator::DISK, "child": child });
        let command = json!({ "execute": "x-blockdev-change", "arguments": arguments });
        let operator = Recorder::default();
        converse(
            format!("{{'execute':'qmp_capabilities'}}{command}").as_bytes(),
            &operator,
        );
        let removed = Asked::Change(crate::control::Change::RemoveReplica(wanted.into()));
        assert_eq!(operator.asked(), [removed]);
    }
}

/// Word for word as qemu-storage-daemon answers, except for the errors of its JSON parser.
#[test]
fn errors_are_those_of_qemu() {
    let cases = [
        (
            r#"{"execute":"system_reset"}"#,
            "CommandNotFound",
            "The command system_reset has not been found",
        ),
        (
            r#"{"execute":1}"#,
            "GenericError",
            "QMP input member 'execute' must be a string",
        ),
        (
            r#"{"exec":"a"}"#,
            "GenericError",
            "QMP input member 'exec' is unexpected",
        ),
        (
            r#"{"execute":"quit","foo":1}"#,
            "GenericError",
            "QMP input member 'foo' is unexpected",
        ),
        (
            r#"{"execute":"quit","arguments":[]}"#,
            "GenericError",
            "QMP input member 'arguments' must be an object",
        ),
        ("{}", "GenericError", "QMP input lacks member 'execute'"),
        ("[1]", "GenericError", "QMP input must be a JSON object"),
    ];
    for (text, class, desc) in cases {
        assert_eq!(answer(text), error(class, desc), "{text}");
    }
}

#[test]
fn invalid_json_is_an_error_and_the_next_line_is_parsed() {
    for text in [
        "5",
        "}",
        "hello {}",
        r#"{"a" 1}"#,
        r#"{"execute": query}"#,
        "{]",
        r#"{"a"#,
        "{\"\u{7f}",
    ] {
        let bytes = format!("{text}\n{{'execute':'qmp_capabilities'}}\n");
        let all = replies(bytes.as_bytes());
        assert_eq!(all[0]["error"]["class"], "GenericError", "{text}: {all:?}");
        assert_eq!(
            all.last(),
            Some(&json!({ "return": {} })),
            "{text}: {all:?}"
        );
    }
}

#[test]
fn arguments_are_checked() {
    let reply = answer(r#"{"execute":"query-status","arguments":{"a":1}}"#);
    assert_eq!(reply["error"]["class"], "GenericError");
    assert!(
        reply["error"]["desc"]
            .as_str()
            .unwrap()
            .contains("unknown field `a`")
    );
}

#[test]
fn query_commands_lists_the_commands() {
    let reply = answer(r#"{"execute":"query-commands"}"#);
    let names: Vec<&str> = reply["return"]
        .as_array()
        .unwrap()
        .iter()
        .map(|command| command["name"].as_str().unwrap())
        .collect();
    assert!(names.is_sorted());
    for name in [
        "qmp_capabilities",
        "query-commands",
        "query-version",
        "quit",
    ] {
        assert!(names.contains(&name), "{name}");
    }
}

#[test]
fn quit_is_answered() {
    let operator = Recorder::default();
    let lines = converse(
        br#"{"execute":"qmp_capabilities"}{"execute":"quit","id":7}"#,
        &operator,
    );
    assert_eq!(lines.last().unwrap(), br#"{"return":{},"id":7}"#);
    assert_eq!(operator.asked(), [Asked::Quit]);
}

#[test]
fn nesting_does_not_exhaust_the_stack_nor_an_endless_message_the_memory() {
    let deep = [b"[".repeat(30_000), b"]".repeat(30_000)].concat();
    assert_eq!(replies(&deep)[0]["error"]["class"], "GenericError");
    let endless = b"[".repeat(1 << 20);
    assert_eq!(replies(&endless).len(), 1, "the connection ends");
}

/// Bytes as a client may send them: parts of messages, in any order.
fn input() -> impl Strategy<Value = Vec<u8>> {
    let parts: [&'static [u8]; 16] = [
        b"{\"execute\":\"qmp_capabilities\"}",
        b"{\"execute\":\"query-version\",\"id\":1}",
        b"{\"execute\":",
        b"\"arguments\":{}",
        b"\"id\":[1,{\"a\":null}]",
        b"{",
        b"}",
        b"[",
        b"]",
        b"\"",
        b"'",
        b"\\",
        b"\n",
        b",",
        b"\xff",
        b"\xc3\xa9",
    ];
    let part = prop_oneof![
        4 => prop::sample::select(parts.to_vec()).prop_map(<[u8]>::to_vec),
        1 => prop::collection::vec(any::<u8>(), 0..8),
    ];
    prop::collection::vec(part, 0..40).prop_map(|parts| parts.concat())
}

proptest! {
    /// For any bytes, each reply is one line of ASCII with a return or an error of a known class,
    /// and the server accepts a command on a new line after a byte that is in no message.
    #[test]
    fn any_bytes_get_valid_replies(bytes in input()) {
        let last = b"\xff\n{\"execute\":\"qmp_capabilities\",\"id\":\"the last\"}";
        let ended = [&bytes, last.as_slice()].concat();
        let lines = converse(&ended, &Recorder::default());
        for line in &lines[1..] {
            prop_assert!(line.is_ascii() && !line.contains(&b'\n') && !line.contains(&b'\r'));
            let reply: Value = serde_json::from_slice(line).unwrap();
            let class = reply["error"]["class"].as_str();
            let known = matches!(class, Some("GenericError" | "CommandNotFound"));
            prop_assert!(known != reply.get("return").is_some(), "{}", reply);
        }
        let last: Value = serde_json::from_slice(lines.last().unwrap()).unwrap();
        prop_assert_eq!(&last["id"], "the last");
    }

    /// How the bytes arrive makes no difference.
    #[test]
    fn replies_do_not_depend_on_how_the_bytes_arrive(bytes in input(), size in 1_usize..9) {
        let mut session = Session::default();
        let mut lines = vec![Session::greeting()];
        for part in bytes.chunks(size) {
            session.receive(part);
            while let Some(step) = session.step() {
                match step {
                    Step::Reply(line) | Step::Close(line) => lines.push(line),
                    Step::Execute(call) => lines.push(call.run(&Recorder::default())),
                }
            }
        }
        prop_assert_eq!(lines, converse(&bytes, &Recorder::default()));
    }
}
