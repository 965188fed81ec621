//! Finds out who else writes rows to a table, before a replay replaces rows of it.
//!
//! A replay makes the rows of one sink again. Rows of other sinks that cannot be told apart from these would be deleted
//! and not made again, so such a replay is refused. The lineage of a row contains its pipeline and, if the table has
//! the column, its sink.
//!
//! | who else writes | replay is refused |
//! |---|---|
//! | a configured sink with lineage on the same table | unless all rows of the window have their sink |
//! | a configured sink without lineage on the same table | unless it only appends |
//! | a sink that has a position here but is not in the file | unless all rows of the window have their sink |
//! | the same sink, from another stream | always |
//! | a sink name that only rows have | always: it may be a former name of this sink |

use std::time::Duration;

use tokio_postgres::types::Type;

use super::lineage::SINK;
use super::position::PositionTable;
use super::settings::PostgresTarget;
use shardmill_config::WriteMode;
use shardmill_core::record::{PipelineName, SinkName, StreamIdentity};
use shardmill_pg::name::TableName;
use shardmill_pg::{Link, PostgresServer, ServerError as Error};

/// Identity of a relation: its database, the relation (for a partition, its root), and whether it is a view.
const IDENTITY: &str = "
    SELECT d.oid::text || '.' || d.datname,
        coalesce(pg_partition_root(to_regclass($1))::oid, to_regclass($1)::oid)::text,
        coalesce((SELECT c.relkind = 'v' FROM pg_catalog.pg_class AS c
            WHERE c.oid = to_regclass($1)), false)
    FROM pg_catalog.pg_database AS d WHERE d.datname = current_database()";

/// Another sink of the pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherSink {
    name: SinkName,
    /// Whether it writes the same table, or may do so.
    is_beside: bool,
    /// Whether it writes a view. The catalogue does not tell what the trigger of a view does.
    is_view: bool,
    says_lineage: bool,
    is_keyed: bool,
}

impl OtherSink {
    /// Finds out which of the pipeline's other sinks write the table that `client` knows as `table`.
    pub(super) async fn all(
        client: &Link,
        table: &TableName,
        others: &[(&SinkName, &PostgresTarget)],
        silence_max: Duration,
    ) -> Result<Vec<Self>, String> {
        let failed = |error: Error| format!("cannot read table {table}: {error}");
        let own = Identity::read(client, table).await.map_err(failed)?;
        let mut found = Vec::new();
        for (name, target) in others {
            let not_known = |cause: String| {
                format!("cannot find out whether sink {name} also writes table {table}: {cause}")
            };
            let server = PostgresServer::parse(&target.url)?;
            let other = TableName::parse(&target.table)?;
            let connected =
                super::session::connect(&server, silence_max).await.map_err(not_known)?;
            let read = Identity::read(&connected, &other).await;
            let read = read.map_err(|error| not_known(error.to_string()))?;
            found.push(Self {
                name: (*name).clone(),
                is_beside: own.may_be(&read),
                is_view: read.is_view,
                says_lineage: target.lineage,
                is_keyed: target.mode != WriteMode::Append,
            });
        }
        Ok(found)
    }
}

/// Identity of a table, independent of the name of its server.
struct Identity {
    /// `None`: the server does not tell.
    system: Option<String>,
    database: String,
    /// `None`: there is no such table.
    relation: Option<String>,
    is_view: bool,
}

impl Identity {
    async fn read(client: &Link, table: &TableName) -> Result<Self, Error> {
        let system = "SELECT system_identifier::text FROM pg_control_system()";
        let system = match client.query_typed_one(system, &[]).await {
            Ok(row) => row.try_get(0)?,
            Err(error) if error.as_db_error().is_some() => None,
            Err(error) => return Err(error),
        };
        let row = client.query_typed_one(IDENTITY, &[(&table.quoted(), Type::TEXT)]).await?;
        let (database, relation, is_view) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        Ok(Self { system, database, relation, is_view })
    }

    fn may_be(&self, other: &Self) -> bool {
        let is_one_system = match (&self.system, &other.system) {
            (Some(own), Some(other)) => own == other,
            _ => true,
        };
        is_one_system
            && self.database == other.database
            && self.relation.is_some()
            && (self.relation == other.relation || other.is_view)
    }
}

/// Window of a table in which the rows of a sink are replaced.
pub(super) struct Writers<'w> {
    pub(super) table: &'w TableName,
    pub(super) positions: PositionTable,
    pub(super) pipeline: &'w PipelineName,
    pub(super) sink: &'w SinkName,
    pub(super) stream: &'w StreamIdentity,
    /// Condition for the window's rows of a table `t`.
    pub(super) of_window: String,
    /// Condition for all rows of the window's time, including those of other sinks.
    pub(super) of_time: String,
    pub(super) says_sink: bool,
}

/// Position that some sink of the pipeline has beside the table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    sink: String,
    stream: String,
}

impl Writers<'_> {
    /// Refuses the replay if rows of the window may belong to another sink.
    pub(super) async fn check(&self, client: &Link, others: &[OtherSink]) -> Result<(), String> {
        let failed =
            |error: Error| format!("cannot find out who writes table {}: {error}", self.table);
        let known = self.known(client).await.map_err(failed)?;
        let all_say_sink = self.says_sink && !self.has_silent_rows(client).await.map_err(failed)?;
        if let Some(writer) = self.other_writer(&known, others, all_say_sink) {
            return Err(self.refusal(&writer));
        }
        if self.says_sink {
            let said = self.sinks_said(client).await.map_err(failed)?;
            if let Some(name) = self.unknown(&said, &known, others) {
                return Err(self.refusal(&Writer::Unknown(name.to_owned())));
            }
        }
        Ok(())
    }

    /// Reads the names of other sinks in the rows of the window.
    async fn sinks_said(&self, client: &Link) -> Result<Vec<String>, Error> {
        let said = format!(
            "SELECT DISTINCT t.{0} FROM {1} AS t WHERE {2} AND t.{0} <> $1 ORDER BY 1",
            SINK.0,
            self.table.quoted(),
            self.of_time
        );
        let rows = client.query_typed(&said, &[(&self.sink.as_str(), Type::TEXT)]).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    /// Returns a sink name in the rows that neither the file nor the positions have. The sink may have had that name
    /// once; its old rows would then stay beside the new ones.
    fn unknown<'s>(
        &self,
        said: &'s [String],
        known: &[Known],
        others: &[OtherSink],
    ) -> Option<&'s str> {
        let is_known = |name: &String| {
            known.iter().any(|known| known.sink == *name)
                || others.iter().any(|other| other.name.as_str() == name)
        };
        said.iter().find(|name| !is_known(name)).map(String::as_str)
    }

    async fn known(&self, client: &Link) -> Result<Vec<Known>, Error> {
        let known = format!(
            "SELECT DISTINCT sink, stream FROM {} WHERE pipeline = $1 ORDER BY sink, stream",
            self.positions.quoted()
        );
        let wanted: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 1] =
            [(&self.pipeline.as_str(), Type::TEXT)];
        let rows = match client.query_typed(&known, &wanted).await {
            Err(error)
                if error.code() == Some(&tokio_postgres::error::SqlState::UNDEFINED_TABLE) =>
            {
                Vec::new()
            }
            rows => rows?,
        };
        let known = |row: &tokio_postgres::Row| {
            Ok(Known { sink: row.try_get(0)?, stream: row.try_get(1)? })
        };
        rows.iter().map(known).collect()
    }

    /// Whether rows of the window have no sink, although the table has a column for it.
    async fn has_silent_rows(&self, client: &Link) -> Result<bool, Error> {
        let silent = format!(
            "SELECT EXISTS (SELECT 1 FROM {} AS t WHERE {} AND t.{} IS NULL)",
            self.table.quoted(),
            self.of_window,
            SINK.0
        );
        Ok(client.query_typed_one(&silent, &[]).await?.try_get(0)?)
    }

    /// Returns another writer whose rows cannot be told apart from the sink's.
    fn other_writer(
        &self,
        known: &[Known],
        others: &[OtherSink],
        all_say_sink: bool,
    ) -> Option<Writer> {
        for other in others.iter().filter(|other| other.is_beside) {
            // Rows without lineage are outside of any window, unless they overwrite rows of the sink.
            let is_distinct = match other.says_lineage {
                true => all_say_sink,
                false => !other.is_keyed,
            };
            if !is_distinct {
                return Some(match other.is_view {
                    true => Writer::View(other.name.to_string()),
                    false => Writer::Sink(other.name.to_string(), other.says_lineage),
                });
            }
        }
        for Known { sink, stream } in known {
            let (arn, _) = stream.rsplit_once('@').unwrap_or((stream, ""));
            let is_of_redrive = stream.starts_with("letters:") || stream.starts_with("replay:");
            if sink == self.sink.as_str() {
                // A stream that was created again has other records, which arrived later.
                if !is_of_redrive && *arn != *self.stream.arn {
                    return Some(Writer::Stream(stream.clone()));
                }
                continue;
            }
            let is_ours = sink.ends_with(".replay") || sink.contains(".again-");
            let is_configured = others.iter().any(|other| other.name.as_str() == sink);
            if !is_ours && !is_configured && !all_say_sink {
                return Some(Writer::Former(sink.clone()));
            }
        }
        None
    }

    fn refusal(&self, writer: &Writer) -> String {
        let Self { table, sink, .. } = self;
        let (column, kind) = SINK;
        let by_column = format!(
            "its rows in the window would be deleted and not made again. Store the sink in each row: \
             ALTER TABLE {quoted} ADD COLUMN IF NOT EXISTS {column} {kind}, which sinks fill from their \
             next start on; for existing rows of sink {sink}, run UPDATE {quoted} SET {column} = '{sink}' \
             with a condition that finds only them",
            quoted = table.quoted(),
        );
        match writer {
            Writer::Sink(other, true) => {
                format!("sink {other} also writes table {table}: {by_column}")
            }
            Writer::Sink(other, false) => format!(
                "sink {other} overwrites rows of table {table} without lineage: set lineage = true there, \
                 or give it a table of its own"
            ),
            Writer::View(other) => format!(
                "sink {other} writes a view, and its trigger may also write table {table}; if it does, \
                 {by_column}"
            ),
            Writer::Unknown(other) => format!(
                "rows of the window in table {table} belong to sink {other}, which is not in the file and has no \
                 position in {positions}. If {other} is a former name of sink {sink}, they would stay beside the \
                 new rows, so set their sink to its current name: UPDATE {quoted} SET {column} = '{sink}' WHERE \
                 {column} = '{other}'; if they belong to another sink, give that sink a table of its own",
                positions = self.positions.name(),
                quoted = table.quoted(),
                column = SINK.0,
            ),
            Writer::Former(other) => format!(
                "sink {other} of pipeline {}, which is not in the file, has its position in {} and may \
                 have written to table {table}: {by_column}; or, if it never wrote there, delete its rows \
                 in {}",
                self.pipeline,
                self.positions,
                self.positions.quoted()
            ),
            Writer::Stream(stream) => format!(
                "sink {sink} has also written records of stream {stream} to table {table}, and the rows of the two \
                 streams cannot be told apart; if no row of the window is of that stream, delete its rows in {}",
                self.positions.quoted()
            ),
        }
    }
}

/// Another writer.
#[derive(Debug, PartialEq, Eq)]
enum Writer {
    /// Sink of the pipeline, and whether its rows have lineage.
    Sink(String, bool),
    /// Sink of the pipeline that writes a view.
    View(String),
    /// Sink whose name is only in the rows.
    Unknown(String),
    /// Sink that is not in the file.
    Former(String),
    /// The same sink, from another stream.
    Stream(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Table, and the sink whose rows of it are replaced.
    struct Setting {
        stream: StreamIdentity,
        pipeline: PipelineName,
        sink: SinkName,
        table: TableName,
    }

    impl Setting {
        fn new() -> Self {
            Self {
                stream: StreamIdentity { name: "cars".into(), arn: "arn".into(), created_ms: 2 },
                pipeline: "cars".into(),
                sink: "mart".into(),
                table: TableName::parse("cars").expect("a name"),
            }
        }

        fn writers(&self, says_sink: bool) -> Writers<'_> {
            Writers {
                table: &self.table,
                positions: PositionTable::beside(&self.table),
                pipeline: &self.pipeline,
                sink: &self.sink,
                stream: &self.stream,
                of_window: String::new(),
                of_time: String::new(),
                says_sink,
            }
        }
    }

    #[test]
    fn fault_17_a_name_that_nobody_has_may_be_the_sinks_former_one() {
        let setting = Setting::new();
        let writers = setting.writers(true);
        let known = [Known { sink: "removed".into(), stream: "arn@2".into() }];
        let others = [OtherSink {
            name: "other".into(),
            is_beside: true,
            is_view: false,
            says_lineage: true,
            is_keyed: false,
        }];
        for (said, expected) in
            [(&["other", "removed"][..], None), (&[], None), (&["other", "former"], Some("former"))]
        {
            let said: Vec<String> = said.iter().map(ToString::to_string).collect();
            assert_eq!(writers.unknown(&said, &known, &others), expected, "{said:?}");
        }
        let refusal = writers.refusal(&Writer::Unknown("former".into()));
        assert!(refusal.contains("SET shardmill_sink = 'mart' WHERE shardmill_sink = 'former'"));
    }

    #[test]
    fn fault_17_rows_that_may_be_anothers_are_not_replaced() {
        let setting = Setting::new();
        let writers = setting.writers(false);
        let other = |is_beside, says_lineage, is_keyed| {
            let (name, is_view) = ("other".into(), false);
            vec![OtherSink { name, is_beside, is_view, says_lineage, is_keyed }]
        };
        let known =
            |sink: &str, stream: &str| vec![Known { sink: sink.into(), stream: stream.into() }];
        let beside = |says_lineage| Some(Writer::Sink("other".into(), says_lineage));
        for (known, others, all_say_sink, expected) in [
            (known("mart", "arn@1"), other(false, true, true), false, None),
            (known("mart", "letters:cars@7"), vec![], false, None),
            (known("mart.replay", "arn@2"), vec![], false, None),
            (known("other", "arn@2"), other(false, true, true), false, None),
            (vec![], other(true, true, false), true, None),
            (vec![], other(true, true, false), false, beside(true)),
            (vec![], other(true, false, false), false, None),
            (vec![], other(true, false, true), true, beside(false)),
            (known("gone", "arn@2"), vec![], true, None),
            (known("gone", "arn@2"), vec![], false, Some(Writer::Former("gone".into()))),
            (known("mart", "else@2"), vec![], true, Some(Writer::Stream("else@2".into()))),
        ] {
            let found = writers.other_writer(&known, &others, all_say_sink);
            assert_eq!(found, expected, "{known:?} {others:?} {all_say_sink}");
        }
        // The trigger of a view may write any table.
        let mut view = other(true, true, false);
        view[0].is_view = true;
        let found = writers.other_writer(&[], &view, false);
        assert_eq!(found, Some(Writer::View("other".into())));
        assert!(
            writers
                .refusal(&Writer::View("other".into()))
                .contains("its trigger may also write table")
        );
    }
}
