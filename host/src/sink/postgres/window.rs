//! A window of a table, and the shadow that may take its place: what a replay works on.
//!
//! Which rows are the window's, the columns of [`lineage`](super::lineage) say. The shadow is a table
//! like the live one. It is marked as ours by a comment, so that no other table is ever dropped.

use std::ops::Range;

use serde::Serialize;
use tokio_postgres::{Client, Error};

use super::lineage::{ARRIVED_AT, COLUMNS, DIGEST, PIPELINE};
use super::name::{TableName, quoted};
use super::position::PositionTable;
use crate::config::PostgresTarget;
use crate::postgres::{PostgresServer, describe};
use crate::record::{PipelineName, SinkName};

/// What the comment on a shadow begins with.
const MARK: &str = "shardmill replay";

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
    client: Client,
    live: TableName,
    shadow: TableName,
    pipeline: PipelineName,
    window_ms: Range<u64>,
    /// What an insert into the live table does with keys that are there.
    on_conflict: String,
    /// The columns that a copy brings.
    copied: Vec<String>,
    /// The columns that a comparison leaves out.
    left_out: Vec<String>,
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
    /// an earlier replay, and forgets the positions that `sink` had there. Errors are sentences.
    ///
    /// # Errors
    /// The server is out of reach, the live table has no lineage, or the shadow's name is another
    /// table's.
    pub async fn prepare(
        target: &PostgresTarget,
        into: Option<&str>,
        sink: &SinkName,
        pipeline: &PipelineName,
        window_ms: Range<u64>,
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
        let connected = server.connect().await;
        let client = connected.map_err(|error| {
            format!("cannot connect to {}: {}", server.place(), describe(&error))
        })?;
        let key: Vec<String> = target.mode.key().iter().map(|name| quoted(name)).collect();
        let on_conflict = match key.is_empty() {
            true => String::new(),
            false => format!("ON CONFLICT ({}) DO NOTHING", key.join(", ")),
        };
        let mut window = Self {
            client,
            live,
            shadow,
            pipeline: pipeline.clone(),
            window_ms,
            on_conflict,
            copied: Vec::new(),
            left_out: Vec::new(),
        };
        window.read_columns().await?;
        window.make_shadow(sink).await?;
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
        let failed =
            |error: Error| format!("cannot read table {}: {}", self.live, describe(&error));
        let rows = self.client.query(COLUMNS_OF, &[&self.live.quoted()]).await.map_err(failed)?;
        let (mut names, mut copied, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
        for row in &rows {
            let name: String = row.try_get(0).map_err(failed)?;
            if !row.try_get::<_, bool>(1).map_err(failed)? {
                copied.push(name.clone());
            }
            // Today's plugins have other digests: that makes a row no other.
            if row.try_get::<_, bool>(2).map_err(failed)? || name == DIGEST.0 {
                left_out.push(name.clone());
            }
            names.push(name);
        }
        if names.is_empty() {
            return Err(format!("table {} does not exist", self.live));
        }
        if let Some((missing, _)) =
            COLUMNS.iter().find(|(due, _)| !names.iter().any(|it| it == due))
        {
            return Err(format!(
                "table {} has no column {missing}: nobody can tell which rows are the window's. Set \
                 lineage = true in the sink, and add the columns that it names",
                self.live
            ));
        }
        (self.copied, self.left_out) = (copied, left_out);
        Ok(())
    }

    async fn make_shadow(&self, sink: &SinkName) -> Result<(), String> {
        let (live, shadow) = (self.live.quoted(), self.shadow.quoted());
        let failed =
            |error: Error| format!("cannot make table {}: {}", self.shadow, describe(&error));
        let comment =
            "SELECT obj_description(to_regclass($1), 'pg_class'), to_regclass($1) IS NOT NULL";
        let found = self.client.query_one(comment, &[&shadow]).await.map_err(failed)?;
        let comment: Option<String> = found.try_get(0).map_err(failed)?;
        let is_ours = comment.is_some_and(|comment| comment.starts_with(MARK));
        if found.try_get(1).map_err(failed)? && !is_ours {
            return Err(format!(
                "table {} is there and was not made by a replay: name another by --into",
                self.shadow
            ));
        }
        let of = format!("{MARK} of {}", self.live).replace('\'', "''");
        self.client
            .batch_execute(&format!(
                "BEGIN; SET LOCAL client_min_messages = warning; DROP TABLE IF EXISTS {shadow}; \
                 CREATE TABLE {shadow} (LIKE {live} INCLUDING ALL); \
                 COMMENT ON TABLE {shadow} IS '{of}'; COMMIT"
            ))
            .await
            .map_err(failed)?;
        let positions = PositionTable::beside(&self.shadow);
        positions.forget(&self.client, &self.pipeline, sink).await.map_err(failed)
    }

    /// Compares the shadow with the window's live rows, but for columns that the table fills itself.
    ///
    /// # Errors
    /// What the server says, as a sentence.
    pub async fn diff(&self) -> Result<WindowDiff, String> {
        let failed = |error: Error| {
            format!("cannot compare {} with {}: {}", self.shadow, self.live, describe(&error))
        };
        let sides = format!(
            "WITH live AS (
                 SELECT (to_jsonb(t) - $1::text[])::text AS row, count(*) AS n
                 FROM {} AS t WHERE {} GROUP BY 1),
             shadow AS (
                 SELECT (to_jsonb(t) - $1::text[])::text AS row, count(*) AS n
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
        self.unbounded().await.map_err(failed)?;
        let counts = self.client.query_one(&counts, &[&self.left_out]).await.map_err(failed)?;
        let number = |place: usize| -> Result<u64, String> {
            let number: i64 = counts.try_get(place).map_err(failed)?;
            Ok(u64::try_from(number).unwrap_or(0))
        };
        let mut samples = [Vec::new(), Vec::new()];
        for (samples, more) in samples.iter_mut().zip(["live > shadow", "shadow > live"]) {
            let some = format!("{sides} SELECT row FROM sides WHERE {more} ORDER BY row LIMIT $2");
            for row in
                self.client.query(&some, &[&self.left_out, &SAMPLES]).await.map_err(failed)?
            {
                samples.push(row.try_get(0).map_err(failed)?);
            }
        }
        let [samples_live, samples_shadow] = samples;
        Ok(WindowDiff {
            same: number(0)?,
            only_live: number(1)?,
            only_shadow: number(2)?,
            samples_live,
            samples_shadow,
        })
    }

    /// Replaces the window's live rows by the shadow's, and drops the shadow, in one transaction; gives
    /// how many rows were deleted and inserted. Where rows have keys, one that a later record has
    /// written stays.
    ///
    /// # Errors
    /// What the server says, as a sentence; nothing was changed.
    pub async fn swap(&mut self) -> Result<(u64, u64), String> {
        let (live, shadow) = (self.live.quoted(), self.shadow.quoted());
        let of_window = self.of_window();
        let columns: Vec<String> = self.copied.iter().map(|name| quoted(name)).collect();
        let columns = columns.join(", ");
        let on_conflict = &self.on_conflict;
        let failed = |error: Error| format!("nothing was replaced: {}", describe(&error));
        self.unbounded().await.map_err(failed)?;
        let transaction = self.client.transaction().await.map_err(failed)?;
        // Readers see the old rows until all new ones are there; no other row comes in between.
        let lock = format!("LOCK TABLE {live} IN SHARE ROW EXCLUSIVE MODE");
        transaction.batch_execute(&lock).await.map_err(failed)?;
        let delete = format!("DELETE FROM {live} AS t WHERE {of_window}");
        let deleted = transaction.execute(&delete, &[]).await.map_err(failed)?;
        let insert = format!(
            "INSERT INTO {live} ({columns}) SELECT {columns} FROM {shadow} \
             ORDER BY shardmill_shard, shardmill_sequence {on_conflict}"
        );
        let inserted = transaction.execute(&insert, &[]).await.map_err(failed)?;
        transaction.batch_execute(&format!("DROP TABLE {shadow}")).await.map_err(failed)?;
        transaction.commit().await.map_err(|error| {
            format!(
                "whether the window was replaced is not known: {}; it was, if table {} is gone",
                describe(&error),
                self.shadow
            )
        })?;
        Ok((deleted, inserted))
    }

    /// Lets statements take as long as a large table takes.
    async fn unbounded(&self) -> Result<(), Error> {
        self.client.batch_execute("SET statement_timeout = 0").await
    }

    /// The condition that finds the window's rows of a table `t`.
    fn of_window(&self) -> String {
        let time = |ms: u64| format!("'epoch'::timestamptz + {ms} * interval '1 millisecond'");
        format!(
            "t.{PIPELINE} = '{}' AND t.{ARRIVED_AT} >= {} AND t.{ARRIVED_AT} < {}",
            self.pipeline.as_str().replace('\'', "''"),
            time(self.window_ms.start),
            time(self.window_ms.end)
        )
    }
}
