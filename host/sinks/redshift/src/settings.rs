//! Settings of a Redshift sink: `[[sink]]` with `type = "redshift"`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;
use url::Url;

use crate::RedshiftSink;
use shardmill_config::reading::{
    CREATE_KEY, Check, KEY_KEY, MODE_KEY, Maybe, NEWEST_BY_KEY, RawCommit, Spanned, Text,
    connection, database, options, table, write_mode,
};
use shardmill_config::{
    CommitPolicy, Key, KeyDefault, KeyForm, ReadSink, SharedParts, SinkBuildError, SinkContext,
    SinkSettings, SinkTable, SinkType, WriteMode,
};
use shardmill_core::sink::Sink;

/// Sink type.
pub const TYPE: &dyn SinkType = &RedshiftType;

const PORT: u16 = 5439;

struct RedshiftType;

/// Target table in Amazon Redshift.
#[derive(Clone, Debug, PartialEq)]
pub struct RedshiftTarget {
    /// Connection string, `postgres://…` or `host=… dbname=…`.
    pub url: String,
    /// Table, optionally `schema.table`; without a schema it is in `public`.
    pub table: String,
    /// Whether to create a missing table from the route's columns.
    pub create: bool,
    /// Write mode.
    pub mode: WriteMode,
    /// Where files wait for COPY.
    pub staging: CopySource,
}

/// Place on S3 that the host writes to and a cluster copies from.
#[derive(Clone, Debug, PartialEq)]
pub struct CopySource {
    /// `s3://bucket/prefix`.
    pub url: Url,
    /// Options for `object_store`, for example `aws_endpoint`.
    pub options: BTreeMap<String, String>,
    /// Role with which the cluster reads there: an ARN, or `default` for the cluster's own.
    pub iam_role: String,
    /// Region of the bucket, if it is not the cluster's.
    pub region: Option<String>,
}

/// `[[sink]]` with `type = "redshift"`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawRedshift {
    name: Spanned<Text>,
    #[serde(rename = "type")]
    _kind: IgnoredAny,
    url: Spanned<Text>,
    table: Spanned<Text>,
    create: Option<bool>,
    mode: Maybe<Text>,
    #[serde(default)]
    key: Vec<Spanned<Text>>,
    newest_by: Maybe<Text>,
    staging: Spanned<Text>,
    options: Option<BTreeMap<String, Text>>,
    iam_role: Spanned<Text>,
    region: Maybe<Text>,
    commit: Option<RawCommit>,
}

impl SinkType for RedshiftType {
    fn name(&self) -> &'static str {
        "redshift"
    }

    fn about(&self) -> &'static str {
        "A table in Amazon Redshift, exactly once: files on S3 that COPY loads, and the position in the same \
         transaction."
    }

    fn keys(&self) -> &'static [Key] {
        &[
            Key {
                name: "url",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"postgres://user@host:5439/database\""),
                about: "Cluster: `postgres://user:${PGPASSWORD}@host:5439/database`, or \
                        `host=… user=… dbname=…`.",
            },
            Key {
                name: "table",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"public.cars\""),
                about: "Table: `schema.table`, or `table` for one in `public`.",
            },
            CREATE_KEY,
            MODE_KEY,
            Key {
                about: "Columns of a row's key, for `upsert` and `ignore`; Redshift itself enforces no keys.",
                ..KEY_KEY
            },
            NEWEST_BY_KEY,
            Key {
                name: "staging",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"s3://bucket/load\""),
                about: "Place of the files that COPY loads, `s3://bucket/prefix`; each is removed once it is loaded.",
            },
            Key {
                name: "options",
                form: KeyForm::Table,
                default: KeyDefault::None,
                about: "Options of the object store of `staging`, as `object_store` names them.",
            },
            Key {
                name: "iam_role",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"default\""),
                about: "Role with which the cluster reads `staging`: an ARN, or `default`.",
            },
            Key {
                name: "region",
                form: KeyForm::Text,
                default: KeyDefault::None,
                about: "Region of the bucket, if it is not the cluster's.",
            },
        ]
    }

    fn commit_policy(&self) -> CommitPolicy {
        // Few large loads, because each load costs a cluster the same few seconds.
        CommitPolicy::patient(100_000, 64 << 20, Duration::from_secs(60))
    }

    fn read(&self, table: SinkTable<'_>, check: &mut Check) -> Option<ReadSink> {
        let raw: RawRedshift = table.shaped(check)?;
        let settings = target(&raw, check);
        Some(ReadSink::new(raw.name, raw.commit, settings))
    }
}

fn target(raw: &RawRedshift, check: &mut Check) -> Option<RedshiftTarget> {
    let url = connection(&raw.url, PORT, check);
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
    Some(RedshiftTarget { url: url?, table: table?, create, mode: mode?, staging })
}

/// Reads the URL that COPY reads from.
fn staging_url(raw: &Spanned<Text>, check: &mut Check) -> Option<Url> {
    let text = check.filled(raw, "URL")?;
    let url = Url::parse(&text).ok().filter(|url| bucket_of(url).is_some());
    if url.is_none() {
        let help = "write \"s3://bucket/prefix\", a place that the host may write to";
        check.problem(raw.span(), format!("unsupported URL for COPY of Redshift: {text:?}"), help);
    }
    url
}

/// Reads the role. Several ARNs are a chain of roles. Source: Redshift guide, "COPY", authorization parameters.
fn iam_role(raw: &Spanned<Text>, check: &mut Check) -> Option<String> {
    let text = check.filled(raw, "role")?;
    let is_part = |c: char| c.is_ascii_alphanumeric() || ":/+=,.@_-".contains(c);
    let is_role = |role: &str| role.starts_with("arn:") && role.contains(":role/");
    if text == "default" || (text.chars().all(is_part) && text.split(',').all(is_role)) {
        return Some(text);
    }
    let help = "write \"arn:aws:iam::123456789012:role/NAME\", a role of the cluster that may read \
                the files, or \"default\"";
    check.problem(raw.span(), format!("not a valid role ARN: {text:?}"), help);
    None
}

/// Returns the bucket of a URL, if Redshift can load from it.
pub(crate) fn bucket_of(url: &Url) -> Option<&str> {
    let is_s3 = matches!(url.scheme(), "s3" | "s3a");
    url.host_str().filter(|bucket| is_s3 && !bucket.is_empty())
}

impl SinkSettings for RedshiftTarget {
    fn destination(&self) -> Option<String> {
        database("redshift", &self.url, &self.table)
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn creates_table(&self) -> bool {
        self.create
    }

    fn build(
        &self,
        context: &SinkContext<'_>,
        _shared: &mut SharedParts,
    ) -> Result<Arc<dyn Sink>, SinkBuildError> {
        let sink = RedshiftSink::new(context.name.clone(), self)?;
        Ok(Arc::new(sink.with_silence_max(context.pipeline.timing.redshift_silence_max)))
    }
}
