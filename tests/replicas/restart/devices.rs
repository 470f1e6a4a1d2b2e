//! Block devices, whose records are in the state directory: under the name of what a device is, not
//! under the path that leads to it today.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use serde_json::{Value, json};
use testkit::images::are_identical;
use testkit::loop_device::LoopDevice;
use testkit::machine;
use testkit::monitor::Monitor;

use super::{Host, Running, in_image, read, write};

/// A disk of loop devices. Links lead to them, as names that the host gives to devices.
struct Devices {
    host: Host,
    devices: Vec<LoopDevice>,
    links: Vec<PathBuf>,
    state: PathBuf,
}

impl Devices {
    fn new(replicas: usize) -> Self {
        let host = Host::new(replicas);
        let images = host.images.iter();
        let devices: Vec<LoopDevice> = images.map(|image| LoopDevice::attach(image)).collect();
        let links = (0..replicas).map(|index| host.path(&format!("vd{index}")));
        let links: Vec<PathBuf> = links.collect();
        let state = host.path("state");
        fs::create_dir(&state).unwrap();
        let disk = Self {
            host,
            devices,
            links,
            state,
        };
        disk.name(&(0..replicas).collect::<Vec<_>>());
        disk
    }

    /// Gives the devices names: the first one the name of this number, and so on.
    fn name(&self, numbers: &[usize]) {
        for (device, number) in self.devices.iter().zip(numbers) {
            let link = &self.links[*number];
            // The first time there is none.
            let _ = fs::remove_file(link);
            symlink(device.path(), link).unwrap();
        }
    }

    /// Serves the disk with the devices that have these names.
    fn start(&self, numbers: &[usize]) -> Running {
        let images: Vec<PathBuf> = numbers.iter().map(|n| self.links[*n].clone()).collect();
        let state = self.state.to_str().unwrap();
        self.host.start_with(&images, &["--state-dir", state])
    }
}

/// The jobs that have ended since the disk was made, by type.
fn ended_jobs(running: &Running) -> Vec<String> {
    running.wait_until_healthy();
    let mut monitor = Monitor::connect(&running.monitor);
    let jobs = monitor.execute("query-quorum-jobs", json!({}));
    let jobs = jobs.as_array().unwrap().iter();
    let name = |job: &Value| job["type"].as_str().unwrap().to_owned();
    jobs.map(name).collect()
}

#[test]
fn a_device_that_has_the_name_of_another_one_is_not_believed_to_be_it() {
    let _machine = machine::shared();
    let disk = Devices::new(3);
    let running = disk.start(&[0, 1, 2]);
    write(&mut running.client(), 0, 1);
    running.end();
    // The third one misses block 1.
    let running = disk.start(&[0, 1]);
    assert_eq!(running.states(), ["in-service", "in-service", "missing"]);
    write(&mut running.client(), 1, 2);
    running.kill();
    // The devices have other names after a reboot: that of the first one leads to the third.
    disk.name(&[2, 1, 0]);
    let running = disk.start(&[0, 2]);
    let mut client = running.client();
    assert_eq!((read(&mut client, 0), read(&mut client, 1)), (1, 2));
    drop(client);
    running.kill();
    let running = disk.start(&[0, 1, 2]);
    running.wait_until_healthy();
    running.end();
    assert!(are_identical(&disk.host.images));
    assert_eq!(in_image(&disk.host.images[2], 1), 2);
}

#[test]
fn a_clean_end_of_block_devices_needs_no_recovery_and_a_kill_does() {
    let _machine = machine::shared();
    let disk = Devices::new(2);
    let running = disk.start(&[0, 1]);
    write(&mut running.client(), 0, 1);
    assert_eq!(ended_jobs(&running), ["quorum-scrub"], "of a new disk");
    running.end();
    assert_eq!(fs::read_dir(&disk.state).unwrap().count(), 2);
    let running = disk.start(&[0, 1]);
    assert_eq!(ended_jobs(&running), ["quorum-scrub"]);
    write(&mut running.client(), 0, 2);
    running.kill();
    let running = disk.start(&[0, 1]);
    assert_eq!(read(&mut running.client(), 0), 2);
    let jobs = ended_jobs(&running);
    assert_eq!(jobs, ["quorum-scrub", "quorum-recovery"]);
    // What is in use elsewhere is left alone.
    let line = disk.host.refusal(
        &[disk.links[1].clone()],
        &["--state-dir", disk.state.to_str().unwrap()],
    );
    assert!(line.contains("in use"), "{line}");
    running.end();
}
