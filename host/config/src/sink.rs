//! `[[sink]]`: where rows go, and in which rhythm they are committed.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};
use url::Url;

use super::check::{Check, bytes_text};
use super::diagnostic::suggest;
use super::grant_http::{RESPONSE_BYTES, headers};
use super::load::shaped;
use super::raw::{
    Count, Maybe, RawCommit, RawDiscard, RawHttpSink, RawKinesisSink, RawObjects, RawPostgres,
    RawRedshift, RawSqlite, RawStdout, Text,
};
use super::{
    Compression, CopySource, HttpBody, HttpHostConfig, HttpMethod, HttpTarget, Located,
    PostgresTarget, RedshiftTarget, Rhythm, SinkConfig, SinkKind, StreamTarget, json, source,
};
use super::{FOLDER_FIELDS, FolderTemplate, ObjectFormat, ObjectLayout};
use crate::WriteMode;
use shardmill_core::record::SinkName;
use shardmill_pg::PostgresServer;

/// The values of `type`.
static TYPES: [&str; 8] =
    ["stdout", "sqlite", "postgres", "objects", "redshift", "kinesis", "http", "discard"];
/// The connections of a server's sinks unless they are told otherwise: more than a server of some cores works
/// on at once, and far from the 100 that PostgreSQL takes by default.
pub const CONNECTIONS_MAX: usize = 16;

/// The schemes of `url` whose stores can create an object only if it is not there, which the
/// claim log rests on.
const SCHEMES: [&str; 9] = ["file", "s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss"];

const CONNECTIONS: RangeInclusive<u64> = 1..=1_000;
const ROWS: RangeInclusive<u64> = 1..=10_000_000;
const BYTES_MIN: usize = 1 << 10;
const LINGERS: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(86_400);
/// PostgreSQL cuts longer identifiers off in silence (NAMEDATALEN - 1).
const POSTGRES_IDENTIFIER_BYTES_MAX: usize = 63;

/// A rhythm of a sink that its shards wait for.
const fn patient(rows_max: usize, bytes_max: usize, linger_max: Duration) -> Rhythm {
    Rhythm { rows_max, bytes_max, linger_max, give_up_after: None }
}

/// A person watches: small steps.
const RHYTHM_STDOUT: Rhythm = patient(1_000, 1 << 20, Duration::from_millis(200));
/// One transaction per second and shard, or what fits in memory without a thought.
const RHYTHM_TABLE: Rhythm = patient(10_000, 4 << 20, Duration::from_secs(1));
/// Few large objects; rows are bounded because each costs memory beside its bytes.
const RHYTHM_OBJECTS: Rhythm = patient(100_000, 64 << 20, Duration::from_secs(300));
/// Few large loads: each costs a cluster the same few seconds, whatever it holds.
const RHYTHM_REDSHIFT: Rhythm = patient(100_000, 64 << 20, Duration::from_secs(60));

/// Ten full requests; soon, because someone downstream waits.
const RHYTHM_STREAM: Rhythm = patient(5_000, 4 << 20, Duration::from_millis(200));
/// What an endpoint may be expected to take in one request.
const RHYTHM_HTTP: Rhythm = patient(1_000, 1 << 20, Duration::from_secs(1));

/// What gets over a failover or a restart, and is over before somebody comes.
const GIVE_UP_AFTER: Duration = Duration::from_secs(300);

/// Statuses that say who may ask, or when: no row is at fault.
const NOT_OF_ROWS: [u16; 7] = [401, 403, 407, 408, 425, 429, 503];

const HTTP_TIMEOUT: Duration = Duration::from_secs(30);
const HTTP_TIMEOUTS: RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_secs(600);

/// Each `[[sink]]` as JSON before any variable is replaced, in the order of the file.
pub(super) fn fingerprints(root: &DeTable<'_>, check: &mut Check) -> Vec<String> {
    let sinks = root.get("sink").and_then(|sinks| sinks.get_ref().as_array());
    let print = |sink: &Spanned<DeValue>| match sink.get_ref().as_table() {
        Some(table) => json::from_table(table, check).to_string(),
        None => String::new(),
    };
    sinks.map(|sinks| sinks.iter().map(print).collect()).unwrap_or_default()
}

/// Reads one `[[sink]]`; `buffer_bytes_max` is what all sinks' buffers hold together.
pub(super) fn read(
    mut table: Spanned<DeValue<'_>>,
    fingerprint_json: String,
    base: &Path,
    buffer_bytes_max: usize,
    check: &mut Check,
) -> Option<SinkConfig> {
    let span = table.span();
    let renamed_from = renamed_from(&mut table, check);
    let (raw_name, commit, default, kind) = match check.table_type(&table, "sink", &TYPES)? {
        "discard" => {
            let RawDiscard { name, commit, .. } = shaped(table, check)?;
            (name, commit, RHYTHM_TABLE, Some(SinkKind::Discard))
        }
        "stdout" => {
            let RawStdout { name, template, commit, .. } = shaped(table, check)?;
            (name, commit, RHYTHM_STDOUT, stdout(template, check))
        }
        "sqlite" => {
            let raw: RawSqlite = shaped(table, check)?;
            let kind = sqlite(&raw, base, check);
            (raw.name, raw.commit, RHYTHM_TABLE, kind)
        }
        "postgres" => {
            let raw: RawPostgres = shaped(table, check)?;
            let kind = postgres(&raw, check);
            (raw.name, raw.commit, RHYTHM_TABLE, kind)
        }
        "redshift" => {
            let raw: RawRedshift = shaped(table, check)?;
            let kind = redshift(&raw, check);
            (raw.name, raw.commit, RHYTHM_REDSHIFT, kind)
        }
        "kinesis" => {
            let raw: RawKinesisSink = shaped(table, check)?;
            let kind = kinesis(&raw, check);
            (raw.name, raw.commit, RHYTHM_STREAM, kind)
        }
        "http" => {
            let raw: RawHttpSink = shaped(table, check)?;
            let kind = http(&raw, check);
            (raw.name, raw.commit, RHYTHM_HTTP, kind)
        }
        _ => {
            let raw: RawObjects = shaped(table, check)?;
            let kind = objects(&raw, base, check);
            (raw.name, raw.commit, RHYTHM_OBJECTS, kind)
        }
    };
    let name = check.name(&raw_name, "sink");
    let promises = matches!(kind, Some(SinkKind::Objects { .. }));
    let rhythm = rhythm(commit, default, promises, buffer_bytes_max, check);
    Some(SinkConfig {
        name: name?,
        renamed_from: renamed_from?,
        rhythm: rhythm?,
        kind: kind?,
        span,
        fingerprint_json,
    })
}

/// Takes `renamed_from` out of a sink's table: sinks of every type have it.
fn renamed_from(
    table: &mut Spanned<DeValue<'_>>,
    check: &mut Check,
) -> Option<Option<Located<SinkName>>> {
    let DeValue::Table(keys) = table.get_mut() else { return Some(None) };
    let Some(value) = keys.remove("renamed_from") else { return Some(None) };
    let span = value.span();
    let Some(text) = value.get_ref().as_str() else {
        let message = "`renamed_from` is the name that the sink had before";
        check.problem(span, message, "write renamed_from = \"old-name\"");
        return None;
    };
    check.name(&Spanned::new(span, Text(text.to_owned())), "sink").map(Some)
}

fn stdout(template: Option<Spanned<Text>>, check: &mut Check) -> Option<SinkKind> {
    let Some(template) = template else { return Some(SinkKind::Stdout { template: None }) };
    let text = &template.get_ref().0;
    let mut rest = text.replace("{{", "").replace("}}", "");
    while let Some((_, after)) = rest.split_once('{') {
        match after.split_once('}') {
            Some((field, after)) if !field.is_empty() && !field.contains('{') => {
                rest = after.to_owned();
            }
            _ => {
                let message = "the template has a `{` that opens no field";
                let help = "fields are a row's JSON fields and {shard}, {sequence}, {key}, \
                            {route}: close each with `}`";
                check.problem(template.span(), message, help);
                return None;
            }
        }
    }
    Some(SinkKind::Stdout { template: Some(text.clone()) })
}

fn sqlite(raw: &RawSqlite, base: &Path, check: &mut Check) -> Option<SinkKind> {
    let path = check.filled(&raw.path, "database file").filter(|path| {
        let lasting = !path.starts_with(":memory:");
        if !lasting {
            let message = "a database in memory forgets its rows when the process ends";
            check.problem(raw.path.span(), message, "name a file, such as \"data/cars.db\"");
        }
        lasting
    });
    let table = table(&raw.table, check);
    let create = raw.create.unwrap_or(false);
    let mode = write_mode(&raw.mode, &raw.key, &raw.newest_by, check);
    Some(SinkKind::Sqlite { path: base.join(path?), table: table?, create, mode: mode? })
}

fn postgres(raw: &RawPostgres, check: &mut Check) -> Option<SinkKind> {
    let url = connection(&raw.url, 5432, check);
    let table = table(&raw.table, check).filter(|table| {
        let long = table.split('.').find(|part| part.len() > POSTGRES_IDENTIFIER_BYTES_MAX);
        if let Some(part) = long {
            let message = format!("PostgreSQL would cut the name {part:?} off");
            let help = format!("at most {POSTGRES_IDENTIFIER_BYTES_MAX} bytes");
            check.problem(raw.table.span(), message, help);
        }
        long.is_none()
    });
    let create = raw.create.unwrap_or(false);
    let mode = write_mode(&raw.mode, &raw.key, &raw.newest_by, check);
    let connections_max = check.count(&raw.connections, CONNECTIONS_MAX, CONNECTIONS);
    Some(SinkKind::Postgres(PostgresTarget {
        url: url?,
        table: table?,
        create,
        mode: mode?,
        connections_max: connections_max?,
        lineage: raw.lineage.unwrap_or(false),
        written_for: None,
    }))
}

/// A connection string; `port` is for the way out.
fn connection(raw: &Spanned<Text>, port: u16, check: &mut Check) -> Option<String> {
    let url = &raw.get_ref().0;
    let Err(cause) = PostgresServer::parse(url) else { return Some(url.clone()) };
    let help = format!(
        "write \"postgres://user:${{PGPASSWORD}}@host:{port}/database\" or \
         \"host=... user=... dbname=...\""
    );
    check.problem(raw.span(), cause, help);
    None
}

fn redshift(raw: &RawRedshift, check: &mut Check) -> Option<SinkKind> {
    let url = connection(&raw.url, 5439, check);
    let table = table(&raw.table, check);
    let create = raw.create.unwrap_or(false);
    let mode = write_mode(&raw.mode, &raw.key, &raw.newest_by, check);
    let staging = staging_url(&raw.staging, check);
    let iam_role = iam_role(&raw.iam_role, check);
    let region = match &raw.region {
        None => Some(None),
        Some(region) => check.filled(region, "region").map(Some),
    };
    let options = options(raw.options.as_ref());
    let staging = CopySource { url: staging?, options, iam_role: iam_role?, region: region? };
    Some(SinkKind::Redshift(RedshiftTarget {
        url: url?,
        table: table?,
        create,
        mode: mode?,
        staging,
    }))
}

/// Where COPY reads.
fn staging_url(raw: &Spanned<Text>, check: &mut Check) -> Option<Url> {
    let text = check.filled(raw, "URL")?;
    let url = Url::parse(&text).ok().filter(|url| bucket_of(url).is_some());
    if url.is_none() {
        let help = "write \"s3://bucket/prefix\", a place that the host may write to";
        check.problem(raw.span(), format!("Redshift cannot load from {text:?}"), help);
    }
    url
}

/// Source: Redshift guide, "COPY", authorization parameters; several ARNs are a chain of roles.
fn iam_role(raw: &Spanned<Text>, check: &mut Check) -> Option<String> {
    let text = check.filled(raw, "role")?;
    let is_part = |c: char| c.is_ascii_alphanumeric() || ":/+=,.@_-".contains(c);
    let is_role = |role: &str| role.starts_with("arn:") && role.contains(":role/");
    if text == "default" || (text.chars().all(is_part) && text.split(',').all(is_role)) {
        return Some(text);
    }
    let help = "write \"arn:aws:iam::123456789012:role/NAME\", a role of the cluster that may read \
                the files, or \"default\"";
    check.problem(raw.span(), format!("{text:?} is no role's ARN"), help);
    None
}

/// Options for `object_store`.
fn options(raw: Option<&BTreeMap<String, Text>>) -> BTreeMap<String, String> {
    raw.into_iter().flatten().map(|(key, value)| (key.clone(), value.0.clone())).collect()
}

/// `mode`, with the keys that belong to it.
fn write_mode(
    mode: &Maybe<Text>,
    key: &[Spanned<Text>],
    newest_by: &Maybe<Text>,
    check: &mut Check,
) -> Option<WriteMode> {
    let words = ["append", "upsert", "ignore"].map(|word| (word, word));
    let word = check.choice(mode, "mode", "append", &words)?;
    if word == "append" {
        let strays = [key.first().map(Spanned::span), newest_by.as_ref().map(Spanned::span)];
        for (name, span) in ["key", "newest_by"].into_iter().zip(strays) {
            if let Some(span) = span {
                let message = format!("`{name}` does nothing while rows are appended");
                check.problem(span, message, "add mode = \"upsert\", or leave it out");
                return None;
            }
        }
        return Some(WriteMode::Append);
    }
    if key.is_empty() {
        let span = mode.as_ref().map(Spanned::span)?;
        let message = format!("mode {word:?} needs the columns that make a row's key");
        check.problem(span, message, "add for example key = [\"id\"]");
        return None;
    }
    let mut names: Vec<String> = Vec::new();
    for column in key {
        let name = check.filled(column, "column")?;
        if names.contains(&name) {
            check.problem(
                column.span(),
                format!("column {name:?} is named twice"),
                "once is enough",
            );
            return None;
        }
        names.push(name);
    }
    match (word, newest_by) {
        ("ignore", Some(newest_by)) => {
            let message =
                "`newest_by` says which row wins, and with mode \"ignore\" the first does";
            check.problem(newest_by.span(), message, "use mode = \"upsert\", or leave it out");
            None
        }
        ("ignore", None) => Some(WriteMode::Ignore { key: names }),
        (_, None) => Some(WriteMode::Upsert { key: names, newest_by: None }),
        (_, Some(newest_by)) => {
            let column = check.filled(newest_by, "column")?;
            Some(WriteMode::Upsert { key: names, newest_by: Some(column) })
        }
    }
}

fn table(raw: &Spanned<Text>, check: &mut Check) -> Option<String> {
    let table = check.filled(raw, "table")?;
    if table.contains('\0') || table.split('.').any(str::is_empty) {
        let help = "write \"table\" or \"schema.table\"; it will be quoted";
        check.problem(raw.span(), format!("{table:?} cannot name a table"), help);
        return None;
    }
    Some(table)
}

fn objects(raw: &RawObjects, base: &Path, check: &mut Check) -> Option<SinkKind> {
    let url = object_url(&raw.url, base, check);
    let format = check.choice(
        &raw.format,
        "format",
        ObjectFormat::Ndjson,
        &[
            ("ndjson", ObjectFormat::Ndjson),
            ("raw", ObjectFormat::Raw),
            ("parquet", ObjectFormat::Parquet),
        ],
    );
    let compression = check.choice(
        &raw.compression,
        "compression",
        if format == Some(ObjectFormat::Parquet) { Compression::Zstd } else { Compression::Gzip },
        &[("gzip", Compression::Gzip), ("zstd", Compression::Zstd), ("none", Compression::None)],
    );
    let folder = match &raw.folder {
        None => Some(FolderTemplate::default()),
        Some(text) => match FolderTemplate::try_from(text.get_ref().0.clone()) {
            Ok(folder) => Some(folder),
            Err(cause) => {
                let help = format!("fields are {FOLDER_FIELDS}");
                check.problem(text.span(), cause, help);
                None
            }
        },
    };
    let options = options(raw.options.as_ref());
    let layout = ObjectLayout { format: format?, compression: compression?, folder: folder? };
    Some(SinkKind::Objects { url: url?, options, layout })
}

fn kinesis(raw: &RawKinesisSink, check: &mut Check) -> Option<SinkKind> {
    let stream = source::stream(&raw.stream, check);
    let role = raw.assume_role.as_ref();
    let server = source::server(&raw.endpoint, &raw.region, role, check);
    let strict_order = raw.strict_order.unwrap_or(false);
    Some(SinkKind::Kinesis(StreamTarget { stream: stream?.value, server: server?, strict_order }))
}

fn http(raw: &RawHttpSink, check: &mut Check) -> Option<SinkKind> {
    let private = raw.private.unwrap_or(false);
    let url = endpoint_url(&raw.url, private, check);
    let headers = headers(raw.headers.as_ref(), check);
    let bodies = [("json", HttpBody::Json), ("ndjson", HttpBody::Ndjson)];
    let body = check.choice(&raw.format, "format", HttpBody::Json, &bodies);
    let timeout = check.duration(&raw.timeout, HTTP_TIMEOUT, HTTP_TIMEOUTS);
    let refuse = refused_statuses(&raw.refuse, check);
    let (url, headers) = (url?, headers?);
    let host = HttpHostConfig {
        host: url.host_str()?.to_owned(),
        port: url.port(),
        headers,
        methods: vec![HttpMethod::Post],
        private,
        response_bytes_max: RESPONSE_BYTES,
    };
    let (body, timeout, refuse) = (body?, timeout?, refuse?);
    Some(SinkKind::Http(HttpTarget { url, host, body, timeout, refuse }))
}

/// Statuses by which an endpoint says that rows are at fault, beside those that always say so.
fn refused_statuses(raw: &[Spanned<Count>], check: &mut Check) -> Option<Vec<u16>> {
    let mut statuses = Vec::new();
    let mut sound = true;
    for status in raw {
        let number = status.get_ref().0;
        match u16::try_from(number) {
            Ok(number) if (400..=599).contains(&number) && !NOT_OF_ROWS.contains(&number) => {
                statuses.push(number);
            }
            _ => {
                let help = "name a status of 400 to 599 that is an answer to rows, such as 409; 401, 403, \
                            407, 408, 425, 429 and 503 are about who asks, or when";
                check.problem(status.span(), format!("{number} cannot refuse rows"), help);
                sound = false;
            }
        }
    }
    sound.then_some(statuses)
}

/// Where to post to.
fn endpoint_url(raw: &Spanned<Text>, private: bool, check: &mut Check) -> Option<Url> {
    let text = check.filled(raw, "URL")?;
    let help = "write for example \"https://api.example.com/events\"";
    let (message, help) = match Url::parse(&text) {
        Err(cause) => (format!("this is no URL: {cause}"), help),
        Ok(url) if url.host_str().is_none() || !matches!(url.scheme(), "https" | "http") => {
            (format!("`{}://` is no HTTP endpoint", url.scheme()), help)
        }
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            let help = "set headers = { authorization = \"Basic ${TOKEN}\" }";
            ("the URL has a user or a password, which are not sent".to_owned(), help)
        }
        Ok(url) if url.scheme() == "http" && !private => {
            let help = "use https://, or set private = true for a host of your own network";
            ("rows would be sent in the clear".to_owned(), help)
        }
        Ok(url) => return Some(url),
    };
    check.problem(raw.span(), message, help);
    None
}

/// A URL, or a folder's path made one.
fn object_url(raw: &Spanned<Text>, base: &Path, check: &mut Check) -> Option<Url> {
    let text = check.filled(raw, "folder or URL")?;
    if !text.contains("://") {
        let folder = std::path::absolute(base.join(&text)).ok();
        let url = folder.and_then(|folder| Url::from_directory_path(folder).ok());
        if url.is_none() {
            check.problem(raw.span(), "this folder has no absolute path", "name another folder");
        }
        return url;
    }
    match Url::parse(&text) {
        Ok(url) if url.scheme() == "file" && url.host().is_some() => {
            let help = "write file:///absolute/folder, or a plain path relative to this file";
            check.problem(raw.span(), "a file:// URL with two slashes names a host", help);
            None
        }
        Ok(url) if SCHEMES.contains(&url.scheme()) => Some(url),
        Ok(url) => {
            let message = format!("there is no object store for `{}://`", url.scheme());
            check.problem(raw.span(), message, suggest(url.scheme(), "allowed", &SCHEMES));
            None
        }
        Err(cause) => {
            let help = "write for example \"s3://bucket/logs\" or a folder's path";
            check.problem(raw.span(), format!("this is no URL: {cause}"), help);
            None
        }
    }
}

fn rhythm(
    raw: Option<RawCommit>,
    default: Rhythm,
    promises: bool,
    buffer_bytes_max: usize,
    check: &mut Check,
) -> Option<Rhythm> {
    let raw = raw.unwrap_or_default();
    let rows_max = check.count(&raw.rows, default.rows_max, ROWS);
    let bytes_default = default.bytes_max.min(buffer_bytes_max);
    let bytes_max = check.size(&raw.bytes, bytes_default, BYTES_MIN..=buffer_bytes_max);
    if bytes_max.is_none() {
        let buffer = bytes_text(buffer_bytes_max);
        check.more_help(&format!(" (`buffer` of [pipeline], which all sinks share, is {buffer})"));
    }
    let linger_max = check.duration(&raw.linger, default.linger_max, LINGERS);
    let give_up_after = give_up_after(&raw, promises, check);
    Some(Rhythm {
        rows_max: rows_max?,
        bytes_max: bytes_max?,
        linger_max: linger_max?,
        give_up_after: give_up_after?,
    })
}

/// How long a sink that is out of reach is waited for; `Some(None)`: for ever. `promises`: the sink
/// has said of rows that they will come before it has them.
fn give_up_after(raw: &RawCommit, promises: bool, check: &mut Check) -> Option<Option<Duration>> {
    let choices = [("block", false), ("dead-letter", true)];
    let gives_up = check.choice(&raw.on_failure, "way to meet a failure", false, &choices)?;
    if let (false, Some(after)) = (gives_up, &raw.give_up_after) {
        let message = "`give_up_after` does nothing while a failing sink blocks its shards";
        check.problem(after.span(), message, "add on_failure = \"dead-letter\", or leave it out");
        return None;
    }
    if let (true, true, Some(on_failure)) = (gives_up, promises, &raw.on_failure) {
        let message = "objects that a claim log has promised must come: such a sink cannot give up";
        check.problem(on_failure.span(), message, "leave `on_failure` out: its shards wait");
        return None;
    }
    let after = check.duration(&raw.give_up_after, GIVE_UP_AFTER, LINGERS)?;
    Some(gives_up.then_some(after))
}

/// The bucket that a URL names, if Redshift can load from it.
pub fn bucket_of(url: &Url) -> Option<&str> {
    let is_s3 = matches!(url.scheme(), "s3" | "s3a");
    url.host_str().filter(|bucket| is_s3 && !bucket.is_empty())
}
