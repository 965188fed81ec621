//! A time window of a table, and the shadow table that may replace it: the target of a replay.
//!
//! The columns of [`lineage`](super::lineage) decide which rows belong to the window. The shadow has the columns of the
//! live table. A comment marks it as ours, so that no other table is ever dropped.
//!
//! The swap is one transaction, in this order: lock the live table, check again that no other sink's rows are in the
//! window, delete the window's rows, insert the shadow's, drop the shadow, leave a mark of the replay in the position
//! table, commit. Readers see the old rows until all new ones are there, and no row can be written in between. If the
//! COMMIT gets no answer, [`TableWindow::has_landed`] looks for the mark: it takes the same lock, so a swap that is
//! still running has ended by then.

use std::collections::HashSet;
use std::ops::Range;
use std::time::Duration;

use serde::Serialize;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use super::lineage::{ARRIVED_AT, COLUMNS, OPTIONAL, PIPELINE, SINK};
use super::position::PositionTable;
use super::session::{BEGIN, connect};
use super::settings::PostgresTarget;
use super::writers::{OtherSink, Writers};
use shardmill_core::boxed;
use shardmill_core::record::ReplayId;
use shardmill_core::record::{PipelineName, SinkName, StreamIdentity};
use shardmill_pg::name::{TableName, literal, quoted};
use shardmill_pg::{Link, PostgresServer, ServerError};

/// Start of the comment on a shadow.
const MARK: &str = "shardmill replay";

/// Start of the stream of a replay's mark in the position table.
const REPLAYS: &str = "replay:";

/// Number of rows that are shown of each side.
const SAMPLES: i64 = 5;

/// Longest name in PostgreSQL, in bytes.
const NAME_BYTES_MAX: usize = 63;

/// Reads the columns, with two flags: whether a copy of a row cannot contain the column, and whether a comparison must
/// leave it out, also because its default differs at each call.
const COLUMNS_OF: &str = "
    SELECT a.attname, a.attgenerated <> '' OR a.attidentity <> '',
        a.attgenerated <> '' OR a.attidentity <> '' OR coalesce(pg_get_expr(d.adbin, d.adrelid), '') LIKE '%(%'
    FROM pg_catalog.pg_attribute AS a
    LEFT JOIN pg_catalog.pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";

/// Time window of a live table, with its shadow.
pub struct TableWindow {
    server: PostgresServer,
    /// Time without an answer after which the server counts as lost.
    silence_max: Duration,
    link: Link,
    live: TableName,
    shadow: TableName,
    pipeline: PipelineName,
    /// Sink that writes the live table.
    sink: SinkName,
    window_ms: Range<u64>,
    /// Whether rows of the live table store their sink.
    says_sink: bool,
    /// Clause for keys that exist when rows are inserted into the live table.
    on_conflict: String,
    /// Columns of a copy.
    copied: Vec<String>,
    /// Columns that a comparison leaves out.
    left_out: Vec<String>,
}

/// Reason why a window was not replaced.
#[derive(Debug)]
pub enum SwapFailed {
    /// It was not replaced, and will not be.
    Nothing(String),
    /// It is unknown whether it was replaced.
    Unknown(String),
}

/// Differences between a shadow and its window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WindowDiff {
    /// Number of rows that are equal on both sides.
    pub same: u64,
    /// Number of rows of the live table that are not in the shadow.
    pub only_live: u64,
    /// Number of rows of the shadow that are not in the live table.
    pub only_shadow: u64,
    /// Some rows of the live table, as JSON.
    pub samples_live: Vec<String>,
    /// Some rows of the shadow, as JSON.
    pub samples_shadow: Vec<String>,
}

impl TableWindow {
    /// Makes an empty shadow, named `into` or like the live table with `_replay`. It replaces the shadow of an earlier
    /// replay. Deletes the positions that a replay of `sink` has there under the name `replayed`. Errors are sentences.
    ///
    /// # Errors
    /// The server is unreachable, the live table has no lineage, or another table has the name of the shadow.
    #[boxed]
    pub async fn prepare(
        target: &PostgresTarget,
        into: Option<&str>,
        (sink, replayed): (&SinkName, &SinkName),
        pipeline: &PipelineName,
        (window_ms, silence_max): (Range<u64>, Duration),
    ) -> Result<Self, String> {
        let server = PostgresServer::parse(&target.url)?;
        let live = TableName::parse(&target.table)?;
        let shadow = match into {
            Some(name) => TableName::parse(name)?,
            None => live.sibling(&format!("{}_replay", live.table)),
        };
        if shadow.table.len() > NAME_BYTES_MAX {
            return Err(format!("the name {shadow} is too long: name the shadow with --into"));
        }
        let link = connect(&server, silence_max).await?;
        let key: Vec<String> = target.mode.key().iter().map(|name| quoted(name)).collect();
        let on_conflict = match key.is_empty() {
            true => String::new(),
            false => format!("ON CONFLICT ({}) DO NOTHING", key.join(", ")),
        };
        let mut window = Self {
            server,
            silence_max,
            link,
            live,
            shadow,
            pipeline: pipeline.clone(),
            sink: sink.clone(),
            window_ms,
            says_sink: false,
            on_conflict,
            copied: Vec::new(),
            left_out: Vec::new(),
        };
        window.read_columns().await?;
        window.make_shadow(replayed).await?;
        Ok(window)
    }

    /// Returns the name of the shadow, in the form of a configuration.
    pub fn shadow(&self) -> String {
        let quote = |part: &str| match part.contains(['.', '"']) {
            true => quoted(part),
            false => part.to_owned(),
        };
        match &self.shadow.schema {
            Some(schema) => format!("{}.{}", quote(schema), quote(&self.shadow.table)),
            None => quote(&self.shadow.table),
        }
    }

    async fn read_columns(&mut self) -> Result<(), String> {
        let failed = |error: ServerError| format!("cannot read table {}: {error}", self.live);
        let unreadable = |error: tokio_postgres::Error| failed(error.into());
        let name = self.live.quoted();
        let rows = self.link.query_typed(COLUMNS_OF, &[(&name, Type::TEXT)]).await;
        let rows = rows.map_err(failed)?;
        let (mut names, mut copied, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
        for row in &rows {
            let name: String = row.try_get(0).map_err(unreadable)?;
            if !row.try_get::<_, bool>(1).map_err(unreadable)? {
                copied.push(name.clone());
            }
            // A newer plugin has another digest, and old rows may not have their sink: neither makes a row different.
            let is_optional = OPTIONAL.iter().any(|(own, _)| name == *own);
            if row.try_get::<_, bool>(2).map_err(unreadable)? || is_optional {
                left_out.push(name.clone());
            }
            names.push(name);
        }
        if names.is_empty() {
            return Err(format!("table {} does not exist", self.live));
        }
        if let Some((missing, _)) =
            COLUMNS.iter().find(|(expected, _)| !names.iter().any(|it| it == expected))
        {
            return Err(format!(
                "missing lineage column {missing} in table {}: the rows of the window cannot be found. Set \
                 lineage = true in the sink, and add the columns that it names",
                self.live
            ));
        }
        self.says_sink = names.iter().any(|name| name == SINK.0);
        (self.copied, self.left_out) = (copied, left_out);
        Ok(())
    }

    async fn make_shadow(&self, sink: &SinkName) -> Result<(), String> {
        let (live, shadow) = (self.live.quoted(), self.shadow.quoted());
        let failed = |error: ServerError| format!("cannot create table {}: {error}", self.shadow);
        let unreadable = |error: tokio_postgres::Error| failed(error.into());
        let comment =
            "SELECT obj_description(to_regclass($1), 'pg_class'), to_regclass($1) IS NOT NULL";
        let found = self.link.query_typed_one(comment, &[(&shadow, Type::TEXT)]).await;
        let found = found.map_err(failed)?;
        let comment: Option<String> = found.try_get(0).map_err(unreadable)?;
        let is_ours = comment.is_some_and(|comment| comment.starts_with(MARK));
        if found.try_get(1).map_err(unreadable)? && !is_ours {
            return Err(format!(
                "table {} exists and was not made by a replay: name another one with --into",
                self.shadow
            ));
        }
        let of = format!("{MARK} of {}", self.live).replace('\'', "''");
        self.link
            .batch_execute(&format!(
                "BEGIN; SET LOCAL client_min_messages = warning; DROP TABLE IF EXISTS {shadow}; \
                 CREATE TABLE {shadow} (LIKE {live} INCLUDING ALL); \
                 COMMENT ON TABLE {shadow} IS '{of}'; COMMIT"
            ))
            .await
            .map_err(failed)?;
        let positions = PositionTable::beside(&self.shadow);
        positions.forget(&self.link, &self.pipeline, sink).await.map_err(failed)
    }

    /// Compares the shadow with the live rows of the window, without columns that the table fills itself.
    ///
    /// # Errors
    /// Error of the server, as a sentence.
    #[boxed]
    pub async fn diff(&self) -> Result<WindowDiff, String> {
        let failed = |error: ServerError| {
            format!("cannot compare {} with {}: {error}", self.shadow, self.live)
        };
        let unreadable = |error: tokio_postgres::Error| failed(error.into());
        // `t` alone would be a column of that name, if the table has one.
        let sides = format!(
            "WITH live AS (
                 SELECT (to_jsonb(t.*) - $1::text[])::text AS row, count(*) AS n
                 FROM {} AS t WHERE {} GROUP BY 1),
             shadow AS (
                 SELECT (to_jsonb(t.*) - $1::text[])::text AS row, count(*) AS n
                 FROM {} AS t GROUP BY 1),
             sides AS (
                 SELECT row, coalesce(live.n, 0) AS live, coalesce(shadow.n, 0) AS shadow
                 FROM live FULL JOIN shadow USING (row))",
            self.live.quoted(),
            self.of_window(),
            self.shadow.quoted()
        );
        let count = |what: &str| format!("coalesce(sum({what}), 0)::bigint");
        let counts = format!(
            "{sides} SELECT {}, {}, {} FROM sides",
            count("least(live, shadow)"),
            count("greatest(live - shadow, 0)"),
            count("greatest(shadow - live, 0)")
        );
        self.begin_unbounded().await.map_err(failed)?;
        let counts = self.ask(&counts, &[(&self.left_out, Type::TEXT_ARRAY)]).await;
        let counts = counts.map_err(failed)?;
        let counts = counts.first().ok_or("the comparison gave no row")?;
        let number = |place: usize| -> Result<u64, String> {
            let number: i64 = counts.try_get(place).map_err(unreadable)?;
            Ok(u64::try_from(number).unwrap_or(0))
        };
        let mut samples = [Vec::new(), Vec::new()];
        for (samples, more) in samples.iter_mut().zip(["live > shadow", "shadow > live"]) {
            let some = format!("{sides} SELECT row FROM sides WHERE {more} ORDER BY row LIMIT $2");
            let values: [(&(dyn ToSql + Sync), Type); 2] =
                [(&self.left_out, Type::TEXT_ARRAY), (&SAMPLES, Type::INT8)];
            for row in self.ask(&some, &values).await.map_err(failed)? {
                samples.push(row.try_get(0).map_err(unreadable)?);
            }
        }
        self.link.batch_execute("COMMIT").await.map_err(failed)?;
        let [samples_live, samples_shadow] = samples;
        Ok(WindowDiff {
            same: number(0)?,
            only_live: number(1)?,
            only_shadow: number(2)?,
            samples_live,
            samples_shadow,
        })
    }

    /// Returns those of the given records (shard and sequence number) that have rows in the shadow.
    ///
    /// # Errors
    /// Error of the server, as a sentence.
    #[boxed]
    pub async fn with_rows(
        &self,
        records: Vec<(String, String)>,
    ) -> Result<HashSet<(String, String)>, String> {
        let failed = |error: ServerError| format!("cannot read table {}: {error}", self.shadow);
        let (shards, sequences): (Vec<String>, Vec<String>) = records.into_iter().unzip();
        let [_, (shard, _), (sequence, _), _] = COLUMNS;
        let found = format!(
            "SELECT DISTINCT own.shard, own.sequence \
             FROM unnest($1::text[], $2::text[]) AS own (shard, sequence) \
             JOIN {} AS t ON t.{shard} = own.shard AND t.{sequence} = own.sequence::numeric",
            self.shadow.quoted()
        );
        let wanted: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 2] =
            [(&shards, Type::TEXT_ARRAY), (&sequences, Type::TEXT_ARRAY)];
        let found = self.ask(&found, &wanted).await.map_err(failed)?;
        let record = |row: &Row| Ok((row.try_get(0)?, row.try_get(1)?));
        found.iter().map(record).collect::<Result<_, ServerError>>().map_err(failed)
    }

    /// Refuses a window into which other sinks write rows that cannot be told apart: they would be deleted and not made
    /// again. `others` are the other sinks of the pipeline, `stream` is the stream that is replayed. Errors are
    /// sentences.
    ///
    /// # Errors
    /// Who writes the table, and the way out; or the error of the server.
    #[boxed]
    pub async fn check_alone(
        &self,
        others: &[(&SinkName, &PostgresTarget)],
        stream: &StreamIdentity,
    ) -> Result<Vec<OtherSink>, String> {
        let others = OtherSink::all(&self.link, &self.live, others, self.silence_max).await?;
        self.writers(stream).check(&self.link, &others).await?;
        Ok(others)
    }

    fn writers<'w>(&'w self, stream: &'w StreamIdentity) -> Writers<'w> {
        Writers {
            table: &self.live,
            positions: PositionTable::beside(&self.live),
            pipeline: &self.pipeline,
            sink: &self.sink,
            stream,
            of_window: self.of_window(),
            of_time: self.of_time(),
            says_sink: self.says_sink,
        }
    }

    /// Replaces the live rows of the window by the rows of the shadow, drops the shadow, and leaves a mark of the
    /// replay, in one transaction. Returns how many rows were deleted and inserted. If rows have keys, a row that a
    /// later record has written is kept. `others` are the result of [`TableWindow::check_alone`].
    ///
    /// # Errors
    /// [`SwapFailed`], with the error of the server as a sentence.
    #[boxed]
    pub async fn swap(
        &mut self,
        replay: ReplayId,
        others: &[OtherSink],
        stream: &StreamIdentity,
    ) -> Result<(u64, u64), SwapFailed> {
        let (live, shadow) = (self.live.quoted(), self.shadow.quoted());
        let of_window = self.of_window();
        let columns: Vec<String> = self.copied.iter().map(|name| quoted(name)).collect();
        let columns = columns.join(", ");
        let on_conflict = &self.on_conflict;
        let failed =
            |error: ServerError| SwapFailed::Nothing(format!("nothing was replaced: {error}"));
        let refused = |cause| SwapFailed::Nothing(format!("nothing was replaced: {cause}"));
        let positions = PositionTable::beside(&self.live);
        positions.create_if_missing(&self.link).await.map_err(failed)?;
        // Readers see the old rows until all new ones are there, and no other row is written in between.
        self.begin_unbounded().await.map_err(failed)?;
        let lock = format!("LOCK TABLE {live} IN SHARE ROW EXCLUSIVE MODE");
        self.run(&lock).await.map_err(failed)?;
        self.writers(stream).check(&self.link, others).await.map_err(refused)?;
        let delete = format!("DELETE FROM {live} AS t WHERE {of_window}");
        let deleted = self.run(&delete).await.map_err(failed)?;
        let insert = format!(
            "INSERT INTO {live} ({columns}) SELECT {columns} FROM {shadow} \
             ORDER BY shardmill_shard, shardmill_sequence {on_conflict}"
        );
        let inserted = self.run(&insert).await.map_err(failed)?;
        let mark = self.mark(replay);
        let end = format!(
            "DROP TABLE {shadow}; DELETE FROM {positions} AS t WHERE {earlier}; \
             INSERT INTO {positions} (pipeline, sink, stream, shard, epoch) \
             VALUES ({pipeline}, {sink}, {mark}, 'swap', 1); COMMIT",
            positions = positions.quoted(),
            earlier = self.marks(),
            pipeline = literal(self.pipeline.as_str()),
            sink = literal(&replayed(&self.sink)),
            mark = literal(&mark),
        );
        match self.link.batch_execute(&end).await {
            Ok(()) => Ok((deleted, inserted)),
            // The server has answered with an error: it has rolled back.
            Err(error) if error.as_db_error().is_some() && !self.link.is_closed() => {
                Err(failed(error))
            }
            Err(error) => Err(SwapFailed::Unknown(error.to_string())),
        }
    }

    /// Returns the condition for the marks of the sink's replays.
    fn marks(&self) -> String {
        marks(&self.pipeline, &self.sink)
    }

    fn mark(&self, replay: ReplayId) -> String {
        mark(replay)
    }

    /// Whether the transaction of a replay was committed. Waits for one that is still running. Errors are sentences.
    ///
    /// # Errors
    /// Error of the server, or that it is unreachable.
    #[boxed]
    pub async fn has_landed(
        target: &PostgresTarget,
        pipeline: &PipelineName,
        (sink, replay): (&SinkName, ReplayId),
        silence_max: Duration,
    ) -> Result<bool, String> {
        let server = PostgresServer::parse(&target.url)?;
        let live = TableName::parse(&target.table)?;
        let link = connect(&server, silence_max).await?;
        let failed = |error: ServerError| format!("cannot read the mark of the replay: {error}");
        let positions = PositionTable::beside(&live);
        // The lock waits for a swap that is still running.
        let look = format!(
            "BEGIN; LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE; \
             SELECT 1 FROM {} AS t WHERE {} AND t.stream = {}; COMMIT",
            live.quoted(),
            positions.quoted(),
            marks(pipeline, sink),
            literal(&mark(replay))
        );
        let answers = match link.unbounded(&server, link.client().simple_query(&look)).await {
            // Without a table there are no rows of a replay.
            Err(error)
                if error.code() == Some(&tokio_postgres::error::SqlState::UNDEFINED_TABLE) =>
            {
                return Ok(false);
            }
            answers => answers.map_err(failed)?,
        };
        let is_row = |one: &_| matches!(one, tokio_postgres::SimpleQueryMessage::Row(_));
        Ok(answers.iter().any(is_row))
    }

    /// Begins a transaction without a limit on the time of its statements, because the table may be large.
    async fn begin_unbounded(&self) -> Result<(), ServerError> {
        let begin = format!("{BEGIN}; SET LOCAL statement_timeout = 0");
        self.link.batch_execute(&begin).await
    }

    async fn ask(
        &self,
        sql: &str,
        values: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<Row>, ServerError> {
        self.link.unbounded(&self.server, self.link.client().query_typed(sql, values)).await
    }

    async fn run(&self, sql: &str) -> Result<u64, ServerError> {
        self.link.unbounded(&self.server, self.link.client().execute_typed(sql, &[])).await
    }

    /// Returns the condition for the window's rows of a table `t`.
    fn of_window(&self) -> String {
        let of_sink = match self.says_sink {
            true => {
                let (column, _) = SINK;
                let sink = literal(self.sink.as_str());
                // Rows from before the table had the column: `check_alone` makes sure that they are the sink's.
                format!(" AND (t.{column} = {sink} OR t.{column} IS NULL)")
            }
            false => String::new(),
        };
        format!("{}{of_sink}", self.of_time())
    }

    /// Returns the condition for rows of the window's time in a table `t`, of any sink.
    fn of_time(&self) -> String {
        let time = |ms: u64| format!("'epoch'::timestamptz + {ms} * interval '1 millisecond'");
        format!(
            "t.{PIPELINE} = {} AND t.{ARRIVED_AT} >= {} AND t.{ARRIVED_AT} < {}",
            literal(self.pipeline.as_str()),
            time(self.window_ms.start),
            time(self.window_ms.end)
        )
    }
}

/// Returns the mark of a replay in the position table.
fn mark(replay: ReplayId) -> String {
    format!("{REPLAYS}{replay}")
}

/// Returns the condition for the marks of a sink's replays among positions `t`.
fn marks(pipeline: &PipelineName, sink: &SinkName) -> String {
    format!(
        "t.pipeline = {} AND t.sink = {} AND starts_with(t.stream, {})",
        literal(pipeline.as_str()),
        literal(&replayed(sink)),
        literal(REPLAYS)
    )
}

/// Returns the name under which a replay of a sink has its positions.
fn replayed(sink: &SinkName) -> String {
    format!("{sink}.replay")
}
