//! Cost of processing a file with a plugin: the flights as CSV lines, decoded by the bundled plugin in its
//! sandbox, and written as NDJSON with the exact positions of the file source and the claims of the objects
//! sink; against a plain Rust program that makes the same output from the same file.
//!
//! There are two plain programs, because there are two questions:
//! - `flights`: an ordinary program with a struct, csv, chrono and serde_json. What does shardmill cost
//!   compared with such a program?
//! - `flights,native=plugin`: the plugin's own crate compiled for this machine, without a check of its output.
//!   What do the sandbox, the exact positions and the checks cost?
//!
//! Whole processes are compared, in turn. The round with the median ratio is shown, because a machine that
//! others use too may be half as fast in the next second. An earlier run has compiled the plugin, as for all
//! runs but the first on a machine.

mod child;
mod report;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, ensure};
use chrono::{DateTime, Utc};
use report::Report;
use serde::{Deserialize, Deserializer, Serialize};
use shardmill_sdk::Writer;

const CPU: &str = "CPU seconds, lower is better";
const MEMORY: &str = "MiB at the peak, lower is better";
const EXAMPLE: &str = "../examples/flights/pipeline.toml";
const FLIGHTS: &str = "../data/flights.csv";
const ROUNDS: usize = 9;
/// Names of the plain programs.
const ORDINARY: &str = "ordinary";
const PLUGIN: &str = "plugin";

fn main() -> Result<()> {
    if let Some(arguments) = child::baseline_arguments() {
        let [program, csv, out] = &arguments[..] else {
            return Err(anyhow!("expected a program and two paths"));
        };
        let program = if program == ORDINARY { ordinary } else { plugin };
        return program(Path::new(csv), Path::new(out));
    }
    let report = Report::start("file", CPU);
    let folder = tempfile::tempdir()?;
    let csv = here(FLIGHTS).canonicalize().context("run `cargo xtask data flights` first")?;
    let pipeline = pipeline(folder.path(), &csv)?;
    let (plain_out, our_out) = (folder.path().join("plain.ndjson"), folder.path().join("out"));
    let (mut ours, mut ordinary, mut plugin) = (Vec::new(), Vec::new(), Vec::new());
    let theirs = |program| {
        let paths = [csv.to_string_lossy(), plain_out.to_string_lossy()];
        child::cost(&mut child::baseline(&[program, &paths[0], &paths[1]])?)
    };
    for round in 0..=ROUNDS {
        for used in [&our_out, &folder.path().join("state/file")] {
            if used.exists() {
                fs::remove_dir_all(used)?;
            }
        }
        let our = child::cost(child::shardmill()?.arg("run").arg(&pipeline))?;
        let their = (theirs(PLUGIN)?, theirs(ORDINARY)?);
        // The first round compiles the plugin, so it does not count.
        if round > 0 {
            ours.push(our);
            plugin.push(their.0);
            ordinary.push(their.1);
        }
    }
    let mut found = Vec::new();
    lines_below(&our_out, &mut found)?;
    found.sort_unstable();
    for program in [PLUGIN, ORDINARY] {
        theirs(program)?;
        let expected = BufReader::new(File::open(&plain_out)?).lines();
        let mut expected = expected.collect::<Result<Vec<_>, _>>()?;
        expected.sort_unstable();
        ensure!(
            expected.len() == 336_776 && expected == found,
            "the outputs of ours and {program} differ"
        );
    }
    let cpu_s = |costs: &[child::Cost]| costs.iter().map(|it| it.cpu_s).collect::<Vec<_>>();
    for (case, theirs) in [("flights", &ordinary), ("flights,native=plugin", &plugin)] {
        let (ours, theirs) = report::median_round(&cpu_s(&ours), &cpu_s(theirs));
        report.line(case, ours, theirs);
    }
    let peak = |costs: &[child::Cost]| costs.iter().map(|it| it.peak_mib).fold(0.0, f64::max);
    report.line_in("flights,memory", peak(&ours), peak(&ordinary), MEMORY);
    Ok(())
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Returns the decoder's configuration from the example.
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

/// A row of the ordinary program.
#[derive(Deserialize, Serialize)]
struct Flight {
    year: i32,
    month: i32,
    day: i32,
    #[serde(deserialize_with = "csv::invalid_option")]
    dep_time: Option<i32>,
    sched_dep_time: i32,
    #[serde(deserialize_with = "csv::invalid_option")]
    dep_delay: Option<i32>,
    #[serde(deserialize_with = "csv::invalid_option")]
    arr_time: Option<i32>,
    sched_arr_time: i32,
    #[serde(deserialize_with = "csv::invalid_option")]
    arr_delay: Option<i32>,
    carrier: String,
    flight: i32,
    #[serde(deserialize_with = "known")]
    tailnum: Option<String>,
    origin: String,
    dest: String,
    #[serde(deserialize_with = "csv::invalid_option")]
    air_time: Option<i32>,
    distance: i32,
    hour: i32,
    minute: i32,
    time_hour: DateTime<Utc>,
}

fn known<'de, D: Deserializer<'de>>(field: D) -> Result<Option<String>, D::Error> {
    Ok(Some(String::deserialize(field)?).filter(|text| text != "NA"))
}

/// Does the same work as an ordinary program.
fn ordinary(csv: &Path, out: &Path) -> Result<()> {
    let mut input = csv::Reader::from_path(csv)?;
    let mut output = BufWriter::with_capacity(256 << 10, File::create(out)?);
    for flight in input.deserialize() {
        let flight: Flight = flight?;
        serde_json::to_writer(&mut output, &flight)?;
        output.write_all(b"\n")?;
    }
    Ok(output.into_inner()?.sync_all()?)
}

/// Does the same work with the plugin's own crate.
fn plugin(csv: &Path, out: &Path) -> Result<()> {
    let config: csv_decode::Config = decoder_table()?.try_into()?;
    let mut decoder = csv_decode::Decoder::new(config).map_err(|error| anyhow!("{error}"))?;
    let mut input = BufReader::with_capacity(256 << 10, File::open(csv)?);
    let mut output = BufWriter::with_capacity(256 << 10, File::create(out)?);
    let (mut line, mut row) = (Vec::new(), Vec::new());
    while input.read_until(b'\n', &mut line)? > 0 {
        let end = line.len() - usize::from(line.ends_with(b"\n"));
        row.clear();
        let decoded = decoder.write_row(&line[..end], &mut Writer::new(&mut row));
        let decoded = decoded.map_err(|error| anyhow!("{error}"))?;
        if decoded == csv_decode::Decoded::Row {
            row.push(b'\n');
            output.write_all(&row)?;
        }
        line.clear();
    }
    Ok(output.into_inner()?.sync_all()?)
}

/// Reads the lines of all data files below a folder.
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
