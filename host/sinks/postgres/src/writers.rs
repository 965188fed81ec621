//! Who else writes rows to a table: before a replay replaces rows of it.
//!
//! A replay makes the rows of one sink again. Rows of others that look like the sink's would be deleted with
//! them and not be made again. A row says its pipeline and, where the table has the column, its sink.

use std::time::Duration;

use tokio_postgres::types::Type;

use super::lineage::SINK;
use super::position::PositionTable;
use super::settings::PostgresTarget;
use shardmill_config::WriteMode;
use shardmill_core::record::{PipelineName, SinkName, StreamIdentity};
use shardmill_pg::name::TableName;
use shardmill_pg::{Link, PostgresServer, ServerError as Error};

/// A relation: of a partition, its root; and whether it is a view. With its database, so that it is told from
/// those of others.
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
    /// It writes the same table, or may.
    is_beside: bool,
    /// It writes a view: what its trigger does, no catalogue says.
    is_view: bool,
    says_lineage: bool,
    is_keyed: bool,
}

impl OtherSink {
    /// Finds out which of the pipeline's other sinks write the table that `client` sees as `table`.
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
                format!("whether sink {name} writes table {table} as well is not known: {cause}")
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

/// A table, whatever its server is called.
struct Identity {
    /// `None`: the server does not say.
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

/// The window of a table that a sink's rows are to be replaced in.
pub(super) struct Writers<'w> {
    pub(super) table: &'w TableName,
    pub(super) positions: PositionTable,
    pub(super) pipeline: &'w PipelineName,
    pub(super) sink: &'w SinkName,
    pub(super) stream: &'w StreamIdentity,
    /// The condition for the window's rows of a table `t`.
    pub(super) of_window: String,
    /// The condition for all rows of the window's time, other sinks' too.
    pub(super) of_time: String,
    pub(super) says_sink: bool,
}

/// A position that some sink of the pipeline keeps beside the table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    sink: String,
    stream: String,
}

impl Writers<'_> {
    /// Refuses where rows of the window may be another's.
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

    /// The other sinks that rows of the window say they are of.
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

    /// A name among those that rows say which is of no sink that the file or the positions have: the sink may
    /// have had it once, and its rows would then stay beside those that are made again.
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

    /// Whether rows of the window do not say their sink, though the table has a column for it.
    async fn has_silent_rows(&self, client: &Link) -> Result<bool, Error> {
        let silent = format!(
            "SELECT EXISTS (SELECT 1 FROM {} AS t WHERE {} AND t.{} IS NULL)",
            self.table.quoted(),
            self.of_window,
            SINK.0
        );
        Ok(client.query_typed_one(&silent, &[]).await?.try_get(0)?)
    }

    /// Somebody else whose rows could be taken for the sink's.
    fn other_writer(
        &self,
        known: &[Known],
        others: &[OtherSink],
        all_say_sink: bool,
    ) -> Option<Writer> {
        for other in others.iter().filter(|other| other.is_beside) {
            // Without lineage its rows are nobody's, unless it writes over rows of the sink.
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
            "its rows of the time would be deleted and not made again. Let rows say their sink: \
             ALTER TABLE {quoted} ADD COLUMN IF NOT EXISTS {column} {kind}, which sinks fill from their \
             next start on; and for those that are there, UPDATE {quoted} SET {column} = '{sink}' where \
             they are of sink {sink}",
            quoted = table.quoted(),
        );
        match writer {
            Writer::Sink(other, true) => {
                format!("sink {other} writes table {table} as well: {by_column}")
            }
            Writer::Sink(other, false) => format!(
                "sink {other} writes over rows of table {table} without saying so: set lineage = true there, \
                 or give it a table of its own"
            ),
            Writer::View(other) => format!(
                "sink {other} writes a view, and whether its trigger writes table {table} as well cannot be \
                 told; if it does, {by_column}"
            ),
            Writer::Unknown(other) => format!(
                "rows of the time in table {table} say that they are of sink {other}, which is not in the file \
                 and keeps no position in {positions}: where sink {sink} had that name once, they would stay \
                 beside the new ones. Let them say the sink's name of today: UPDATE {quoted} SET {column} = \
                 '{sink}' WHERE {column} = '{other}'; if they are another's, give that sink a table of its own",
                positions = self.positions.name(),
                quoted = table.quoted(),
                column = SINK.0,
            ),
            Writer::Former(other) => format!(
                "sink {other} of pipeline {}, which is not in the file, keeps its position in {} and may \
                 have written to table {table}: {by_column}; or, if it never wrote there, delete its rows \
                 in {}",
                self.pipeline,
                self.positions,
                self.positions.quoted()
            ),
            Writer::Stream(stream) => format!(
                "sink {sink} has written records of stream {stream} to table {table} as well, and which rows \
                 of the time are of which stream cannot be told; if none of the time is of that stream, \
                 delete its rows in {}",
                self.positions.quoted()
            ),
        }
    }
}

/// Who else writes.
#[derive(Debug, PartialEq, Eq)]
enum Writer {
    /// A sink of the pipeline, and whether its rows say their pipeline.
    Sink(String, bool),
    /// A sink of the pipeline that writes a view.
    View(String),
    /// A sink that nothing but the rows themselves know.
    Unknown(String),
    /// A sink that the file does not have.
    Former(String),
    /// The same sink, from another stream.
    Stream(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table, and the sink whose rows of it are to be replaced.
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
        // A view's trigger may write any table.
        let mut view = other(true, true, false);
        view[0].is_view = true;
        let found = writers.other_writer(&[], &view, false);
        assert_eq!(found, Some(Writer::View("other".into())));
        assert!(
            writers.refusal(&Writer::View("other".into())).contains("its trigger writes table")
        );
    }
}
