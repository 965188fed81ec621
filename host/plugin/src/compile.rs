//! Compiles components in a child process.
//!
//! A compilation cannot be cancelled, and a component is untrusted input: a crafted one can keep the compiler busy
//! for hours or fill the memory. So this program starts itself once more, with limits. The child does nothing but
//! compile: component on standard input, compiled code on standard output. It inherits no environment and so no
//! secrets, cannot write files or gain rights, and ends with its parent. At most [`COMPILATIONS_MAX`] run at a
//! time.
//!
//! The size of the component and its structure (`features::check`) are checked before the child starts. Then:
//!
//! | the child | result |
//! |---|---|
//! | runs longer than `limits.compile_time`: it is killed | [`CompileError::TooSlow`] |
//! | is ended by SIGXCPU (CPU time of all its threads) | [`CompileError::TooSlow`] |
//! | succeeds | the code |
//! | reports a failed allocation | [`CompileError::TooMuchMemory`], or names a lower limit of the system |
//! | ends with code 1 and a message | [`CompileError::Refused`] with wasmtime's reason |
//! | ends in any other way | [`CompileError::Compiler`] |
//!
//! Pipes are read and written by three threads at once: a child that writes while nobody reads would block for
//! ever.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use wasmtime::Engine;

use super::{engine, features};
use shardmill_config::CompileLimits;

/// The hidden command that runs [`serve`].
pub const COMMAND: &str = "compile-component";

/// Interval at which a running compiler is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Number of compilations that run at a time: each may take all cores, and memory up to its limit.
const COMPILATIONS_MAX: usize = 2;
/// Longest wait for a turn, in multiples of the compilation's own time limit.
const TURN_WAIT_FACTOR: u32 = 4;

/// The turns of all compilations in this process. Static, because they share the machine.
static TURNS: Turns = Turns::new(COMPILATIONS_MAX);

/// Where components are compiled.
#[derive(Clone, Debug)]
pub(super) enum Compiler {
    /// In this process, without limits: for other programs that embed this library.
    InProcess,
    /// By this program, started as a child process.
    Child(PathBuf),
}

/// Why a component was not compiled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// The component is over the size limit; it was not read.
    #[error("the component has {bytes} bytes, over the limit of {bytes_max} (limits.component)")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// It took too long.
    #[error("compiling took longer than its limit of {} s (limits.compile_time)", .time_max.as_secs())]
    TooSlow {
        /// The limit.
        time_max: Duration,
    },
    /// It took too much memory.
    #[error(
        "compiling needs more memory than its limit of {memory_bytes_max} bytes (limits.compile_memory)"
    )]
    TooMuchMemory {
        /// The limit.
        memory_bytes_max: usize,
    },
    /// Other compilations took too long.
    #[error(
        "no compilation could start within {} s: {COMPILATIONS_MAX} others were running; try again",
        .waited.as_secs()
    )]
    NoTurn {
        /// Time that it waited.
        waited: Duration,
    },
    /// wasmtime or our own checks refuse the component.
    #[error("{0}")]
    Refused(String),
    /// The compiler could not be run.
    #[error("failed to run the compiler: {0}")]
    Compiler(String),
}

impl Compiler {
    /// Compiles with this program, started again for each compilation.
    ///
    /// On Linux it is found by the link to the running file, so an update that replaced the file since does not
    /// matter: parent and child are the same build.
    pub(crate) fn this_program() -> Self {
        let link = PathBuf::from("/proc/self/exe");
        match link.exists() {
            true => Self::Child(link),
            false => std::env::current_exe().map_or(Self::InProcess, Self::Child),
        }
    }

    /// Compiles a component to wasmtime's serialised form, within limits.
    pub fn compile(
        &self,
        engine: &Engine,
        component: &[u8],
        limits: &CompileLimits,
    ) -> Result<Vec<u8>, CompileError> {
        let (bytes, bytes_max) = (component.len(), limits.component_bytes_max);
        if bytes > bytes_max {
            return Err(CompileError::TooLarge { bytes, bytes_max });
        }
        features::check(component).map_err(CompileError::Refused)?;
        match self {
            Self::InProcess => engine
                .precompile_component(component)
                .map_err(|error| CompileError::Refused(features::explain(component, &error))),
            Self::Child(program) => compile_in_child(program, component, limits),
        }
    }
}

fn compile_in_child(
    program: &PathBuf,
    component: &[u8],
    limits: &CompileLimits,
) -> Result<Vec<u8>, CompileError> {
    let failed = |cause: std::io::Error| CompileError::Compiler(cause.to_string());
    let waits_max = limits.time_max.saturating_mul(TURN_WAIT_FACTOR);
    let Some(_turn) = TURNS.take(waits_max) else {
        return Err(CompileError::NoTurn { waited: waits_max });
    };
    let mut child = Command::new(program)
        .arg(COMMAND)
        .args(["--memory-bytes", &limits.memory_bytes_max.to_string()])
        .args(["--cpu-seconds", &cpu_seconds_max(limits.time_max).to_string()])
        .args(["--parent", &std::process::id().to_string()])
        // No secrets of this process reach a compiler that runs crafted input.
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (Some(mut stdin), Some(mut stdout), Some(mut stderr)) = (stdin, stdout, stderr) else {
        return Err(CompileError::Compiler("its pipes are missing".into()));
    };
    thread::scope(|scope| {
        // A compiler that ends early gives its reason on standard error; the broken pipe adds nothing to it.
        scope.spawn(move || _ = stdin.write_all(component));
        let code = scope.spawn(move || {
            let mut code = Vec::new();
            stdout.read_to_end(&mut code).map(|_| code)
        });
        let said = scope.spawn(move || {
            let mut said = Vec::new();
            _ = stderr.read_to_end(&mut said);
            String::from_utf8_lossy(&said).trim().to_owned()
        });
        let ended = wait(&mut child, limits.time_max);
        let code = code.join().unwrap_or_else(|_| Err(std::io::Error::other("a reader panicked")));
        let said = said.join().unwrap_or_default();
        match ended.map_err(failed)? {
            None => Err(CompileError::TooSlow { time_max: limits.time_max }),
            Some(status) if has_used_its_cpu_time(status) => {
                Err(CompileError::TooSlow { time_max: limits.time_max })
            }
            Some(status) if status.success() => code.map_err(failed),
            // The first is Rust's message for a failed allocation, the second wasmtime's.
            Some(_) if said.contains("memory allocation of") || said.contains("out of memory") => {
                Err(too_much_memory(limits.memory_bytes_max))
            }
            Some(status) if status.code() == Some(1) && !said.is_empty() => {
                Err(CompileError::Refused(said.trim_start_matches("error: ").to_owned()))
            }
            Some(status) => Err(CompileError::Compiler(format!("it ended with {status}: {said}"))),
        }
    })
}

/// Names the limit that was reached: the configured one, or a lower one set by the system.
fn too_much_memory(memory_bytes_max: usize) -> CompileError {
    match shardmill_core::system::address_limit() {
        Some(limit) if limit < memory_bytes_max as u64 => CompileError::Compiler(format!(
            "compiling needs more memory than the {} MiB of address space that the system gives this \
             process (ulimit -v); raise or remove that limit",
            limit >> 20
        )),
        _ => CompileError::TooMuchMemory { memory_bytes_max },
    }
}

/// Waits for the child to end; `None`: it took too long and was killed.
fn wait(child: &mut Child, time_max: Duration) -> std::io::Result<Option<ExitStatus>> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if begun.elapsed() > time_max {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Returns the limit on CPU seconds: a compiler that uses all cores for its whole time needs no more.
fn cpu_seconds_max(time_max: Duration) -> u64 {
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    (time_max.as_secs() + 1).saturating_mul(cores)
}

/// Whether the system ended the process for its CPU time.
fn has_used_its_cpu_time(status: ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt as _;
    status.signal() == Some(libc::SIGXCPU)
}

/// A bound on how many run at a time.
struct Turns {
    left: Mutex<usize>,
    given_back: Condvar,
}

/// The right to run, given back on drop.
struct Turn<'t>(&'t Turns);

impl Turns {
    const fn new(count: usize) -> Self {
        Self { left: Mutex::new(count), given_back: Condvar::new() }
    }

    /// Waits for a turn, for `waits_max` at most.
    fn take(&self, waits_max: Duration) -> Option<Turn<'_>> {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.given_back.wait_timeout_while(left, waits_max, |left| *left == 0);
        let (mut left, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *left = left.checked_sub(1)?;
        Some(Turn(self))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.left.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.given_back.notify_one();
    }
}

/// Limits that a compiling process sets itself.
#[derive(Clone, Copy, Debug)]
pub struct OwnLimits {
    /// Limit on the address space, in bytes: `--memory-bytes`.
    pub memory_bytes: u64,
    /// Limit on the CPU time, in seconds: `--cpu-seconds`.
    pub cpu_seconds: u64,
    /// Id of the process that started this one, and with which it ends: `--parent`.
    pub parent: u32,
}

/// Runs the compiling process: reads a component, writes compiled code.
///
/// # Errors
/// wasmtime's reason, for standard error; or that the parent process is gone.
pub fn serve(limits: OwnLimits) -> wasmtime::Result<()> {
    // All limits hold before the first byte of the component is read.
    end_with_parent(limits.parent)?;
    bound_rights();
    bound_resources(limits.memory_bytes, limits.cpu_seconds);
    let mut component = Vec::new();
    std::io::stdin().lock().read_to_end(&mut component)?;
    let compiled = Engine::new(&engine::config())?.precompile_component(&component);
    let code =
        compiled.map_err(|error| wasmtime::Error::msg(features::explain(&component, &error)))?;
    std::io::stdout().lock().write_all(&code)?;
    Ok(())
}

/// Makes the kernel kill this process when its parent ends, in whatever way.
///
/// The signal is sent when the *thread* that started this process ends. That thread waits for this process
/// ([`compile_in_child`]), so it ends earlier only together with its process.
fn end_with_parent(parent: u32) -> wasmtime::Result<()> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: sets an attribute of this process; no memory is read.
        let asked = unsafe { prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) };
        if asked != 0 {
            let cause = std::io::Error::last_os_error();
            wasmtime::bail!("the compiler cannot be made to end with its parent: {cause}");
        }
        // The parent may have ended before the request took effect: then another process has adopted this one.
        let found = std::os::unix::process::parent_id();
        if found != parent {
            wasmtime::bail!(
                "expected parent process {parent}, found {found}: nobody waits for the code"
            );
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = parent;
    Ok(())
}

/// Sets an attribute of this process. The kernel reads whole words and refuses nonzero values in the unused ones.
///
/// # Safety
/// As documented for the attribute: `value` must not be an address.
#[cfg(target_os = "linux")]
unsafe fn prctl(attribute: libc::c_int, value: libc::c_ulong) -> libc::c_int {
    const NONE: libc::c_ulong = 0;
    // SAFETY: no memory is read, as the caller promises.
    unsafe { libc::prctl(attribute, value, NONE, NONE, NONE) }
}

/// Gives up every way to gain rights (set-user-ID programs) and to write files or core dumps.
fn bound_rights() {
    #[cfg(target_os = "linux")]
    // SAFETY: sets an attribute of this process; no memory is read. A kernel without it leaves things as
    // they are.
    unsafe {
        prctl(libc::PR_SET_NO_NEW_PRIVS, 1);
    }
    // The limit on file sizes does not apply to pipes.
    bound(libc::RLIMIT_FSIZE, 0, 0);
    bound(libc::RLIMIT_CORE, 0, 0);
}

/// Limits the address space and the CPU time of this process.
fn bound_resources(memory_bytes: u64, cpu_seconds: u64) {
    bound(libc::RLIMIT_AS, memory_bytes, memory_bytes);
    // At the soft limit SIGXCPU tells the parent why the process ends; SIGKILL at the hard one would not.
    bound(libc::RLIMIT_CPU, cpu_seconds, cpu_seconds.saturating_add(1));
}

/// Sets a limit of this process. If the system refuses, or has a lower limit already, the process goes on: the
/// parent's time limit still holds.
fn bound(resource: shardmill_core::system::Resource, soft: u64, hard: u64) {
    let limit = libc::rlimit { rlim_cur: soft as _, rlim_max: hard as _ };
    // SAFETY: the call reads a structure on this stack frame.
    unsafe { libc::setrlimit(resource, &raw const limit) };
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn wall_13_no_more_compilations_run_than_there_are_turns() {
        static TURNS: Turns = Turns::new(2);
        let (running, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let turn = TURNS.take(Duration::from_secs(60)).expect("a turn");
                    most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    thread::yield_now();
                    running.fetch_sub(1, Ordering::SeqCst);
                    drop(turn);
                });
            }
        });
        assert!((1..=2).contains(&most.into_inner()));
        // Waiting for a turn is bounded.
        let taken = [TURNS.take(Duration::ZERO), TURNS.take(Duration::ZERO)];
        assert!(taken.iter().all(Option::is_some));
        assert!(TURNS.take(Duration::from_millis(10)).is_none());
        drop(taken);
        assert!(TURNS.take(Duration::ZERO).is_some());
    }
}
