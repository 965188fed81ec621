//! Settings of a SQLite sink: `[[sink]]` with `type = "sqlite"`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::SqliteSink;
use shardmill_config::reading::{
    CREATE_KEY, Check, KEY_KEY, MODE_KEY, Maybe, NEWEST_BY_KEY, RawCommit, RerunTable, Spanned,
    Text, table, write_mode,
};
use shardmill_config::{
    CommitPolicy, Key, KeyDefault, KeyForm, ReadSink, Rerun, SharedParts, SinkBuildError,
    SinkContext, SinkSettings, SinkTable, SinkType, WriteMode,
};
use shardmill_core::record::SinkName;
use shardmill_core::sink::Sink;

/// Sink type of SQLite tables.
pub const TYPE: &dyn SinkType = &SqliteType;

struct SqliteType;

/// A table in a SQLite file.
#[derive(Clone, Debug, PartialEq)]
pub struct SqliteTarget {
    /// Database file.
    pub path: PathBuf,
    /// Name of the table.
    pub table: String,
    /// Whether to create a missing table from the route's columns.
    pub create: bool,
    /// Mode of writing rows.
    pub mode: WriteMode,
}

/// `[[sink]]` with `type = "sqlite"`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawSqlite {
    name: Spanned<Text>,
    #[serde(rename = "type")]
    _kind: IgnoredAny,
    path: Spanned<Text>,
    table: Spanned<Text>,
    create: Option<bool>,
    mode: Maybe<Text>,
    #[serde(default)]
    key: Vec<Spanned<Text>>,
    newest_by: Maybe<Text>,
    commit: Option<RawCommit>,
}

impl SinkType for SqliteType {
    fn name(&self) -> &'static str {
        "sqlite"
    }

    fn about(&self) -> &'static str {
        "A table in a SQLite file, exactly once: rows and position are written in one transaction."
    }

    fn keys(&self) -> &'static [Key] {
        &[
            Key {
                name: "path",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"data/cars.db\""),
                about: "The database file; it is created if it is missing.",
            },
            Key {
                name: "table",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"cars\""),
                about: "The table.",
            },
            CREATE_KEY,
            MODE_KEY,
            KEY_KEY,
            NEWEST_BY_KEY,
        ]
    }

    fn commit_policy(&self) -> CommitPolicy {
        CommitPolicy::TABLE
    }

    fn read(&self, table: SinkTable<'_>, check: &mut Check) -> Option<ReadSink> {
        let base = table.base();
        let raw: RawSqlite = table.shaped(check)?;
        let settings = target(&raw, base, check);
        Some(ReadSink::new(raw.name, raw.commit, settings))
    }
}

fn target(raw: &RawSqlite, base: &Path, check: &mut Check) -> Option<SqliteTarget> {
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
    Some(SqliteTarget { path: base.join(path?), table: table?, create, mode: mode? })
}

impl SinkSettings for SqliteTarget {
    fn destination(&self) -> Option<String> {
        let Self { path, table, .. } = self;
        // The folder may be a link, and the file may not exist yet.
        let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
        let path = match (folder, path.file_name()) {
            (Some(folder), Some(name)) => folder.join(name),
            _ => std::path::absolute(path).unwrap_or_else(|_| path.clone()),
        };
        let path = path.canonicalize().unwrap_or(path);
        // SQLite's names are not case-sensitive.
        Some(format!("sqlite {} table {}", path.display(), table.to_ascii_lowercase()))
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn creates_table(&self) -> bool {
        self.create
    }

    fn rerun(&self, _sink: &SinkName, number: i64) -> Option<Rerun> {
        let RerunTable { table, create, place } =
            RerunTable::of(&self.table, self.create, &self.mode, number);
        Some(Rerun { settings: Arc::new(Self { table, create, ..self.clone() }), place })
    }

    fn build(
        &self,
        context: &SinkContext<'_>,
        _shared: &mut SharedParts,
    ) -> Result<Arc<dyn Sink>, SinkBuildError> {
        let Self { path, table, create, mode } = self;
        Ok(Arc::new(SqliteSink::new(context.name.clone(), path, table, *create, mode.clone())?))
    }
}
