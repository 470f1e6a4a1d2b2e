//! The state that an operator queries agrees with what happened to the disk.

use std::time::{Duration, Instant};
use testkit::HANG_LIMIT;

use serde_json::{Value, json};
use testkit::client::Client;
use testkit::disk::{Disk, Plan, System, node_name};
use testkit::fuse::{Fault, Operation};
use testkit::images::corrupt_sectors;
use testkit::process::wait_until;

const BLOCK_BYTES: usize = 4096;
const BLOCK: u64 = BLOCK_BYTES as u64;

fn seen(disk: &Disk) -> Value {
    disk.monitor().execute("query-quorum", json!({}))
}

/// The state as soon as it `is_wanted`.
fn seen_when(disk: &Disk, is_wanted: impl Fn(&Value) -> bool) -> Value {
    let mut state = Value::Null;
    let mut monitor = disk.monitor();
    let came = wait_until(HANG_LIMIT, || {
        state = monitor.execute("query-quorum", json!({}));
        is_wanted(&state)
    });
    assert!(came, "{state:#}");
    state
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("not a number: {value}"))
}

/// Writes three blocks, reads five, flushes.
fn work(disk: &Disk) {
    let mut client: Client = disk.connect();
    for block in 0..3 {
        client.write(0, block * BLOCK, &[7; BLOCK_BYTES]).unwrap();
    }
    for block in 0..5 {
        client.read(0, block * BLOCK, BLOCK_BYTES).unwrap();
    }
    client.flush(0).unwrap();
}

#[test]
fn requests_and_operations_are_counted_and_timed() {
    let disk = Disk::start(System::Ours, &Plan::default());
    work(&disk);
    // A late reply may come after the answer.
    let state = seen_when(&disk, |state| {
        let replicas = state["replicas"].as_array().unwrap().iter();
        replicas
            .flat_map(|replica| replica["operations"].as_object().unwrap().values())
            .all(|operations| operations["in-flight"] == 0)
    });
    assert_eq!(
        (&state["node-name"], &state["size"]),
        (&json!("quorum0"), &json!(4 << 20))
    );
    assert_eq!(
        (&state["vote-threshold"], &state["read-pattern"]),
        (&json!(2), &json!("quorum"))
    );
    let counted = |operations: &Value| {
        ["completed", "failed", "in-flight", "bytes"].map(|member| number(&operations[member]))
    };
    let requests = &state["requests"];
    assert_eq!(counted(&requests["read"]), [5, 0, 0, 5 * BLOCK]);
    assert_eq!(counted(&requests["write"]), [3, 0, 0, 3 * BLOCK]);
    assert_eq!(counted(&requests["flush"]), [1, 0, 0, 0]);
    assert_eq!(counted(&requests["zero"]), [0; 4]);
    assert!(requests["zero"].get("latency").is_none());
    for (index, replica) in state["replicas"].as_array().unwrap().iter().enumerate() {
        assert_eq!(replica["node-name"], node_name(index));
        assert_eq!(replica["file"], disk.images[index].to_str().unwrap());
        assert_eq!(
            (&replica["state"], &replica["stale-bytes"]),
            (&json!("in-service"), &json!(0))
        );
        assert_eq!(
            (
                &replica["corrupt-sectors-found"],
                &replica["repaired-sectors"]
            ),
            (&json!(0), &json!(0))
        );
        let operations = &replica["operations"];
        assert_eq!(counted(&operations["read"]), [5, 0, 0, 5 * BLOCK]);
        assert_eq!(counted(&operations["write"]), [3, 0, 0, 3 * BLOCK]);
        assert_eq!(counted(&operations["flush"]), [1, 0, 0, 0]);
        for operations in operations.as_object().unwrap().values() {
            let latency = &operations["latency"];
            let quantiles =
                ["p50-ns", "p90-ns", "p99-ns", "p999-ns", "max-ns"].map(|q| number(&latency[q]));
            assert!(quantiles.is_sorted() && quantiles[0] > 0, "{latency}");
            assert!(number(&latency["mean-ns"]) <= quantiles[4], "{latency}");
        }
    }
}

#[test]
fn latencies_show_a_slow_replica() {
    let plan = Plan {
        faulty: vec![2],
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    disk.faulty(2).inject(Operation::Read, Fault::Hang);
    let mut client = disk.connect();
    let began = Instant::now();
    client.read(0, 0, 4096).unwrap();
    let completed = |state: &Value, replica: usize| {
        state["replicas"][replica]["operations"]["read"]["completed"] == 1
    };
    seen_when(&disk, |state| completed(state, 0) && completed(state, 1));
    // Then this one takes at least twice as long as the others, however busy the machine is.
    let slow = 2 * began.elapsed() + Duration::from_millis(100);
    wait_until(HANG_LIMIT, || began.elapsed() >= slow);
    let hung = began.elapsed();
    disk.faulty(2).clear_faults();
    let state = seen_when(&disk, |state| completed(state, 2));
    let median = |replica: usize| {
        let latency = &state["replicas"][replica]["operations"]["read"]["latency"];
        Duration::from_nanos(number(&latency["p50-ns"]))
    };
    assert!(median(2) > hung / 2, "{state:#}");
    assert!(median(0).max(median(1)) < median(2), "{state:#}");
}

#[test]
fn corrupt_sectors_and_errors_are_counted_where_they_are() {
    let plan = Plan {
        faulty: vec![0],
        rewrite_corrupted: true,
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    corrupt_sectors(&disk.images[1], 3..5, 0xff);
    let mut client = disk.connect();
    client.read(0, 0, 4096).unwrap();
    let state = seen_when(&disk, |state| {
        number(&state["replicas"][1]["repaired-sectors"]) >= 2
    });
    assert_eq!(state["confirmations"], 1);
    assert_eq!(state["confirmations-without-fault"], 0);
    assert_eq!(state["replicas"][1]["corrupt-sectors-found"], 2);
    // The repair writes whole blocks of the image, which may be longer than a sector.
    assert_eq!(state["replicas"][1]["repair-failed-sectors"], 0);

    disk.faulty(0)
        .inject(Operation::Read, Fault::Fail(libc::EIO));
    client.read(0, 0, 4096).unwrap();
    disk.faulty(0)
        .inject(Operation::Write, Fault::Fail(libc::EIO));
    client.write(0, 0, &[1; 4096]).unwrap();
    let state = seen_when(&disk, |state| {
        number(&state["replicas"][0]["stale-bytes"]) == BLOCK
    });
    let bad = &state["replicas"][0];
    assert!(
        number(&bad["operations"]["read"]["failed"]) >= 1,
        "{state:#}"
    );
    assert!(
        number(&bad["operations"]["write"]["failed"]) >= 1,
        "{state:#}"
    );
    // It votes where it is not stale.
    assert_eq!(bad["state"], "syncing");
    for replica in 1..3 {
        let good = &state["replicas"][replica]["operations"];
        assert_eq!(
            (&good["read"]["failed"], &good["write"]["failed"]),
            (&json!(0), &json!(0))
        );
    }
    assert_eq!(
        state["failures"],
        json!({ "read": 0, "write": 0, "flush": 0 })
    );

    corrupt_sectors(&disk.images[1], 64..65, 0x0f);
    corrupt_sectors(&disk.images[2], 64..65, 0xf0);
    client.read(0, 64 * 512, 4096).unwrap_err();
    let state = seen(&disk);
    assert_eq!(
        state["failures"],
        json!({ "read": 1, "write": 0, "flush": 0 })
    );
    assert_eq!(state["requests"]["read"]["failed"], 1);
}

#[test]
fn evictions_and_rejoins_are_counted() {
    let (disk, _client) = Disk::with_evicted_replica(Duration::from_secs(1));
    let state = seen(&disk);
    let replica = &state["replicas"][1];
    assert_eq!(
        (
            &replica["state"],
            &replica["evictions"],
            &replica["rejoins"]
        ),
        (&json!("evicted"), &json!(1), &json!(0))
    );
    assert_eq!(replica["operations"]["write"]["in-flight"], 1);
    assert_eq!(number(&replica["stale-bytes"]), BLOCK);
    disk.faulty(1).clear_faults();
    let state = seen_when(&disk, |state| {
        state["replicas"][1]["state"] == "in-service" && state["replicas"][1]["stale-bytes"] == 0
    });
    let replica = &state["replicas"][1];
    assert_eq!(
        (&replica["evictions"], &replica["rejoins"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(number(&replica["resynced-sectors"]), BLOCK / 512);
}

/// Whether `ours` has all members of `qemus`, with the same types. Members that are optional in
/// QEMU's schema and mean nothing here may be missing.
fn has_the_shape_of(ours: &Value, qemus: &Value, place: &str) {
    const OPTIONAL: [&str; 3] = ["actual-size", "dirty-flag", "driver-specific"];
    match (ours, qemus) {
        (Value::Object(ours), Value::Object(qemus)) => {
            for (name, value) in qemus
                .iter()
                .filter(|(name, _)| !OPTIONAL.contains(&name.as_str()))
            {
                let mine = ours
                    .get(name)
                    .unwrap_or_else(|| panic!("{place} has no {name}"));
                has_the_shape_of(mine, value, &format!("{place}.{name}"));
            }
        }
        (Value::Array(ours), Value::Array(qemus)) => {
            for (ours, qemus) in ours.iter().zip(qemus) {
                has_the_shape_of(ours, qemus, place);
            }
        }
        (Value::Bool(_), Value::Bool(_))
        | (Value::Number(_), Value::Number(_))
        | (Value::String(_), Value::String(_)) => {}
        _ => panic!("{place}: {ours} is not of the type of {qemus}"),
    }
}

#[test]
fn queries_reply_like_qemu() {
    let [ours, peer] =
        [System::Ours, System::Peer].map(|system| Disk::start(system, &Plan::default()));
    let mut monitor = ours.monitor();
    work(&ours);
    work(&peer);
    let by_name = |nodes: Value| {
        let mut nodes: Vec<Value> = serde_json::from_value(nodes).unwrap();
        nodes.sort_by_key(|node| node["node-name"].to_string());
        nodes
    };
    let mut compared = 0;
    for (command, arguments) in [
        ("query-named-block-nodes", json!({})),
        ("query-named-block-nodes", json!({ "flat": true })),
        ("query-blockstats", json!({ "query-nodes": true })),
    ] {
        let mine = by_name(monitor.execute(command, arguments.clone()));
        let theirs = by_name(peer.ask_peer(command, arguments));
        assert_eq!(mine.len(), theirs.len());
        for (mine, theirs) in mine.iter().zip(&theirs) {
            assert_eq!(mine["node-name"], theirs["node-name"]);
            for member in ["drv", "ro", "cache", "detect_zeroes"] {
                assert_eq!(mine[member], theirs[member], "{member} of {mine}");
            }
            assert_eq!(
                mine["image"]["virtual-size"],
                theirs["image"]["virtual-size"]
            );
            has_the_shape_of(mine, theirs, command);
            compared += 1;
        }
    }
    assert_eq!(compared, 12);
    for command in ["query-version", "query-jobs"] {
        let theirs = peer.ask_peer(command, json!({}));
        has_the_shape_of(&monitor.execute(command, json!({})), &theirs, command);
    }

    let block = monitor.execute("query-block", json!({}));
    assert_eq!(
        (&block[0]["device"], &block[0]["inserted"]["drv"]),
        (&json!("quorum0"), &json!("quorum"))
    );
    let statistics = &monitor.execute("query-blockstats", json!({}))[0];
    assert_eq!(statistics["device"], "quorum0");
    let stats = &statistics["stats"];
    let names = [
        "rd_operations",
        "rd_bytes",
        "wr_operations",
        "wr_bytes",
        "flush_operations",
        "wr_highest_offset",
    ];
    assert_eq!(
        names.map(|name| number(&stats[name])),
        [5, 5 * BLOCK, 3, 3 * BLOCK, 1, 3 * BLOCK]
    );
    for name in [
        "rd_total_time_ns",
        "wr_total_time_ns",
        "flush_total_time_ns",
    ] {
        assert!(number(&stats[name]) > 0, "{name}");
    }
}
