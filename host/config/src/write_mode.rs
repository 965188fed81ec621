//! What a row does where the table has one with its key: for the sinks that have tables.

/// How rows go into a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum WriteMode {
    /// Each is a new row. One whose key is there already is refused by the table.
    #[default]
    Append,
    /// A row takes the place of the one with its key: the columns that it brings are set.
    Upsert {
        /// The columns that make the key; a unique index of the table.
        key: Vec<String>,
        /// A column by which a row wins over the one that is there unless its value is smaller;
        /// `None`: the row that comes last wins.
        newest_by: Option<String>,
    },
    /// A row whose key is there is dropped.
    Ignore {
        /// As above.
        key: Vec<String>,
    },
}

impl WriteMode {
    /// The columns of the key; empty when rows are appended.
    pub fn key(&self) -> &[String] {
        match self {
            Self::Append => &[],
            Self::Upsert { key, .. } | Self::Ignore { key } => key,
        }
    }

    /// Whether the newest row of each key wins, in whatever order rows come.
    pub(crate) fn keeps_newest(&self) -> bool {
        matches!(self, Self::Upsert { newest_by: Some(_), .. })
    }

    /// The columns that each row must bring, and not as null: without them nobody knows which row of
    /// the table is meant.
    pub fn required(&self) -> impl Iterator<Item = &str> {
        let newest_by = match self {
            Self::Upsert { newest_by, .. } => newest_by.as_deref(),
            _ => None,
        };
        self.key().iter().map(String::as_str).chain(newest_by)
    }

    /// What an `INSERT` of these columns does with a key that is there: from `ON CONFLICT` to the
    /// statement's end, in the SQL that PostgreSQL and SQLite share. `table` and the names that
    /// `quoted` gives are SQL already. Empty when rows are appended.
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
