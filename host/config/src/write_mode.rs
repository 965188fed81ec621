//! Effect of a row if the table already has a row with its key, for sinks with tables.

/// How rows are written into a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum WriteMode {
    /// Each is a new row. The table refuses a row whose key exists, if it has a unique index.
    #[default]
    Append,
    /// A row with an existing key updates that row: the columns that it has are set.
    Upsert {
        /// Columns of the key, which have a unique index in the table.
        key: Vec<String>,
        /// Column that decides which row wins: the new row, unless its value in this column is smaller; `None`: the
        /// last row wins.
        newest_by: Option<String>,
    },
    /// A row with an existing key is dropped.
    Ignore {
        /// As above.
        key: Vec<String>,
    },
}

impl WriteMode {
    /// Returns the columns of the key; empty if rows are appended.
    pub fn key(&self) -> &[String] {
        match self {
            Self::Append => &[],
            Self::Upsert { key, .. } | Self::Ignore { key } => key,
        }
    }

    /// Whether the newest row of each key wins, in any order of the rows.
    pub(crate) fn keeps_newest(&self) -> bool {
        matches!(self, Self::Upsert { newest_by: Some(_), .. })
    }

    /// Returns the columns that must be present and not null in each row. Without them, a row cannot be matched with a
    /// row of the table.
    pub fn required(&self) -> impl Iterator<Item = &str> {
        let newest_by = match self {
            Self::Upsert { newest_by, .. } => newest_by.as_deref(),
            _ => None,
        };
        self.key().iter().map(String::as_str).chain(newest_by)
    }

    /// Returns the clause of an `INSERT` of these columns that handles existing keys: from `ON CONFLICT` to the end of
    /// the statement, in the SQL that PostgreSQL and SQLite share. `table`, and the names that `quoted` returns, are
    /// already quoted SQL. Empty if rows are appended.
    ///
    /// Sources: PostgreSQL, "INSERT", ON CONFLICT clause; SQLite, "UPSERT".
    pub fn on_conflict(
        &self,
        table: &str,
        columns: &[&str],
        quoted: impl Fn(&str) -> String,
    ) -> String {
        let key: Vec<String> = self.key().iter().map(|name| quoted(name)).collect();
        let key = key.join(", ");
        let newest_by = match self {
            Self::Append => return String::new(),
            Self::Ignore { .. } => return format!("ON CONFLICT ({key}) DO NOTHING"),
            Self::Upsert { newest_by, .. } => newest_by,
        };
        let others = columns.iter().filter(|name| !self.key().iter().any(|key| key == *name));
        let set: Vec<String> = others
            .map(|name| quoted(name))
            .map(|name| format!("{name} = excluded.{name}"))
            .collect();
        if set.is_empty() {
            return format!("ON CONFLICT ({key}) DO NOTHING");
        }
        let set = set.join(", ");
        match newest_by.as_deref().map(quoted) {
            None => format!("ON CONFLICT ({key}) DO UPDATE SET {set}"),
            Some(by) => format!(
                "ON CONFLICT ({key}) DO UPDATE SET {set} \
                 WHERE {table}.{by} IS NULL OR {table}.{by} <= excluded.{by}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sql(mode: &WriteMode, columns: &[&str]) -> String {
        mode.on_conflict("t", columns, |name| format!("<{name}>"))
    }

    #[test]
    fn the_clause_sets_what_the_row_brings() {
        let key = vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(sql(&WriteMode::Append, &["a"]), "");
        assert_eq!(
            sql(&WriteMode::Ignore { key: key.clone() }, &["a", "b", "c"]),
            "ON CONFLICT (<a>, <b>) DO NOTHING"
        );
        let last = WriteMode::Upsert { key: key.clone(), newest_by: None };
        assert_eq!(
            sql(&last, &["a", "b", "c"]),
            "ON CONFLICT (<a>, <b>) DO UPDATE SET <c> = excluded.<c>"
        );
        assert_eq!(sql(&last, &["a", "b"]), "ON CONFLICT (<a>, <b>) DO NOTHING");
        let newest = WriteMode::Upsert { key, newest_by: Some("n".into()) };
        assert_eq!(
            sql(&newest, &["a", "b", "n"]),
            "ON CONFLICT (<a>, <b>) DO UPDATE SET <n> = excluded.<n> \
             WHERE t.<n> IS NULL OR t.<n> <= excluded.<n>"
        );
        assert!(newest.required().eq(["a", "b", "n"]));
    }
}
