//! Counts instructions: runs this program under callgrind.

use std::process::{Command, Stdio};

/// Instructions of a run of this program with `arguments`.
fn count(arguments: &[&str]) -> Result<u64, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run valgrind ({error}); install it first"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{arguments:?} failed: {stderr}"));
    }
    let collected = stderr
        .lines()
        .find_map(|line| line.split("Collected :").nth(1));
    collected
        .and_then(|figure| figure.trim().parse().ok())
        .ok_or_else(|| format!("valgrind printed no count: {stderr}"))
}

/// Instructions of one repetition of `name`: the difference between runs with `long` and with
/// `short` repetitions, so that start-up does not count.
pub(crate) fn per_unit(name: &str, short: u64, long: u64) -> Result<f64, String> {
    let run = |units: u64| count(&["--run", name, &units.to_string()]);
    let more = run(long)?
        .checked_sub(run(short)?)
        .ok_or("the long run took fewer instructions than the short one")?;
    let float = |count: u64| u32::try_from(count).map(f64::from);
    let quotient = float(more).and_then(|more| Ok(more / float(long - short)?));
    quotient.map_err(|error| format!("{more} instructions: {error}"))
}
