//! `[source]`: the stream, its server, the start position and the limits of batches.

use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::check::Check;
use super::diagnostic::{did_you_mean, suggest};
use super::raw::{Maybe, RawAssumeRole, RawBatch, RawCreate, RawFile, RawKinesis, Text};
use super::shape::shaped;
use super::{
    AssumeRole, BatchLimits, CreateStream, Endpoint, FileConfig, FileCut, KinesisConfig, Located,
    OnLostRecords, ReaderKind, SourceConfig, SourceKind, StreamServer,
};
use shardmill_core::record::{SequenceNumber, ShardId, StreamRef};
use shardmill_core::source::StartPosition;

/// Values of `type`.
static TYPES: [&str; 2] = ["kinesis", "file"];
/// Path that stands for standard input.
const STANDARD_INPUT: &str = "-";
/// Default name of a pipeline's consumer or session in AWS.
const CONSUMER: &str = "shardmill";

/// Source: API reference, `GetRecords`, Limit.
const RECORDS_PER_CALL_MAX: u32 = 10_000;
/// AWS allows 5 GetRecords calls per second and shard, so 200 ms is the minimum.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Other servers do not have this limit. A shorter pause only wastes a core.
const POLL_INTERVAL_OWN_SERVER_MIN: Duration = Duration::from_millis(5);
/// An iterator expires after 5 minutes. A much shorter pause leaves time for a slow batch.
const POLL_INTERVAL_MAX: Duration = Duration::from_secs(60);
/// How long a new stream may take to become ACTIVE.
const CREATE_WAIT: Duration = Duration::from_secs(120);
const CREATE_WAITS: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);
const SHARDS: RangeInclusive<u64> = 1..=10_000;
const BATCH_RECORDS_ALLOWED: RangeInclusive<u64> = 1..=100_000;
const BATCH_BYTES_ALLOWED: RangeInclusive<usize> = (1 << 10)..=(64 << 20);

/// Reads `[source]`. Relative paths start at `base`.
pub(super) fn read(
    table: Spanned<DeValue<'_>>,
    base: &Path,
    check: &mut Check,
) -> Option<SourceConfig> {
    match check.table_type(&table, "source", &TYPES)? {
        "file" => {
            let raw: RawFile = shaped(table, check)?;
            let path = check.filled(&raw.path, "path");
            let skip_lines = check.count(&raw.skip, 0, 0..=u64::MAX);
            let (format, batch) = (format(&raw.format, check), batch(raw.batch, check));
            let path = path?;
            let path = if path == STANDARD_INPUT { path.into() } else { base.join(path) };
            let format = format?;
            let cut = cut(format.as_deref(), &path);
            let cut = delimited(cut, &raw.delimiter, check)?;
            let file = FileConfig { path, cut, skip_lines: skip_lines? };
            let kind = SourceKind::File(file);
            let columns = Vec::new();
            Some(SourceConfig { kind, batch: batch?, format, columns })
        }
        _ => {
            let mut raw: RawKinesis = shaped(table, check)?;
            let (format, batch) = (format(&raw.format, check), batch(raw.batch.take(), check));
            let kinesis = kinesis(raw, check);
            let kind = SourceKind::Kinesis(kinesis?);
            let columns = Vec::new();
            Some(SourceConfig { kind, batch: batch?, format: format?, columns })
        }
    }
}

/// Chooses the cut by the declared format, or else by the name of the file.
fn cut(format: Option<&str>, path: &Path) -> FileCut {
    let is_named_csv = path.extension().is_some_and(|name| name.eq_ignore_ascii_case("csv"));
    match format {
        Some("text/csv") => FileCut::Csv { delimiter: None },
        None if is_named_csv => FileCut::Csv { delimiter: None },
        _ => FileCut::Lines,
    }
}

/// Sets the configured delimiter, if there is one.
fn delimited(cut: FileCut, raw: &Maybe<Text>, check: &mut Check) -> Option<FileCut> {
    let Some(raw) = raw else { return Some(cut) };
    match (cut, raw.get_ref().0.as_bytes()) {
        (FileCut::Lines, _) => {
            check.problem(
                raw.span(),
                "`delimiter` has no effect: it is for CSV, and this file is read by lines",
                "leave it out, or set format = \"text/csv\"",
            );
            None
        }
        (_, [delimiter]) if !matches!(delimiter, b'"' | b'\n' | b'\r') => {
            Some(FileCut::Csv { delimiter: Some(*delimiter) })
        }
        (_, found) => {
            let found = String::from_utf8_lossy(found).into_owned();
            check.problem(
                raw.span(),
                format!("expected one ASCII character as delimiter, found {found:?}"),
                "write the delimiter that the plugin is configured with, such as \";\"",
            );
            None
        }
    }
}

fn kinesis(raw: RawKinesis, check: &mut Check) -> Option<KinesisConfig> {
    let stream = stream(&raw.stream, check);
    let server = server(&raw.endpoint, &raw.region, raw.assume_role.as_ref(), check);
    let start = start(&raw.start, check);
    let on_lost_records = check.choice(
        &raw.on_lost_records,
        "value of `on_lost_records`",
        OnLostRecords::Stop,
        &[("stop", OnLostRecords::Stop), ("continue", OnLostRecords::Continue)],
    );
    let create = raw.create.map(|raw| create(&raw, check));
    let reader = reader(&raw.reader, &raw.consumer, check);
    let records_per_call_max = check.count(
        &raw.records_per_call,
        RECORDS_PER_CALL_MAX,
        1..=u64::from(RECORDS_PER_CALL_MAX),
    );
    let poll_interval_min = match server.as_ref().map(|server| &server.endpoint) {
        Some(Endpoint::Aws) => POLL_INTERVAL,
        _ => POLL_INTERVAL_OWN_SERVER_MIN,
    };
    let poll_intervals = poll_interval_min..=POLL_INTERVAL_MAX;
    let poll_interval = check.duration(&raw.poll_interval, POLL_INTERVAL, poll_intervals);
    Some(KinesisConfig {
        stream: stream?,
        server: server?,
        start: start?,
        on_lost_records: on_lost_records?,
        create: match create {
            Some(create) => Some(create?),
            None => None,
        },
        reader: reader?,
        records_per_call_max: records_per_call_max?,
        poll_interval: poll_interval?,
    })
}

/// Reads `endpoint`, `region` and `assume_role`.
pub fn server(
    raw_endpoint: &Maybe<Text>,
    raw_region: &Maybe<Text>,
    raw_role: Option<&RawAssumeRole>,
    check: &mut Check,
) -> Option<StreamServer> {
    let endpoint = endpoint(raw_endpoint, check);
    let region = filled(raw_region, "region", check);
    let role = raw_role.map(|raw| assume_role(raw, check));
    Some(StreamServer {
        endpoint: endpoint?,
        region: region?,
        assume_role: match role {
            Some(role) => Some(role?),
            None => None,
        },
    })
}

/// Reads the name or the ARN of a stream.
pub fn stream(raw: &Spanned<Text>, check: &mut Check) -> Option<Located<StreamRef>> {
    let text = &raw.get_ref().0;
    match StreamRef::parse(text) {
        Ok(stream) => Some(Located { value: stream, span: raw.span() }),
        Err(_) => {
            let help = "Kinesis allows 1 to 128 letters, digits, `_`, `.` and `-`; another \
                        account's stream is named by its ARN";
            check.problem(raw.span(), format!("not a valid stream name: {text:?}"), help);
            None
        }
    }
}

fn reader(kind: &Maybe<Text>, consumer: &Maybe<Text>, check: &mut Check) -> Option<ReaderKind> {
    let is_fan_out =
        check.choice(kind, "reader", false, &[("polling", false), ("fan-out", true)])?;
    match (is_fan_out, consumer) {
        (false, None) => Some(ReaderKind::Polling),
        (false, Some(consumer)) => {
            let help = "add reader = \"fan-out\", or take it out";
            check.problem(consumer.span(), "`consumer` has no effect with a polling reader", help);
            None
        }
        (true, None) => Some(ReaderKind::FanOut { consumer: CONSUMER.into() }),
        (true, Some(consumer)) => {
            let name = check.name::<String>(consumer, "consumer")?;
            Some(ReaderKind::FanOut { consumer: name.value })
        }
    }
}

fn assume_role(raw: &RawAssumeRole, check: &mut Check) -> Option<AssumeRole> {
    let arn = &raw.arn.get_ref().0;
    let is_role = arn.starts_with("arn:aws") && arn.contains(":iam::") && arn.contains(":role/");
    if !is_role {
        let help = "write for example \"arn:aws:iam::123456789012:role/shardmill-reader\"";
        check.problem(raw.arn.span(), format!("not a valid role ARN: {arn:?}"), help);
    }
    let external_id = filled(&raw.external_id, "role's external id", check);
    let session_name = filled(&raw.session_name, "session name", check);
    is_role.then_some(())?;
    Some(AssumeRole {
        arn: arn.clone(),
        external_id: external_id?,
        session_name: session_name?.unwrap_or_else(|| CONSUMER.to_owned()),
    })
}

fn endpoint(raw: &Maybe<Text>, check: &mut Check) -> Option<Endpoint> {
    let Some(raw) = raw else { return Some(Endpoint::Aws) };
    let text = raw.get_ref().0.as_str();
    if text == "embedded" {
        return Some(Endpoint::Embedded);
    }
    match url::Url::parse(text) {
        Ok(url) if matches!(url.scheme(), "http" | "https") => return Some(Endpoint::Url(url)),
        _ => {}
    }
    let forms = "write \"embedded\" or a URL such as \"http://127.0.0.1:4567\", or leave the key \
                 out for AWS";
    let help = match did_you_mean(text, ["embedded"]) {
        Some(near) => format!("did you mean \"{near}\"? {forms}"),
        None => forms.to_owned(),
    };
    check.problem(raw.span(), "invalid endpoint", help);
    None
}

/// Reads an optional text. The inner `None` means that the key is missing, the outer one that its value is empty.
fn filled(raw: &Maybe<Text>, noun: &str, check: &mut Check) -> Option<Option<String>> {
    match raw {
        Some(raw) => check.filled(raw, noun).map(Some),
        None => Some(None),
    }
}

fn start(raw: &Maybe<Text>, check: &mut Check) -> Option<StartPosition> {
    let Some(raw) = raw else { return Some(StartPosition::TrimHorizon) };
    match parse_start(&raw.get_ref().0) {
        Ok(start) => Some(start),
        Err(NotAStart { message, help }) => {
            check.problem(raw.span(), message, help);
            None
        }
    }
}

/// Error for text that is not a valid start position.
#[derive(Debug, thiserror::Error)]
#[error("{message}; {help}")]
pub struct NotAStart {
    message: String,
    help: String,
}

/// Parses one of the four forms: `trim-horizon`, `latest`, `at-timestamp:TIME` with an RFC 3339 time,
/// `at-sequence:SHARD:SEQUENCE` with several places separated by commas.
///
/// # Errors
/// [`NotAStart`].
pub fn parse_start(text: &str) -> Result<StartPosition, NotAStart> {
    if let Some(time) = text.strip_prefix("at-timestamp:") {
        return match chrono::DateTime::parse_from_rfc3339(time.trim()) {
            Ok(time) => Ok(StartPosition::AtTimestampMs(time.timestamp_millis())),
            Err(cause) => Err(NotAStart {
                message: format!("not a valid time: {:?} ({cause})", time.trim()),
                help: "write date, time and zone: \"at-timestamp:2026-01-31T00:00:00Z\"".into(),
            }),
        };
    }
    if let Some(places) = text.strip_prefix("at-sequence:") {
        let place = |place: &str| {
            let (shard, sequence) = place.trim().rsplit_once(':')?;
            Some((ShardId::from(shard), SequenceNumber::parse(sequence).ok()?))
        };
        let read: Option<_> = places.split(',').map(place).collect();
        return read.map(StartPosition::AtSequence).ok_or_else(|| NotAStart {
            message: format!("not a valid place of a record: {places:?}"),
            help: "write shard and sequence number, several separated by commas: \
                   \"at-sequence:shardId-000000000000:49590338271490256608559692538361571\""
                .into(),
        });
    }
    match text {
        "trim-horizon" => Ok(StartPosition::TrimHorizon),
        "latest" => Ok(StartPosition::Latest),
        _ => {
            let help = suggest(text, "allowed", &["trim-horizon", "latest"]);
            Err(NotAStart {
                message: format!("not a valid start position: {text:?}"),
                help: format!(
                    "{help}; or \"at-timestamp:2026-01-31T00:00:00Z\", or \
                     \"at-sequence:SHARD:SEQUENCE\""
                ),
            })
        }
    }
}

fn create(raw: &RawCreate, check: &mut Check) -> Option<CreateStream> {
    let shards = check.count(&Some(raw.shards.clone()), 1, SHARDS);
    let wait_max = check.duration(&raw.wait, CREATE_WAIT, CREATE_WAITS);
    Some(CreateStream { shards: shards?, wait_max: wait_max? })
}

/// Reads a media type, `type/subtype`, with or without parameters.
fn format(raw: &Maybe<Text>, check: &mut Check) -> Option<Option<String>> {
    let Some(raw) = raw else { return Some(None) };
    let text = raw.get_ref().0.as_str();
    let essence = text.split(';').next().unwrap_or_default().trim();
    let token = |part: &str| !part.is_empty() && !part.contains([' ', '/', '"']);
    if essence.split_once('/').is_some_and(|(kind, subtype)| token(kind) && token(subtype)) {
        return Some(Some(text.to_owned()));
    }
    let help = "write for example \"application/json\" or \"application/x-bincode\"";
    check.problem(raw.span(), format!("not a valid media type: {text:?}"), help);
    None
}

fn batch(raw: Option<RawBatch>, check: &mut Check) -> Option<BatchLimits> {
    let (records, bytes) = raw.map_or((None, None), |raw| (raw.records, raw.bytes));
    let default = BatchLimits::default();
    let records = check.count(&records, default.records_max, BATCH_RECORDS_ALLOWED);
    let bytes = check.size(&bytes, default.bytes_max, BATCH_BYTES_ALLOWED);
    Some(BatchLimits { records_max: records?, bytes_max: bytes? })
}
