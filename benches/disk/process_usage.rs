//! CPU time and memory of a process, from /proc.

use std::fs;
use std::time::Duration;

/// CPU time of all threads of a process so far, including the kernel threads of its io_urings, and
/// of its tasks for `--aio threads`, which are children of it.
pub fn cpu(id: u32) -> Duration {
    of_process(id) + aio_tasks(id).into_iter().map(of_process).sum::<Duration>()
}

fn aio_tasks(id: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{id}/task")).expect("reading /proc");
    let lists = threads.filter_map(|thread| {
        let path = thread.ok()?.path().join("children");
        fs::read_to_string(path).ok()
    });
    let lists: Vec<String> = lists.collect();
    let children = lists.iter().flat_map(|list| list.split_ascii_whitespace());
    let children = children.map(|id| id.parse().expect("a process id"));
    let is_task = |id: &u32| {
        let name = fs::read_to_string(format!("/proc/{id}/comm"));
        name.is_ok_and(|name| name.trim_end() == "aio")
    };
    children.filter(is_task).collect()
}

fn of_process(id: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).expect("reading /proc");
    // The name before the parenthesis may contain any character.
    let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
    let field = |index| fields.split_ascii_whitespace().nth(index);
    let ticks = |index| -> u32 { field(index).expect("a field").parse().expect("a number") };
    // utime and stime, the 14th and 15th field.
    let ticks = ticks(11) + ticks(12);
    // SAFETY: sysconf takes no pointer.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Duration::from_secs(1) * ticks / u32::try_from(per_second).expect("a small number")
}

/// Peak resident memory of a process, in bytes. It includes guest memory that the process has
/// touched.
pub fn peak_memory_bytes(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).expect("reading /proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
    kib.expect("VmHWM in kB").parse::<u64>().expect("a number") << 10
}
