//! Shared by the tests: the real binary, its processes, and temporary places.

pub mod aggregate;
pub mod flights;
pub mod pipeline;
pub mod player;
pub mod proxy;
pub mod world;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Time limit of any run: many times what the longest one takes, which compiles a plugin's dependencies from scratch
/// beside other tests.
const RUN_MAX: Duration = Duration::from_secs(900);
/// Time limit for anything that a test waits for: many times what it takes on an idle machine.
const WAIT_MAX: Duration = Duration::from_secs(180);

/// Returns the repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace").to_owned()
}

/// Returns every Rust source under `host/`, including tests, with its path from the root. The templates of plugins
/// and the plugins of the tests are not sources of the host.
pub fn host_sources() -> Vec<(PathBuf, String)> {
    let mut sources = Vec::new();
    let mut folders = vec![root().join("host")];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.strip_prefix(root()).expect("below the root").to_owned();
            if path.is_dir() {
                let is_foreign = ["host/workbench/templates", "host/tests/asking"]
                    .map(Path::new)
                    .contains(&&*name);
                folders.extend((!is_foreign).then_some(path));
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources.push((name, std::fs::read_to_string(&path).expect("a source")));
            }
        }
    }
    sources
}

/// Returns a prebuilt plugin's path.
pub fn plugin(name: &str) -> String {
    root().join("plugins/prebuilt").join(format!("{name}.wasm")).display().to_string()
}

/// Returns the binary as a command.
pub fn shardmill(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardmill"));
    command.args(arguments).stdin(Stdio::null());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("AWS_")) {
        command.env_remove(name);
    }
    command
}

/// Runs the binary to its end.
pub fn run(arguments: &[&str]) -> Output {
    output(&mut shardmill(arguments))
}

/// Runs a command to its end. A command that hangs is killed and fails its own test, not all of them.
pub fn output(command: &mut Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    output_of(child, command)
}

/// Waits for the end of a command that was started with pipes; one that hangs is killed.
pub fn output_of(child: Child, command: &Command) -> Output {
    let pid = child.id().to_string();
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait_with_output()));
    if let Ok(output) = end.recv_timeout(RUN_MAX) {
        return output.expect("it ends");
    }
    signal("-KILL", &pid);
    let output = end.recv().expect("killed").expect("it ends");
    panic!("{command:?} runs after {RUN_MAX:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn signal(name: &str, pid: &str) {
    assert!(Command::new("kill").args([name, pid]).status().expect("kill").success());
}

/// Runs the binary, which must succeed; returns its standard output.
pub fn run_ok(arguments: &[&str]) -> String {
    let output = run(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?} failed: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A process that is killed when dropped.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Sends SIGTERM and waits for the end; returns the exit code.
    pub fn terminate(mut self) -> Option<i32> {
        self.ask_to_end();
        self.wait().code()
    }

    /// Sends SIGTERM.
    pub fn ask_to_end(&self) {
        signal("-TERM", &self.0.id().to_string());
    }

    /// Waits for the end, which must come within [`RUN_MAX`].
    pub fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().expect("a state") {
                return status;
            }
            assert!(begun.elapsed() < RUN_MAX, "process {} runs after {RUN_MAX:?}", self.0.id());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Runs a command repeatedly until it succeeds, and kills every run before that. The pauses before the kills are
/// drawn from the seed and grow, so that the kills hit the command at work on fast and on slow machines. Returns the
/// number of kills.
pub fn kill_until_it_ends(seed: u64, command: impl Fn() -> Command) -> u32 {
    const PAUSE_MAX_MS: f64 = 100.0;
    const GROWTH: f64 = 1.3;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut pause_max_ms = PAUSE_MAX_MS;
    for kills in 0.. {
        let mut command = command();
        let run = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut run = Process(run.expect("the binary starts"));
        std::thread::sleep(Duration::from_millis(random.u64(20..pause_max_ms as u64)));
        if let Some(status) = run.0.try_wait().expect("a state") {
            assert!(status.success(), "{status}");
            assert!(kills > 1, "the command was killed only {kills} times");
            return kills;
        }
        pause_max_ms *= GROWTH;
        assert!(pause_max_ms < RUN_MAX.as_millis() as f64, "the command never ends by itself");
    }
    unreachable!("the loop returns at the end")
}

/// Serves the embedded stream from a state folder.
pub fn serve_stream(state_dir: &Path) -> Process {
    let state_dir = state_dir.display().to_string();
    let mut command = shardmill(&["stream", "serve", "--json", "--state-dir", &state_dir]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the binary starts");
    let mut line = String::new();
    let output = child.stdout.take().expect("piped");
    BufReader::new(output).read_line(&mut line).expect("a line");
    assert!(line.contains("http://127.0.0.1:"), "{line}");
    Process(child)
}

/// Sets variables that name the compilers and the binary for a command.
pub fn with_tools(command: &mut Command) -> &mut Command {
    let tools = std::env::var_os("SHARDMILL_TEST_TOOLS")
        .expect("SHARDMILL_TEST_TOOLS names the folders of compilers: run `cargo xtask test`");
    let mut path: Vec<PathBuf> = std::env::split_paths(&tools).collect();
    path.extend(Path::new(env!("CARGO_BIN_EXE_shardmill")).parent().map(Path::to_owned));
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    command.env("PATH", std::env::join_paths(path).expect("folders"));
    // One folder for all tests, so that dependencies are compiled once.
    command.env("CARGO_TARGET_DIR", root().join("target/plugins-in-tests"));
    if let Some(rustc) = std::env::var_os("SHARDMILL_TEST_WASM_RUSTC") {
        command.env("RUSTC", rustc);
    }
    command
}

/// Opens a SQLite database that a run may be writing to.
pub fn sqlite(path: &Path) -> rusqlite::Connection {
    let database = rusqlite::Connection::open(path).expect("a database");
    database.busy_timeout(Duration::from_secs(20)).expect("set");
    database
}

/// Waits until `done` returns true, at most [`WAIT_MAX`].
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < WAIT_MAX, "waited {WAIT_MAX:?} for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Returns a port on loopback that nobody listens on.
pub fn free_port() -> u16 {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    free.local_addr().expect("an address").port()
}

/// Token of the admin ports of the tests.
pub const ADMIN_TOKEN: &str = "token-of-the-tests";

/// Returns `[admin]` with a port and the token that [`http_get`] sends.
pub fn admin(port: u16) -> String {
    format!("[admin]\nlisten = \"127.0.0.1:{port}\"\ntoken = \"{ADMIN_TOKEN}\"")
}

/// Sends an HTTP GET with the token of the tests; returns an empty text while nobody answers.
pub fn http_get(port: u16, path: &str) -> String {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else {
        return String::new();
    };
    let token = format!("Authorization: Bearer {ADMIN_TOKEN}");
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{token}\r\nConnection: close\r\n\r\n");
    let mut answer = String::new();
    let asked = stream.write_all(request.as_bytes());
    if asked.is_err() || stream.read_to_string(&mut answer).is_err() {
        return String::new();
    }
    answer
}

/// Returns the URL of the throw-away PostgreSQL that `cargo xtask test` has started.
pub fn postgres_url() -> String {
    std::env::var("SHARDMILL_TEST_POSTGRES")
        .expect("SHARDMILL_TEST_POSTGRES names a throw-away PostgreSQL: run `cargo xtask test`")
}

/// Returns the flights that `cargo xtask data flights` has downloaded.
pub fn flights_csv() -> PathBuf {
    let path = root().join("data/flights.csv");
    assert!(path.exists(), "{} is missing: run `cargo xtask data flights`", path.display());
    path
}

/// Writes every fourth flight, with the header, into a folder: for tests that do not depend on the number of flights.
pub fn some_flights_csv(folder: &Path) -> PathBuf {
    let text = std::fs::read_to_string(flights_csv()).expect("the flights");
    let some: String = text.split_inclusive('\n').step_by(4).collect();
    let path = folder.join("some_flights.csv");
    std::fs::write(&path, some).expect("written");
    path
}

/// Runs statements on the throw-away PostgreSQL; returns the first column of their results.
pub fn postgres(sql: &str) -> Vec<String> {
    postgres_at(&postgres_url(), sql)
}

/// Like `postgres`, on any server.
pub fn postgres_at(url: &str, sql: &str) -> Vec<String> {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let (client, connection) =
            tokio_postgres::connect(url, tokio_postgres::NoTls).await.expect("a server");
        tokio::spawn(connection);
        let messages = client.simple_query(sql).await.expect(sql);
        messages
            .into_iter()
            .filter_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0)?.to_owned()),
                _ => None,
            })
            .collect()
    })
}
