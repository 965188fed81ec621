//! A stream, a pipeline with one stage that stamps its version into rows, and a table of these rows.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;

use crate::support::pipeline::PipelineToml;
use crate::support::world::World;
use crate::support::{Process, plugin, postgres, postgres_url, run, shardmill, wait_for};

/// Row of the table, ordered by its shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamped {
    pub id: u64,
    pub key: String,
    pub shard: String,
    pub sequence: String,
    pub digest: String,
    pub version: String,
}

pub struct Fixture {
    pub world: World,
    pub table: String,
    run: Option<Process>,
    /// Lines of `[timing]`.
    pub timing: String,
    /// Further lines of the pipeline's file.
    pub more: String,
    /// Further lines of its stage.
    pub stage: String,
    /// Lines for the sink's write mode.
    pub mode: String,
    /// Sinks that get the rows.
    pub routes: String,
}

impl Fixture {
    /// Makes a fixture whose stage has version `v1`; its plugin's file is the world's `stage.wasm`.
    pub fn new(shards: u32) -> Self {
        static TABLES: AtomicU64 = AtomicU64::new(0);
        let number = TABLES.fetch_add(1, Ordering::Relaxed);
        let table = format!("stamped_{}_{number}", std::process::id());
        let fixture = Self {
            world: World::new(shards),
            table,
            run: None,
            timing: String::new(),
            more: String::new(),
            stage: String::new(),
            mode: String::new(),
            routes: "[\"mart\"]".into(),
        };
        std::fs::write(fixture.stage_file(), stamp("v1 none")).expect("written");
        fixture
    }

    pub fn stage_file(&self) -> PathBuf {
        self.world.folder.path().join("stage.wasm")
    }

    /// Returns the pipeline's name, which is unique: two tests may create their streams in the same millisecond, and
    /// keep their positions in one database.
    pub fn name(&self) -> String {
        format!("swap-{}", self.table.replace('_', "-"))
    }

    /// Writes the pipeline's file; returns its path.
    pub fn write_pipeline(&self) -> String {
        let Self { table, timing, more, stage, mode, routes, .. } = self;
        let stage = format!("routes = {{ all = {routes} }}\n{stage}");
        let url = postgres_url();
        let mart = format!(
            "type = \"postgres\"\nurl = \"{url}\"\ntable = \"{table}\"\ncreate = true\n\
             lineage = true\n{mode}"
        );
        PipelineToml::new(self.world.folder.path(), &self.name())
            .timing(timing)
            .stream("test", "embedded", "format = \"application/json\"\npoll_interval = \"200 ms\"")
            .stage("stamp", &self.stage_file().display().to_string(), &stage)
            .sink("mart", &mart)
            .table(more)
            .write()
    }

    /// Starts the pipeline and waits until it reads.
    pub fn start(&mut self) {
        let path = self.write_pipeline();
        let log = std::fs::File::create(self.world.log()).expect("a log");
        let started = shardmill(&["run", &path, "-vv"]).stdout(Stdio::null()).stderr(log).spawn();
        self.run = Some(Process(started.expect("the binary starts")));
        wait_for("the run to read", || self.world.logged("reading"));
    }

    /// Kills the pipeline, as a crash does.
    pub fn kill(&mut self) {
        self.run = None;
    }

    /// Lets the pipeline drain and end.
    pub fn stop(&mut self) {
        let run = self.run.take().expect("it runs");
        assert_eq!(run.terminate(), Some(0), "{}", self.log());
    }

    pub fn is_running(&mut self) -> bool {
        self.run.as_mut().is_some_and(|run| run.0.try_wait().expect("a state").is_none())
    }

    pub fn process_id(&self) -> u32 {
        self.run.as_ref().expect("it runs").0.id()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.world.log()).unwrap_or_default()
    }

    /// Writes a component with this mark; returns its file.
    pub fn version(&self, mark: &str) -> String {
        let name = mark.replace(' ', "-");
        self.file(&format!("{name}.wasm"), &stamp(mark))
    }

    pub fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.world.folder.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        path.display().to_string()
    }

    /// Returns the path of the pipeline's file.
    pub fn pipeline_file(&self) -> String {
        self.world.folder.path().join("pipeline.toml").display().to_string()
    }

    /// Runs a command with the pipeline's file.
    pub fn command(&self, arguments: &[&str]) -> Output {
        let pipeline = self.pipeline_file();
        let mut all = arguments.to_vec();
        match arguments.first() {
            Some(&("plugin" | "dlq")) => all.extend(["--pipeline", &pipeline]),
            _ => all.push(&pipeline),
        }
        all.push("--json");
        run(&all)
    }

    /// Runs a swap, which must succeed; returns the report.
    pub fn swap(&self, file: &str, more: &[&str]) -> Value {
        let arguments = [&["plugin", "swap", "stamp", file], more].concat();
        let output = self.command(&arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}{}", self.log());
        serde_json::from_slice(&output.stdout).expect("a report")
    }

    /// Runs a swap, which must be refused; returns the error.
    pub fn refused(&self, file: &str, more: &[&str]) -> String {
        let arguments = [&["plugin", "swap", "stamp", file], more].concat();
        let output = self.command(&arguments);
        assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Returns the changes, newest first.
    pub fn history(&self) -> Vec<Value> {
        let output = self.command(&["plugin", "history"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let lines = String::from_utf8(output.stdout).expect("text");
        lines.lines().map(|line| serde_json::from_str(line).expect("a change")).collect()
    }

    /// Waits until the table has this many rows.
    pub fn wait_rows(&self, count: u64) {
        let sql = format!("SELECT count(*) FROM {}", self.table);
        wait_for(&format!("{count} rows: {}", self.log()), || {
            postgres(&sql)[0].parse::<u64>().expect("a count") >= count
        });
    }

    /// Returns the rows, ordered by shard and sequence.
    pub fn rows(&self) -> Vec<Stamped> {
        let sql = format!(
            "SELECT concat_ws('|', id, key, shardmill_shard, shardmill_sequence, shardmill_digest,
             version) FROM {}
             ORDER BY shardmill_shard, shardmill_sequence",
            self.table
        );
        let row = |line: String| {
            let fields: Vec<&str> = line.split('|').collect();
            let [id, key, shard, sequence, digest, version] = fields[..] else { panic!("{line}") };
            Stamped {
                id: id.parse().expect("an id"),
                key: key.into(),
                shard: shard.into(),
                sequence: sequence.into(),
                digest: digest.into(),
                version: version.into(),
            }
        };
        postgres(&sql).into_iter().map(row).collect()
    }

    /// Asserts that each of these ids is there once, written by the version that the ledger says.
    pub fn assert_each_once_as_the_ledger_says(&self, ids: std::ops::Range<u64>) {
        let rows = self.rows();
        let mut found: Vec<u64> = rows.iter().map(|row| row.id).collect();
        found.sort_unstable();
        assert_eq!(found, ids.collect::<Vec<_>>());
        let ledger = self.ledger();
        for row in &rows {
            assert_eq!(row.version, ledger.version_of(row), "{row:?}");
            assert_eq!(row.digest, ledger.digest_of(row), "{row:?}");
        }
    }

    /// Returns the revision ledger from the state database.
    pub fn ledger(&self) -> Ledger {
        let path = self.world.folder.path().join("state").join(self.name()).join("state.db");
        let state = crate::support::sqlite(&path);
        let mut query = state
            .prepare(
                "SELECT l.shard, l.sequence, g.spec FROM ledger l JOIN generation g ON g.id = l.generation
                 ORDER BY l.shard, l.sequence, l.sub_sequence",
            )
            .expect("sql");
        let segments = query.query_map((), |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
        let mut shards: BTreeMap<String, Vec<(String, Value)>> = BTreeMap::new();
        for segment in segments.expect("rows") {
            let (shard, sequence, spec): (String, String, String) = segment.expect("a row");
            let spec = serde_json::from_str(&spec).expect("a specification");
            shards.entry(shard).or_default().push((sequence, spec));
        }
        Ledger { shards, versions: self.versions() }
    }

    /// Returns the versions of the world's component files, by digest.
    fn versions(&self) -> BTreeMap<String, String> {
        use sha2::Digest as _;
        let mut versions = BTreeMap::new();
        for entry in std::fs::read_dir(self.world.folder.path()).expect("a folder") {
            let path = entry.expect("a file").path();
            if path.extension().is_some_and(|it| it == "wasm") {
                let bytes = std::fs::read(&path).expect("a component");
                let Some(at) = mark_in(&bytes) else { continue };
                let text = String::from_utf8_lossy(&bytes[at..at + MARK_BYTES]).into_owned();
                let version = text.split(' ').next().unwrap_or_default().to_owned();
                versions.insert(hex::encode(sha2::Sha256::digest(&bytes)), version);
            }
        }
        versions
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the run's log:\n{}", self.log());
        }
    }
}

/// Ledger: the version that ran each part of each shard.
pub struct Ledger {
    shards: BTreeMap<String, Vec<(String, Value)>>,
    versions: BTreeMap<String, String>,
}

impl Ledger {
    /// Returns the version that the ledger gives for a record.
    pub fn version_of(&self, row: &Stamped) -> String {
        self.versions[&self.digest_of(row)].clone()
    }

    /// Returns the digest of that version.
    fn digest_of(&self, row: &Stamped) -> String {
        let padded = format!("{:0>129}", row.sequence);
        let segments = &self.shards[&row.shard];
        let (_, spec) =
            segments.iter().rev().find(|(from, _)| *from < padded).expect("a segment before it");
        let mut stages = spec["stages"].as_array().expect("stages").iter();
        let stage = stages.find(|stage| stage["name"] == "stamp").expect("the stage");
        let mut digest = &stage["digest"];
        let percent = stage["canary"]["percent"].as_u64().unwrap_or(0);
        if u64::from(crc32fast::hash(row.key.as_bytes()) % 100) < percent {
            digest = &stage["canary"]["digest"];
        }
        digest.as_str().expect("a digest").to_owned()
    }
}

/// Bytes before a mark's text in the component; the text has `MARK_BYTES`.
const MARK: &[u8] = b"shardmill-stamp|";
const MARK_BYTES: usize = 80 - MARK.len();

fn mark_in(bytes: &[u8]) -> Option<usize> {
    bytes.windows(MARK.len()).position(|window| window == MARK).map(|at| at + MARK.len())
}

/// Returns the component with another mark in place of its own.
pub fn stamp(mark: &str) -> Vec<u8> {
    let mut bytes = std::fs::read(plugin("stamp")).expect("the prebuilt component");
    let at = mark_in(&bytes).expect("a mark");
    let text = format!("{mark:<MARK_BYTES$}");
    assert_eq!(text.len(), MARK_BYTES);
    bytes[at..at + MARK_BYTES].copy_from_slice(text.as_bytes());
    bytes
}
