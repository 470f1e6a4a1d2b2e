//! The metrics as Prometheus gets them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Instant;
use testkit::HANG_LIMIT;
use testkit::machine::measure;

use quorum_blk::limits::{METRICS_CONNECTIONS_MAX, METRICS_LIMIT};
use testkit::client::Client;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::{corrupt_sectors, create_images};
use testkit::process::{Process, wait_until};
use testkit::programs::client_program;

struct Served {
    daemon: Daemon,
    address: SocketAddr,
    directory: tempfile::TempDir,
}

/// A daemon on three images that serves metrics at a free port of `address`.
fn serve(address: &str) -> Served {
    serve_with(address, "none")
}

fn serve_with(address: &str, state: &str) -> Served {
    let directory = tempfile::tempdir().unwrap();
    let mut arguments = replica_arguments(&create_images(directory.path(), 3, 1 << 20));
    let more = [
        "--rewrite-corrupted",
        "--metrics",
        address,
        "--state",
        state,
    ];
    arguments.extend(more.map(OsString::from));
    let daemon = Daemon::start(directory.path(), arguments);
    if state == "none" {
        daemon.wait_until_compared();
    }
    let mut port = None;
    wait_until(HANG_LIMIT, || {
        let log = daemon.log();
        let told = log.split("serving metrics url=http://").nth(1);
        let told: Option<SocketAddr> = told.and_then(|rest| rest.split('/').next()?.parse().ok());
        port = told.map(|address| address.port());
        port.is_some()
    });
    let address = SocketAddr::from(([127, 0, 0, 1], port.expect("a port in the log")));
    Served {
        daemon,
        address,
        directory,
    }
}

impl Served {
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(HANG_LIMIT)).unwrap();
        stream
    }

    fn scrape(&self) -> String {
        let mut stream = self.connect();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
        assert!(
            head.contains(&format!("Content-Length: {}\r\n", body.len())),
            "{head}"
        );
        body.to_owned()
    }
}

/// Values by the name and labels before them, without `disk`.
fn values(text: &str) -> HashMap<String, f64> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let value = |line: &str| {
        let (series, value) = line.rsplit_once(' ').unwrap();
        assert!(series.contains(r#"disk="quorum0""#), "{series}");
        let series = series
            .replace(r#"{disk="quorum0"}"#, "")
            .replace(r#"disk="quorum0","#, "");
        (series, value.parse().unwrap())
    };
    samples.map(value).collect()
}

#[test]
fn metrics_count_what_happened_and_are_well_formed() {
    let served = serve("0");
    corrupt_sectors(&served.directory.path().join("1.raw"), 0..2, 0xff);
    let mut client = Client::connect(served.daemon.socket(), 1);
    client.read(0, 0, 4096).unwrap();
    client.write(0, 8192, &[1; 8192]).unwrap();
    client.flush(0).unwrap();
    let mut text = String::new();
    let came = wait_until(HANG_LIMIT, || {
        text = served.scrape();
        let values = values(&text);
        values[r#"quorum_blk_replica_repaired_sectors_total{replica="1.raw"}"#] >= 2.0
            && values[r#"quorum_blk_replica_corrupt_sectors{replica="1.raw"}"#] == 0.0
            && values[r#"quorum_blk_replica_operations_in_flight{replica="2.raw",type="read"}"#]
                == 0.0
    });
    assert!(came, "{text}");
    let values = values(&text);
    for (series, expected) in [
        ("quorum_blk_disk_size_bytes", 1_048_576.0),
        (r#"quorum_blk_requests_total{type="read"}"#, 1.0),
        (r#"quorum_blk_request_bytes_total{type="read"}"#, 4096.0),
        (r#"quorum_blk_request_bytes_total{type="write"}"#, 8192.0),
        (r#"quorum_blk_requests_total{type="flush"}"#, 1.0),
        (r#"quorum_blk_request_errors_total{type="read"}"#, 0.0),
        (
            r#"quorum_blk_request_duration_seconds_count{type="write"}"#,
            1.0,
        ),
        (
            r#"quorum_blk_request_duration_seconds_bucket{type="write",le="+Inf"}"#,
            1.0,
        ),
        (r#"quorum_blk_requests_in_flight{type="write"}"#, 0.0),
        (
            r#"quorum_blk_replica_corrupt_sectors_found_total{replica="1.raw"}"#,
            2.0,
        ),
        (
            r#"quorum_blk_replica_corrupt_sectors_found_total{replica="0.raw"}"#,
            0.0,
        ),
        (r#"quorum_blk_replica_stale_bytes{replica="0.raw"}"#, 0.0),
        (
            r#"quorum_blk_replica_corrupt_sectors{replica="1.raw"}"#,
            0.0,
        ),
        ("quorum_blk_undecided_sectors", 0.0),
        (
            r#"quorum_blk_replica_state{replica="0.raw",state="in-service"}"#,
            1.0,
        ),
        (
            r#"quorum_blk_replica_state{replica="0.raw",state="evicted"}"#,
            0.0,
        ),
        (
            r#"quorum_blk_replica_operations_total{replica="0.raw",type="flush"}"#,
            1.0,
        ),
    ] {
        assert_eq!(values.get(series), Some(&expected), "{series} in {text}");
    }
    // The scrub of the neighbourhood may meet the sectors while they are being repaired.
    let confirmations = values["quorum_blk_confirmations_total"];
    assert!((1.0..=2.0).contains(&confirmations), "{confirmations}");
    // The read, and the read that confirmed it.
    let reads = values[r#"quorum_blk_replica_operations_total{replica="0.raw",type="read"}"#];
    assert!(reads >= 2.0, "{reads}");
    let took = values[r#"quorum_blk_request_duration_seconds_sum{type="write"}"#];
    assert!(took > 0.0 && took < 60.0, "{took} s");

    let manual = include_str!("../../docs/metrics.md");
    let families = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE quorum_blk_"));
    for family in families.map(|rest| rest.split(' ').next().unwrap()) {
        assert!(
            manual.contains(&format!("`{family}`")),
            "docs/metrics.md does not document {family}"
        );
    }

    let input = served.directory.path().join("metrics.txt");
    let output = served.directory.path().join("promtool.txt");
    fs::write(&input, &text).unwrap();
    let file = fs::File::create(&output).unwrap();
    let mut command = Command::new(client_program("promtool"));
    command
        .args(["check", "metrics"])
        .stdin(fs::File::open(&input).unwrap());
    command.stderr(file.try_clone().unwrap()).stdout(file);
    let mut promtool = Process::spawn(&mut command).unwrap();
    let status = promtool.wait_within(HANG_LIMIT).expect("promtool ends");
    let said = fs::read_to_string(&output).unwrap();
    assert!(status.success() && said.is_empty(), "{said}\n{text}");
}

/// What docs/metrics.md has alerts for.
#[test]
fn health_and_conditions_are_in_the_metrics() {
    let served = serve("0");
    let health = |values: &HashMap<String, f64>| {
        ["healthy", "degraded", "failing"]
            .map(|word| values[&format!(r#"quorum_blk_disk_health{{health="{word}"}}"#)])
    };
    let condition = |replica: u8, word: &str| {
        format!(r#"quorum_blk_replica_condition{{replica="{replica}.raw",condition="{word}"}}"#)
    };
    let before = values(&served.scrape());
    assert_eq!(health(&before), [1.0, 0.0, 0.0]);
    assert_eq!(before[&condition(2, "unlinked")], 0.0);

    fs::remove_file(served.directory.path().join("2.raw")).unwrap();
    let mut now = HashMap::new();
    let came = wait_until(HANG_LIMIT, || {
        now = values(&served.scrape());
        now[&condition(2, "unlinked")] == 1.0
    });
    assert!(
        came && health(&now) == [0.0, 1.0, 0.0],
        "{:?}",
        health(&now)
    );
    assert_eq!(now[&condition(1, "unlinked")], 0.0);
    let undecided = r#"quorum_blk_disk_condition{condition="undecided"}"#;
    assert_eq!(now[undecided], 0.0);
}

#[test]
fn the_records_have_metrics() {
    let values_of = |served: &Served| values(&served.scrape());
    let served = serve("0");
    let values = values_of(&served);
    for name in ["records", "marked_bytes", "record_rounds_total"] {
        assert_eq!(values[&format!("quorum_blk_{name}")], 0.0, "{name}");
    }
    let served = serve_with("0", "records");
    let mut client = Client::connect(served.daemon.socket(), 1);
    client.write(0, 8192, &[1; 8192]).unwrap();
    let values = values_of(&served);
    assert_eq!(values["quorum_blk_records"], 1.0);
    assert_eq!(values["quorum_blk_marked_bytes"], 1_048_576.0);
    assert!(values["quorum_blk_record_rounds_total"] >= 1.0);
    let errors = r#"quorum_blk_replica_record_write_errors_total{replica="0.raw"}"#;
    assert_eq!(values[errors], 0.0);
}

#[test]
fn a_misbehaving_client_delays_no_scrape_for_long() {
    let mut served = serve("127.0.0.1:0");
    let silent: Vec<TcpStream> = (0..METRICS_CONNECTIONS_MAX)
        .map(|_| served.connect())
        .collect();
    for (index, mut stream) in silent.iter().enumerate() {
        stream
            .write_all(&b"GET /metrics HTTP/1.1\r\n"[..index])
            .unwrap();
    }
    // They stay silent until after this: without a limit for them it would wait for ever.
    served.scrape();
    for mut stream in silent {
        // An end or a reset: what was sent is not read any more.
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
    }

    let mut endless = served.connect();
    while endless.write_all(&[b'x'; 4096]).is_ok() {}
    let mut garbage = served.connect();
    garbage.write_all(b"\0\0\0\0\r\n\r\n").unwrap();
    let mut answer = String::new();
    garbage.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");

    // The end of the daemon does not wait for silent connections.
    measure(|| {
        let _silent: Vec<TcpStream> = (0..2 * METRICS_CONNECTIONS_MAX)
            .map(|_| served.connect())
            .collect();
        let begun = Instant::now();
        assert!(served.daemon.terminate().success());
        let took = begun.elapsed();
        served = serve("127.0.0.1:0");
        let is_at_once = took < METRICS_LIMIT;
        if is_at_once {
            Ok(())
        } else {
            Err(format!("ended after {took:?}"))
        }
    });
}

#[test]
fn clients_that_send_nothing_give_their_places_to_one_that_comes() {
    let served = serve("0");
    measure(|| {
        let _silent: Vec<TcpStream> = (0..3 * METRICS_CONNECTIONS_MAX)
            .map(|_| served.connect())
            .collect();
        let begun = Instant::now();
        served.scrape();
        let took = begun.elapsed();
        if took < METRICS_LIMIT {
            Ok(())
        } else {
            Err(format!("scraped after {took:?}"))
        }
    });
}

#[test]
fn an_address_that_other_hosts_reach_is_logged() {
    let served = serve("0.0.0.0:0");
    served.scrape();
    let log = served.daemon.log();
    assert!(log.contains("other hosts can read them"), "{log}");
    let local = serve("0");
    assert!(!local.daemon.log().contains("other hosts"));
}

#[test]
fn an_address_in_use_is_refused_in_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let directory = tempfile::tempdir().unwrap();
    let mut arguments = replica_arguments(&create_images(directory.path(), 1, 1 << 20));
    let socket = directory.path().join("disk.sock");
    arguments.extend([
        "--socket-path".into(),
        socket.clone().into(),
        "--metrics".into(),
        address.clone().into(),
    ]);
    let output = Daemon::run_to_end(arguments);
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        line,
        format!("quorum-blkd: --metrics {address}: cannot listen: Address already in use\n")
    );
    assert!(!output.status.success() && !socket.exists());
}
