//! What the tests of faulty replicas share.

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::disk::Disk;

/// The bytes in which a replica is stale.
pub(crate) fn stale_bytes(state: &Value, replica: usize) -> u64 {
    let bytes = state["replicas"][replica]["stale-bytes"].as_u64();
    bytes.expect("a number")
}

/// How many replicas were evicted, and how often.
pub(crate) fn evictions(state: &Value) -> u64 {
    let replicas = state["replicas"].as_array().expect("replicas").iter();
    replicas
        .map(|replica| replica["evictions"].as_u64().expect("a number"))
        .sum()
}

/// The events that say of a replica that it returned corrupt data.
pub(crate) fn accused(events: &[Value]) -> Vec<Value> {
    let of_bytes =
        |event: &&Value| event["event"] == "QUORUM_REPORT_BAD" && event["data"]["ret"] == 0;
    events.iter().filter(of_bytes).cloned().collect()
}

/// Runs a scrub to its end, and returns what was said at its end.
pub(crate) fn scrub(disk: &Disk, repair: bool) -> Value {
    let mut monitor = disk.monitor();
    let begun = monitor.execute("quorum-scrub", json!({ "repair": repair }));
    let id = begun["id"].clone();
    let is_end = |message: &Value| {
        let name = message["event"].as_str().unwrap_or_default();
        name.starts_with("BLOCK_JOB_") && message["data"]["device"] == id
    };
    let end = monitor.wait_for_event(is_end, HANG_LIMIT);
    let mut end = end.unwrap_or_else(|| panic!("no end of {id}"));
    end["data"].take()
}
