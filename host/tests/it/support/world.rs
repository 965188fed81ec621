//! Small world for tests of reading: a served stream, a pipeline of JSON rows into a table, and the questions that
//! each of these tests asks about that table.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_sdk_kinesis::Client;
use aws_sdk_kinesis::types::Shard;
use bytes::Bytes;
use shardmill_core::record::StreamRef;
use shardmill_kinesis::producer::Producer;
use shardmill_kinesis::put_call::NewRecord;
use shardmill_kinesis::{client, served, stream};

use super::pipeline::{PipelineToml, SHORT_PAUSES};
use super::{Process, serve_stream, shardmill, wait_for};

/// Stream of every world.
pub const STREAM: &str = "test";

/// A folder, a served stream and a client.
pub struct World {
    /// Folder of all files.
    pub folder: tempfile::TempDir,
    /// Address of the server, such as `127.0.0.1:4567`.
    pub address: String,
    /// Client of the server.
    pub client: Client,
    runtime: tokio::runtime::Runtime,
    server: Option<Process>,
}

/// Differences of a pipeline from the plain one.
#[derive(Clone)]
pub struct Pipeline {
    /// `embedded`, or a proxy's URL.
    pub endpoint: String,
    /// Further lines of `[pipeline]`.
    pub settings: String,
    /// Further lines of `[source]`.
    pub source: String,
    /// Lines of the only stage, whose route is `all`; `None`: it passes rows on unchanged.
    pub stage: Option<String>,
    /// PostgreSQL table for the rows; `None`: the world's SQLite table.
    pub postgres_table: Option<String>,
    /// Further lines of the pipeline, after the sink's.
    pub sink: String,
    /// Further lines of `[timing]`.
    pub timing: String,
}

impl Default for Pipeline {
    fn default() -> Self {
        Self {
            endpoint: "embedded".into(),
            settings: String::new(),
            source: String::new(),
            stage: None,
            postgres_table: None,
            sink: String::new(),
            timing: String::new(),
        }
    }
}

impl World {
    /// Serves a stream with this many shards from a process of its own.
    pub fn new(shards: u32) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let state = folder.path().join("state");
        let server = serve_stream(&state);
        let url = served::find(&state).expect("served");
        Self::at(folder, url.as_str(), Some(server), shards)
    }

    /// Uses a stream on a server that is already running.
    pub fn at(folder: tempfile::TempDir, url: &str, server: Option<Process>, shards: u32) -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let url = url::Url::parse(url).expect("a URL");
        let address = url.as_str().trim_start_matches("http://").trim_end_matches('/').to_owned();
        let client =
            runtime.block_on(client::connect(&client::Server::at(&url))).expect("connected");
        let world = Self { folder, address, client, runtime, server };
        world.create(shards);
        let sql = "CREATE TABLE rows (id INTEGER NOT NULL, key TEXT NOT NULL, n INTEGER NOT NULL)";
        world.mart().execute(sql, ()).expect("created");
        world
    }

    /// Makes an empty stream on a server of another implementation. All tests share that server, and all streams have
    /// one name: the world belongs to the test while it holds the guard.
    pub fn on_other_server(shards: u32) -> (MutexGuard<'static, ()>, Self) {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let url = std::env::var("SHARDMILL_TEST_KINESIS_LOCAL")
            .expect("SHARDMILL_TEST_KINESIS_LOCAL names a second server: run `cargo xtask test`");
        let world = Self::at(tempfile::tempdir().expect("a folder"), &url, None, shards);
        // A failed test leaves its stream.
        world.delete();
        world.create(shards);
        (alone, world)
    }

    /// Kills the process that serves the stream.
    pub fn kill_server(&mut self) {
        drop(self.server.take());
    }

    /// Creates the stream and waits for it.
    pub fn create(&self, shards: u32) {
        self.runtime.block_on(async {
            stream::create(&self.client, &stream_ref(), shards).await.expect("created");
        });
        self.active();
    }

    /// Deletes the stream and waits until it is gone and until the current second is over. The server stores creation
    /// times in whole seconds, so a reader could not distinguish two streams created within one second.
    pub fn delete(&self) {
        let wait = Duration::from_secs(20);
        self.runtime.block_on(stream::delete(&self.client, &stream_ref(), wait)).expect("deleted");
        let second = || chrono::Utc::now().timestamp();
        let deleted = second();
        super::wait_for("the next second", || second() > deleted);
    }

    /// Waits until the stream is ACTIVE.
    pub fn active(&self) {
        let wait = Duration::from_secs(20);
        self.runtime.block_on(async {
            let stream = stream_ref();
            stream::wait_active(&self.client, &stream, wait, &mut |_, _| {}).await.expect("active");
        });
    }

    /// Puts `{"id":…,"key":…,"n":…}` for each id in order; the key is `id % keys`, `n` is `id`.
    pub fn put(&self, ids: std::ops::Range<u64>, keys: u64) {
        self.put_raw(ids.map(|id| (format!("key-{}", id % keys), row(id, keys))));
    }

    /// Puts records as they are.
    pub fn put_raw(&self, records: impl Iterator<Item = (String, Vec<u8>)>) {
        self.runtime.block_on(async {
            let mut producer = Producer::new(self.client.clone(), stream_ref());
            for (partition_key, payload) in records {
                let record = NewRecord { partition_key, payload: Bytes::from(payload) };
                producer.put(record).await.expect("put");
            }
            producer.flush().await.expect("put");
        });
    }

    /// Returns the shards that accept records.
    pub fn open_shards(&self) -> Vec<Shard> {
        let listed = self.client.list_shards().stream_name(STREAM).send();
        let listed = self.runtime.block_on(listed).expect("listed");
        let is_open = |shard: &Shard| {
            shard.sequence_number_range().is_some_and(|it| it.ending_sequence_number().is_none())
        };
        listed.shards.unwrap_or_default().into_iter().filter(is_open).collect()
    }

    /// Runs a call to the server.
    pub fn block_on<T>(&self, call: impl Future<Output = T>) -> T {
        self.runtime.block_on(call)
    }

    /// Splits a shard in its middle.
    pub fn split(&self, shard: &Shard) {
        let (start, end) = hashes(shard);
        let call = self.client.split_shard().stream_name(STREAM).shard_to_split(shard.shard_id());
        let call = call.new_starting_hash_key((start + (end - start) / 2 + 1).to_string());
        self.runtime.block_on(call.send()).expect("split");
        self.active();
    }

    /// Merges two adjacent shards.
    pub fn merge(&self, shard: &Shard, adjacent: &Shard) {
        let call = self.client.merge_shards().stream_name(STREAM).shard_to_merge(shard.shard_id());
        let call = call.adjacent_shard_to_merge(adjacent.shard_id());
        self.runtime.block_on(call.send()).expect("merged");
        self.active();
    }

    /// Writes the pipeline's file; returns its path.
    pub fn pipeline(&self, pipeline: &Pipeline) -> String {
        let data = self.folder.path();
        let Pipeline { endpoint, settings, source, stage, postgres_table, sink, timing } = pipeline;
        let file = PipelineToml::new(data, "reading")
            .pipeline(settings)
            .timing(&format!("{SHORT_PAUSES}{timing}"))
            .stream(STREAM, endpoint, source);
        let file = match stage {
            None => file.route_all_to(&["mart"]),
            Some(lines) => {
                let head = "[[stage]]\nname = \"route\"";
                file.table(&format!("{head}\n{lines}\nroutes = {{ all = [\"mart\"] }}"))
            }
        };
        let file = match postgres_table {
            None => file.sqlite("mart", "rows"),
            Some(table) => file.postgres("mart", table),
        };
        file.table(sink).write()
    }

    /// Runs a pipeline until it has caught up, which must succeed. Returns standard error.
    pub fn catch_up(&self, pipeline: &Pipeline) -> String {
        let path = self.pipeline(pipeline);
        let output = super::run(&["run", &path, "--until-caught-up", "-v"]);
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{log}");
        log
    }

    /// Starts a pipeline and waits until it reads.
    pub fn start(&self, pipeline: &Pipeline) -> Process {
        let path = self.pipeline(pipeline);
        let log = std::fs::File::create(self.log()).expect("a log");
        let mut command = shardmill(&["run", &path, "-v"]);
        let run = command.stdout(std::process::Stdio::null()).stderr(log).spawn();
        let run = Process(run.expect("the binary starts"));
        wait_for("the run to read", || self.logged("reading"));
        run
    }

    /// Returns the path of the log of the run that was started last.
    pub fn log(&self) -> PathBuf {
        self.folder.path().join("run.log")
    }

    /// Whether that log contains a text.
    pub fn logged(&self, text: &str) -> bool {
        std::fs::read_to_string(self.log()).unwrap_or_default().contains(text)
    }

    /// Opens the data mart.
    pub fn mart(&self) -> rusqlite::Connection {
        super::sqlite(&self.folder.path().join("mart.db"))
    }

    /// Opens the pipeline's state.
    pub fn state(&self) -> rusqlite::Connection {
        let path = self.folder.path().join("state/reading/state.db");
        rusqlite::Connection::open(path).expect("the state")
    }

    /// Returns the number of rows so far.
    pub fn rows(&self) -> u64 {
        self.mart().query_row("SELECT count(*) FROM rows", (), |row| row.get(0)).expect("a count")
    }

    /// Waits for this many rows.
    pub fn wait_rows(&self, count: u64) {
        wait_for(&format!("{count} rows"), || self.rows() >= count);
    }

    /// Asserts that each id of `0..count` is there once, and that the rows of each key are in the order of the
    /// stream.
    pub fn assert_each_once_in_order(&self, count: u64) {
        let mart = self.mart();
        let mut query = mart.prepare("SELECT id, key, n FROM rows ORDER BY rowid").expect("sql");
        let rows = query.query_map((), |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
        let rows: Vec<(u64, String, u64)> =
            rows.expect("rows").map(|row| row.expect("a row")).collect();
        assert_once_in_order(rows, count);
    }
}

/// The same assertion for rows (id, key, n) in the order in which they were written.
pub fn assert_once_in_order(rows: Vec<(u64, String, u64)>, count: u64) {
    let mut last_of_key: HashMap<String, u64> = HashMap::new();
    let mut seen = vec![0u32; count as usize];
    for (id, key, n) in rows {
        seen[id as usize] += 1;
        if let Some(last) = last_of_key.insert(key.clone(), n) {
            assert!(last < n, "{key}: {n} came after {last}");
        }
    }
    let lost = seen.iter().filter(|times| **times == 0).count();
    let doubled = seen.iter().filter(|times| **times > 1).count();
    assert_eq!((lost, doubled), (0, 0), "lost and duplicated of {count}");
}

/// Returns one row.
pub fn row(id: u64, keys: u64) -> Vec<u8> {
    format!(r#"{{"id":{id},"key":"key-{}","n":{id}}}"#, id % keys).into_bytes()
}

/// Returns the stream's reference for calls of the library.
pub fn stream_ref() -> StreamRef {
    StreamRef::parse(STREAM).expect("a name")
}

/// Returns a shard's range of hash keys.
pub fn hashes(shard: &Shard) -> (u128, u128) {
    let range = shard.hash_key_range().expect("a range");
    let parse = |text: &str| text.parse().expect("a hash");
    (parse(range.starting_hash_key()), parse(range.ending_hash_key()))
}
