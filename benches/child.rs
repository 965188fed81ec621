//! Processes that benches start: their cost, and their end.
#![allow(dead_code, reason = "no bench uses all of it")]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// Cost of a process that has ended.
pub struct Cost {
    /// User and system CPU time, in seconds.
    pub cpu_s: f64,
    /// Peak of resident memory, in MiB.
    pub peak_mib: f64,
}

/// Returns a command for the measured binary. `cargo xtask bench` has built it and set SHARDMILL_BIN.
pub fn shardmill() -> Result<Command> {
    let path = std::env::var_os("SHARDMILL_BIN")
        .context("missing SHARDMILL_BIN: run `cargo xtask bench`")?;
    let mut command = Command::new(path);
    command.stdin(Stdio::null());
    Ok(command)
}

/// Returns a command that runs the baseline in this bench's own binary.
pub fn baseline(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--baseline").args(arguments).stdin(Stdio::null());
    Ok(command)
}

/// Returns the arguments of [`baseline`], in the process that it starts.
pub fn baseline_arguments() -> Option<Vec<String>> {
    let mut arguments = std::env::args().skip(1);
    (arguments.next()? == "--baseline").then(|| arguments.collect())
}

/// Runs a process to its end, which must be a success, and returns its cost.
pub fn cost(command: &mut Command) -> Result<Cost> {
    let child = command.stdout(Stdio::null()).spawn().context("failed to start a process")?;
    let pid = libc::pid_t::try_from(child.id())?;
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both pointers are to local values that live through the call, and nothing else waits for this
    // child.
    let waited = unsafe { libc::wait4(pid, &raw mut status, 0, usage.as_mut_ptr()) };
    ensure!(waited == pid && status == 0, "a process failed: {status:#x}");
    // SAFETY: zeroed is a valid rusage, and wait4 has filled it in.
    let usage = unsafe { usage.assume_init() };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    Ok(Cost {
        cpu_s: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        peak_mib: usage.ru_maxrss as f64 / 1024.0,
    })
}

/// A process that is killed when dropped.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Returns the CPU seconds used so far.
    ///
    /// Source: proc(5), `/proc/PID/stat`, fields 14 and 15, in ticks of 10 ms.
    pub fn cpu_s(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let (_, after_name) = stat.rsplit_once(") ").context("an odd stat")?;
        let fields: Vec<&str> = after_name.split(' ').collect();
        Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
    }

    /// Returns the current resident memory, in KiB.
    pub fn resident_kib(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
        Ok(line.split_whitespace().nth(1).context("no number")?.parse()?)
    }
}

/// Serves the embedded stream in a separate process, and returns its URL.
pub fn serve_stream(state_dir: &Path) -> Result<(Running, url::Url)> {
    let mut command = shardmill()?;
    command.args(["stream", "serve", "--json", "--state-dir"]).arg(state_dir);
    let mut child = command.stdout(Stdio::piped()).spawn().context("failed to serve a stream")?;
    let output = child.stdout.take().context("no output")?;
    let served = Running(child);
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    let line: serde_json::Value = serde_json::from_str(&line)?;
    let url = line["url"].as_str().context("no address")?.parse()?;
    Ok((served, url))
}
