//! What a file costs on its way through a plugin: the flights as CSV lines, decoded by the bundled
//! plugin behind the wall, written as NDJSON with the file source's exact positions and the objects
//! sink's claims; against the same decoder and the same output in a plain Rust program.
//!
//! Whole processes are compared. The plugin was compiled by an earlier run, as it is for all runs
//! but the first on a machine.

mod child;
mod report;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, ensure};
use report::Report;

const CPU: &str = "CPU seconds, lower is better";
const MEMORY: &str = "MiB at the peak, lower is better";
const EXAMPLE: &str = "../examples/flights/pipeline.toml";
const FLIGHTS: &str = "../data/flights.csv";
const ROUNDS: usize = 3;

fn main() -> Result<()> {
    if let Some(arguments) = child::baseline_arguments() {
        let [csv, out] = &arguments[..] else { return Err(anyhow!("two paths are due")) };
        return plain(Path::new(csv), Path::new(out));
    }
    let report = Report::start("file", CPU);
    let folder = tempfile::tempdir()?;
    let csv = here(FLIGHTS).canonicalize().context("run `cargo xtask data flights` first")?;
    let pipeline = pipeline(folder.path(), &csv)?;
    let (plain_out, our_out) = (folder.path().join("plain.ndjson"), folder.path().join("out"));
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for round in 0..=ROUNDS {
        for used in [&our_out, &folder.path().join("state/file")] {
            if used.exists() {
                fs::remove_dir_all(used)?;
            }
        }
        let our = child::cost(child::shardmill()?.arg("run").arg(&pipeline))?;
        let paths = [csv.to_string_lossy(), plain_out.to_string_lossy()];
        let their = child::cost(&mut child::baseline(&[&paths[0], &paths[1]])?)?;
        // The first round compiles the plugin.
        if round > 0 {
            ours.push(our);
            theirs.push(their);
        }
    }
    let mut due: Vec<String> =
        BufReader::new(File::open(&plain_out)?).lines().collect::<Result<_, _>>()?;
    let mut found = Vec::new();
    lines_below(&our_out, &mut found)?;
    due.sort_unstable();
    found.sort_unstable();
    ensure!(due.len() == 336_776 && due == found, "the two outputs differ");
    let least = |costs: &[child::Cost], of: fn(&child::Cost) -> f64| {
        costs.iter().map(of).fold(f64::INFINITY, f64::min)
    };
    report.line("flights", least(&ours, |it| it.cpu_s), least(&theirs, |it| it.cpu_s));
    let peak = ours.iter().map(|it| it.peak_mib).fold(0.0, f64::max);
    report.line_in("flights,memory", peak, least(&theirs, |it| it.peak_mib), MEMORY);
    Ok(())
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The decoder's configuration, as the example has it.
fn decoder_table() -> Result<toml::Table> {
    let example: toml::Table = fs::read_to_string(here(EXAMPLE))?.parse()?;
    let decode = example["stage"].get(0).and_then(|stage| stage.get("config"));
    decode.and_then(|config| config.as_table()).cloned().context("the example's first stage")
}

fn pipeline(folder: &Path, csv: &Path) -> Result<PathBuf> {
    let plugin = here("../plugins/prebuilt/csv-decode.wasm").canonicalize()?;
    let text = format!(
        r#"
[pipeline]
name = "file"
state_dir = "state"
[source]
type = "file"
path = {csv:?}
[[stage]]
name = "decode"
plugin = {plugin:?}
routes = {{ rows = ["out"] }}
[[sink]]
name = "out"
type = "objects"
url = "out"
compression = "none"
commit = {{ bytes = "4 MiB" }}
"#
    );
    let mut pipeline: toml::Table = text.parse()?;
    let stage = pipeline["stage"].get_mut(0).and_then(|stage| stage.as_table_mut());
    stage.context("a stage")?.insert("config".into(), decoder_table()?.into());
    let path = folder.join("pipeline.toml");
    fs::write(&path, toml::to_string(&pipeline)?)?;
    Ok(path)
}

/// The same work without shardmill.
fn plain(csv: &Path, out: &Path) -> Result<()> {
    let config: csv_decode::Config = decoder_table()?.try_into()?;
    let mut decoder = csv_decode::Decoder::new(config).map_err(|error| anyhow!("{error}"))?;
    let mut input = BufReader::with_capacity(256 << 10, File::open(csv)?);
    let mut output = BufWriter::with_capacity(256 << 10, File::create(out)?);
    let (mut line, mut row) = (Vec::new(), Vec::new());
    while input.read_until(b'\n', &mut line)? > 0 {
        let end = line.len() - usize::from(line.ends_with(b"\n"));
        row.clear();
        let decoded =
            decoder.write_row(&line[..end], &mut row).map_err(|error| anyhow!("{error}"))?;
        if decoded == csv_decode::Decoded::Row {
            row.push(b'\n');
            output.write_all(&row)?;
        }
        line.clear();
    }
    Ok(output.into_inner()?.sync_all()?)
}

/// The lines of all data below a folder.
fn lines_below(folder: &Path, lines: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "_shardmill") {
                lines_below(&path, lines)?;
            }
        } else {
            for line in BufReader::new(File::open(path)?).lines() {
                lines.push(line?);
            }
        }
    }
    Ok(())
}
