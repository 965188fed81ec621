//! What a sink is and when it commits, proven: where rows go.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ObjectLayout;
use super::{HttpHostConfig, Located, StreamServer};
use crate::WriteMode;
use shardmill_core::record::{SinkName, StreamRef};

/// One sink.
#[derive(Clone, Debug)]
pub struct SinkConfig {
    /// Its name, unique in the pipeline.
    pub name: Located<SinkName>,
    /// The name that it had before: what is kept under it moves to this one.
    pub renamed_from: Option<Located<SinkName>>,
    /// When it commits.
    pub rhythm: Rhythm,
    /// What it is.
    pub kind: SinkKind,
    /// Where the sink's table begins.
    pub span: Range<usize>,
    /// The sink's table as JSON with secrets left as `${VAR}` written: stored with the generation.
    pub fingerprint_json: String,
}

/// A sink commits at the first of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rhythm {
    /// Rows of one shard in hand.
    pub rows_max: usize,
    /// Bytes of one shard in hand.
    pub bytes_max: usize,
    /// Age of the oldest span in hand.
    pub linger_max: Duration,
    /// How long the sink may be out of reach before its rows go to the dead letters; `None`: the
    /// shard waits.
    pub give_up_after: Option<Duration>,
}

/// The sinks that there are.
#[derive(Clone, Debug, PartialEq)]
pub enum SinkKind {
    /// To nowhere.
    Discard,
    /// One line per row on standard output; at least once.
    Stdout {
        /// With `{field}` for a JSON field and `{shard}`, `{sequence}`, `{key}`, `{route}`;
        /// `None`: the payload as it is.
        template: Option<String>,
    },
    /// A table in a SQLite file; exactly once.
    Sqlite {
        /// The database file.
        path: PathBuf,
        /// The table.
        table: String,
        /// Create the table from the route's columns when it is missing.
        create: bool,
        /// How rows go into it.
        mode: WriteMode,
    },
    /// A table in PostgreSQL; exactly once.
    Postgres(PostgresTarget),
    /// Objects in a bucket or folder; exactly once by a claim log.
    Objects {
        /// `file:///…`, `s3://bucket/prefix`, `gs://…`, `az://…`.
        url: url::Url,
        /// Options for `object_store`, for example `aws_endpoint`.
        options: BTreeMap<String, String>,
        /// What the objects hold, and where they lie.
        layout: ObjectLayout,
    },
    /// A table in Amazon Redshift; exactly once.
    Redshift(RedshiftTarget),
    /// Records of another Kinesis stream; at least once.
    Kinesis(StreamTarget),
    /// An HTTP endpoint; at least once.
    Http(HttpTarget),
}

/// A table in PostgreSQL.
#[derive(Clone, Debug, PartialEq)]
pub struct PostgresTarget {
    /// A connection string, `postgres://…` or `host=… dbname=…`.
    pub url: String,
    /// The table, optionally `schema.table`.
    pub table: String,
    /// Create the table from the route's columns when it is missing.
    pub create: bool,
    /// How rows go into it.
    pub mode: WriteMode,
    /// How many connections all shards share, at least 1.
    pub connections_max: usize,
    /// Whether each row says from which record it came.
    pub lineage: bool,
    /// The sink in whose name rows are written, where that is not the sink's own: a replay's are.
    pub written_for: Option<SinkName>,
}

/// A table in Amazon Redshift.
#[derive(Clone, Debug, PartialEq)]
pub struct RedshiftTarget {
    /// A connection string, `postgres://…` or `host=… dbname=…`.
    pub url: String,
    /// The table, optionally `schema.table`; without a schema it is in `public`.
    pub table: String,
    /// Create the table from the route's columns when it is missing.
    pub create: bool,
    /// How rows go into it.
    pub mode: WriteMode,
    /// Where rows wait for COPY.
    pub staging: CopySource,
}

/// A place on S3 that the host writes to and a cluster copies from.
#[derive(Clone, Debug, PartialEq)]
pub struct CopySource {
    /// `s3://bucket/prefix`.
    pub url: url::Url,
    /// Options for `object_store`, for example `aws_endpoint`.
    pub options: BTreeMap<String, String>,
    /// The role by which the cluster reads there, an ARN; or `default`, the cluster's own.
    pub iam_role: String,
    /// The bucket's region, where it is not the cluster's.
    pub region: Option<String>,
}

/// A Kinesis stream that rows are put on.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamTarget {
    /// The stream.
    pub stream: StreamRef,
    /// The server that has it.
    pub server: StreamServer,
    /// Whether no request holds two records of one key.
    pub strict_order: bool,
}

/// An HTTP endpoint that rows are posted to.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpTarget {
    /// The endpoint, `https://…`.
    pub url: url::Url,
    /// Its host, with the headers that are sent.
    pub host: HttpHostConfig,
    /// What a request's body is.
    pub body: HttpBody,
    /// How long one request may take, up to the head of its answer.
    pub timeout: Duration,
    /// Further statuses by which the endpoint says that rows are at fault.
    pub refuse: Vec<u16>,
}

/// What the body of a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpBody {
    /// An array of the rows.
    Json,
    /// A row a line.
    Ndjson,
}

impl SinkKind {
    /// Whether it keeps its own position with its rows: each row is there exactly once.
    pub fn is_exact(&self) -> bool {
        match self {
            Self::Sqlite { .. } | Self::Postgres(_) | Self::Objects { .. } | Self::Redshift(_) => {
                true
            }
            Self::Discard | Self::Stdout { .. } | Self::Kinesis(_) | Self::Http(_) => false,
        }
    }
}

/// How objects are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, `.gz`.
    Gzip,
    /// Zstandard, `.zst`.
    Zstd,
}
