//! The bound on the memory of a process that is attacked, and the peak that it came to.
//!
//! A peak is VmHWM of `/proc`, which begins at exec. `ru_maxrss` of `wait4` would count what the child had
//! before, and that is the memory of this program.

use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::support::{Process, output_of};

pub const MIB: u64 = 1 << 20;

/// The limit of a stage whose instances may have what [`bound`] counts for each.
pub const LIMITS: &str = "limits = { memory = \"16 MiB\" }";

/// The pause between two looks at a peak. It only grows, so no more is missed than what the last pause adds.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// The bound on what a process may hold whose plugins have 16 MiB each, in bytes.
pub const fn bound(buffer_mib: u64, trial_mib: u64, stages: u64, instances: u64) -> u64 {
    (2 * buffer_mib + trial_mib * stages + 16 * instances + 100) * MIB
}

/// Asserts that a process that runs has stayed below the bound.
#[track_caller]
pub fn assert_below(run: &Process, bound: u64) {
    assert_peak_below(peak_of(run.0.id()).expect("it runs"), bound, "the run");
}

/// Asserts that a peak lies below the bound; `what` came to it.
#[track_caller]
pub fn assert_peak_below(peak: u64, bound: u64, what: &str) {
    println!("{what}: {} MiB at the peak of {} MiB", peak / MIB, bound / MIB);
    assert!(peak > 0, "{what}: the process ended before anybody looked");
    assert!(peak < bound, "{what}: {} MiB at the peak, expected < {}", peak / MIB, bound / MIB);
}

/// Runs a command to its end. Gives its output, and the peak of its resident memory in bytes.
pub fn output_and_peak(command: &mut Command) -> (Output, u64) {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let peak = follow(child.id());
    let output = output_of(child, command);
    (output, peak.join().expect("a peak"))
}

/// Follows a process from a thread until it ends; the thread gives the peak of its resident memory in bytes.
pub fn follow(pid: u32) -> JoinHandle<u64> {
    std::thread::spawn(move || {
        let mut peak = 0;
        // The last look counts, not the highest: the first may still show the memory before exec.
        while let Some(bytes) = peak_of(pid) {
            peak = bytes;
            std::thread::sleep(LOOK_INTERVAL);
        }
        peak
    })
}

/// The peak of a process's resident memory so far, in bytes; `None` once it has ended, waited for or not.
fn peak_of(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}
