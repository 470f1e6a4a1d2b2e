//! The properties of the machine on which the figures depend, without its name.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

/// The properties with their values, one line each.
pub fn describe(directory: &Path) -> Vec<(&'static str, String)> {
    vec![
        ("CPU", cpu()),
        ("memory", memory()),
        ("kernel", format!("Linux {}", kernel())),
        ("page cache, disk", file_system(directory)),
        ("tmpfs", file_system(Path::new("/dev/shm"))),
        ("peer", first_line("qemu-storage-daemon", "--version")),
        ("compiler", first_line("rustc", "--version")),
    ]
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| {
        let line = info.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim())
    };
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let is_virtual =
        value("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor"));
    format!(
        "{}, {cores} cores{}",
        value("model name").unwrap_or("unknown"),
        if is_virtual {
            " of a virtual machine"
        } else {
            ""
        }
    )
}

fn memory() -> String {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map_or("unknown".into(), |kib| {
        format!("{} GiB", kib.div_ceil(1 << 20))
    })
}

/// The kernel's version without the suffix of its distributor.
fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let end = release.find(|c: char| !c.is_ascii_digit() && c != '.');
    release[..end.unwrap_or(release.len())].to_owned()
}

/// The type of the file system that holds `path`.
fn file_system(path: &Path) -> String {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let path = path.canonicalize().unwrap_or_default();
    let of_mount = |line: &str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        let kind = file_system.split(' ').next()?;
        path.starts_with(point)
            .then(|| (point.len(), kind.to_owned()))
    };
    // The last of several mounts at one point is the visible one.
    let holding = mounts
        .lines()
        .filter_map(of_mount)
        .max_by_key(|(length, _)| *length);
    holding.map_or("unknown".into(), |(_, kind)| kind)
}

fn first_line(program: &str, argument: &str) -> String {
    let output = Command::new(program).arg(argument).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let line = text
        .ok()
        .and_then(|text| text.lines().next().map(str::to_owned));
    line.unwrap_or("unknown".into())
}
