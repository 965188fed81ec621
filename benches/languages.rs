//! Cost of a plugin in each language: the plugin that `shardmill new plugin` makes, in its sandbox as a lane
//! runs it, against the same work in native Rust: parse JSON, read a member, write JSON.
//!
//! `SHARDMILL_LANGUAGES` is a folder with a component per language, `LANGUAGE.wasm`, which `cargo xtask bench
//! languages` has built. If `SHARDMILL_PICTURE` is set, the figures are also drawn into that file as SVG.

mod report;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use plotters::prelude::*;
use report::Report;
use serde::{Deserialize, Serialize};
use shardmill_plugin::{CompileCache, Plugin, PluginEngine};
use shardmill_workbench::{TrialRecord, Workbench};

const UNIT: &str = "ns per record of 200 bytes in batches of 1,000, lower is better";
const START: &str = "µs to start an instance, lower is better";
const LANGUAGES: [&str; 5] = ["rust", "c", "go", "js", "python"];
const RECORDS: usize = 1_000;
const PAYLOAD_BYTES: usize = 200;
const ROUNDS: usize = 15;

fn main() -> Result<()> {
    let report = Report::start("languages", UNIT);
    let folder: PathBuf = std::env::var_os("SHARDMILL_LANGUAGES")
        .context("SHARDMILL_LANGUAGES is not set: run `cargo xtask bench languages`")?
        .into();
    let records: Vec<TrialRecord> =
        (0..RECORDS).map(|number| TrialRecord::new(number, payload(number))).collect();
    let mut figures = Vec::new();
    let mut starts = Vec::new();
    for language in LANGUAGES.into_iter().filter(|language| report.wants(language)) {
        let workbench = load(&folder.join(format!("{language}.wasm")))?;
        let mut trial = workbench.start("{}")?;
        let fates = trial.run(&records)?;
        for (record, fate) in records.iter().zip(&fates) {
            let expected: serde_json::Value = serde_json::from_slice(&greet(&record.payload)?)?;
            let payload = fate.outputs[0].payload.as_ref().context("an output")?;
            let found: serde_json::Value = serde_json::from_slice(payload)?;
            ensure!(found == expected, "{language}: expected {expected}, found {found}");
        }
        let (mut ours, mut native) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            native.push(time(|| {
                records.iter().try_for_each(|record| {
                    black_box(greet(&record.payload)?);
                    Ok(())
                })
            })?);
            ours.push(time(|| {
                black_box(trial.run_once(&records)?);
                Ok(())
            })?);
        }
        let (ours, native) = report::median_round(&ours, &native);
        report.line(language, ours, native);
        figures.push((language, ours / native));
        let mut times: Vec<f64> = (0..9)
            .map(|_| {
                let begun = Instant::now();
                workbench.start("{}").map(|_| begun.elapsed().as_secs_f64() * 1e6 / 2.0)
            })
            .collect::<Result<_, _>>()?;
        times.sort_by(f64::total_cmp);
        starts.push((language, times[times.len() / 2]));
    }
    let rust = starts.first().map_or(1.0, |(_, start)| *start);
    for (language, start) in &starts {
        report.line_in(&format!("{language},start"), *start, rust, START);
    }
    match std::env::var_os("SHARDMILL_PICTURE") {
        Some(path) => draw(Path::new(&path), &figures),
        None => Ok(()),
    }
}

fn load(file: &Path) -> Result<Workbench> {
    let engine = PluginEngine::new().map_err(anyhow::Error::from)?;
    Ok(Workbench::new(Plugin::load_file(&engine, &CompileCache::none(), file)?.0))
}

/// Measures the nanoseconds per record.
fn time(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    run()?;
    Ok(begun.elapsed().as_secs_f64() * 1e9 / RECORDS as f64)
}

fn payload(number: usize) -> String {
    let head = format!("{{\"name\":\"Ada {number}\",\"note\":\"");
    let filler = "x".repeat(PAYLOAD_BYTES.saturating_sub(head.len() + 2));
    format!("{head}{filler}\"}}")
}

#[derive(Deserialize)]
struct Person {
    name: String,
}

#[derive(Serialize)]
struct Greeting {
    greeting: String,
}

/// The plugin's work without a sandbox.
fn greet(payload: &[u8]) -> Result<Vec<u8>> {
    let person: Person = serde_json::from_slice(payload)?;
    Ok(serde_json::to_vec(&Greeting { greeting: format!("Hello, {}!", person.name) })?)
}

/// Draws the ratios as bars, on a logarithmic scale.
fn draw(path: &Path, figures: &[(&str, f64)]) -> Result<()> {
    let area = SVGBackend::new(path, (640, 320)).into_drawing_area();
    area.fill(&WHITE)?;
    let most = figures.iter().map(|(_, ratio)| *ratio).fold(1.0, f64::max);
    let count = figures.len() as i32;
    let mut chart = ChartBuilder::on(&area)
        .caption("Time per record, native Rust = 1 (JSON of 200 bytes)", ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(64)
        .build_cartesian_2d((0.5..most * 2.0).log_scale(), (0..count).into_segmented())?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_label_formatter(&|segment| match segment {
            SegmentValue::CenterOf(index) => {
                figures.get(*index as usize).map_or(String::new(), |(name, _)| (*name).to_owned())
            }
            _ => String::new(),
        })
        .draw()?;
    chart.draw_series(figures.iter().zip(0..).map(|((_, ratio), index)| {
        let corners = [(0.5, SegmentValue::Exact(index)), (*ratio, SegmentValue::Exact(index + 1))];
        let mut bar = Rectangle::new(corners, RGBColor(60, 110, 180).filled());
        bar.set_margin(6, 6, 0, 0);
        bar
    }))?;
    chart.draw_series(figures.iter().zip(0..).map(|((_, ratio), index)| {
        let style = ("sans-serif", 14).into_font().color(&BLACK);
        Text::new(format!(" {ratio:.1}"), (*ratio, SegmentValue::CenterOf(index)), style)
    }))?;
    area.present()?;
    Ok(())
}
