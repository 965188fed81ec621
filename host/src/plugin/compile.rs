//! Compiles components in a process of its own.
//!
//! A compilation cannot be cancelled, and a component is input: one that is made for it keeps a
//! compiler busy for hours or fills the memory. So this program is started again, with limits, and
//! does nothing but compile: component on standard input, compiled code on standard output. It
//! inherits no environment and so no secrets.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use wasmtime::Engine;

use super::{engine, features};
use crate::config::CompileLimits;

/// The command that [`serve`] is behind.
pub const COMMAND: &str = "compile-component";

/// How often a running compiler is looked at.
const GLANCE_INTERVAL: Duration = Duration::from_millis(5);

/// Where components are compiled.
#[derive(Clone, Debug)]
pub(super) enum Compiler {
    /// In this process, without limits: for programs that are not shardmill itself.
    InProcess,
    /// By this program, started again.
    Child(PathBuf),
}

/// Why a component was not compiled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// The component is too large to be looked at.
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
    /// wasmtime refuses the component.
    #[error("{0}")]
    Refused(String),
    /// The compiler could not be run.
    #[error("failed to run the compiler: {0}")]
    Compiler(String),
}

impl Compiler {
    /// This program, started again for each compilation.
    ///
    /// On Linux by the link to the running file itself: that it was replaced since it was started
    /// does not matter.
    pub fn this_program() -> Self {
        let link = PathBuf::from("/proc/self/exe");
        match link.exists() {
            true => Self::Child(link),
            false => std::env::current_exe().map_or(Self::InProcess, Self::Child),
        }
    }

    /// Compiles a component to wasmtime's serialised form.
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
        features::check_state(component).map_err(CompileError::Refused)?;
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
    let mut child = Command::new(program)
        .arg(COMMAND)
        .args(["--memory-bytes", &limits.memory_bytes_max.to_string()])
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
        // A compiler that ends early says why on standard error: a broken pipe adds nothing.
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
            Some(status) if status.success() => code.map_err(failed),
            // Rust's own words when an allocation fails, and wasmtime's.
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

/// Names the limit that was reached: the configuration's, or a lower one that the system sets.
fn too_much_memory(memory_bytes_max: usize) -> CompileError {
    match crate::system::address_limit() {
        Some(limit) if limit < memory_bytes_max as u64 => CompileError::Compiler(format!(
            "compiling needs more memory than the {} MiB of address space that the system gives this \
             process (ulimit -v); raise or remove that limit",
            limit >> 20
        )),
        _ => CompileError::TooMuchMemory { memory_bytes_max },
    }
}

/// Waits for the end; `None`: it took too long and was killed.
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
        thread::sleep(GLANCE_INTERVAL);
    }
}

/// The compiling process: component in, compiled code out.
///
/// # Errors
/// What wasmtime says, for standard error.
pub fn serve(memory_bytes_max: u64) -> wasmtime::Result<()> {
    bound_memory(memory_bytes_max);
    let mut component = Vec::new();
    std::io::stdin().lock().read_to_end(&mut component)?;
    let compiled = Engine::new(&engine::config())?.precompile_component(&component);
    let code =
        compiled.map_err(|error| wasmtime::Error::msg(features::explain(&component, &error)))?;
    std::io::stdout().lock().write_all(&code)?;
    Ok(())
}

/// Bounds the address space of this process, and leaves no core file behind.
fn bound_memory(bytes_max: u64) {
    #[cfg(unix)]
    {
        let limit = libc::rlimit { rlim_cur: bytes_max as _, rlim_max: bytes_max as _ };
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: both calls read a structure that lives here. A system that refuses one leaves
        // the process as it is, and the limit of time holds.
        unsafe {
            libc::setrlimit(libc::RLIMIT_AS, &limit);
            libc::setrlimit(libc::RLIMIT_CORE, &none);
        }
    }
    #[cfg(not(unix))]
    let _ = bytes_max;
}
