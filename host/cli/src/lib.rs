//! The command line: what a person types, and what they are told.
//!
//! Arguments go in, and an exit code comes out. Each command is a module; its options are its type's fields. Here alone
//! all types of sources and sinks are known: `sinks` makes those that a configuration names. A command decides nothing
//! about records: it prepares what the other crates run, and prints what they report. It may use every crate.

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

/// The pipeline that is run when none is named.
const DEFAULT_PIPELINE: &str = "pipeline.toml";

/// Exit code when the command did what it says.
const EXIT_DONE: u8 = 0;
/// Exit code when it failed.
const EXIT_FAILED: u8 = 1;
/// Exit code when the command line or the configuration is wrong.
const EXIT_MISUSED: u8 = 2;

/// How long threads that are at work when a command has ended are waited for.
const THREADS_WAIT_MAX: Duration = Duration::from_secs(3);
/// How long the rest of the log is waited for at the end, where its reader does not read.
const LOG_WAIT_MAX: Duration = Duration::from_secs(1);
/// Lanes that one process has at most, by far: each needs address space for its sandboxes, of which 128 TiB
/// hold no more.
const LANES_MAX: usize = 16_320;
/// Threads for calls that block, beside those of the lanes: state, files, encoders of sinks.
const OTHER_THREADS_MAX: usize = 64;
/// Threads for calls that block: one for each lane, and these others. A lane has one call of a plugin at a
/// time, and no lane waits for the thread of another: with tokio's 512, a few hundred plugins that loop would
/// hold all the others up, and the state's writes with them. How cores are shared among threads is the
/// kernel's affair, which is fair to each. Threads are started when they are needed and end when they are not.
const BLOCKING_THREADS_MAX: usize = LANES_MAX + OTHER_THREADS_MAX;

#[derive(Parser)]
#[command(
    name = "shardmill",
    version,
    about = "A stream processor whose logic is WebAssembly: Kinesis shards through sandboxed plugins \
             into data marts and log files.",
    after_help = "Examples:\n  shardmill demo                      see it work, from nothing\n  \
                  shardmill check pipeline.toml       prove a pipeline without reading a record\n  \
                  shardmill run pipeline.toml         run it until SIGTERM or Ctrl-C\n\n\
                  Exit codes: 0 done, 1 failed, 2 the command line or the configuration is wrong."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print reports as JSON, one object per line, on standard output.
    #[arg(long, global = true)]
    json: bool,
    /// Log more; twice: everything. Logs go to standard error.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Use a state folder that other users of this machine can change: whoever does decides what runs.
    #[arg(long, global = true)]
    trust_state_dir: bool,
}

/// Whether the command line trusts state folders. Set once, before a command begins.
static TRUSTS_STATE_DIR: OnceLock<bool> = OnceLock::new();

/// A state folder as the command line has it.
fn with_trust(state_dir: StateDir) -> StateDir {
    state_dir.trusted(TRUSTS_STATE_DIR.get().copied().unwrap_or_default())
}

#[derive(Subcommand)]
enum Command {
    /// Run the whole path once: a stream of 5 shards, 100 cars, three plugins, a data mart.
    #[command(after_help = "Example:\n  shardmill demo --data /tmp/cars")]
    Demo(demo::Options),
    /// Work on a plugin: at each save it is built, swapped in, and shown by what it does differently.
    #[command(after_help = "Example:\n  shardmill dev plugins/geo")]
    Dev(dev::Options),
    /// Run a pipeline until SIGTERM or Ctrl-C, then drain: finish the batch, commit, checkpoint.
    #[command(
        after_help = "Examples:\n  shardmill run\n  shardmill run flights.toml --until-caught-up"
    )]
    Run(run::Options),
    /// Let a running pipeline take its files over as they are now: plugins, stages, sinks.
    #[command(after_help = "Example:\n  shardmill reload pipeline.toml")]
    Reload(reload::Options),
    /// Run a window of time again with today's plugins, beside the live table or in place of its rows.
    #[command(
        after_help = "Examples:\n  shardmill replay --sink mart --from 2026-01-31T00:00:00Z --to \
                      2026-02-01T00:00:00Z\n  shardmill replay --sink mart --from 2026-01-31T00:00:00Z \
                      --to 2026-02-01T00:00:00Z --swap"
    )]
    Replay(replay::Options),
    /// Prove a pipeline: its file, its plugins, its sinks. Reads no record.
    #[command(after_help = "Example:\n  shardmill check pipeline.toml --json")]
    Check(check::Options),
    /// Take events by HTTP and put them on the pipeline's stream, without running the pipeline.
    #[command(after_help = "Example:\n  shardmill intake pipeline.toml")]
    Intake(intake::Options),
    /// Create, fill, look at and delete streams; serve the embedded one.
    #[command(subcommand)]
    Stream(stream::Command),
    /// Look at a pipeline's dead letters, take them elsewhere, delete them.
    #[command(subcommand)]
    Dlq(dlq::Command),
    /// Look after what an objects sink has written.
    #[command(subcommand)]
    Objects(objects::Command),
    /// Make a new plugin.
    #[command(subcommand)]
    New(new::Command),
    /// Run a plugin's test cases; accept what it does; make cases of real records.
    #[command(
        after_help = "Examples:\n  shardmill test\n  shardmill test geo --update\n  shardmill test geo \
                      --from-dlq --pipeline pipeline.toml --stage geo --redact /user/email"
    )]
    Test(test::Options),
    /// Build, inspect, prove and measure plugins.
    #[command(subcommand)]
    Plugin(plugin::Command),
    /// Compile a component: what this program starts itself for, in a process with limits.
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

/// What every command is given.
#[derive(Clone)]
pub(crate) struct Console {
    /// Reports are printed as JSON.
    pub json: bool,
}

impl Console {
    /// Prints a line of a report for people, without values of variables; nothing when JSON is asked for.
    pub fn say(&self, line: impl std::fmt::Display) {
        if !self.json {
            print_line(masking::hide(line.to_string()));
        }
    }

    /// Prints a line with colours of ours, whose other parts were escaped; nothing when JSON is asked for.
    pub(crate) fn say_styled(&self, line: &str) {
        if !self.json {
            output::print_styled(line);
        }
    }

    /// Prints a report as one JSON line, without values of variables, when JSON is asked for.
    pub fn report(&self, report: &impl serde::Serialize) -> anyhow::Result<()> {
        if self.json {
            print_json(&masking::hide_json(serde_json::to_string(report)?));
        }
        Ok(())
    }
}

/// The limits that a compiling process sets itself.
#[derive(clap::Args)]
struct CompileOptions {
    /// The most memory that this process may have, in bytes.
    #[arg(long)]
    memory_bytes: u64,
    /// The most CPU time that this process may use, in seconds.
    #[arg(long)]
    cpu_seconds: u64,
    /// The process that started this one, with which it ends.
    #[arg(long)]
    parent: u32,
}

impl CompileOptions {
    fn limits(&self) -> compile::OwnLimits {
        let Self { memory_bytes, cpu_seconds, parent } = *self;
        compile::OwnLimits { memory_bytes, cpu_seconds, parent }
    }
}

/// Reads the command line, does what it says, and gives the exit code.
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
            // Into memory first: the generator panics where a pipe is closed.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "shardmill", &mut script);
            output::print_styled(String::from_utf8_lossy(&script).trim_end());
            Ok(())
        }
        command => match runtime() {
            Ok(runtime) => {
                let code = exit_code(runtime.block_on(dispatch(command, &console)));
                shardmill_core::off_thread::end_waits();
                // A thread that is stuck does not keep the process.
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

/// Prints what the parser of the command line found, and gives the exit code. Its errors repeat arguments, which
/// scripts take from names and texts of strangers.
fn misused(mut error: clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // The help or the version that was asked for: our own text, on standard output.
        error.exit();
    }
    // In an argument the ends of lines are escaped, too: after this they cannot be told from those of the parser.
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

/// The part of a parser's error with the characters that steer a terminal escaped; `None`: it repeats no argument.
fn escaped_argument(value: &ContextValue) -> Option<ContextValue> {
    let escaped = |text: &String| shardmill_core::escape::escaped(text, &[]);
    match value {
        ContextValue::String(text) => Some(ContextValue::String(escaped(text))),
        ContextValue::Strings(texts) => {
            Some(ContextValue::Strings(texts.iter().map(escaped).collect()))
        }
        // Tips, of one line each.
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

/// The exit code of a command that has ended; an error is printed.
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

/// Blocks from this size on are given back to the system when they are freed.
#[cfg(target_env = "gnu")]
const LARGE_BLOCK_BYTES: libc::c_int = 1 << 20;

/// Keeps glibc from giving each thread a heap of its own. Batches are made on one thread and dropped
/// on another, so that each heap would keep what others need: 52 MiB instead of 71 for the flights
/// from a file, and a tenth less CPU time. Keeps it from holding what large blocks leave, too.
fn bound_malloc_arenas() {
    #[cfg(target_env = "gnu")]
    {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let arenas = libc::c_int::try_from(cores / 2).unwrap_or(libc::c_int::MAX).max(1);
        // SAFETY: sets a number in malloc's own state, before other threads are started. A refusal
        // leaves things as they are.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
        // By itself glibc raises this to 32 MiB once a large block is freed, and the heap then keeps the
        // holes that large blocks leave. Buffers of a batch stay in the heap.
        // SAFETY: as above.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES) };
        // SAFETY: as above.
        unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * LARGE_BLOCK_BYTES) };
    }
}

/// Logs go to standard error, so that standard output is the command's own.
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
    // An event is one line and steers nothing, whatever its fields hold.
    let kept = KeptCharacters::OneLine { styles };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(move || EscapingWriter::new(LogOutput, kept))
        .with_ansi(styles)
        // It would report its own failures by a macro that panics.
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

/// Writes what the standard library does at a panic. Its own way waits for the reader, and what a panic holds at
/// that time is held for as long.
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

/// Tells a person why the command failed, each cause once, and gives the exit code.
fn print_error(error: &anyhow::Error) -> ExitCode {
    if let Some(config) = error.downcast_ref::<ConfigError>() {
        let is_styled = terminal::is_styled(&std::io::stderr());
        terminal::note_styled(&config.render(is_styled));
        return EXIT_MISUSED.into();
    }
    terminal::note(format_args!("error: {}", shardmill_config::error_text(error)));
    EXIT_FAILED.into()
}

/// Reads a pipeline's file with the process's environment, and checks that no other user can change its
/// state.
fn load(path: &std::path::Path) -> anyhow::Result<PipelineConfig> {
    let config = load_file(path)?;
    config.state_dir.check(config.name.as_str())?;
    if uses_embedded(&config) {
        config.state_dir.check(shardmill_kinesis::served::FOLDER)?;
    }
    Ok(config)
}

/// Reads a pipeline's file for what it says, and not for its state.
fn load_file(path: &std::path::Path) -> anyhow::Result<PipelineConfig> {
    let mut config = shardmill_config::load(path, &SINK_TYPES, &shardmill_config::environment)?;
    masking::register(&config.values);
    config.state_dir = with_trust(config.state_dir);
    Ok(config)
}

/// Whether a pipeline finds an embedded stream by its state folder.
fn uses_embedded(config: &PipelineConfig) -> bool {
    let sinks = config.sinks.iter().chain(&config.dead_letter_sinks);
    let asked = sinks.filter_map(|sink| sink.settings.stream_server());
    let source = config.source.kinesis().map(|kinesis| &kinesis.server);
    source.into_iter().chain(asked).any(|server| matches!(server.endpoint, Endpoint::Embedded))
}

/// The dead letters of a pipeline that ran. Another process may be running it.
fn dead_letters(config: &PipelineConfig) -> anyhow::Result<DeadLetters> {
    let folder = config.state_dir.join(config.name.as_str());
    anyhow::ensure!(
        folder.join("state.db").exists(),
        "pipeline {} has no dead letters: it never ran with its state in {}",
        config.name,
        folder.display()
    );
    Ok(DeadLetters::new(state_beside(config)?))
}

/// The state of a pipeline that another process may be running: where it is of an earlier version, opening
/// it would change it under that process.
fn state_beside(config: &PipelineConfig) -> anyhow::Result<StateStore> {
    let folder = config.state_dir.join(config.name.as_str());
    anyhow::ensure!(
        !StateStore::is_of_earlier_version(&folder)?
            || !PipelineLock::is_taken(&config.state_dir, &config.name)?,
        "pipeline {} is run by an earlier version of shardmill, which could not read its state in {} after \
         this command: give the command with that version, or restart the pipeline with this one first",
        config.name,
        folder.display()
    );
    Ok(StateStore::open(&folder)?)
}

/// The environment variable that names a folder for compiled plugins, in place of `compiled` in the state
/// folder. Pipelines and containers whose state folders are new can share it.
const COMPILED_DIR: &str = "SHARDMILL_COMPILED_DIR";

/// The folder of compiled plugins that [`COMPILED_DIR`] names, else the one in the user's caches
/// (`$XDG_CACHE_HOME/shardmill`); an empty value names none.
fn shared_cache() -> Option<CompileCache> {
    let named = |variable| std::env::var_os(variable).filter(|folder| !folder.is_empty());
    if let Some(folder) = named(COMPILED_DIR) {
        return Some(CompileCache::shared(folder));
    }
    // The specification of base directories: a relative path is invalid, and is ignored.
    let caches =
        named("XDG_CACHE_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute())?;
    Some(CompileCache::of_user(caches.join("shardmill")))
}

/// What a pipeline's plugins are loaded with.
fn plugin_host(config: &PipelineConfig) -> anyhow::Result<PluginHost> {
    shardmill_core::system::check_start()?;
    let engine = PluginEngine::new().map_err(anyhow::Error::from)?;
    let cache = shared_cache().unwrap_or_else(CompileCache::none);
    let cache = cache.or_in_folder(config.state_dir.join("compiled")).in_child_processes();
    // Of components that are stored, nobody knows any more which of the stages they are for.
    let cache = cache.with_limits(config.compile_limits());
    let backends = Backends::from_config(config, &tokio::runtime::Handle::current())?;
    Ok(PluginHost { engine, cache, backends })
}

/// Loads a plugin outside of any pipeline.
fn load_plugin(file: &std::path::Path) -> anyhow::Result<Plugin> {
    shardmill_core::system::check_start()?;
    let engine = PluginEngine::new().map_err(anyhow::Error::from)?;
    let cache = shared_cache().unwrap_or_else(CompileCache::none).in_child_processes();
    Ok(Plugin::load_file(&engine, &cache, file)?.0)
}

/// The argument that names a pipeline's file.
#[derive(clap::Args)]
pub(crate) struct PipelineFile {
    /// The pipeline's file.
    #[arg(default_value = DEFAULT_PIPELINE)]
    pub file: PathBuf,
}
