//! `shardmill dlq`: the records that a pipeline could not process, and why.

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

/// Characters of a reason in a list.
const REASON_CHARS: usize = 100;
/// Control characters that are kept in a text of several lines.
const LINES: [char; 2] = ['\n', '\t'];
/// Dead letters that an export reads at once. Each may contain two payloads of 10 MiB.
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
        /// Maximum number of dead letters to show.
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Show one dead letter with its payloads and the plugin's backtrace.
    #[command(after_help = "Example:\n  shardmill dlq show 17")]
    Show {
        /// Number of the dead letter, as `list` shows it.
        id: i64,
        #[command(flatten)]
        pipeline: DlqPipeline,
    },
    /// Write dead letters as JSON, one per line, with all fields.
    #[command(after_help = "Example:\n  shardmill dlq export --sink mart -o letters.ndjson")]
    Export {
        #[command(flatten)]
        selection: Selection,
        /// Output file [default: standard output].
        #[arg(short, long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Process dead letters again with the current pipeline, each from the stage or sink where it failed.
    ///
    /// The records run in their original order, whether the pipeline is running or not. While it runs, the
    /// revision that it runs is used, even if its files have changed since. Nothing is read from the stream:
    /// the stored payload enters the stage that rejected it (and passes the stages after it), or the sink that
    /// refused it. A payload that was too large to store is first produced again from the stored record.
    ///
    /// A record that now succeeds is delivered and its dead letter is removed. A record that fails again stays
    /// a dead letter with the new reason. An interrupted redrive continues where it stopped when the command is
    /// run again; exactly-once sinks get each row once.
    #[command(
        after_help = "Examples:\n  shardmill dlq redrive --stage decode\n  shardmill dlq redrive 17 18\n  \
                      shardmill dlq redrive --all\n  shardmill dlq redrive --without mart"
    )]
    Redrive {
        #[command(flatten)]
        selection: Selection,
        /// Redrive all dead letters.
        #[arg(long)]
        all: bool,
        /// Continue without a sink or stage that is no longer in the pipeline; its dead letters stay.
        #[arg(long, value_name = "NAME")]
        without: Vec<String>,
        /// Also redrive dead letters from an older copy of the state. They may have been redriven since that
        /// copy was made: their rows would be duplicated.
        #[arg(long)]
        even_if_redriven: bool,
    },
    /// Delete dead letters. Their records are then lost for this pipeline.
    #[command(
        after_help = "Examples:\n  shardmill dlq purge --stage decode --reason \"no JSON\"\n  \
                      shardmill dlq purge --all"
    )]
    Purge {
        #[command(flatten)]
        selection: Selection,
        /// Delete all dead letters.
        #[arg(long)]
        all: bool,
    },
}

/// Pipeline whose dead letters are meant.
#[derive(clap::Args)]
pub struct DlqPipeline {
    /// The pipeline file.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PIPELINE)]
    pipeline: PathBuf,
    /// Dead letters of the rerun after this change was undone (rollback --replay-from-swap).
    #[arg(long, value_name = "CHANGE")]
    again: Option<i64>,
}

/// Selection of dead letters. Several options narrow each other.
#[derive(clap::Args)]
pub struct Selection {
    #[command(flatten)]
    pipeline: DlqPipeline,
    /// Numbers of dead letters.
    ids: Vec<i64>,
    /// Only records that this stage rejected.
    #[arg(long, value_name = "NAME", conflicts_with = "sink")]
    stage: Option<String>,
    /// Only rows that this sink refused.
    #[arg(long, value_name = "NAME")]
    sink: Option<String>,
    /// Only records of this shard.
    #[arg(long)]
    shard: Option<String>,
    /// Only dead letters whose reason contains this text.
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

    /// Returns the dead letters that a command changes: a selection, or all of them with `--all`.
    fn chosen(&self, all: bool, verb: &str) -> anyhow::Result<DeadLetterFilter> {
        let filter = self.filter();
        ensure!(
            all || !filter.is_empty(),
            "this would {verb} every dead letter: select some (--stage, --sink, --shard, --reason, numbers), \
             or use --all"
        );
        ensure!(
            !all || filter.is_empty(),
            "--all cannot be combined with a selection of dead letters"
        );
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
        ensure!(folder.exists(), "nothing was rerun after change {change} was undone");
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
    // Some may have been purged since they were listed.
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
        bail!("unknown dead letter {id}: `shardmill dlq list` shows the numbers");
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
            // Further lines are indented, so that no line of a reason looks like a line of this report.
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
            "entered    {bytes} bytes, too large to be stored: a redrive produces them again\ndigest     {sha256}"
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
        // Pipes and devices cannot be synced.
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
            "{left} dead letters are left, because an interrupted redrive has them: finish it with `shardmill dlq \
             redrive`, then run this command again for those that are still dead letters"
        ));
    }
    console.report(&json!({ "deleted": purged, "left": left }))
}

/// Formats bytes for people: text as it is, anything else in base64.
fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => escaped(text, &LINES),
        Err(_) => format!("{} (base64)", BASE64.encode(bytes)),
    }
}

/// Formats a time for people, in UTC.
fn time(ms: u64) -> String {
    let time = i64::try_from(ms).ok().and_then(chrono::DateTime::from_timestamp_millis);
    time.map_or_else(|| format!("{ms} ms"), |time| time.to_rfc3339())
}
