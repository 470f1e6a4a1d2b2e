//! One measurement: one system on one row for a given time.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use super::ceiling::Ceiling;
use super::drive::{Latencies, drive, latencies};
use super::guest::{GuestQueue, QUEUE_SIZE};
use super::images::Images;
use super::interrupt::{self, Interrupted};
use super::plan::{IMAGE_BYTES, Row};
use super::process_usage::{cpu, peak_memory_bytes};
use super::requests::Requests;
use super::systems::{Server, System};
use testkit::client::Client;

/// The result of one measurement.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Requests a second.
    pub requests_per_second: f64,
    /// p50, p99 and p99.9 latencies, in microseconds.
    pub latency_us: [f64; 3],
    /// CPU time of the system for each request, in microseconds.
    pub cpu_us: f64,
    /// Peak memory of the system, in MiB. `None` for the ceiling, which shares
    /// its process with the benchmark.
    pub memory_mib: Option<f64>,
    /// Share of a core that the client used. `None` for the ceiling, which is its own client.
    pub client_cores: Option<f64>,
}

/// Measures `system` for `time`, then writes back all dirty pages. The offsets and data depend on
/// `seed`. `None` if no request completed in that time, because the machine is busy with something
/// else.
pub fn measure(
    system: System,
    row: &Row,
    images: &Images,
    time: Duration,
    seed: u64,
) -> Result<Option<Measured>, Interrupted> {
    let files = images.first(row.replicas);
    let server = match system {
        System::Ours => Server::start_ours(row, files, "io_uring"),
        System::Threads => Server::start_ours(row, files, "threads"),
        System::Peer => Server::start_peer(row, files),
        System::Ceiling => return measure_ceiling(row, images, time, seed),
    };
    let mut client = Client::connect_sized(server.socket(), row.queues, QUEUE_SIZE);
    images.prepare_again(row.replicas)?;
    let window = window(time);
    let (latencies, [of_server, of_client]) = thread::scope(|scope| {
        let drivers: Vec<_> = client
            .queues()
            .enumerate()
            .map(|(index, (queue, memory))| {
                let window = &window;
                scope.spawn(move || {
                    let mut requests = Requests::new(row, IMAGE_BYTES, index, seed);
                    let mut queue = GuestQueue::new(queue, memory, row.pattern.len);
                    drive(&mut queue, &mut requests, row.pattern.depth, window)
                })
            })
            .collect();
        let cpu = cpu_within(&window, [server.id(), std::process::id()])?;
        Ok((join(drivers)?, cpu))
    })?;
    let memory = peak_memory_bytes(server.id());
    drop(client);
    if row.writes() {
        images.sync(row.replicas)?;
    }
    server.end();
    Ok(
        Measured::new(&latencies, time, of_server).map(|measured| Measured {
            memory_mib: Some(memory as f64 / f64::from(1 << 20)),
            client_cores: Some(of_client.as_secs_f64() / time.as_secs_f64()),
            ..measured
        }),
    )
}

fn measure_ceiling(
    row: &Row,
    images: &Images,
    time: Duration,
    seed: u64,
) -> Result<Option<Measured>, Interrupted> {
    let files = images.first(row.replicas);
    let window = window(time);
    let (latencies, [cpu]) = thread::scope(|scope| {
        let drivers: Vec<_> = (0..row.queues)
            .map(|index| {
                let window = &window;
                scope.spawn(move || {
                    let mut requests = Requests::new(row, IMAGE_BYTES, index, seed);
                    drive(
                        &mut Ceiling::new(row, files),
                        &mut requests,
                        row.pattern.depth,
                        window,
                    )
                })
            })
            .collect();
        let cpu = cpu_within(&window, [std::process::id()])?;
        Ok((join(drivers)?, cpu))
    })?;
    if row.writes() {
        images.sync(row.replicas)?;
    }
    Ok(Measured::new(&latencies, time, cpu))
}

impl Measured {
    fn new(latencies: &Latencies, time: Duration, cpu: Duration) -> Option<Self> {
        let count = latencies.len();
        let percentile = |percent| latencies.value_at_quantile(percent / 100.0) as f64 / 1e3;
        (count > 0).then(|| Self {
            requests_per_second: count as f64 / time.as_secs_f64(),
            latency_us: [50.0, 99.0, 99.9].map(percentile),
            cpu_us: cpu.as_secs_f64() * 1e6 / count as f64,
            memory_mib: None,
            client_cores: None,
        })
    }
}

/// The window to measure: after a warm-up that fills pools and faults memory in.
fn window(time: Duration) -> Range<Instant> {
    let start = Instant::now() + (time / 5).max(Duration::from_millis(100));
    start..start + time
}

/// CPU time that the processes use within `window`.
fn cpu_within<const N: usize>(
    window: &Range<Instant>,
    ids: [u32; N],
) -> Result<[Duration; N], Interrupted> {
    interrupt::wait_until(window.start)?;
    let before = ids.map(cpu);
    interrupt::wait_until(window.end)?;
    let after = ids.map(cpu);
    Ok(std::array::from_fn(|index| after[index] - before[index]))
}

type Driver<'scope> = thread::ScopedJoinHandle<'scope, Result<Latencies, Interrupted>>;

fn join(drivers: Vec<Driver<'_>>) -> Result<Latencies, Interrupted> {
    let mut all = latencies();
    for driver in drivers {
        let of_queue = driver.join().expect("a client panicked")?;
        all.add(of_queue).expect("the same bounds");
    }
    Ok(all)
}
