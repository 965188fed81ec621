//! The command line: options, commands, reports and exit codes.
//!
//! Each command is a module, and the fields of its `Options` are its command-line options. Only this crate
//! knows every type of source and sink: `registry` lists the types, and `sinks` makes the ones that a
//! configuration names. A command makes no decision about records. It prepares what the other crates run, and
//! prints what they report. It may use every crate.

mod assets;
mod check;
mod control;
mod demo;
mod dev;
mod dlq;
mod dropped;
mod holes;
mod intake;
mod new;
mod objects;
mod output;
mod plugin;
mod progress;
pub mod registry;
mod reload;
mod replay;
mod rerun;
mod run;
mod signals;
mod sinks;
pub mod stderr;
mod stream;
mod swap;
pub mod terminal;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::Duration;

use clap::builder::StyledStr;
use clap::error::ContextValue;
use clap::{CommandFactory as _, Parser, Subcommand};

pub(crate) use self::output::{print_json, print_line};
use crate::registry::SINK_TYPES;
use crate::terminal::LogOutput;
use shardmill_config::{ConfigError, Endpoint, PipelineConfig};
use shardmill_core::escape::{EscapingWriter, KeptCharacters};
use shardmill_core::masking;
use shardmill_core::private::StateDir;
use shardmill_engine::lock::PipelineLock;
use shardmill_plugin::{
    Backends, CompileCache, LOG_TARGET, Plugin, PluginEngine, PluginHost, compile,
};
use shardmill_state::{DeadLetters, StateStore};

/// Pipeline file that is used if none is named.
const DEFAULT_PIPELINE: &str = "pipeline.toml";

/// Exit code of a command that succeeded.
const EXIT_DONE: u8 = 0;
/// Exit code of a command that failed.
const EXIT_FAILED: u8 = 1;
/// Exit code for an invalid command line or an invalid configuration.
const EXIT_MISUSED: u8 = 2;

/// Longest wait for threads that still work when a command has ended.
const THREADS_WAIT_MAX: Duration = Duration::from_secs(3);
/// Longest wait at the end for the rest of the log, if its reader does not read.
const LOG_WAIT_MAX: Duration = Duration::from_secs(1);
/// Upper limit of lanes in one process. Each lane needs address space for its sandboxes, and the 128 TiB of a
/// process hold no more than this.
const LANES_MAX: usize = 16_320;
/// Threads for blocking calls other than those of lanes: state, files, encoders of sinks.
const OTHER_THREADS_MAX: usize = 64;
/// Threads for blocking calls: one for each lane, plus [`OTHER_THREADS_MAX`]. A lane makes one plugin call at a
/// time, and no lane may wait for the thread of another. With tokio's default of 512, a few hundred plugins
/// that loop would stop all other lanes, and writes to the state with them. The kernel's scheduler shares the
/// cores among threads fairly. Threads start when they are needed and end when they are idle.
const BLOCKING_THREADS_MAX: usize = LANES_MAX + OTHER_THREADS_MAX;

#[derive(Parser)]
#[command(
    name = "shardmill",
    version,
    about = "A stream processor whose logic is WebAssembly: Kinesis shards through sandboxed plugins \
             into data marts and log files.",
    after_help = "Examples:\n  shardmill demo                      see it work, from nothing\n  \
                  shardmill check pipeline.toml       validate a pipeline without reading a record\n  \
                  shardmill run pipeline.toml         run it until SIGTERM or Ctrl-C\n\n\
                  Exit codes: 0 success, 1 failure, 2 invalid command line or configuration, 130 stopped at \
                  once by a second signal."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print reports as JSON, one object per line, to standard output.
    #[arg(long, global = true)]
    json: bool,
    /// Log more (repeatable: -v info, -vv debug, -vvv trace). Logs go to standard error.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Use a state folder that other users of this machine can change. Whoever changes it decides what runs.
    #[arg(long, global = true)]
    trust_state_dir: bool,
}

/// Whether the command line trusts state folders. Set once, before a command starts.
static TRUSTS_STATE_DIR: OnceLock<bool> = OnceLock::new();

/// Applies `--trust-state-dir` to a state folder.
fn with_trust(state_dir: StateDir) -> StateDir {
    state_dir.trusted(TRUSTS_STATE_DIR.get().copied().unwrap_or_default())
}

#[derive(Subcommand)]
enum Command {
    /// Run a complete demo: a stream of 5 shards, 100 cars, three plugins, a data mart.
    #[command(after_help = "Example:\n  shardmill demo --data /tmp/cars")]
    Demo(demo::Options),
    /// Develop a plugin: each save builds it, swaps it in, and shows which outputs changed.
    #[command(after_help = "Example:\n  shardmill dev plugins/geo")]
    Dev(dev::Options),
    /// Run a pipeline until SIGTERM or Ctrl-C, then drain: finish the batch, commit, checkpoint.
    #[command(
        after_help = "Examples:\n  shardmill run\n  shardmill run flights.toml --until-caught-up"
    )]
    Run(run::Options),
    /// Apply the changed files of a running pipeline: plugins, stages, sinks.
    #[command(after_help = "Example:\n  shardmill reload pipeline.toml")]
    Reload(reload::Options),
    /// Process a time window again with the current plugins, into a new table or in place of the old rows.
    #[command(
        after_help = "Examples:\n  shardmill replay --sink mart --from 2026-01-31T00:00:00Z --to \
                      2026-02-01T00:00:00Z\n  shardmill replay --sink mart --from 2026-01-31T00:00:00Z \
                      --to 2026-02-01T00:00:00Z --swap"
    )]
    Replay(replay::Options),
    /// Validate a pipeline: its file, its plugins, its sinks. Reads no record.
    #[command(after_help = "Example:\n  shardmill check pipeline.toml --json")]
    Check(check::Options),
    /// Accept events by HTTP and put them on the pipeline's stream, without running the pipeline.
    #[command(after_help = "Example:\n  shardmill intake pipeline.toml")]
    Intake(intake::Options),
    /// Create, fill, inspect and delete streams; serve the embedded stream.
    #[command(subcommand)]
    Stream(stream::Command),
    /// List, show, export, redrive and delete dead letters.
    ///
    /// A dead letter is a record that a stage rejected or a sink refused, stored with the reason. `redrive`
    /// processes dead letters again with the current pipeline, each from the stage or sink where it failed.
    /// Those that succeed are delivered and are no longer dead letters.
    #[command(subcommand)]
    Dlq(dlq::Command),
    /// Verify and repair what an objects sink has written.
    #[command(subcommand)]
    Objects(objects::Command),
    /// Create a new plugin.
    #[command(subcommand)]
    New(new::Command),
    /// Run a plugin's test cases, accept its outputs, or make cases from real records.
    #[command(
        after_help = "Examples:\n  shardmill test\n  shardmill test geo --update\n  shardmill test geo \
                      --from-dlq --pipeline pipeline.toml --stage geo --redact /user/email"
    )]
    Test(test::Options),
    /// Build, inspect, verify, measure and swap plugins.
    #[command(subcommand)]
    Plugin(plugin::Command),
    /// Compile a component, in a process with limits. shardmill starts this command itself.
    #[command(name = compile::COMMAND, hide = true)]
    CompileComponent(CompileOptions),
    /// Print a completion script for a shell.
    #[command(
        after_help = "Example:\n  shardmill completions bash > ~/.local/share/bash-completion/completions/shardmill"
    )]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Output settings that every command gets.
#[derive(Clone)]
pub(crate) struct Console {
    /// Whether reports are printed as JSON.
    pub json: bool,
}

impl Console {
    /// Prints a line of a report for people and masks the values of variables. Prints nothing with `--json`.
    pub fn say(&self, line: impl std::fmt::Display) {
        if !self.json {
            print_line(masking::hide(line.to_string()));
        }
    }

    /// Prints a line that contains our own colours; the caller has escaped the rest. Prints nothing with
    /// `--json`.
    pub(crate) fn say_styled(&self, line: &str) {
        if !self.json {
            output::print_styled(line);
        }
    }

    /// Prints a report as one JSON line and masks the values of variables. Prints nothing without `--json`.
    pub fn report(&self, report: &impl serde::Serialize) -> anyhow::Result<()> {
        if self.json {
            print_json(&masking::hide_json(serde_json::to_string(report)?));
        }
        Ok(())
    }
}

/// Limits that a compiling process sets for itself.
#[derive(clap::Args)]
struct CompileOptions {
    /// Memory limit of this process, in bytes.
    #[arg(long)]
    memory_bytes: u64,
    /// CPU time limit of this process, in seconds.
    #[arg(long)]
    cpu_seconds: u64,
    /// Process that started this one. If it ends, this process ends too.
    #[arg(long)]
    parent: u32,
}

impl CompileOptions {
    fn limits(&self) -> compile::OwnLimits {
        let Self { memory_bytes, cpu_seconds, parent } = *self;
        compile::OwnLimits { memory_bytes, cpu_seconds, parent }
    }
}

/// Parses the command line, runs the command, and returns the exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misused(error),
    };
    init_logging(cli.verbose);
    TRUSTS_STATE_DIR.get_or_init(|| cli.trust_state_dir);
    let console = Console { json: cli.json };
    let done = match cli.command {
        Command::CompileComponent(options) => {
            compile::serve(options.limits()).map_err(anyhow::Error::from)
        }
        Command::Completions { shell } => {
            // Into memory first: the generator panics if standard output is a closed pipe.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "shardmill", &mut script);
            output::print_styled(String::from_utf8_lossy(&script).trim_end());
            Ok(())
        }
        command => match runtime() {
            Ok(runtime) => {
                let code = exit_code(runtime.block_on(dispatch(command, &console)));
                shardmill_core::off_thread::end_waits();
                // A stuck thread must not keep the process alive.
                runtime.shutdown_timeout(THREADS_WAIT_MAX);
                crate::stderr::flush(LOG_WAIT_MAX);
                return code;
            }
            Err(error) => Err(error),
        },
    };
    let code = exit_code(done);
    crate::stderr::flush(LOG_WAIT_MAX);
    code
}

/// Prints an error of the command-line parser and returns the exit code. Such errors repeat arguments, and
/// scripts may build arguments from untrusted text, so arguments are escaped.
fn misused(mut error: clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Help or version: our own text, on standard output.
        error.exit();
    }
    // Line ends in arguments are escaped here, because they cannot be distinguished from the parser's own
    // later.
    let arguments: Vec<_> = (error.context())
        .filter_map(|(kind, value)| Some((kind, escaped_argument(value)?)))
        .collect();
    for (kind, value) in arguments {
        error.insert(kind, value);
    }
    let rendered = error.render();
    let text = match terminal::is_styled(&std::io::stderr()) {
        true => shardmill_core::escape::printable_styled(&rendered.ansi().to_string()),
        false => shardmill_core::escape::printable(&rendered.to_string()).into_owned(),
    };
    terminal::note_styled(text.trim_end_matches('\n'));
    crate::stderr::flush(LOG_WAIT_MAX);
    EXIT_MISUSED.into()
}

/// Escapes the characters that control a terminal in a part of a parser's error. `None`: the part repeats no
/// argument.
fn escaped_argument(value: &ContextValue) -> Option<ContextValue> {
    let escaped = |text: &String| shardmill_core::escape::escaped(text, &[]);
    match value {
        ContextValue::String(text) => Some(ContextValue::String(escaped(text))),
        ContextValue::Strings(texts) => {
            Some(ContextValue::Strings(texts.iter().map(escaped).collect()))
        }
        // Tips of the parser, one line each.
        ContextValue::StyledStrs(tips) => {
            let escaped = |tip: &StyledStr| {
                let tip = shardmill_core::escape::printable_styled(&tip.ansi().to_string());
                StyledStr::from(tip.replace('\n', "\\n"))
            };
            Some(ContextValue::StyledStrs(tips.iter().map(escaped).collect()))
        }
        _ => None,
    }
}

/// Returns the exit code of a finished command, and prints its error if it failed.
fn exit_code(done: anyhow::Result<()>) -> ExitCode {
    match done.and_then(|()| output::failure()) {
        Ok(()) => EXIT_DONE.into(),
        Err(error) => print_error(&error),
    }
}

async fn dispatch(command: Command, console: &Console) -> anyhow::Result<()> {
    match command {
        Command::Demo(options) => demo::demo(options, console).await,
        Command::Dev(options) => dev::dev(options, console).await,
        Command::Run(options) => run::run(options, console).await,
        Command::Replay(options) => replay::replay(options, console).await,
        Command::Check(options) => check::check(options, console).await,
        Command::Intake(options) => intake::intake(options, console).await,
        Command::Stream(command) => stream::stream(command, console).await,
        Command::Dlq(command) => dlq::dlq(command, console).await,
        Command::Objects(command) => objects::objects(command, console).await,
        Command::New(command) => new::new(command, console),
        Command::Test(options) => test::test(options, console).await,
        Command::Plugin(command) => plugin::plugin(command, console).await,
        Command::Reload(options) => reload::reload(options, console).await,
        Command::CompileComponent(_) | Command::Completions { .. } => Ok(()),
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    bound_malloc_arenas();
    shardmill_core::system::raise_open_files();
    shardmill_core::system::ignore_file_size_signal();
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let built = builder.enable_all().max_blocking_threads(BLOCKING_THREADS_MAX).build();
    built.map_err(shardmill_core::system::cannot_begin)
}

/// Blocks of at least this size are returned to the system when they are freed.
#[cfg(target_env = "gnu")]
const LARGE_BLOCK_BYTES: libc::c_int = 1 << 20;

/// Limits the number of glibc heaps. By default each thread gets a heap of its own. Batches are made on one
/// thread and dropped on another, so each heap would keep memory that others need: 52 MiB instead of 71 MiB for
/// the flights example read from a file, and 10 % less CPU time. Also makes glibc return large blocks to the
/// system.
fn bound_malloc_arenas() {
    #[cfg(target_env = "gnu")]
    {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let arenas = libc::c_int::try_from(cores / 2).unwrap_or(libc::c_int::MAX).max(1);
        // SAFETY: sets a number in malloc's own state, before other threads are started. If glibc refuses the
        // value, nothing changes.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
        // By default glibc raises this threshold up to 32 MiB when a large block is freed, and the heap then
        // keeps the holes that large blocks leave. Buffers of a batch are smaller and stay in the heap. SAFETY:
        // as above.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES) };
        // SAFETY: as above.
        unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * LARGE_BLOCK_BYTES) };
    }
}

/// Sets up logging to standard error, so that standard output contains only the command's own output.
fn init_logging(verbose: u8) {
    use tracing_subscriber::filter::{LevelFilter, Targets};
    use tracing_subscriber::layer::SubscriberExt as _;
    use tracing_subscriber::util::SubscriberInitExt as _;
    let (ours, others) = match verbose {
        0 => (LevelFilter::WARN, LevelFilter::ERROR),
        1 => (LevelFilter::INFO, LevelFilter::WARN),
        2 => (LevelFilter::DEBUG, LevelFilter::INFO),
        _ => (LevelFilter::TRACE, LevelFilter::DEBUG),
    };
    let styles = terminal::is_styled(&std::io::stderr());
    // Each event is one line and cannot control the terminal, whatever its fields contain.
    let kept = KeptCharacters::OneLine { styles };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(move || EscapingWriter::new(LogOutput, kept))
        .with_ansi(styles)
        // The layer reports its own failures with a macro that panics.
        .log_internal_errors(false)
        .with_target(false);
    let plugins = ours.max(LevelFilter::INFO);
    let levels = Targets::new()
        .with_default(others)
        .with_target("shardmill", ours)
        .with_target(LOG_TARGET, plugins);
    tracing_subscriber::registry().with(lines).with(levels).init();
    std::panic::set_hook(Box::new(log_panic));
}

/// Writes the message of a panic, like the standard library's hook. That hook would block until the reader of
/// standard error reads, and all locks held by the panicking thread would stay locked meanwhile.
fn log_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let backtrace = std::backtrace::Backtrace::capture();
    let backtrace = match backtrace.status() {
        std::backtrace::BacktraceStatus::Captured => format!("\n{backtrace}"),
        _ => String::new(),
    };
    let name = thread.name().unwrap_or("<unnamed>");
    terminal::note(format_args!("thread '{name}' {panic}{backtrace}"));
}

/// Prints why the command failed, each cause once, and returns the exit code.
fn print_error(error: &anyhow::Error) -> ExitCode {
    if let Some(config) = error.downcast_ref::<ConfigError>() {
        let is_styled = terminal::is_styled(&std::io::stderr());
        terminal::note_styled(&config.render(is_styled));
        return EXIT_MISUSED.into();
    }
    terminal::note(format_args!("error: {}", shardmill_config::error_text(error)));
    EXIT_FAILED.into()
}

/// Reads a pipeline file with the environment of the process, and checks that no other user can change the
/// pipeline's state.
fn load(path: &std::path::Path) -> anyhow::Result<PipelineConfig> {
    let config = load_file(path)?;
    config.state_dir.check(config.name.as_str())?;
    if uses_embedded(&config) {
        config.state_dir.check(shardmill_kinesis::served::FOLDER)?;
    }
    Ok(config)
}

/// Reads a pipeline file without checking its state folder.
fn load_file(path: &std::path::Path) -> anyhow::Result<PipelineConfig> {
    let mut config = shardmill_config::load(path, &SINK_TYPES, &shardmill_config::environment)?;
    masking::register(&config.values);
    config.state_dir = with_trust(config.state_dir);
    Ok(config)
}

/// Whether a pipeline finds an embedded stream through its state folder.
fn uses_embedded(config: &PipelineConfig) -> bool {
    let sinks = config.sinks.iter().chain(&config.dead_letter_sinks);
    let asked = sinks.filter_map(|sink| sink.settings.stream_server());
    let source = config.source.kinesis().map(|kinesis| &kinesis.server);
    source.into_iter().chain(asked).any(|server| matches!(server.endpoint, Endpoint::Embedded))
}

/// Opens the dead letters of a pipeline that has run. Another process may be running the pipeline.
fn dead_letters(config: &PipelineConfig) -> anyhow::Result<DeadLetters> {
    let folder = config.state_dir.join(config.name.as_str());
    anyhow::ensure!(
        folder.join("state.db").exists(),
        "pipeline {} has no dead letters: no state found in {}; it has never run with this state_dir",
        config.name,
        folder.display()
    );
    Ok(DeadLetters::new(state_beside(config)?))
}

/// Opens the state of a pipeline that another process may be running. Refuses if that process is of an earlier
/// version, because opening would migrate the state under it.
fn state_beside(config: &PipelineConfig) -> anyhow::Result<StateStore> {
    let folder = config.state_dir.join(config.name.as_str());
    anyhow::ensure!(
        !StateStore::is_of_earlier_version(&folder)?
            || !PipelineLock::is_taken(&config.state_dir, &config.name)?,
        "pipeline {} is running with an earlier version of shardmill, which could not read its state in {} \
         after this command: use that version for this command, or restart the pipeline with this version first",
        config.name,
        folder.display()
    );
    Ok(StateStore::open(&folder)?)
}

/// Environment variable that names a folder for compiled plugins, instead of `compiled` in the state folder.
/// Pipelines and containers with new state folders can share it.
const COMPILED_DIR: &str = "SHARDMILL_COMPILED_DIR";

/// Returns the shared folder of compiled plugins: the one that [`COMPILED_DIR`] names, otherwise the one in the
/// user's cache folder (`$XDG_CACHE_HOME/shardmill`). An empty variable counts as unset.
fn shared_cache() -> Option<CompileCache> {
    let named = |variable| std::env::var_os(variable).filter(|folder| !folder.is_empty());
    if let Some(folder) = named(COMPILED_DIR) {
        return Some(CompileCache::shared(folder));
    }
    // The XDG Base Directory specification says that relative paths are invalid and must be ignored.
    let caches =
        named("XDG_CACHE_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute())?;
    Some(CompileCache::of_user(caches.join("shardmill")))
}

/// Makes what is needed to load a pipeline's plugins: engine, compile cache, backends of capabilities.
fn plugin_host(config: &PipelineConfig) -> anyhow::Result<PluginHost> {
    shardmill_core::system::check_start()?;
    let engine = PluginEngine::new().map_err(anyhow::Error::from)?;
    let cache = shared_cache().unwrap_or_else(CompileCache::none);
    let cache = cache.or_in_folder(config.state_dir.join("compiled")).in_child_processes();
    // For a stored component it is not known for which stage it was compiled, so the largest limits of all
    // stages apply.
    let cache = cache.with_limits(config.compile_limits());
    let backends = Backends::from_config(config, &tokio::runtime::Handle::current())?;
    Ok(PluginHost { engine, cache, backends })
}

/// Loads a plugin outside a pipeline.
fn load_plugin(file: &std::path::Path) -> anyhow::Result<Plugin> {
    shardmill_core::system::check_start()?;
    let engine = PluginEngine::new().map_err(anyhow::Error::from)?;
    let cache = shared_cache().unwrap_or_else(CompileCache::none).in_child_processes();
    Ok(Plugin::load_file(&engine, &cache, file)?.0)
}

/// Argument that names a pipeline file.
#[derive(clap::Args)]
pub(crate) struct PipelineFile {
    /// The pipeline file.
    #[arg(default_value = DEFAULT_PIPELINE)]
    pub file: PathBuf,
}
