//! Handwritten plugins that call the host, with any bytes at any address.

use std::fmt::Write as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::assets;
use crate::hostile::wat::component;
use crate::support::pipeline::PipelineToml;
use crate::support::{Process, shardmill, sqlite};
use crate::walls::memory::{assert_peak_below, bound, follow};

/// Address of a test's own bytes.
pub const DATA: usize = 1024;

/// `lookup.get`: name, arena and keys, each an address and a length; the last parameter is the address of the answer.
pub const GET: &str = r#"(import "shardmill:plugin/lookup@0.1.0" "get"
    (func $get (param i32 i32 i32 i32 i32 i32 i32)))"#;
/// `http.send`: method, URL, headers and body, each an address and a length; the last parameter is the address of the
/// answer.
pub const SEND: &str = r#"(import "shardmill:plugin/http@0.1.0" "send"
    (func $send (param i32 i32 i32 i32 i32 i32 i32 i32 i32)))"#;
/// `log.write`: level, and the line's address and length.
pub const LOG: &str =
    r#"(import "shardmill:plugin/log@0.1.0" "write" (func $log (param i32 i32 i32)))"#;
/// `metrics.register`: kind, name and help; the last parameter is the address of the answer.
pub const REGISTER: &str = r#"(import "shardmill:plugin/metrics@0.1.0" "register"
    (func $register (param i32 i32 i32 i32 i32 i32)))"#;
/// `metrics.observe`.
pub const OBSERVE: &str =
    r#"(import "shardmill:plugin/metrics@0.1.0" "observe" (func $observe (param i32 f64)))"#;
/// `clock.now-ms`.
pub const NOW: &str =
    r#"(import "shardmill:plugin/clock@0.1.0" "now-ms" (func $now (result i64)))"#;
/// `random.next-u64`.
pub const RANDOM: &str =
    r#"(import "shardmill:plugin/random@0.1.0" "next-u64" (func $random (result i64)))"#;

/// Refuses the configuration with the host's error text if the call before it failed.
pub const REFUSE_IF_FAILED: &str = "(if (i32.load8_u (i32.const 8192)) (then
    (return (call $refusal (i32.load (i32.const 8200)) (i32.load (i32.const 8204))))))";
/// Fails the batch for good with the host's error text if the call before it failed.
pub const FAIL_IF_FAILED: &str = "(if (i32.load8_u (i32.const 8192)) (then
    (return (call $failure (i32.load (i32.const 8200)) (i32.load (i32.const 8204))))))";

/// Texts that replace the placeholders of the skeleton.
pub struct Asking<'a> {
    /// Name of the plugin.
    pub name: &'a str,
    /// Its only route, and the format of that.
    pub route: &'a str,
    pub format: &'a str,
    /// Imports.
    pub imports: &'a [&'a str],
    /// Bytes at [`DATA`].
    pub data: &'a [u8],
    /// Code in `configure`, before its answer.
    pub configure: &'a str,
    /// Code in `process`, before its answer.
    pub process: &'a str,
}

impl Default for Asking<'_> {
    fn default() -> Self {
        Self {
            name: "asking",
            route: "out",
            format: "text/plain",
            imports: &[],
            data: b"",
            configure: "",
            process: "",
        }
    }
}

impl Asking<'_> {
    /// Builds the component; returns its file.
    pub fn build(&self) -> tempfile::NamedTempFile {
        assert!(self.data.len() <= 3072, "the constants are too long");
        let place = |at: usize, bytes: &[u8]| format!("(data (i32.const {at}) \"{}\")", hex(bytes));
        let (name, route, format) = (256, 512, 768);
        let words = |words: &[usize]| {
            let bytes = words.iter().flat_map(|word| (*word as u32).to_le_bytes());
            bytes.collect::<Vec<u8>>()
        };
        // The route: name, format, columns. The answer: ok, name, version, accepts, routes, extra.
        let route_words = words(&[route, self.route.len(), format, self.format.len(), 4, 0]);
        let answer = words(&[0, name, self.name.len(), 16, 1, 4, 0, 96, 1, 4, 0]);
        let constants = [
            place(name, self.name.as_bytes()),
            place(route, self.route.as_bytes()),
            place(format, self.format.as_bytes()),
            place(96, &route_words),
            place(128, &answer),
        ];
        let text = assets::ASKING_WAT
            .replace(";;@imports", &self.imports.join("\n"))
            .replace(";;@constants", &constants.join("\n"))
            .replace(";;@data", &place(DATA, self.data))
            .replace(";;@configure", self.configure)
            .replace(";;@process", self.process);
        component(&text, "plugin-with-capabilities")
    }
}

/// Writes bytes as WAT has them in a string.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "\\{byte:02x}");
        text
    })
}

/// `buffer` of the pipelines, in MiB.
const BUFFER_MIB: u64 = 16;

/// Pipeline with one such plugin over the lines of a file.
pub struct Place {
    pub folder: tempfile::TempDir,
    component: tempfile::NamedTempFile,
}

/// Outcome of a run.
pub struct Ran {
    pub code: Option<i32>,
    pub log: String,
    /// Peak of the process's resident memory, in bytes.
    pub peak_bytes: u64,
    pub took: Duration,
}

impl Ran {
    /// Asserts that the process has stayed below the bound of its only stage, whose memory limit must be 16 MiB.
    /// `what` names what it was asked to do.
    #[track_caller]
    pub fn assert_memory(&self, what: &str) {
        assert_peak_below(self.peak_bytes, bound(BUFFER_MIB, 8, 1, 1), what);
    }
}

impl Place {
    /// The file has `records` lines, and each line is a batch. `stage` has further lines of the stage; `tables`
    /// follow after the sink's.
    pub fn new(asking: &Asking<'_>, records: usize, stage: &str, tables: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let place = Self { folder, component: asking.build() };
        let lines = place.folder.path().join("lines.txt");
        std::fs::write(&lines, "record\n".repeat(records)).expect("written");
        let routes = format!("routes = {{ {} = [\"console\"] }}", asking.route);
        PipelineToml::new(place.folder.path(), "guests")
            .pipeline(&format!("buffer = \"{BUFFER_MIB} MiB\""))
            .file(&lines, "[source.batch]\nrecords = 1")
            .stage("ask", &place.component(), &format!("{routes}\n{stage}"))
            .table("[[sink]]\nname = \"console\"\ntype = \"stdout\"")
            .table(tables)
            .write();
        place
    }

    /// Returns the component's path.
    pub fn component(&self) -> String {
        self.component.path().display().to_string()
    }

    /// Returns the pipeline's path.
    pub fn pipeline(&self) -> String {
        self.folder.path().join("pipeline.toml").display().to_string()
    }

    /// Runs until the process ends, with success or not.
    pub fn run(&self) -> Ran {
        let log = self.folder.path().join("run.log");
        let to = std::fs::File::create(&log).expect("a log");
        let mut command = shardmill(&["run", &self.pipeline(), "--until-caught-up"]);
        let begun = Instant::now();
        let child = command.stdout(Stdio::null()).stderr(to).spawn();
        let mut run = Process(child.expect("the binary starts"));
        let peak = follow(run.0.id());
        let code = loop {
            if let Some(ended) = run.0.try_wait().expect("a state") {
                break ended.code();
            }
            assert!(begun.elapsed() < Duration::from_secs(120), "the run takes too long");
            std::thread::sleep(Duration::from_millis(2));
        };
        let took = begun.elapsed();
        let log = std::fs::read_to_string(log).expect("a log");
        Ran { code, log, peak_bytes: peak.join().expect("a peak"), took }
    }

    /// Returns the reasons of the dead letters, in order.
    pub fn dead_letters(&self) -> Vec<String> {
        let state = sqlite(&self.folder.path().join("state/guests/state.db"));
        let sql = "SELECT reason FROM dead_letter ORDER BY sequence";
        let mut query = state.prepare(sql).expect("the dead letters");
        let reasons = query.query_map((), |row| row.get(0)).expect("rows");
        reasons.map(|reason| reason.expect("a reason")).collect()
    }
}
