//! What several sink types have in common: names of tables, ways to write to them, connection strings, and options.

use std::collections::BTreeMap;

use toml::Spanned;

use super::check::Check;
use super::raw::{Maybe, Text};
use super::{Key, KeyDefault, KeyForm};
use crate::WriteMode;
use shardmill_pg::PostgresServer;

/// The key `create` of sinks that have tables.
pub const CREATE_KEY: Key = Key {
    name: "create",
    form: KeyForm::Flag,
    default: KeyDefault::Value("false"),
    about: "Create the table from the route's columns when it is missing.",
};

/// The key `mode`, which [`write_mode`] reads.
pub const MODE_KEY: Key = Key {
    name: "mode",
    form: KeyForm::Text,
    default: KeyDefault::Value("\"append\""),
    about: "What a row does where the table has one with its key: `append` adds it, and it is a dead letter where a \
            unique index of the table refuses it; `upsert` sets the columns that it brings; `ignore` drops it.",
};

/// The key `key`, which goes with `mode`.
pub const KEY_KEY: Key = Key {
    name: "key",
    form: KeyForm::List,
    default: KeyDefault::None,
    about: "The columns that make a row's key, for `upsert` and `ignore`; they have a unique index.",
};

/// The key `newest_by`, which goes with `mode`.
pub const NEWEST_BY_KEY: Key = Key {
    name: "newest_by",
    form: KeyForm::Text,
    default: KeyDefault::None,
    about: "With `upsert`: a row wins over the one that is there unless its value in this column is smaller.",
};

/// Reads a connection string; `port` is for the way out.
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

/// Reads `mode`, with the keys that belong to it.
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
                let message = format!("`{name}` does nothing while rows are appended");
                check.problem(span, message, "add mode = \"upsert\", or leave it out");
                return None;
            }
        }
        return Some(WriteMode::Append);
    }
    if key.is_empty() {
        let span = mode.as_ref().map(Spanned::span)?;
        let message = format!("mode {word:?} needs the columns that make a row's key");
        check.problem(span, message, "add for example key = [\"id\"]");
        return None;
    }
    let mut names: Vec<String> = Vec::new();
    for column in key {
        let name = check.filled(column, "column")?;
        if names.contains(&name) {
            check.problem(
                column.span(),
                format!("column {name:?} is named twice"),
                "once is enough",
            );
            return None;
        }
        names.push(name);
    }
    match (word, newest_by) {
        ("ignore", Some(newest_by)) => {
            let message =
                "`newest_by` says which row wins, and with mode \"ignore\" the first does";
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

/// Reads the name of a table, with its schema or without.
pub fn table(raw: &Spanned<Text>, check: &mut Check) -> Option<String> {
    let table = check.filled(raw, "table")?;
    if table.contains('\0') || table.split('.').any(str::is_empty) {
        let help = "write \"table\" or \"schema.table\"; it will be quoted";
        check.problem(raw.span(), format!("{table:?} cannot name a table"), help);
        return None;
    }
    Some(table)
}

/// The table that takes rows once more which `table` got before, by a change of this number that is rolled back.
pub struct RerunTable {
    /// The table: the same where the newest row of each key wins, else a new one beside it.
    pub table: String,
    /// Whether it is created where it is missing.
    pub create: bool,
    /// Where that is, in words.
    pub place: String,
}

impl RerunTable {
    /// The table for rows of `table`, which goes by `create` and `mode`.
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
