//! `shardmill dlq`: what a pipeline could not process, and why.

mod redrive;

pub(super) use redrive::resolve_replays;

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use comfy_table::{Table, presets};
use serde_json::json;

use super::{Console, DEFAULT_PIPELINE, dead_letters, load, print_json, print_line, rerun};
use shardmill_core::boxed;
use shardmill_core::escape::escaped;
use shardmill_core::record::DeadLetterPlace;
use shardmill_state::{DeadLetterFilter, DeadLetters, PayloadDigest};

/// Characters of a reason that a list shows.
const REASON_CHARS: usize = 100;
/// What stays of control characters in a text of several lines.
const LINES: [char; 2] = ['\n', '\t'];
/// Letters that an export reads at once: each may hold two payloads of 10 MiB.
const EXPORT_PIECE: u32 = 16;

#[derive(clap::Subcommand)]
pub enum Command {
    /// List dead letters, oldest first.
    #[command(
        after_help = "Examples:\n  shardmill dlq list\n  shardmill dlq list --stage decode --reason \
                      \"no JSON\""
    )]
    List {
        #[command(flatten)]
        selection: Selection,
        /// The most letters that are shown.
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Show one dead letter with its payloads and the plugin's stack.
    #[command(after_help = "Example:\n  shardmill dlq show 17")]
    Show {
        /// The letter's number, as `list` shows it.
        id: i64,
        #[command(flatten)]
        pipeline: DlqPipeline,
    },
    /// Write dead letters as JSON, one a line, with all that is known of them.
    #[command(after_help = "Example:\n  shardmill dlq export --sink mart -o letters.ndjson")]
    Export {
        #[command(flatten)]
        selection: Selection,
        /// The file; default: standard output.
        #[arg(short, long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Send dead letters through the pipeline as it is now, from where each of them failed.
    ///
    /// They go in the order of their records, while the pipeline runs or not. What goes through is no
    /// letter any more, what fails again stays with the new reason. A redrive that was broken off goes
    /// on where it was: sinks that are exactly once have each row once. While the pipeline runs, they go
    /// through what it runs, whatever its files say by now.
    #[command(
        after_help = "Examples:\n  shardmill dlq redrive --stage decode\n  shardmill dlq redrive 17 18\n  \
                      shardmill dlq redrive --all\n  shardmill dlq redrive --without mart"
    )]
    Redrive {
        #[command(flatten)]
        selection: Selection,
        /// Redrive every letter.
        #[arg(long)]
        all: bool,
        /// Go on without a sink, or a stage, that is gone from the pipeline; its letters stay.
        #[arg(long, value_name = "NAME")]
        without: Vec<String>,
        /// Redrive letters of an older copy of the state too, which may have been redriven since that
        /// copy was made: their rows would be doubled.
        #[arg(long)]
        even_if_redriven: bool,
    },
    /// Delete dead letters: the records are then gone for this pipeline.
    #[command(
        after_help = "Examples:\n  shardmill dlq purge --stage decode --reason \"no JSON\"\n  \
                      shardmill dlq purge --all"
    )]
    Purge {
        #[command(flatten)]
        selection: Selection,
        /// Delete every letter.
        #[arg(long)]
        all: bool,
    },
}

/// The pipeline whose letters are meant.
#[derive(clap::Args)]
pub struct DlqPipeline {
    /// The pipeline's file.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PIPELINE)]
    pipeline: PathBuf,
    /// Letters of what was run again after this change was undone (rollback --replay-from-swap).
    #[arg(long, value_name = "CHANGE")]
    again: Option<i64>,
}

/// Which letters are meant; several options narrow each other.
#[derive(clap::Args)]
pub struct Selection {
    #[command(flatten)]
    pipeline: DlqPipeline,
    /// Letters by their numbers.
    ids: Vec<i64>,
    /// Only what this stage did not take.
    #[arg(long, value_name = "NAME", conflicts_with = "sink")]
    stage: Option<String>,
    /// Only what this sink's table did not take.
    #[arg(long, value_name = "NAME")]
    sink: Option<String>,
    /// Only of this shard.
    #[arg(long)]
    shard: Option<String>,
    /// Only those whose reason contains this.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

impl Selection {
    fn filter(&self) -> DeadLetterFilter {
        let stage = self.stage.as_deref().map(|name| DeadLetterPlace::Stage(name.into()));
        let sink = self.sink.as_deref().map(|name| DeadLetterPlace::Sink(name.into()));
        DeadLetterFilter {
            ids: self.ids.clone(),
            place: stage.or(sink),
            shard: self.shard.clone(),
            reason: self.reason.clone(),
        }
    }

    /// The letters that a command changes: a choice, or all of them if that is said.
    fn chosen(&self, all: bool, verb: &str) -> anyhow::Result<DeadLetterFilter> {
        let filter = self.filter();
        ensure!(
            all || !filter.is_empty(),
            "this would {verb} every dead letter: narrow it (--stage, --sink, --shard, --reason, \
             numbers), or say --all"
        );
        ensure!(!all || filter.is_empty(), "--all and a choice of letters contradict each other");
        Ok(filter)
    }
}

#[boxed]
pub async fn dlq(command: Command, console: &Console) -> anyhow::Result<()> {
    match command {
        Command::List { selection, limit } => list(&selection, limit, console).await,
        Command::Show { id, pipeline } => show(id, &pipeline, console).await,
        Command::Export { selection, out } => export(&selection, out, console).await,
        Command::Redrive { selection, all, without, even_if_redriven } => {
            redrive::redrive(&selection, all, &without, even_if_redriven, console).await
        }
        Command::Purge { selection, all } => purge(&selection, all, console).await,
    }
}

fn open(pipeline: &DlqPipeline) -> anyhow::Result<DeadLetters> {
    let mut config = load(&pipeline.pipeline)?;
    if let Some(change) = pipeline.again {
        let folder = rerun::folder(&config, change);
        ensure!(folder.exists(), "nothing was run again after change {change} was undone");
        config.state_dir = config.state_dir.at(folder);
    }
    dead_letters(&config)
}

async fn list(wanted: &Selection, limit: u32, console: &Console) -> anyhow::Result<()> {
    let store = open(&wanted.pipeline)?;
    let dead_letters = store.select_heads(wanted.filter(), limit).await?;
    let count = store.count_of(wanted.filter()).await?;
    for dead_letter in &dead_letters {
        console.report(&json!({
            "id": dead_letter.id,
            "shard": dead_letter.shard,
            "sequence": dead_letter.sequence,
            "sub_sequence": dead_letter.sub_sequence,
            "place": dead_letter.place,
            "plugin": dead_letter.plugin,
            "reason": dead_letter.reason,
        }))?;
    }
    if console.json {
        return Ok(());
    }
    if !dead_letters.is_empty() {
        let mut table = Table::new();
        let header = ["id", "failed in", "plugin", "shard", "sequence", "reason"];
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(header);
        for dead_letter in &dead_letters {
            let reason: String = dead_letter.reason.chars().take(REASON_CHARS).collect();
            let cut = if reason.len() < dead_letter.reason.len() { "…" } else { "" };
            let reason = escaped(&reason, &[]);
            table.add_row([
                dead_letter.id.to_string(),
                dead_letter.place.clone(),
                escaped(&dead_letter.plugin, &[]),
                dead_letter.shard.clone(),
                dead_letter.sequence.clone(),
                format!("{reason}{cut}"),
            ]);
        }
        print_line(table);
    }
    // Some may have been purged since.
    match count.saturating_sub(dead_letters.len() as u64) {
        0 => print_line(format!("{count} dead letters")),
        more => print_line(format!("{count} dead letters, {more} not shown (--limit)")),
    }
    Ok(())
}

async fn show(id: i64, pipeline: &DlqPipeline, console: &Console) -> anyhow::Result<()> {
    let filter = DeadLetterFilter { ids: vec![id], ..DeadLetterFilter::default() };
    let dead_letters = open(pipeline)?.select(filter, 1).await?;
    let Some(dead_letter) = dead_letters.first() else {
        bail!("there is no dead letter {id}: `shardmill dlq list` shows their numbers");
    };
    if console.json {
        return console.report(&dead_letter.to_json());
    }
    let record = format!("{} {}", dead_letter.shard, dead_letter.sequence);
    let record = match dead_letter.sub_sequence {
        0 => record,
        sub_sequence => format!("{record} ({sub_sequence} in its aggregate)"),
    };
    let (key, entered_key) = (text(&dead_letter.partition_key), text(&dead_letter.entered_key));
    for (what, said) in [
        ("failed in", dead_letter.place.as_str()),
        ("plugin", &dead_letter.plugin),
        ("digest", &dead_letter.digest),
        ("reason", &escaped(&dead_letter.reason, &LINES)),
        ("record", &record),
        ("arrived", &time(dead_letter.arrived_ms)),
        ("key", &key),
    ] {
        if !said.is_empty() {
            // Further lines are set in: none of them is taken for one of ours.
            print_line(format!("{what:<10} {}", said.replace('\n', "\n           ")));
        }
    }
    print_line(format!(
        "original   {} bytes\n{}",
        dead_letter.original.len(),
        text(&dead_letter.original)
    ));
    if let Some(PayloadDigest { sha256, bytes }) = &dead_letter.entered_digest {
        print_line(format!(
            "entered    {bytes} bytes, too large to be kept: a redrive makes them again\ndigest     {sha256}"
        ));
    } else if dead_letter.entered != dead_letter.original {
        print_line(format!(
            "entered    {} bytes\n{}",
            dead_letter.entered.len(),
            text(&dead_letter.entered)
        ));
    }
    if dead_letter.entered_digest.is_none() && entered_key != key {
        print_line(format!("under key  {}", entered_key.replace('\n', "\n           ")));
    }
    if !dead_letter.backtrace.is_empty() {
        print_line(format!("backtrace\n{}", escaped(&dead_letter.backtrace, &LINES)));
    }
    Ok(())
}

async fn export(wanted: &Selection, out: Option<PathBuf>, console: &Console) -> anyhow::Result<()> {
    let store = open(&wanted.pipeline)?;
    // By their numbers, a few at a time: all of them may not fit into memory.
    let ids = store.ids(wanted.filter()).await?;
    let mut file = match &out {
        Some(path) => Some(std::io::BufWriter::new(
            shardmill_core::private::create_export(path)
                .with_context(|| format!("failed to write {}", path.display()))?,
        )),
        None => None,
    };
    for piece in ids.chunks(EXPORT_PIECE as usize) {
        let filter = DeadLetterFilter { ids: piece.to_vec(), ..DeadLetterFilter::default() };
        for dead_letter in store.select(filter, EXPORT_PIECE).await? {
            let line = dead_letter.to_json();
            match &mut file {
                Some(file) => writeln!(file, "{line}")?,
                None => print_json(&line.to_string()),
            }
        }
    }
    if let (Some(file), Some(path)) = (file, out) {
        let file = file.into_inner()?;
        // Pipes and devices cannot be.
        if file.metadata()?.is_file() {
            file.sync_all()?;
        }
        console.say(format!("{} dead letters in {}", ids.len(), path.display()));
        console.report(&json!({ "letters": ids.len(), "file": path }))?;
    }
    Ok(())
}

async fn purge(wanted: &Selection, all: bool, console: &Console) -> anyhow::Result<()> {
    let filter = wanted.chosen(all, "delete")?;
    let (purged, left) = open(&wanted.pipeline)?.purge(filter).await?;
    console.say(format!("{purged} dead letters deleted"));
    if left > 0 {
        console.say(format!(
            "{left} dead letters are left: a redrive that was broken off has them; finish it by `shardmill dlq \
             redrive`, then give the command again for those that are dead letters still"
        ));
    }
    console.report(&json!({ "deleted": purged, "left": left }))
}

/// Bytes for people; what is no text in base64.
fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => escaped(text, &LINES),
        Err(_) => format!("{} (base64)", BASE64.encode(bytes)),
    }
}

/// A time as people write it, in UTC.
fn time(ms: u64) -> String {
    let time = i64::try_from(ms).ok().and_then(chrono::DateTime::from_timestamp_millis);
    time.map_or_else(|| format!("{ms} ms"), |time| time.to_rfc3339())
}
