//! A window of a table, and the shadow that may take its place: what a replay works on.
//!
//! Which rows are the window's, the columns of [`lineage`](super::lineage) say. The shadow is a table
//! like the live one. It is marked as ours by a comment, so that no other table is ever dropped.

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

/// What the comment on a shadow begins with.
const MARK: &str = "shardmill replay";

/// What the stream of a replay's mark begins with, in the position table.
const REPLAYS: &str = "replay:";

/// Rows that are shown of each side.
const SAMPLES: i64 = 5;

/// The longest name that PostgreSQL keeps whole, in bytes.
const NAME_BYTES_MAX: usize = 63;

/// Columns that a copy of a row cannot bring, and those whose default is another at each call: the
/// first are left out of a copy, all of them of a comparison.
const COLUMNS_OF: &str = "
    SELECT a.attname, a.attgenerated <> '' OR a.attidentity <> '',
        a.attgenerated <> '' OR a.attidentity <> '' OR coalesce(pg_get_expr(d.adbin, d.adrelid), '') LIKE '%(%'
    FROM pg_catalog.pg_attribute AS a
    LEFT JOIN pg_catalog.pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";

/// A window of a live table, with its shadow.
pub struct TableWindow {
    server: PostgresServer,
    /// A server that says nothing for so long is given up.
    silence_max: Duration,
    link: Link,
    live: TableName,
    shadow: TableName,
    pipeline: PipelineName,
    /// The sink that writes the live table.
    sink: SinkName,
    window_ms: Range<u64>,
    /// Whether the live table says which sink wrote a row.
    says_sink: bool,
    /// What an insert into the live table does with keys that are there.
    on_conflict: String,
    /// The columns that a copy brings.
    copied: Vec<String>,
    /// The columns that a comparison leaves out.
    left_out: Vec<String>,
}

/// Why a window was not replaced.
#[derive(Debug)]
pub enum SwapFailed {
    /// It was not, and will not be.
    Nothing(String),
    /// Whether it was is not known.
    Unknown(String),
}

/// How a shadow differs from its window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WindowDiff {
    /// Rows that are the same on both sides.
    pub same: u64,
    /// Rows of the live table that are not in the shadow.
    pub only_live: u64,
    /// Rows of the shadow that are not in the live table.
    pub only_shadow: u64,
    /// Some of each, as JSON.
    pub samples_live: Vec<String>,
    /// Likewise.
    pub samples_shadow: Vec<String>,
}

impl TableWindow {
    /// Makes an empty shadow, `into` or the live table's name with `_replay`, in the place of the one of
    /// an earlier replay, and forgets the positions that the replay of `sink` had there, under the name
    /// `replayed`. Errors are sentences.
    ///
    /// # Errors
    /// The server is out of reach, the live table has no lineage, or the shadow's name is another
    /// table's.
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
            return Err(format!("the name {shadow} is too long: name the shadow by --into"));
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

    /// The shadow's name, as a configuration has it.
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
            // Today's plugins have other digests, and rows of before may not say their sink: that makes a
            // row no other.
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
                "table {} has no column {missing}: nobody can tell which rows are the window's. Set \
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
        let failed = |error: ServerError| format!("cannot make table {}: {error}", self.shadow);
        let unreadable = |error: tokio_postgres::Error| failed(error.into());
        let comment =
            "SELECT obj_description(to_regclass($1), 'pg_class'), to_regclass($1) IS NOT NULL";
        let found = self.link.query_typed_one(comment, &[(&shadow, Type::TEXT)]).await;
        let found = found.map_err(failed)?;
        let comment: Option<String> = found.try_get(0).map_err(unreadable)?;
        let is_ours = comment.is_some_and(|comment| comment.starts_with(MARK));
        if found.try_get(1).map_err(unreadable)? && !is_ours {
            return Err(format!(
                "table {} is there and was not made by a replay: name another by --into",
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

    /// Compares the shadow with the window's live rows, but for columns that the table fills itself.
    ///
    /// # Errors
    /// What the server says, as a sentence.
    #[boxed]
    pub async fn diff(&self) -> Result<WindowDiff, String> {
        let failed = |error: ServerError| {
            format!("cannot compare {} with {}: {error}", self.shadow, self.live)
        };
        let unreadable = |error: tokio_postgres::Error| failed(error.into());
        // `t` alone would be a column of that name, where the table has one.
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

    /// Of records, given as shard and sequence number, those that have rows in the shadow.
    ///
    /// # Errors
    /// What the server says, as a sentence.
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

    /// Refuses a window that others write rows to as well, unless the rows say whose they are: theirs would
    /// be deleted and not be made again. `others` are the other sinks of the pipeline, `stream` is what is
    /// replayed. Errors are sentences.
    ///
    /// # Errors
    /// Who writes the table, and the way out; or what the server says.
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

    /// Replaces the window's live rows by the shadow's, and drops the shadow, in one transaction, which
    /// leaves a mark of the replay; gives how many rows were deleted and inserted. Where rows have keys, one
    /// that a later record has written stays. `others` are as [`TableWindow::check_alone`] has given them.
    ///
    /// # Errors
    /// [`SwapFailed`], with what the server says as a sentence.
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
        // Readers see the old rows until all new ones are there; no other row comes in between.
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
            // The server has answered: it was rolled back.
            Err(error) if error.as_db_error().is_some() && !self.link.is_closed() => {
                Err(failed(error))
            }
            Err(error) => Err(SwapFailed::Unknown(error.to_string())),
        }
    }

    /// The condition that finds the marks of the sink's replays.
    fn marks(&self) -> String {
        marks(&self.pipeline, &self.sink)
    }

    fn mark(&self, replay: ReplayId) -> String {
        mark(replay)
    }

    /// Whether the transaction of a replay has landed. Waits for one that is under way. Errors are
    /// sentences.
    ///
    /// # Errors
    /// What the server says, or that it is out of reach.
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
        let failed = |error: ServerError| format!("cannot read what was replayed: {error}");
        let positions = PositionTable::beside(&live);
        // Behind the lock that such a transaction takes: it has ended then.
        let look = format!(
            "BEGIN; LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE; \
             SELECT 1 FROM {} AS t WHERE {} AND t.stream = {}; COMMIT",
            live.quoted(),
            positions.quoted(),
            marks(pipeline, sink),
            literal(&mark(replay))
        );
        let answers = match link.unbounded(&server, link.client().simple_query(&look)).await {
            // No table, no rows of a replay.
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

    /// Begins a transaction whose statements may take as long as a large table takes.
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

    /// The condition that finds the window's rows of a table `t`.
    fn of_window(&self) -> String {
        let of_sink = match self.says_sink {
            true => {
                let (column, _) = SINK;
                let sink = literal(self.sink.as_str());
                // Rows from before the table had the column: `check_alone` proves that they are the sink's.
                format!(" AND (t.{column} = {sink} OR t.{column} IS NULL)")
            }
            false => String::new(),
        };
        format!("{}{of_sink}", self.of_time())
    }

    /// The condition that finds the rows of the window's time of a table `t`, whichever sink wrote them.
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

/// What a replay is in the position table.
fn mark(replay: ReplayId) -> String {
    format!("{REPLAYS}{replay}")
}

/// The condition that finds the marks of a sink's replays among positions `t`.
fn marks(pipeline: &PipelineName, sink: &SinkName) -> String {
    format!(
        "t.pipeline = {} AND t.sink = {} AND starts_with(t.stream, {})",
        literal(pipeline.as_str()),
        literal(&replayed(sink)),
        literal(REPLAYS)
    )
}

/// The name under which a replay of a sink keeps positions.
fn replayed(sink: &SinkName) -> String {
    format!("{sink}.replay")
}
