//! `shardmill stream put`: puts the records of files or of standard input on a stream.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use aws_sdk_kinesis::Client;
use serde::Serialize;

use super::super::Console;
use super::super::progress::ConsoleProgress;
use shardmill_core::record::StreamRef;
use shardmill_kinesis::input::{Format, Input, KeyRule};
use shardmill_kinesis::producer::{Producer, PutReport};
use shardmill_kinesis::stream;

/// Records between two updates of the progress bar.
const PROGRESS_RECORDS: u64 = 1_000;

/// Options of `stream put`.
#[derive(clap::Args)]
pub struct StreamPutOptions {
    /// The files; `-` or none: standard input.
    files: Vec<PathBuf>,
    /// Record format of the files [default: csv for names that end in .csv, otherwise lines].
    #[arg(long, value_enum)]
    format: Option<FileFormat>,
    /// Partition key of all records [default: the number of the record, which spreads records over the shards].
    #[arg(long, conflicts_with = "key_field")]
    key: Option<String>,
    /// Top-level member of each JSON record that is its partition key.
    #[arg(long, value_name = "NAME")]
    key_field: Option<String>,
    /// Number of lines to skip at the beginning of each file.
    #[arg(long, default_value_t = 0)]
    skip: u64,
    /// Put at most one record of each partition key in a request, so that a later record of a key never
    /// overtakes a refused one.
    #[arg(long)]
    strict_order: bool,
}

impl StreamPutOptions {
    /// Refuses options that make no sense together.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        if self.key_field.is_some() && self.format != Some(FileFormat::Ndjson) {
            bail!("--key-field requires JSON records: add --format ndjson");
        }
        if self.skip > 0 && self.format == Some(FileFormat::Binary) {
            bail!(
                "--skip cannot be used with --format binary, which has no lines: remove one of them"
            );
        }
        Ok(())
    }
}

/// Record format of a file, as a command-line value.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum FileFormat {
    /// One record per line, without the line end (`\n` or `\r\n`).
    Lines,
    /// One CSV record per line; line breaks within quotes belong to the record.
    Csv,
    /// One JSON value per line; blank lines are skipped.
    Ndjson,
    /// A 4-byte big-endian length, then that number of bytes, repeated.
    Binary,
}

impl From<FileFormat> for Format {
    fn from(format: FileFormat) -> Self {
        match format {
            FileFormat::Lines => Self::Lines,
            FileFormat::Csv => Self::Csv,
            FileFormat::Ndjson => Self::Ndjson,
            FileFormat::Binary => Self::Binary,
        }
    }
}

/// Summary of a put, for its last line.
#[derive(Serialize)]
struct PutSummary {
    records: u64,
    bytes: u64,
    retried: u64,
    seconds: f64,
    records_per_second: f64,
}

/// Puts all records on the stream, and reports the throughput.
pub(super) async fn put(
    client: Client,
    name: &StreamRef,
    options: StreamPutOptions,
    console: &Console,
) -> anyhow::Result<()> {
    stream::describe(&client, name).await?;
    let begun = Instant::now();
    let mut producer = Producer::new(client, name.clone()).strict_order(options.strict_order);
    let mut progress = ConsoleProgress::start(&format!("putting records on {name}"), None);
    let key = match (options.key, options.key_field) {
        (Some(key), _) => KeyRule::Fixed(key),
        (None, Some(member)) => KeyRule::Member(member),
        (None, None) => KeyRule::Number,
    };
    let mut number = 0u64;
    for file in input_files(options.files) {
        let (reader, place) = open_input(file.as_deref())?;
        let format = options.format.map_or_else(|| format_of(file.as_deref()), Format::from);
        let mut input = Input::new(reader, place, format, key.clone(), number);
        input.skip_lines(options.skip)?;
        while let Some(record) = input.next_record()? {
            producer.put(record).await?;
            number += 1;
            if number.is_multiple_of(PROGRESS_RECORDS) {
                progress.at(number, &rate(producer.report(), begun));
            }
        }
    }
    producer.flush().await?;
    progress.done();
    let (report, seconds) = (producer.report(), begun.elapsed().as_secs_f64());
    let summary = PutSummary {
        records: report.records,
        bytes: report.bytes,
        retried: report.retried,
        seconds,
        records_per_second: report.records as f64 / seconds.max(f64::EPSILON),
    };
    console.say(format!(
        "put {} records, {} bytes, {} retried, in {seconds:.1} s ({:.0} records/s)",
        summary.records, summary.bytes, summary.retried, summary.records_per_second
    ));
    console.report(&summary)
}

/// Returns the input files; standard input is `None`.
fn input_files(files: Vec<PathBuf>) -> Vec<Option<PathBuf>> {
    match files.is_empty() {
        true => vec![None],
        false => files.into_iter().map(|file| (file != Path::new("-")).then_some(file)).collect(),
    }
}

/// Chooses the format by the file name.
fn format_of(file: Option<&Path>) -> Format {
    let extension = file.and_then(Path::extension);
    match extension.is_some_and(|name| name.eq_ignore_ascii_case("csv")) {
        true => Format::Csv,
        false => Format::Lines,
    }
}

fn open_input(file: Option<&Path>) -> anyhow::Result<(Box<dyn BufRead + Send>, String)> {
    let Some(path) = file else {
        return Ok((Box::new(BufReader::new(std::io::stdin())), "standard input".into()));
    };
    let opened = std::fs::File::open(path);
    let opened =
        opened.with_context(|| format!("failed to read {}", shardmill_core::escape::path(path)))?;
    Ok((Box::new(BufReader::new(opened)), path.display().to_string()))
}

/// Formats the bytes put and the throughput.
fn rate(report: PutReport, begun: Instant) -> String {
    let per_second = report.records as f64 / begun.elapsed().as_secs_f64().max(f64::EPSILON);
    format!("{}, {per_second:.0} records/s", bytesize::ByteSize(report.bytes))
}
