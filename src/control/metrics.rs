//! The metrics of a disk in the text format of Prometheus: base units in the names, `_total` for
//! counters. A pure function of the [state](super::state).

use prometheus::TextEncoder;
use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};

use super::condition::{DiskCondition, Health, ReplicaCondition};
use super::state::{DiskState, Operations, ReplicaState, ServiceState};
use crate::statistics::Distribution;

/// The content type of [`render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// Upper bounds of the buckets of latencies are these powers of two of microseconds: 16 µs to 17 s.
/// The state has finer figures, but each series costs Prometheus memory.
const BUCKET_POWERS: std::ops::RangeInclusive<u32> = 4..=24;

/// The value of a metric of a replica.
type ReplicaFigure = fn(&ReplicaState) -> u64;

/// Name, help and value of each gauge of a replica.
const REPLICA_GAUGES: [(&str, &str, ReplicaFigure); 2] = [
    (
        "replica_stale_bytes",
        "Bytes of which the replica does not hold the newest data.",
        |replica| replica.stale_bytes,
    ),
    (
        "replica_corrupt_sectors",
        "Sectors that were corrupt when they were last read.",
        |replica| replica.corrupt_sectors,
    ),
];

/// Name, help and value of each counter of a replica.
const REPLICA_COUNTERS: [(&str, &str, ReplicaFigure); 7] = [
    (
        "replica_corrupt_sectors_found_total",
        "Corrupt sectors that were found; a sector that is found again counts again.",
        |replica| replica.corrupt_sectors_found,
    ),
    (
        "replica_repaired_sectors_total",
        "Sectors that were repaired.",
        |replica| replica.repaired_sectors,
    ),
    (
        "replica_repair_failed_sectors_total",
        "Sectors whose repair failed.",
        |replica| replica.repair_failed_sectors,
    ),
    (
        "replica_resynced_sectors_total",
        "Stale sectors that were copied to the replica.",
        |replica| replica.resynced_sectors,
    ),
    (
        "replica_record_write_errors_total",
        "Writes to the record of the replica that failed.",
        |replica| replica.record_write_errors,
    ),
    (
        "replica_evictions_total",
        "How often the replica was evicted.",
        |replica| replica.evictions,
    ),
    (
        "replica_rejoins_total",
        "How often the replica rejoined.",
        |replica| replica.rejoins,
    ),
];

/// All metrics of a disk.
pub fn render(disk: &DiskState) -> String {
    let mut page = Page::of(disk);
    page.disk(disk);
    page.requests(disk);
    page.records(disk);
    page.replicas(disk);
    let encoded = TextEncoder::new().encode_to_string(&page.families);
    encoded.expect("each has a name and a metric")
}

struct Page {
    families: Vec<MetricFamily>,
    disk: String,
}

type Labels<'a> = &'a [(&'static str, &'a str)];

impl Page {
    fn of(disk: &DiskState) -> Self {
        Self {
            families: Vec::new(),
            disk: disk.node_name.clone(),
        }
    }

    fn disk(&mut self, disk: &DiskState) {
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        self.gauge(
            "build_info",
            "The version of quorum-blkd, as a label.",
            |add| add(&version, 1),
        );
        self.gauge("disk_size_bytes", "Size of the disk.", |add| {
            add(&[], disk.size)
        });
        self.gauge("vote_threshold", "Equal versions that win a vote.", |add| {
            add(&[], disk.policy.vote_threshold as u64);
        });
        self.counter(
            "log_lines_dropped_total",
            "Log lines that were dropped because stderr was not read.",
            |add| add(&[], disk.log_lines_dropped),
        );
        self.counter(
            "confirmations_total",
            "Reads that were repeated because the replies of the replicas differed.",
            |add| add(&[], disk.confirmations),
        );
        self.counter(
            "confirmations_without_fault_total",
            "Repeated reads that found no replica at fault: writes were in flight.",
            |add| add(&[], disk.confirmations_without_fault),
        );
        self.counter(
            "quorum_failures_total",
            "Requests that failed without a quorum, in fragments of at most 1 MiB.",
            |add| {
                for (kind, failures) in disk.failures.iter() {
                    add(&[("type", kind)], *failures);
                }
            },
        );
    }

    fn requests(&mut self, disk: &DiskState) {
        self.gauge(
            "disk_health",
            "1 for the health of the disk, 0 for the other words.",
            |add| {
                for health in Health::ALL {
                    let holds = disk.health == *health;
                    add(&[("health", health.name())], u64::from(holds));
                }
            },
        );
        self.gauge(
            "disk_condition",
            "1 for the conditions that the disk has, 0 for the others.",
            |add| {
                for condition in DiskCondition::ALL {
                    let holds = disk.conditions.contains(condition);
                    add(&[("condition", condition.name())], u64::from(holds));
                }
            },
        );
        self.gauge(
            "held_requests",
            "Requests that failed and wait for the command cont, in fragments of at most 1 MiB.",
            |add| add(&[], disk.held_requests),
        );
        self.gauge(
            "undecided_sectors",
            "Sectors that had no winner when they were last read.",
            |add| add(&[], disk.undecided_sectors),
        );
        let kinds: Vec<_> = disk
            .requests
            .iter()
            .map(|(kind, all)| (vec![("type", kind)], all))
            .collect();
        self.operations("request", "Requests of the guest", &kinds);
        self.counter(
            "requests_rejected_total",
            "Requests of the guest that were invalid or unsupported.",
            |add| add(&[], disk.requests.rejected),
        );
    }

    fn records(&mut self, disk: &DiskState) {
        self.gauge("records", "1 if the disk has records.", |add| {
            add(&[], u64::from(disk.records));
        });
        self.gauge(
            "marked_bytes",
            "Bytes that the records say may have been changed and not flushed.",
            |add| add(&[], disk.marked_bytes),
        );
        self.gauge(
            "unrecovered_bytes",
            "Bytes in which replicas may differ since the last end, which was not clean.",
            |add| add(&[], disk.unrecovered_bytes),
        );
        self.counter(
            "record_rounds_total",
            "How often the records of all replicas in service were written.",
            |add| add(&[], disk.record_rounds),
        );
    }

    fn replicas(&mut self, disk: &DiskState) {
        let kinds = disk.replicas.iter().flat_map(|replica| {
            let name = replica.node_name.as_str();
            let kinds = replica.operations.iter();
            kinds.map(move |(kind, all)| (vec![("replica", name), ("type", kind)], all))
        });
        let kinds: Vec<_> = kinds.collect();
        self.operations("replica_operation", "Operations on a replica", &kinds);
        self.gauge(
            "replica_state",
            "1 for the state of the replica, 0 for the other states.",
            |add| {
                for replica in &disk.replicas {
                    for state in ServiceState::ALL {
                        let labels = [
                            ("replica", replica.node_name.as_str()),
                            ("state", state.name()),
                        ];
                        add(&labels, u64::from(replica.state == state));
                    }
                }
            },
        );
        self.gauge(
            "replica_condition",
            "1 for the conditions that the replica has, 0 for the others.",
            |add| {
                for replica in &disk.replicas {
                    for condition in ReplicaCondition::ALL {
                        let labels = [
                            ("replica", replica.node_name.as_str()),
                            ("condition", condition.name()),
                        ];
                        let holds = replica.conditions.contains(condition);
                        add(&labels, u64::from(holds));
                    }
                }
            },
        );
        for (name, help, figure) in REPLICA_GAUGES {
            self.gauge(name, help, |add| {
                for replica in &disk.replicas {
                    add(&[("replica", &replica.node_name)], figure(replica));
                }
            });
        }
        for (name, help, figure) in REPLICA_COUNTERS {
            self.counter(name, help, |add| {
                for replica in &disk.replicas {
                    add(&[("replica", &replica.node_name)], figure(replica));
                }
            });
        }
    }

    /// The families of requests or operations: counts, bytes, in flight and durations.
    fn operations(
        &mut self,
        noun: &str,
        what: &str,
        all: &[(Vec<(&'static str, &str)>, &Operations)],
    ) {
        type Figure = fn(&Operations) -> u64;
        let counters: [(String, String, Figure); 3] = [
            (
                format!("{noun}s_total"),
                format!("{what} that have ended."),
                |all| all.completed + all.failed,
            ),
            (
                format!("{noun}_errors_total"),
                format!("{what} that failed."),
                |all| all.failed,
            ),
            (
                format!("{noun}_bytes_total"),
                format!("Bytes of those that succeeded: {}.", what.to_lowercase()),
                |all| all.bytes,
            ),
        ];
        for (name, help, figure) in counters {
            self.counter(&name, &help, |add| {
                for (labels, operations) in all {
                    add(labels, figure(operations));
                }
            });
        }
        let in_flight = (
            format!("{noun}s_in_flight"),
            format!("{what} that are in flight."),
        );
        self.gauge(&in_flight.0, &in_flight.1, |add| {
            for (labels, operations) in all {
                add(labels, operations.in_flight);
            }
        });
        let metrics = all.iter().map(|(labels, operations)| {
            let mut metric = self.metric(labels);
            metric.set_histogram(histogram(&operations.latency));
            metric
        });
        let metrics = metrics.collect();
        let help = format!("Duration of those that succeeded: {}.", what.to_lowercase());
        self.family(
            &format!("{noun}_duration_seconds"),
            &help,
            MetricType::HISTOGRAM,
            metrics,
        );
    }

    fn counter(
        &mut self,
        name: &str,
        help: &str,
        fill: impl FnOnce(&mut dyn FnMut(Labels<'_>, u64)),
    ) {
        let mut metrics = Vec::new();
        fill(&mut |labels, value| {
            let mut counter = Counter::default();
            counter.set_value(float(value));
            let mut metric = self.metric(labels);
            metric.set_counter(counter);
            metrics.push(metric);
        });
        self.family(name, help, MetricType::COUNTER, metrics);
    }

    fn gauge(
        &mut self,
        name: &str,
        help: &str,
        fill: impl FnOnce(&mut dyn FnMut(Labels<'_>, u64)),
    ) {
        let mut metrics = Vec::new();
        fill(&mut |labels, value| {
            let mut gauge = Gauge::default();
            gauge.set_value(float(value));
            let mut metric = self.metric(labels);
            metric.set_gauge(gauge);
            metrics.push(metric);
        });
        self.family(name, help, MetricType::GAUGE, metrics);
    }

    fn metric(&self, labels: Labels<'_>) -> Metric {
        let all = std::iter::once(("disk", self.disk.as_str())).chain(labels.iter().copied());
        let pairs = all.map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name(name.to_owned());
            pair.set_value(value.to_owned());
            pair
        });
        Metric::from_label(pairs.collect())
    }

    fn family(&mut self, name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) {
        let mut family = MetricFamily::default();
        family.set_name(format!("quorum_blk_{name}"));
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics);
        self.families.push(family);
    }
}

fn histogram(latency: &Distribution) -> Histogram {
    let buckets = BUCKET_POWERS.map(|power| {
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(float(1 << power) / 1e6);
        bucket.set_cumulative_count(latency.below_us(1 << power));
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(latency.count());
    histogram.set_sample_sum(float(latency.sum_ns()) / 1e9);
    histogram
}

/// Prometheus has only floating point numbers, which are exact up to 2^53.
#[expect(clippy::cast_precision_loss)]
fn float(value: u64) -> f64 {
    value as f64
}
