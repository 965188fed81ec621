//! The memory bound of a process under attack, and its peak memory.
//!
//! The peak is VmHWM of `/proc`, which begins at exec. `ru_maxrss` of `wait4` would also count the child's memory
//! from before exec, which is the memory of this program.

use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::support::{Process, output_of};

pub const MIB: u64 = 1 << 20;

/// Memory limit of a stage whose instances may use what [`bound`] counts for each.
pub const LIMITS: &str = "limits = { memory = \"16 MiB\" }";

/// Pause between two readings of the peak. The peak only grows, so only the growth during the last pause is missed.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// Returns the memory bound in bytes of a process whose plugins have 16 MiB each.
pub const fn bound(buffer_mib: u64, trial_mib: u64, stages: u64, instances: u64) -> u64 {
    (2 * buffer_mib + trial_mib * stages + 16 * instances + 100) * MIB
}

/// Asserts that a running process has stayed below the bound.
#[track_caller]
pub fn assert_below(run: &Process, bound: u64) {
    assert_peak_below(peak_of(run.0.id()).expect("it runs"), bound, "the run");
}

/// Asserts that the peak of `what` lies below the bound.
#[track_caller]
pub fn assert_peak_below(peak: u64, bound: u64, what: &str) {
    println!("{what}: {} MiB at the peak of {} MiB", peak / MIB, bound / MIB);
    assert!(peak > 0, "{what}: the process ended before its peak was read");
    assert!(peak < bound, "{what}: {} MiB at the peak, expected < {}", peak / MIB, bound / MIB);
}

/// Runs a command to its end. Returns its output, and the peak of its resident memory in bytes.
pub fn output_and_peak(command: &mut Command) -> (Output, u64) {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let peak = follow(child.id());
    let output = output_of(child, command);
    (output, peak.join().expect("a peak"))
}

/// Follows a process in a thread until it ends; the thread returns the peak of its resident memory in bytes.
pub fn follow(pid: u32) -> JoinHandle<u64> {
    std::thread::spawn(move || {
        let mut peak = 0;
        // The last reading counts, not the highest: the first one may still show the memory before exec.
        while let Some(bytes) = peak_of(pid) {
            peak = bytes;
            std::thread::sleep(LOOK_INTERVAL);
        }
        peak
    })
}

/// Returns the peak of a process's resident memory so far, in bytes; `None` once it has ended, even if nobody has
/// waited for it.
fn peak_of(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}
