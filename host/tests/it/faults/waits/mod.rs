//! Waits: each one ends at a stop, at a fatal error elsewhere, or at a deadline.

mod changes;
mod ends;
mod search;
mod state;
mod system;

use std::io::Read as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::{Process, shardmill, wait_for};

/// Extra time for an end beside its drain, for a busy machine.
const SLACK: Duration = Duration::from_secs(4);

/// A short drain, and short pauses.
const SHORT_DRAIN: &str =
    "drain = \"1 s\"\nretry_pause = \"50 ms\"\nshard_sync = \"200 ms\"\ncheckpoint = \"50 ms\"\n";

/// Run in the background, with its log.
struct Run {
    process: Process,
    log: PathBuf,
}

impl Run {
    /// Starts the pipeline of a file.
    fn start(pipeline: &str) -> Self {
        Self::with_output(pipeline, Stdio::null())
    }

    /// Like `start`, with this standard output.
    fn with_output(pipeline: &str, output: Stdio) -> Self {
        let log = Path::new(pipeline).with_extension("log");
        let file = std::fs::File::create(&log).expect("a log");
        let mut command = shardmill(&["run", pipeline, "-v"]);
        let child = command.stdout(output).stderr(file).spawn().expect("the binary starts");
        Self { process: Process(child), log }
    }

    fn logged(&self, text: &str) -> bool {
        self.text().contains(text)
    }

    fn text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn wait_logged(&self, text: &str) {
        wait_for(&format!("{text:?} in the log:\n{}", self.text()), || self.logged(text));
    }

    /// Waits for the end, which must come within this time.
    fn ends_within(&mut self, time: Duration) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.process.0.try_wait().expect("a state") {
                return status;
            }
            assert!(begun.elapsed() < time, "no end within {time:?}; the log:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Lets a thread of the process run only while all its other threads wait: as slow as any machine could make it.
    fn run_last(&self, thread: &str) {
        let process = self.process.0.id();
        let own = std::fs::read_to_string("/proc/self/status").expect("a status");
        let allowed = own.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let core = allowed.and_then(|list| list.trim().split([',', '-']).next()).expect("a core");
        let set = |command: &mut std::process::Command| {
            let status = command.stdout(Stdio::null()).status();
            assert!(status.expect("util-linux is there").success(), "{command:?}");
        };
        set(std::process::Command::new("taskset").args(["-acp", core, &process.to_string()]));
        let is_it = |task: &PathBuf| {
            let name = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
            name.trim_end() == thread
        };
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("threads");
        let task = tasks.flatten().map(|task| task.path()).find(is_it).expect("the thread runs");
        let id = task.file_name().and_then(std::ffi::OsStr::to_str).expect("a number");
        set(std::process::Command::new("chrt").args(["--idle", "--pid", "0", id]));
    }

    /// Sends SIGTERM, then waits for the end, which must come within this time.
    fn terminated_within(&mut self, time: Duration) -> ExitStatus {
        self.process.ask_to_end();
        self.ends_within(time)
    }
}

/// Runs a command that must end within this time.
fn answers_within(arguments: &[&str], time: Duration) -> Output {
    let child = shardmill(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("the binary starts");
    let begun = Instant::now();
    while child.try_wait().expect("a state").is_none() {
        if begun.elapsed() >= time {
            let _ = child.kill();
            panic!("{arguments:?}: no answer within {time:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().expect("it ended")
}

fn text_of(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

/// Writes `rows.ndjson` with this many rows; returns its path.
fn rows_file(folder: &Path, rows: u64) -> PathBuf {
    let path = folder.join("rows.ndjson");
    let padding = "x".repeat(200);
    let lines: String =
        (0..rows).map(|id| format!("{{\"id\":{id},\"text\":\"{padding}\"}}\n")).collect();
    std::fs::write(&path, lines).expect("written");
    path
}

/// Server on loopback that accepts connections and requests and never answers.
struct SilentServer {
    port: u16,
    requests: Arc<AtomicUsize>,
}

impl SilentServer {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let requests = Arc::<AtomicUsize>::default();
        let seen = requests.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let seen = seen.clone();
                std::thread::spawn(move || {
                    let mut connection = connection;
                    let mut bytes = [0; 1_024];
                    while connection.read(&mut bytes).is_ok_and(|read| read > 0) {
                        seen.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        Self { port, requests }
    }

    fn wait_asked(&self) {
        wait_for("a request", || self.requests.load(Ordering::SeqCst) > 0);
    }
}
