//! The settings of a PostgreSQL sink, as `[[sink]]` with `type = "postgres"` has them.

use std::ops::RangeInclusive;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::PostgresSink;
use shardmill_config::reading::{
    CREATE_KEY, Check, Count, KEY_KEY, MODE_KEY, Maybe, NEWEST_BY_KEY, RawCommit, RerunTable,
    Spanned, Text, connection, database, table, write_mode,
};
use shardmill_config::{
    BuildError, Key, KeyDefault, KeyForm, ReadSink, ReplaySupport, Rerun, Rhythm, SharedParts,
    SinkContext, SinkSettings, SinkTable, SinkType, WriteMode,
};
use shardmill_core::record::SinkName;
use shardmill_core::sink::Sink;
use shardmill_pg::{PoolSpec, PostgresServer, ServerPool};

/// The sink type.
pub const TYPE: &dyn SinkType = &PostgresType;

/// The connections of a server's sinks unless they are told otherwise: more than a server of some cores works
/// on at once, and far from the 100 that PostgreSQL takes by default.
pub const CONNECTIONS_MAX: usize = 16;

const CONNECTIONS: RangeInclusive<u64> = 1..=1_000;
/// PostgreSQL cuts longer identifiers off in silence (NAMEDATALEN - 1).
const IDENTIFIER_BYTES_MAX: usize = 63;
const PORT: u16 = 5432;

struct PostgresType;

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

/// `[[sink]]` with `type = "postgres"`
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawPostgres {
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
    connections: Maybe<Count>,
    lineage: Option<bool>,
    commit: Option<RawCommit>,
}

impl SinkType for PostgresType {
    fn name(&self) -> &'static str {
        "postgres"
    }

    fn about(&self) -> &'static str {
        "A table in PostgreSQL, exactly once: rows and position move in one transaction."
    }

    fn keys(&self) -> &'static [Key] {
        &[
            Key {
                name: "url",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"postgres://user@host/database\""),
                about: "The server: `postgres://user:${PGPASSWORD}@host:5432/database`, or \
                        `host=… user=… dbname=…`.",
            },
            Key {
                name: "table",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"cars\""),
                about: "The table: `table` or `schema.table`.",
            },
            CREATE_KEY,
            MODE_KEY,
            KEY_KEY,
            NEWEST_BY_KEY,
            Key {
                name: "connections",
                form: KeyForm::Number,
                default: KeyDefault::Value("16"),
                about: "The connections that all shards of all sinks with this URL share.",
            },
            Key {
                name: "lineage",
                form: KeyForm::Flag,
                default: KeyDefault::Value("false"),
                about: "Write into each row from which record it came, which `shardmill replay` needs.",
            },
        ]
    }

    fn rhythm(&self) -> Rhythm {
        Rhythm::TABLE
    }

    fn read(&self, table: SinkTable<'_>, check: &mut Check) -> Option<ReadSink> {
        let raw: RawPostgres = table.shaped(check)?;
        let settings = target(&raw, check);
        Some(ReadSink::new(raw.name, raw.commit, settings))
    }
}

fn target(raw: &RawPostgres, check: &mut Check) -> Option<PostgresTarget> {
    let url = connection(&raw.url, PORT, check);
    let table = table(&raw.table, check).filter(|table| {
        let long = table.split('.').find(|part| part.len() > IDENTIFIER_BYTES_MAX);
        if let Some(part) = long {
            let message = format!("PostgreSQL would cut the name {part:?} off");
            let help = format!("at most {IDENTIFIER_BYTES_MAX} bytes");
            check.problem(raw.table.span(), message, help);
        }
        long.is_none()
    });
    let create = raw.create.unwrap_or(false);
    let mode = write_mode(&raw.mode, &raw.key, &raw.newest_by, check);
    let connections_max = check.count(&raw.connections, CONNECTIONS_MAX, CONNECTIONS);
    Some(PostgresTarget {
        url: url?,
        table: table?,
        create,
        mode: mode?,
        connections_max: connections_max?,
        lineage: raw.lineage.unwrap_or(false),
        written_for: None,
    })
}

impl PostgresTarget {
    /// The same for the rows of a replay, which go to a table beside that is there already.
    pub fn replayed(&self, shadow: &str, sink: &SinkName) -> Self {
        Self {
            table: shadow.to_owned(),
            create: false,
            written_for: Some(sink.clone()),
            ..self.clone()
        }
    }

    /// The pool of all sinks of the pipeline with this URL. It has as many connections as the one that asks for
    /// most.
    fn pool(&self, context: &SinkContext<'_>) -> Result<ServerPool, BuildError> {
        let server = PostgresServer::parse(&self.url)?;
        let sinks = context.pipeline.sinks.iter();
        let connections: Vec<usize> = sinks
            .filter_map(|sink| sink.settings.of_type::<Self>())
            .filter(|other| other.url == self.url)
            .map(|other| other.connections_max)
            .collect();
        let spec = PoolSpec {
            connections_max: connections.iter().copied().max().unwrap_or(self.connections_max),
            sinks: connections.len(),
            silence_max: context.pipeline.timing.postgres_silence_max,
        };
        Ok(ServerPool::new(server, spec))
    }
}

impl SinkSettings for PostgresTarget {
    fn destination(&self) -> Option<String> {
        database("postgres", &self.url, &self.table)
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn creates_table(&self) -> bool {
        self.create
    }

    fn replay(&self) -> ReplaySupport {
        match self.lineage {
            true => ReplaySupport::Supported,
            false => ReplaySupport::Needs("lineage = true"),
        }
    }

    fn rerun(&self, sink: &SinkName, number: i64) -> Option<Rerun> {
        let RerunTable { table, create, place } =
            RerunTable::of(&self.table, self.create, &self.mode, number);
        let written_for = Some(sink.clone());
        let settings = Arc::new(Self { table, create, written_for, ..self.clone() });
        Some(Rerun { settings, place })
    }

    fn build(
        &self,
        context: &SinkContext<'_>,
        shared: &mut SharedParts,
    ) -> Result<Arc<dyn Sink>, BuildError> {
        let pool = shared.get_or_make(&self.url, || self.pool(context))?;
        Ok(Arc::new(PostgresSink::with_share(context.name.clone(), self, pool.share())?))
    }
}
