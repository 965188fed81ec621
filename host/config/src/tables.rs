//! Parts of several sink types: names of tables, write modes, connection strings, and options.

use std::collections::BTreeMap;

use toml::Spanned;

use super::check::Check;
use super::raw::{Maybe, Text};
use super::{Key, KeyDefault, KeyForm};
use crate::WriteMode;
use shardmill_pg::PostgresServer;

/// Key `create` of sinks with tables.
pub const CREATE_KEY: Key = Key {
    name: "create",
    form: KeyForm::Flag,
    default: KeyDefault::Value("false"),
    about: "Create a missing table from the route's columns.",
};

/// Key `mode`, which [`write_mode`] reads.
pub const MODE_KEY: Key = Key {
    name: "mode",
    form: KeyForm::Text,
    default: KeyDefault::Value("\"append\""),
    about: "What to do with a row whose key exists in the table: `append` adds it (a row that a unique index refuses \
            becomes a dead letter); `upsert` sets the columns that it has; `ignore` drops it.",
};

/// Key `key`, which belongs to `mode`.
pub const KEY_KEY: Key = Key {
    name: "key",
    form: KeyForm::List,
    default: KeyDefault::None,
    about: "Columns of a row's key, for `upsert` and `ignore`; they need a unique index.",
};

/// Key `newest_by`, which belongs to `mode`.
pub const NEWEST_BY_KEY: Key = Key {
    name: "newest_by",
    form: KeyForm::Text,
    default: KeyDefault::None,
    about: "With `upsert`: a row replaces the existing one unless its value in this column is smaller.",
};

/// Reads a connection string. `port` appears in the help text.
pub fn connection(raw: &Spanned<Text>, port: u16, check: &mut Check) -> Option<String> {
    let url = &raw.get_ref().0;
    let Err(cause) = PostgresServer::parse(url) else { return Some(url.clone()) };
    let help = format!(
        "write \"postgres://user:${{PGPASSWORD}}@host:{port}/database\" or \
         \"host=... user=... dbname=...\""
    );
    check.problem(raw.span(), cause, help);
    None
}

/// Reads options for `object_store`.
pub fn options(raw: Option<&BTreeMap<String, Text>>) -> BTreeMap<String, String> {
    raw.into_iter().flatten().map(|(key, value)| (key.clone(), value.0.clone())).collect()
}

/// Reads `mode` with its keys.
pub fn write_mode(
    mode: &Maybe<Text>,
    key: &[Spanned<Text>],
    newest_by: &Maybe<Text>,
    check: &mut Check,
) -> Option<WriteMode> {
    let words = ["append", "upsert", "ignore"].map(|word| (word, word));
    let word = check.choice(mode, "mode", "append", &words)?;
    if word == "append" {
        let strays = [key.first().map(Spanned::span), newest_by.as_ref().map(Spanned::span)];
        for (name, span) in ["key", "newest_by"].into_iter().zip(strays) {
            if let Some(span) = span {
                let message = format!("`{name}` has no effect with mode = \"append\"");
                check.problem(span, message, "add mode = \"upsert\", or leave it out");
                return None;
            }
        }
        return Some(WriteMode::Append);
    }
    if key.is_empty() {
        let span = mode.as_ref().map(Spanned::span)?;
        let message = format!("missing `key`: mode {word:?} needs the columns of a row's key");
        check.problem(span, message, "add for example key = [\"id\"]");
        return None;
    }
    let mut names: Vec<String> = Vec::new();
    for column in key {
        let name = check.filled(column, "column")?;
        if names.contains(&name) {
            check.problem(column.span(), format!("column {name:?} is named twice"), "delete one");
            return None;
        }
        names.push(name);
    }
    match (word, newest_by) {
        ("ignore", Some(newest_by)) => {
            let message =
                "`newest_by` has no effect with mode \"ignore\", where the first row wins";
            check.problem(newest_by.span(), message, "use mode = \"upsert\", or leave it out");
            None
        }
        ("ignore", None) => Some(WriteMode::Ignore { key: names }),
        (_, None) => Some(WriteMode::Upsert { key: names, newest_by: None }),
        (_, Some(newest_by)) => {
            let column = check.filled(newest_by, "column")?;
            Some(WriteMode::Upsert { key: names, newest_by: Some(column) })
        }
    }
}

/// Reads the name of a table, with or without a schema.
pub fn table(raw: &Spanned<Text>, check: &mut Check) -> Option<String> {
    let table = check.filled(raw, "table")?;
    if table.contains('\0') || table.split('.').any(str::is_empty) {
        let help = "write \"table\" or \"schema.table\"; it will be quoted";
        check.problem(raw.span(), format!("not a valid table name: {table:?}"), help);
        return None;
    }
    Some(table)
}

/// Table of a rerun: it takes rows again that `table` got before, after the rollback of a change.
pub struct RerunTable {
    /// Table that gets the rows: the live table with `newest_by`, otherwise a new one beside it.
    pub table: String,
    /// Whether a missing table is created.
    pub create: bool,
    /// Place of the rows, in words.
    pub place: String,
}

impl RerunTable {
    /// Chooses the table of a rerun for a sink with this table, `create` and `mode`. `number` is the number of the
    /// change.
    pub fn of(table: &str, create: bool, mode: &WriteMode, number: i64) -> Self {
        if mode.keeps_newest() {
            let place = format!("in place, in table {table}");
            return Self { table: table.to_owned(), create, place };
        }
        let table = format!("{table}_again_{number}");
        let place = format!("beside, in the new table {table}");
        Self { table, create: true, place }
    }
}
