//! Example of a program with an embedded pipeline: readings of two weather stations go from a custom source through a
//! plugin into a custom sink.
//!
//! `cargo run -p embed -- FOLDER` shows that no row is lost or doubled. It starts itself as `embed FOLDER run`, kills
//! that process halfway, runs it again to its end, and counts the rows in `FOLDER/rows`: each reading is there
//! once. The engine keeps checkpoints in `FOLDER/state`. Rows are not doubled because the sink writes its position
//! together with its rows (`sink.rs`).

mod sink;
mod source;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::json;
use shardmill_core::stop::Stop;
use shardmill_engine::{CommitPolicy, DEFAULT_COMMIT_POLICY, Pipeline, Stage};

use sink::FolderSink;
use source::{READINGS, STATIONS, WeatherStations};

/// Plugin that decodes CSV lines to JSON rows.
const PLUGIN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins/prebuilt/csv-decode.wasm");
/// Configuration of the plugin: a line is `north,17,21.5`.
const COLUMNS: [(&str, &str); 3] =
    [("station", "text"), ("number", "bigint"), ("celsius", "numeric")];
/// Time for a run to commit what it has read after its end is requested.
const DRAIN_MAX: Duration = Duration::from_secs(20);
/// Longest wait for the first rows. The first run compiles the plugin.
const FIRST_ROWS_MAX: Duration = Duration::from_secs(120);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder =
        arguments.next().context("expected `embed FOLDER`: name a folder for rows and state")?;
    match arguments.next().as_deref() {
        Some("run") => run(Path::new(&folder)).await,
        _ => show(Path::new(&folder)),
    }
}

/// Runs the pipeline until the last reading of every station is committed, or until Ctrl-C.
async fn run(folder: &Path) -> anyhow::Result<()> {
    let columns = COLUMNS.map(|(name, data_type)| json!({ "name": name, "type": data_type }));
    let often = CommitPolicy { linger_max: Duration::from_millis(50), ..DEFAULT_COMMIT_POLICY };
    let pipeline = Pipeline::builder("weather")
        .state_dir(folder.join("state"))
        .source(Arc::new(WeatherStations))
        .stage(
            Stage::component("decode", PLUGIN)
                .config(json!({ "columns": columns }))
                .route("rows", "folder"),
        )
        .sink_with(Arc::new(FolderSink::new("folder", folder.join("rows"))), often)
        .build()?;

    let stop = Stop::new(DRAIN_MAX);
    let asked = stop.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            asked.ask();
        }
    });
    let summary = pipeline.run(&stop).await?;
    say(format!("this run read {} readings", summary.records));
    Ok(())
}

/// Kills a run halfway, lets a second run continue, and counts the rows.
fn show(folder: &Path) -> anyhow::Result<()> {
    let rows = folder.join("rows");
    let all = STATIONS.len() * READINGS as usize;
    let run = || {
        let mut command = Command::new(std::env::current_exe()?);
        anyhow::Ok(command.arg(folder).arg("run").spawn()?)
    };
    let mut first = run()?;
    let begun = std::time::Instant::now();
    while sink::rows(&rows)?.len() < all / 2 && first.try_wait()?.is_none() {
        ensure!(
            begun.elapsed() < FIRST_ROWS_MAX,
            "expected rows in {}, found too few",
            rows.display()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    first.kill()?;
    first.wait()?;
    say(format!("killed with {} of {all} rows in the sink", sink::rows(&rows)?.len()));

    ensure!(run()?.wait()?.success(), "the second run has failed");
    let mut times = BTreeMap::<String, usize>::new();
    for row in sink::rows(&rows)? {
        *times.entry(row).or_default() += 1;
    }
    let once = times.values().filter(|times| **times == 1).count();
    say(format!("{all} readings: {once} are there once, {} more often", times.len() - once));
    ensure!(once == all && times.len() == all, "expected each of {all} readings once");
    Ok(())
}

/// Prints a line of the example's output.
#[expect(clippy::print_stdout, reason = "it is the output of the program")]
fn say(line: impl std::fmt::Display) {
    println!("{line}");
}
