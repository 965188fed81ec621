//! Settings of a PostgreSQL sink: `[[sink]]` with `type = "postgres"`.

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
    CommitPolicy, Key, KeyDefault, KeyForm, PipelineConfig, ReadSink, ReplaySupport, Rerun,
    SharedParts, SinkBuildError, SinkContext, SinkSettings, SinkTable, SinkType, WriteMode,
};
use shardmill_core::record::SinkName;
use shardmill_core::sink::Sink;
use shardmill_pg::{PoolSpec, PostgresServer, ServerPool};

/// Sink type.
pub const TYPE: &dyn SinkType = &PostgresType;

/// Default number of connections of a server's sinks: more than a server with some cores can use at once, and far below
/// the 100 that PostgreSQL accepts by default.
pub const CONNECTIONS_MAX: usize = 16;

const CONNECTIONS: RangeInclusive<u64> = 1..=1_000;
/// PostgreSQL silently cuts longer identifiers (NAMEDATALEN - 1).
const IDENTIFIER_BYTES_MAX: usize = 63;
const PORT: u16 = 5432;

struct PostgresType;

/// Target table in PostgreSQL.
#[derive(Clone, Debug, PartialEq)]
pub struct PostgresTarget {
    /// Connection string, `postgres://…` or `host=… dbname=…`.
    pub url: String,
    /// Table, optionally `schema.table`.
    pub table: String,
    /// Whether to create a missing table from the route's columns.
    pub create: bool,
    /// Write mode.
    pub mode: WriteMode,
    /// Number of connections that all shards share, at least 1.
    pub connections_max: usize,
    /// Whether each row stores from which record it came.
    pub lineage: bool,
    /// Sink name in the lineage, if it is not the sink's own name: replays write in the name of another sink.
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
                about: "Server: `postgres://user:${PGPASSWORD}@host:5432/database`, or \
                        `host=… user=… dbname=…`.",
            },
            Key {
                name: "table",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"cars\""),
                about: "Table: `table` or `schema.table`.",
            },
            CREATE_KEY,
            MODE_KEY,
            KEY_KEY,
            NEWEST_BY_KEY,
            Key {
                name: "connections",
                form: KeyForm::Number,
                default: KeyDefault::Value("16"),
                about: "Number of connections that all shards of all sinks with this URL share.",
            },
            Key {
                name: "lineage",
                form: KeyForm::Flag,
                default: KeyDefault::Value("false"),
                about: "Store in each row from which record it came, which `shardmill replay` needs.",
            },
        ]
    }

    fn commit_policy(&self) -> CommitPolicy {
        CommitPolicy::TABLE
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
            let message = format!("name too long for PostgreSQL, which would cut it: {part:?}");
            let help = format!("use at most {IDENTIFIER_BYTES_MAX} bytes");
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
    /// Returns the settings for a replay, whose rows go to an existing shadow table.
    pub fn replayed(&self, shadow: &str, sink: &SinkName) -> Self {
        Self {
            table: shadow.to_owned(),
            create: false,
            written_for: Some(sink.clone()),
            ..self.clone()
        }
    }

    /// Makes the pool of all sinks of the pipeline with this URL.
    fn pool(&self, pipeline: &PipelineConfig) -> Result<ServerPool, SinkBuildError> {
        let server = PostgresServer::parse(&self.url)?;
        Ok(ServerPool::new(server, self.pool_spec(pipeline)))
    }

    /// Sizes the pool: it has as many connections as the sink that asks for most.
    fn pool_spec(&self, pipeline: &PipelineConfig) -> PoolSpec {
        let sinks = pipeline.sinks.iter();
        let connections: Vec<usize> = sinks
            .filter_map(|sink| sink.settings.of_type::<Self>())
            .filter(|other| other.url == self.url)
            .map(|other| other.connections_max)
            .collect();
        PoolSpec {
            connections_max: connections.iter().copied().max().unwrap_or(self.connections_max),
            sinks: connections.len(),
            silence_max: pipeline.timing.postgres_silence_max,
        }
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
    ) -> Result<Arc<dyn Sink>, SinkBuildError> {
        let pool = shared.get_or_make(&self.url, || self.pool(context.pipeline))?;
        Ok(Arc::new(PostgresSink::with_share(context.name.clone(), self, pool.share())?))
    }
}

#[cfg(test)]
mod tests {
    use shardmill_config::{SinkTypes, parse};

    use super::*;

    const TYPES: SinkTypes = SinkTypes::new(&[TYPE]);

    #[test]
    fn sinks_of_one_server_share_a_pool_that_suits_the_one_that_asks_for_most() {
        let sink = |name: &str, host: &str, connections: usize| {
            format!(
                "[[sink]]\nname = {name:?}\ntype = \"postgres\"\nurl = \"postgres://u@{host}/d\"\n\
                 table = {name:?}\nconnections = {connections}\n"
            )
        };
        let sinks = [sink("a", "one", 2), sink("b", "two", 3), sink("c", "one", 5)].concat();
        let text = format!(
            "[pipeline]\nname = \"p\"\n[source]\ntype = \"file\"\npath = \"-\"\n[timing]\n\
             postgres_silence = \"7 s\"\n{sinks}"
        );
        let config = parse("p.toml", text, &TYPES, &|_| None).expect("a sound pipeline");
        let mut shared = SharedParts::default();
        let mut pool = |at: usize| {
            let target: &PostgresTarget = config.sinks[at].settings.of_type().expect("a table");
            let spec = target.pool_spec(&config);
            assert_eq!(spec.silence_max.as_secs(), 7);
            let pool = shared.get_or_make(&target.url, || target.pool(&config)).expect("a pool");
            (pool, spec.connections_max, spec.sinks)
        };
        let (one, two, again) = (pool(0), pool(1), pool(2));
        assert_eq!([(one.1, one.2), (two.1, two.2), (again.1, again.2)], [(5, 2), (3, 1), (5, 2)]);
        assert!(Arc::ptr_eq(&one.0, &again.0) && !Arc::ptr_eq(&one.0, &two.0));
    }
}
