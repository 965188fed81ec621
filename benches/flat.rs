//! Growth of memory: an endless sequence of small records through one lane; the host's resident memory and the
//! plugin's linear memory at the end against those after the first million.
//!
//! `SHARDMILL_FLAT_RECORDS` is the number of records; the default is 100 million, which take about ten minutes.

mod child;
mod report;

use std::fs;
use std::io::{BufWriter, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{ChildStdin, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use child::Running;
use report::Report;

const MEMORY: &str = "MiB, lower is better";
const PLUGIN: &str = "../plugins/prebuilt/csv-decode.wasm";
const RECORDS: u64 = 100_000_000;
/// Number of records after which memory must have become stable.
const WARM_UP_RECORDS: u64 = 1_000_000;

fn main() -> Result<()> {
    let report = Report::start("flat", MEMORY);
    let records = match std::env::var("SHARDMILL_FLAT_RECORDS") {
        Ok(records) => {
            records.parse().context("invalid SHARDMILL_FLAT_RECORDS: expected a number")?
        }
        Err(_) => RECORDS,
    };
    let folder = tempfile::tempdir()?;
    // A port that was free a moment ago. If another process takes it meanwhile, the run fails visibly.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let pipeline = pipeline(folder.path(), port)?;
    let mut run = child::shardmill()?;
    run.arg("run").arg(pipeline).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut run = Running(run.spawn()?);
    let input = run.0.stdin.take().context("no input")?;
    let writer = thread::spawn(move || write_lines(input, records));
    let (mut warm, mut last, mut peak_mib) = (None, None, 0.0);
    while run.0.try_wait()?.is_none() {
        if let Some(seen) = Seen::now(&run, port) {
            if seen.records >= WARM_UP_RECORDS {
                warm.get_or_insert(seen);
            }
            peak_mib = f64::max(peak_mib, seen.host_mib);
            last = Some(seen);
        }
        thread::sleep(Duration::from_millis(100));
    }
    ensure!(run.0.wait()?.success(), "the run failed");
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    let (warm, last) = warm.zip(last).context("the run was too short to be looked at")?;
    let millions = last.records / 1_000_000;
    report.line(&format!("host,{millions}M"), last.host_mib, warm.host_mib);
    report.line(&format!("host,{millions}M,peak"), peak_mib, warm.host_mib);
    report.line(&format!("guest,{millions}M"), last.guest_mib, warm.guest_mib);
    Ok(())
}

/// State of a run, as seen from outside.
#[derive(Clone, Copy)]
struct Seen {
    records: u64,
    host_mib: f64,
    guest_mib: f64,
}

impl Seen {
    /// Looks at the run; `None` if its port does not answer.
    fn now(run: &Running, port: u16) -> Option<Self> {
        let metrics = metrics(port).ok()?;
        let value = |name: &str| -> Option<f64> {
            let line = metrics.lines().find(|line| line.starts_with(name))?;
            line.rsplit_once(' ')?.1.parse().ok()
        };
        Some(Self {
            records: value("shardmill_stage_records_total")? as u64,
            host_mib: run.resident_kib().ok()? / 1024.0,
            guest_mib: value("shardmill_stage_memory_bytes")? / f64::from(1 << 20),
        })
    }
}

fn metrics(port: u16) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn write_lines(input: ChildStdin, records: u64) -> Result<()> {
    let mut input = BufWriter::with_capacity(1 << 16, input);
    for number in 0..records {
        writeln!(input, "{number},honda")?;
    }
    Ok(input.flush()?)
}

fn pipeline(folder: &Path, port: u16) -> Result<std::path::PathBuf> {
    let plugin = Path::new(env!("CARGO_MANIFEST_DIR")).join(PLUGIN).canonicalize()?;
    let text = format!(
        r#"
[pipeline]
name = "flat"
state_dir = "state"
[admin]
listen = "127.0.0.1:{port}"
[source]
type = "file"
path = "-"
[[stage]]
name = "decode"
plugin = {plugin:?}
[stage.config]
columns = [{{ name = "id", type = "integer" }}, {{ name = "make", type = "text" }}]
[stage.routes]
rows = ["nowhere"]
[[sink]]
name = "nowhere"
type = "discard"
"#
    );
    let file = folder.join("pipeline.toml");
    fs::write(&file, text)?;
    Ok(file)
}
