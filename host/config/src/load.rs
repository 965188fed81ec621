//! Turns a file into a [`PipelineConfig`]: parses it, replaces variables, reads each table, and checks that the tables
//! fit together.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::check::{CONNECTIONS_ALLOWED, Check};
use super::diagnostic::suggest;
use super::env::{EnvLookup, substitute_table};
use super::raw::{RawAdmin, RawDeadLetters, RawPipeline, Text};
use super::shape::shaped;
use super::{
    AdminConfig, ConfigError, ConfigFile, OnPositionMismatch, PipelineConfig, RejectedMax,
    ReloadConfig, Secret, SinkConfig, SinkTypes, Timing, bindings, intake, lookup, reload, sink,
    source, stage, timing,
};
use shardmill_core::record::PipelineName;

/// Tables of the file.
const TABLES: [&str; 10] = [
    "pipeline",
    "source",
    "stage",
    "sink",
    "dead_letters",
    "lookup",
    "reload",
    "timing",
    "admin",
    "intake",
];

/// Default of `buffer`. The largest default commit has 64 MiB of payload in up to 100,000 rows, each with about 360
/// bytes of overhead. With less, the objects of one shard would be cut before they are full.
pub const BUFFER_BYTES: usize = 100 << 20;
/// Range of `buffer`: a smaller one hardly holds one batch, a larger one exceeds any machine.
const BUFFER_BYTES_MIN: usize = 1 << 20;
const BUFFER_BYTES_MAX: usize = 64 << 30;
/// Connections of the admin port, in all and of one peer that is not on this machine.
const ADMIN_CONNECTIONS: usize = 128;
const CONNECTIONS_PER_PEER: usize = 32;
/// 0: no limit.
const PER_PEER_ALLOWED: std::ops::RangeInclusive<u64> = 0..=65_536;
/// Range of `dead_letters.bytes`: a smaller one hardly holds one dead letter.
const DEAD_LETTERS_BYTES_MIN: usize = 1 << 20;
const DEAD_LETTERS_BYTES_MAX: usize = 1 << 50;

/// Reads and validates a configuration file. `types` are the sink types that it may use; `lookup` is the source of
/// `${VAR}`.
///
/// Relative paths in it start at its folder.
///
/// # Errors
/// All problems that the file alone shows, each with its place and a help text.
pub fn load(
    path: &Path,
    types: &SinkTypes,
    lookup: EnvLookup,
) -> Result<PipelineConfig, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|cause| ConfigError::unreadable(path, &cause))?;
    parse(path, text, types, lookup)
}

/// Validates a configuration that is given as text. `path` appears in errors, and its folder is where relative paths
/// start.
///
/// # Errors
/// As for [`load`].
pub fn parse(
    path: impl Into<PathBuf>,
    text: impl Into<String>,
    types: &SinkTypes,
    lookup: EnvLookup,
) -> Result<PipelineConfig, ConfigError> {
    let file = Arc::new(ConfigFile { path: path.into(), text: text.into() });
    let mut check = Check::new(&file).with_lists(types.lists());
    let config = read(&file, types, lookup, &mut check);
    check.finish(config)
}

fn read(
    file: &Arc<ConfigFile>,
    types: &SinkTypes,
    variables: EnvLookup,
    check: &mut Check,
) -> Option<PipelineConfig> {
    let mut root = match DeTable::parse(&file.text) {
        Ok(root) => root.into_inner(),
        Err(error) => {
            let span = error.span().unwrap_or_default();
            let help = match error.message() {
                "duplicate key" => "keep one of the two",
                _ => "check the quotes, brackets and commas here and on the line before",
            };
            check.problem(span, format!("invalid TOML: {}", error.message()), help);
            return None;
        }
    };
    let fingerprints = sink::fingerprints(&root, check);
    let stage_texts = stage::written(&root, file);
    substitute_table(&mut root, variables, check);
    if check.failed() {
        return None; // The value of an unset variable is unknown, so later errors could be wrong.
    }
    let base = file.path.parent().unwrap_or(Path::new(""));
    let sections = Sections::split(root, check);

    let pipeline = sections.pipeline.and_then(|table| pipeline(table, check));
    let buffer = pipeline.as_ref().map_or(BUFFER_BYTES, |pipeline| pipeline.buffer_bytes_max);
    let source = sections.source.and_then(|table| source::read(table, base, check));
    let names = bindings::Names::collect(&sections.stages, &sections.sinks, &sections.lookups);
    let (stages_written, sinks_written) = (sections.stages.len(), sections.sinks.len());
    let stages = sections.stages.into_iter().zip(stage_texts);
    let stages = stages.filter_map(|(table, text)| stage::read(table, &text, base, &names, check));
    let stages: Vec<_> = stages.collect();
    let sinks = sections.sinks.into_iter().zip(fingerprints);
    let sinks =
        sinks.filter_map(|(table, print)| sink::read(table, print, (types, base), buffer, check));
    let sinks: Vec<_> = sinks.collect();
    let lookups = sections.lookups.into_iter();
    let lookups: Vec<_> = lookups.filter_map(|table| lookup::read(table, base, check)).collect();
    lookup::check_unique(&lookups, check);
    let reload = match sections.reload {
        Some(table) => reload::read(table, check),
        None => Some(ReloadConfig::default()),
    };
    let timing = match sections.timing {
        Some(table) => timing::read(table, check),
        None => Some(Timing::default()),
    };
    let admin = sections.admin.map(|table| admin(table, check));
    let intake = sections.intake.map(|table| intake::read(table, source.as_ref(), check));

    let dead_letter_sinks = sections.dead_letters.and_then(|table| shaped(table, check));
    let RawDeadLetters { sinks: dead_letter_sinks, bytes } = dead_letter_sinks.unwrap_or_default();
    let is_set = bytes.is_some();
    let dead_letters_bytes_max =
        is_set.then(|| check.size(&bytes, 0, DEAD_LETTERS_BYTES_MIN..=DEAD_LETTERS_BYTES_MAX));

    names.check_unique(check);
    bindings::check_dead_letter_sinks(&dead_letter_sinks, &names, &stages, check);
    bindings::check_renamed(&sinks, &names, check);
    let is_for_dead_letters = |sink: &SinkConfig| {
        dead_letter_sinks.iter().any(|name| name.get_ref().0 == sink.name.value.as_str())
    };
    let all_sinks = sinks.len();
    let (dead_letter_sinks, sinks): (Vec<_>, Vec<_>) =
        sinks.into_iter().partition(is_for_dead_letters);
    if stages.len() == stages_written && all_sinks == sinks_written {
        bindings::check_bound(&stages, &sinks, check);
    }
    let pipeline = pipeline?;
    Some(PipelineConfig {
        file: Arc::clone(file),
        name: pipeline.name,
        state_dir: base.join(pipeline.state_dir).into(),
        source: source?,
        stages,
        sinks,
        dead_letter_sinks,
        dead_letters_bytes_max: match dead_letters_bytes_max {
            Some(bytes) => Some(bytes?),
            None => None,
        },
        lookups,
        buffer_bytes_max: pipeline.buffer_bytes_max,
        rejected_max: pipeline.rejected_max,
        on_position_mismatch: pipeline.on_position_mismatch,
        timing: timing?,
        reload: reload?,
        admin: match admin {
            Some(admin) => Some(admin?),
            None => None,
        },
        intake: match intake {
            Some(intake) => Some(intake?),
            None => None,
        },
        values: check.values().clone(),
    })
}

/// Tables of the file, each read separately, so that an error in one does not hide errors in the next.
struct Sections<'i> {
    pipeline: Option<Spanned<DeValue<'i>>>,
    source: Option<Spanned<DeValue<'i>>>,
    stages: Vec<Spanned<DeValue<'i>>>,
    sinks: Vec<Spanned<DeValue<'i>>>,
    lookups: Vec<Spanned<DeValue<'i>>>,
    dead_letters: Option<Spanned<DeValue<'i>>>,
    reload: Option<Spanned<DeValue<'i>>>,
    timing: Option<Spanned<DeValue<'i>>>,
    admin: Option<Spanned<DeValue<'i>>>,
    intake: Option<Spanned<DeValue<'i>>>,
}

impl<'i> Sections<'i> {
    fn split(mut root: DeTable<'i>, check: &mut Check) -> Self {
        let sections = Self {
            pipeline: required(&mut root, "[pipeline]", "name = \"cars\"", check),
            source: required(&mut root, "[source]", "type = \"kinesis\"", check),
            // Without a stage, records go to the sinks unchanged.
            stages: match root.contains_key("stage") {
                true => tables(&mut root, "[[stage]]", "plugin = \"decode.wasm\"", check),
                false => Vec::new(),
            },
            sinks: tables(&mut root, "[[sink]]", "type = \"stdout\"", check),
            lookups: match root.contains_key("lookup") {
                true => tables(&mut root, "[[lookup]]", "name = \"customers\"", check),
                false => Vec::new(),
            },
            dead_letters: root.remove("dead_letters"),
            reload: root.remove("reload"),
            timing: root.remove("timing"),
            admin: root.remove("admin"),
            intake: root.remove("intake"),
        };
        for key in root.keys() {
            let name = key.get_ref();
            let message = format!("unknown table or top-level key `{name}`");
            check.problem(key.span(), message, suggest(name, "allowed", &TABLES));
        }
        sections
    }
}

fn required<'i>(
    root: &mut DeTable<'i>,
    header: &str,
    example: &str,
    check: &mut Check,
) -> Option<Spanned<DeValue<'i>>> {
    let table = root.remove(header.trim_matches(['[', ']']));
    if table.is_none() {
        let help = format!("add {header} with {example} and its other keys");
        check.problem(0..0, format!("the table {header} is missing"), help);
    }
    table
}

/// Returns the elements of `[[header]]`, at least one.
fn tables<'i>(
    root: &mut DeTable<'i>,
    header: &str,
    example: &str,
    check: &mut Check,
) -> Vec<Spanned<DeValue<'i>>> {
    let Some(value) = required(root, header, example, check) else { return Vec::new() };
    let span = value.span();
    match value.into_inner() {
        DeValue::Array(values) if !values.is_empty() => values.into_iter().collect(),
        DeValue::Array(_) => {
            check.problem(span, format!("the list {header} is empty"), "add at least one");
            Vec::new()
        }
        _ => {
            let help = format!("write {header}, with two brackets: there may be several");
            check.problem(span, format!("expected a list of tables for {header}"), help);
            Vec::new()
        }
    }
}

/// Values of `[pipeline]`.
struct Pipeline {
    name: PipelineName,
    state_dir: PathBuf,
    buffer_bytes_max: usize,
    rejected_max: RejectedMax,
    on_position_mismatch: OnPositionMismatch,
}

fn pipeline(table: Spanned<DeValue<'_>>, check: &mut Check) -> Option<Pipeline> {
    let raw: RawPipeline = shaped(table, check)?;
    let name = check.name::<PipelineName>(&raw.name, "pipeline");
    let state_dir = match &raw.state_dir {
        Some(path) => check.filled(path, "state folder"),
        None => Some("state".to_owned()),
    };
    let buffer = check.size(&raw.buffer, BUFFER_BYTES, BUFFER_BYTES_MIN..=BUFFER_BYTES_MAX);
    let default = RejectedMax::default();
    let of_last_1000 = check.count(&raw.rejected_of_last_1000, default.of_last_1000, 0..=1_000);
    let in_a_row = check.count(&raw.rejected_in_a_row, default.in_a_row, 0..=1_000_000);
    let on_position_mismatch = check.choice(
        &raw.on_position_mismatch,
        "value of `on_position_mismatch`",
        OnPositionMismatch::Stop,
        &[
            ("stop", OnPositionMismatch::Stop),
            ("sink", OnPositionMismatch::Sink),
            ("checkpoint", OnPositionMismatch::Checkpoint),
        ],
    );
    Some(Pipeline {
        name: name?.value,
        state_dir: state_dir?.into(),
        buffer_bytes_max: buffer?,
        rejected_max: RejectedMax { of_last_1000: of_last_1000?, in_a_row: in_a_row? },
        on_position_mismatch: on_position_mismatch?,
    })
}

fn admin(table: Spanned<DeValue<'_>>, check: &mut Check) -> Option<AdminConfig> {
    let raw: RawAdmin = shaped(table, check)?;
    let mut token = |raw: &Option<Spanned<Text>>| match raw {
        Some(raw) => check.filled(raw, "token").map(|text| Some(Secret::new(text))),
        None => Some(None),
    };
    let (own, read) = (token(&raw.token), token(&raw.read_token));
    let (own, read) = (own?, read?);
    if let (Some(own), Some(read), Some(at)) = (&own, &read, &raw.read_token)
        && own == read
    {
        let help = "choose another one, so that a client with `read_token` cannot change what runs";
        check.problem(at.span(), "`read_token` is the same as `token`", help);
        return None;
    }
    let is_guarded = own.is_some() || read.is_some();
    let listen = match raw.listen {
        None => Some(([127, 0, 0, 1], 9901).into()),
        Some(listen) if is_guarded => check.address(&listen, "127.0.0.1:9901"),
        Some(listen) => {
            let why = "add `token = \"${ADMIN_TOKEN}\"`, which requests must then send, or listen on loopback";
            check.loopback(&listen, "admin", "127.0.0.1:9901", why)
        }
    };
    let hosts = host_names(&raw.hosts, check);
    let connections = check.count(&raw.connections, ADMIN_CONNECTIONS, CONNECTIONS_ALLOWED);
    let per_peer = check.count(&raw.connections_per_peer, CONNECTIONS_PER_PEER, PER_PEER_ALLOWED);
    Some(AdminConfig {
        listen: listen?,
        token: own,
        read_token: read,
        hosts: hosts?,
        connections_max: connections?,
        per_peer_max: per_peer.map(|max| (max > 0).then_some(max))?,
    })
}

/// Reads host names, without scheme and port.
fn host_names(raw: &[Spanned<Text>], check: &mut Check) -> Option<Vec<String>> {
    let mut names = Vec::new();
    for text in raw {
        let written = &text.get_ref().0;
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let is_name = !written.is_empty() && written.chars().all(is_of_name);
        match is_name && written.parse::<std::net::IpAddr>().is_err() {
            true => names.push(written.trim_end_matches('.').to_ascii_lowercase()),
            false => {
                let help = "write only the name, without scheme, port and wildcard: \
                            \"mill.example.com\"; addresses and localhost need no entry";
                check.problem(text.span(), format!("not a valid host name: {written:?}"), help);
            }
        }
    }
    (names.len() == raw.len()).then_some(names)
}
