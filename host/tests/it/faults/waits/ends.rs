//! SIGTERM and fatal errors end the process, whatever a lane waits for.

use std::io::Read as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::{Run, SHORT_DRAIN, SLACK, SilentServer, answers_within, rows_file, text_of};
use crate::support::pipeline::PipelineToml;
use crate::support::proxy::{Fault, Proxy};
use crate::support::world::{Pipeline, STREAM, World};
use crate::support::{postgres, postgres_url, sqlite, wait_for};
use crate::swap::fixture::Fixture;

/// Time limit for an end with [`SHORT_DRAIN`].
const END_MAX: Duration = Duration::from_secs(1 + SLACK.as_secs());
/// More rows than a lane may buffer.
const ROWS: u64 = 20_000;

/// Makes a pipeline over many rows whose sink is blocked; the lane waits for memory.
fn blocked_pipeline(folder: &std::path::Path, sink: &str) -> PipelineToml {
    let rows = rows_file(folder, ROWS);
    PipelineToml::new(folder, "waits")
        .pipeline("buffer = \"1 MiB\"")
        .timing(SHORT_DRAIN)
        .file(&rows, "format = \"application/json\"")
        .route_all_to(&["mart"])
        .sink("mart", sink)
}

#[test]
fn fault_01_sigterm_ends_a_lane_that_waits_for_a_sink_which_refuses() {
    let folder = tempfile::tempdir().expect("a folder");
    let mart = folder.path().join("mart.db");
    sqlite(&mart)
        .execute_batch("CREATE TABLE rows (id INTEGER NOT NULL, text TEXT NOT NULL)")
        .expect("a table");
    let lines = format!("type = \"sqlite\"\npath = \"{}\"\ntable = \"rows\"", mart.display());
    let file = blocked_pipeline(folder.path(), &lines).write();
    // Every commit fails, and the sink is to blame.
    let trigger = "CREATE TRIGGER refuse BEFORE INSERT ON rows WHEN NEW.id >= 0
        BEGIN SELECT abs(-9223372036854775807 - 1); END";
    sqlite(&mart).execute_batch(trigger).expect("a trigger");
    let mut run = Run::start(&file);
    run.wait_logged("blocked");
    assert_eq!(run.terminated_within(END_MAX).code(), Some(0), "{}", run.text());
}

#[test]
fn fault_01_sigterm_ends_a_lane_that_waits_for_a_sink_which_does_not_answer() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = SilentServer::start();
    let lines =
        format!("type = \"http\"\nprivate = true\nurl = \"http://127.0.0.1:{}/rows\"", server.port);
    let file = blocked_pipeline(folder.path(), &lines).write();
    let mut run = Run::start(&file);
    server.wait_asked();
    assert_eq!(run.terminated_within(END_MAX).code(), Some(0), "{}", run.text());
}

#[test]
fn fault_01_sigterm_ends_a_lane_whose_table_is_locked() {
    let world = World::new(1);
    let table = format!("waits_locked_{}", std::process::id());
    postgres(&format!(
        "CREATE TABLE {table} (id bigint NOT NULL, key text NOT NULL, n bigint NOT NULL)"
    ));
    let file = PipelineToml::new(world.folder.path(), "reading")
        .pipeline("buffer = \"1 MiB\"")
        .timing(SHORT_DRAIN)
        .stream(STREAM, "embedded", "poll_interval = \"200 ms\"")
        .route_all_to(&["mart"])
        .postgres("mart", &table)
        .write();
    let mut run = Run::start(&file);
    run.wait_logged("reading");
    let locker = Locker::lock(&table);
    world.put(0..ROWS, 50);
    let waits = format!(
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{table}'::regclass"
    );
    wait_for("the sink to wait for the table", || postgres(&waits)[0] != "0");
    assert_eq!(run.terminated_within(END_MAX).code(), Some(0), "{}", run.text());
    drop(locker);
}

/// Session that locks a table.
struct Locker(Option<std::sync::mpsc::Sender<()>>, Option<std::thread::JoinHandle<()>>);

impl Locker {
    fn lock(table: &str) -> Self {
        let (release, released) = std::sync::mpsc::channel::<()>();
        let (locked, is_locked) = std::sync::mpsc::channel();
        let sql = format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
        let locker = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            runtime.block_on(async {
                let url = postgres_url();
                let connected = tokio_postgres::connect(&url, tokio_postgres::NoTls);
                let (client, connection) = connected.await.expect("a server");
                tokio::spawn(connection);
                client.batch_execute(&sql).await.expect("locked");
                locked.send(()).expect("a test");
                let wait = tokio::task::spawn_blocking(move || released.recv());
                let _ = wait.await;
            });
        });
        is_locked.recv().expect("locked");
        Self(Some(release), Some(locker))
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        drop(self.0.take());
        if let Some(locker) = self.1.take() {
            let _ = locker.join();
        }
    }
}

/// Standard output is a pipe that nobody reads: the thread that writes to it never returns.
#[test]
fn fault_01_the_process_ends_5_s_after_its_drain_whatever_thread_is_stuck() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = blocked_pipeline(folder.path(), "type = \"stdout\"").write();
    let mut run = Run::with_output(&file, Stdio::piped());
    run.wait_logged("reading");
    wait_for("a full pipe", || is_stuck_in_pipe(run.process.0.id()));
    let begun = std::time::Instant::now();
    let status = run.terminated_within(Duration::from_secs(1 + 5) + SLACK);
    // The process ends by itself, or is forced to end where its end waits for that thread.
    assert!(matches!(status.code(), Some(0 | 1)), "{status}: {}", run.text());
    assert!(begun.elapsed() >= Duration::from_secs(1));
}

/// Whether some thread of the process waits in a write to a pipe.
fn is_stuck_in_pipe(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("threads");
    threads.flatten().any(|thread| {
        let state = std::fs::read_to_string(thread.path().join("wchan")).unwrap_or_default();
        state.contains("pipe_write")
    })
}

#[test]
fn fault_01_a_second_sigterm_ends_the_process_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = blocked_pipeline(folder.path(), "type = \"stdout\"").timing("drain = \"60 s\"");
    let mut run = Run::with_output(&file.write(), Stdio::piped());
    run.wait_logged("reading");
    wait_for("a full pipe", || is_stuck_in_pipe(run.process.0.id()));
    run.process.ask_to_end();
    run.wait_logged("draining");
    assert_eq!(run.terminated_within(SLACK).code(), Some(130));
}

/// One shard is blocked while the stream is replaced by another stream of the same name.
#[test]
fn fault_01_a_fatal_error_is_logged_when_it_happens_and_ends_blocked_lanes() {
    let world = World::new(2);
    let trigger = "CREATE TRIGGER refuse BEFORE INSERT ON rows WHEN NEW.id >= 0
        BEGIN SELECT abs(-9223372036854775807 - 1); END";
    world.mart().execute_batch(trigger).expect("a trigger");
    world.put(0..20_000, 50);
    let file = PipelineToml::new(world.folder.path(), "reading")
        .pipeline("buffer = \"1 MiB\"")
        .timing(&SHORT_DRAIN.replace("1 s", "4 s"))
        .stream(STREAM, "embedded", "poll_interval = \"200 ms\"")
        .route_all_to(&["mart"])
        .sqlite("mart", "rows")
        .write();
    let mut run = Run::start(&file);
    run.wait_logged("blocked");
    world.delete();
    world.create(2);
    run.wait_logged("the pipeline stops");
    let status = run.ends_within(Duration::from_secs(4) + SLACK);
    assert_eq!(status.code(), Some(1), "{}", run.text());
}

/// A call that lists the shards is never answered.
#[test]
fn fault_01_sigterm_ends_a_look_for_shards_that_is_never_answered() {
    let world = World::new(1);
    let mut looks = 0;
    let proxy = Proxy::start(&world.address, 1, move |operation, _| {
        let is_look = operation.contains("ListShards") || operation.contains("DescribeStream");
        looks += u32::from(is_look);
        match is_look && looks > 6 {
            true => Fault::Slow(Duration::from_secs(600)),
            false => Fault::None,
        }
    });
    let file = PipelineToml::new(world.folder.path(), "reading")
        .timing(SHORT_DRAIN)
        .stream("test", &proxy.url, "poll_interval = \"200 ms\"")
        .route_all_to(&["mart"])
        .sqlite("mart", "rows")
        .write();
    let mut run = Run::start(&file);
    run.wait_logged("reading");
    wait_for("an unanswered list of shards", || {
        let seen = proxy.seen.lock().expect("a lock");
        seen.iter().any(|(_, fault)| matches!(fault, Fault::Slow(_)))
    });
    assert_eq!(run.terminated_within(END_MAX).code(), Some(0), "{}", run.text());
}

/// Writes a pipeline over a stream of a server that does not answer.
fn reading_from(folder: &std::path::Path, server: &SilentServer) -> String {
    PipelineToml::new(folder, "waits")
        .timing(SHORT_DRAIN)
        .stream("test", &format!("http://127.0.0.1:{}", server.port), "")
        .route_all_to(&["mart"])
        .sink("mart", "type = \"discard\"")
        .write()
}

/// The server accepts the connection and never answers, before anything runs.
#[test]
fn fault_01_sigterm_ends_a_start_whose_server_does_not_answer() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = SilentServer::start();
    let file = reading_from(folder.path(), &server);
    let mut run = Run::start(&file);
    server.wait_asked();
    run.terminated_within(END_MAX);
    assert!(run.logged("draining"), "{}", run.text());
}

/// The thread that handles signals may be slower than the rest of the process, which has nothing to drain and ends.
#[test]
fn fault_01_an_end_is_announced_before_it_comes() {
    let folder = tempfile::tempdir().expect("a folder");
    for _ in 0..8 {
        let server = SilentServer::start();
        let file = reading_from(folder.path(), &server);
        let mut run = Run::start(&file);
        server.wait_asked();
        run.run_last("signals");
        run.terminated_within(END_MAX);
        assert!(run.logged("draining"), "{}", run.text());
    }
}

/// The same for `stream tail`, which has nothing to drain.
#[test]
fn fault_01_sigterm_ends_a_tail_whose_server_does_not_answer() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = SilentServer::start();
    let file = reading_from(folder.path(), &server);
    let tail = crate::support::shardmill(&["stream", "tail", "--pipeline", &file]).spawn();
    let tail = crate::support::Process(tail.expect("the binary starts"));
    server.wait_asked();
    let begun = Instant::now();
    tail.terminate();
    assert!(begun.elapsed() < END_MAX, "{:?}", begun.elapsed());
}

/// A job that is stopped early, for example when it is evicted, must not look finished.
#[test]
fn fault_01_a_run_until_caught_up_that_is_stopped_before_that_says_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = SilentServer::start();
    let url = format!("http://127.0.0.1:{}/rows", server.port);
    let rows = rows_file(folder.path(), 10);
    let file = PipelineToml::new(folder.path(), "waits")
        .timing(SHORT_DRAIN)
        .file(&rows, "format = \"application/json\"")
        .route_all_to(&["mart"])
        .sink("mart", &format!("type = \"http\"\nprivate = true\nurl = \"{url}\""))
        .write();
    let log = folder.path().join("run.log");
    let mut command = crate::support::shardmill(&["run", &file, "-v", "--until-caught-up"]);
    command.stdout(Stdio::null()).stderr(std::fs::File::create(&log).expect("a log"));
    let process = crate::support::Process(command.spawn().expect("the binary starts"));
    let mut run = Run { process, log };
    server.wait_asked();
    assert_eq!(run.terminated_within(END_MAX).code(), Some(1), "{}", run.text());
    assert!(run.logged("stopped before it had caught up"), "{}", run.text());
}

/// Neither the sinks of dead letters answer nor does a client of the intake finish its request.
#[test]
fn fault_01_lanes_copies_and_the_intake_end_within_one_drain() {
    let world = World::new(1);
    let server = SilentServer::start();
    let url = format!("http://127.0.0.1:{}", server.port);
    let port = crate::support::free_port();
    let file = PipelineToml::new(world.folder.path(), "reading")
        .timing(&SHORT_DRAIN.replace("1 s", "2 s"))
        .stream("test", "embedded", "poll_interval = \"200 ms\"")
        .route_all_to(&["mart"])
        .sink("mart", &format!("type = \"http\"\nprivate = true\nurl = \"{url}/rows\""))
        .table(&format!("[intake]\nlisten = \"127.0.0.1:{port}\""))
        .table(&format!(
            "[dead_letters]\nsinks = [\"copies\"]\n[[sink]]\nname = \"copies\"\ntype = \"http\"\nprivate = true\n\
             url = \"{url}/letters\""
        ))
        .write();
    let mut run = Run::start(&file);
    run.wait_logged("reading");
    world.put(0..10, 2);
    world.put_raw(std::iter::once(("key".to_owned(), b"no JSON".to_vec())));
    server.wait_asked();
    // Half a request, which keeps the intake busy.
    let mut client = std::net::TcpStream::connect(("127.0.0.1", port)).expect("connected");
    std::io::Write::write_all(
        &mut client,
        b"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nhalf",
    )
    .expect("sent");
    let status = run.terminated_within(Duration::from_secs(2) + SLACK);
    assert_eq!(status.code(), Some(0), "{}", run.text());
    drop(client);
}

#[test]
fn fault_01_sigterm_ends_a_redrive_whose_sink_does_not_answer() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = SilentServer::start();
    let rows = folder.path().join("rows.ndjson");
    std::fs::write(&rows, "{\"id\":1}\n").expect("written");
    let passing = crate::support::plugin("hostile");
    let trap =
        |word: &str| format!("config = {{ format = \"application/json\", trap_on = \"{word}\"");
    let first = PipelineToml::new(folder.path(), "waits")
        .timing(SHORT_DRAIN)
        .file(&rows, "format = \"application/json\"")
        .stage("route", &passing, &format!("{} }}\nroutes = {{ out = [\"mart\"] }}", trap("id")))
        .sink("mart", "type = \"discard\"");
    crate::support::run_ok(&["run", &first.write(), "--until-caught-up"]);
    let url = format!("http://127.0.0.1:{}/rows", server.port);
    let second = PipelineToml::new(folder.path(), "waits")
        .timing(SHORT_DRAIN)
        .file(&rows, "format = \"application/json\"")
        .stage(
            "route",
            &passing,
            "config = { format = \"application/json\" }\nroutes = { out = [\"mart\"] }",
        )
        .sink("mart", &format!("type = \"http\"\nprivate = true\nurl = \"{url}\""))
        .write();
    // A redrive runs what the state says, so a start must record the other sink first.
    crate::support::run_ok(&["run", &second, "--until-caught-up"]);
    let log = folder.path().join("redrive.log");
    let mut command =
        crate::support::shardmill(&["dlq", "redrive", "--all", "--pipeline", &second, "-v"]);
    command.stdout(Stdio::null()).stderr(std::fs::File::create(&log).expect("a log"));
    let process = crate::support::Process(command.spawn().expect("the binary starts"));
    let mut run = Run { process, log };
    wait_for(&format!("a request: {}", run.text()), || {
        server.requests.load(std::sync::atomic::Ordering::SeqCst) > 0
            || run.process.0.try_wait().expect("a state").is_some()
    });
    assert!(run.process.0.try_wait().expect("a state").is_none(), "{}", run.text());
    let status = run.terminated_within(END_MAX);
    assert_eq!(status.code(), Some(1), "{}", run.text());
    assert!(run.logged("dlq redrive` continues it"), "{}", run.text());
}

#[test]
fn fault_01_a_shadow_is_at_most_a_day_and_ends_with_the_pipeline() {
    let mut fixture = Fixture::new(1);
    fixture.timing = "drain = \"1 s\"".into();
    fixture.start();
    fixture.world.put(0..100, 10);
    fixture.wait_rows(100);
    let version = fixture.version("v2 none");
    let file = fixture.pipeline_file();
    let swap = ["plugin", "swap", "stamp", &version, "--pipeline", &file, "--shadow"];
    let refused = answers_within(&[&swap[..], &["2 days"]].concat(), SLACK);
    assert!(text_of(&refused).contains("at most one day"), "{}", text_of(&refused));
    let mut shadow = crate::support::shardmill(&[&swap[..], &["1 h"]].concat());
    let shadow = shadow.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("started");
    let mut shadow = crate::support::Process(shadow);
    wait_for("the trial", || fixture.log().contains("step=trial"));
    let begun = std::time::Instant::now();
    fixture.stop();
    assert!(begun.elapsed() < END_MAX, "{:?}", begun.elapsed());
    shadow.wait();
    let mut said = String::new();
    let error = shadow.0.stderr.take().expect("piped").read_to_string(&mut said);
    assert!(error.is_ok() && !said.is_empty());
}

#[test]
fn fault_01_a_lane_that_waits_does_not_keep_the_world_from_ending() {
    // The simple case for comparison: nothing is blocked, and the process ends quickly.
    let world = World::new(2);
    world.put(0..200, 10);
    let run = world.start(&Pipeline::default());
    world.wait_rows(200);
    let begun = std::time::Instant::now();
    assert_eq!(run.terminate(), Some(0));
    assert!(begun.elapsed() < SLACK);
    world.assert_each_once_in_order(200);
}

/// Before the process handles signals, SIGHUP would end it.
#[test]
fn fault_01_a_sighup_during_the_start_is_no_end() {
    let folder = tempfile::tempdir().expect("a folder");
    let rows = rows_file(folder.path(), 10);
    let state = folder.path().join("state/waits");
    let file = PipelineToml::new(folder.path(), "waits")
        .file(&rows, "format = \"application/json\"")
        .route_all_to(&["nowhere"])
        .sink("nowhere", "type = \"discard\"")
        .write();
    let mut command = crate::support::shardmill(&["run", &file]);
    // Without a cache the plugin is compiled first. That gives the test time to send the signal.
    command.env("XDG_CACHE_HOME", folder.path()).env_remove("SHARDMILL_COMPILED_DIR");
    let mut run = crate::support::Process(command.spawn().expect("it starts"));
    let signed = || std::fs::read_to_string(state.join("lock")).is_ok_and(|text| !text.is_empty());
    wait_for("the lock", signed);
    let pid = run.0.id().to_string();
    let sent = std::process::Command::new("kill").args(["-HUP", &pid]).status().expect("kill");
    assert!(sent.success());
    assert!(run.wait().success(), "the run ends with the file");
}
