//! Names in SQL. They are always quoted, so that no part of a name is read as SQL.

use std::fmt;

/// Longest name in PostgreSQL, in bytes. The server would cut a longer one, which could then be the name of another
/// table.
const NAME_BYTES_MAX: usize = 63;

/// Name of a table, with or without a schema. It is taken as written; case does not change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableName {
    /// Schema, if the name has one.
    pub schema: Option<String>,
    /// Name within the schema.
    pub table: String,
}

impl TableName {
    /// Parses `table` or `schema.table`. A part that contains a dot must be in double quotes.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text;
        loop {
            let (part, tail) = take_part(rest).ok_or_else(|| not_a_name(text))?;
            if part.is_empty() || part.len() > NAME_BYTES_MAX || part.contains('\0') {
                return Err(not_a_name(text));
            }
            parts.push(part);
            match tail.strip_prefix('.') {
                Some(tail) => rest = tail,
                None if tail.is_empty() => break,
                None => return Err(not_a_name(text)),
            }
        }
        match (parts.pop(), parts.pop(), parts.is_empty()) {
            (Some(table), schema, true) => Ok(Self { schema, table }),
            _ => Err(not_a_name(text)),
        }
    }

    /// Returns the name of another table in the same schema.
    pub fn sibling(&self, table: &str) -> Self {
        Self { schema: self.schema.clone(), table: table.into() }
    }

    /// Returns the quoted name for SQL.
    pub fn quoted(&self) -> String {
        match &self.schema {
            Some(schema) => format!("{}.{}", quoted(schema), quoted(&self.table)),
            None => quoted(&self.table),
        }
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.schema {
            Some(schema) => write!(f, "{schema}.{}", self.table),
            None => f.write_str(&self.table),
        }
    }
}

/// Normalizes the name of a table: removes quotes that are not needed, and the schema `public`, which is the default. A
/// text that is not a valid name is returned unchanged.
pub fn one_spelling(text: &str) -> String {
    let Ok(name) = TableName::parse(text) else { return text.to_owned() };
    let part = |part: &str| match part.contains(['.', '"']) {
        true => quoted(part),
        false => part.to_owned(),
    };
    match &name.schema {
        Some(schema) if schema != "public" => format!("{}.{}", part(schema), part(&name.table)),
        _ => part(&name.table),
    }
}

/// Adds a schema to a table name that has none.
pub fn in_schema(schema: &str, text: &str) -> String {
    match TableName::parse(text) {
        Ok(TableName { schema: None, table }) => format!("{}.{}", quoted(schema), quoted(&table)),
        _ => text.to_owned(),
    }
}

fn not_a_name(text: &str) -> String {
    format!(
        "not a valid table name: {text:?}; expected \"table\" or \"schema.table\", \
         each of 1 to {NAME_BYTES_MAX} bytes"
    )
}

/// Splits off the first part of a dotted name.
fn take_part(text: &str) -> Option<(String, &str)> {
    let Some(mut rest) = text.strip_prefix('"') else {
        let end = text.find('.').unwrap_or(text.len());
        let (part, tail) = text.split_at(end);
        return (!part.contains('"')).then(|| (part.to_owned(), tail));
    };
    let mut part = String::new();
    loop {
        let end = rest.find('"')?;
        part.push_str(&rest[..end]);
        rest = &rest[end + 1..];
        match rest.strip_prefix('"') {
            Some(tail) => {
                part.push('"');
                rest = tail;
            }
            None => return Some((part, rest)),
        }
    }
}

/// Quotes a name for SQL.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quotes a text for SQL. In this form a backslash is an escape, whatever the settings of the server are.
pub fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', r"\\").replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_literal_ends_where_its_text_ends() {
        for (text, sql) in [("cars", "E'cars'"), ("O'Hara", "E'O''Hara'"), (r"a\'b", r"E'a\\''b'")]
        {
            assert_eq!(literal(text), sql);
        }
    }

    #[test]
    fn names_are_read_and_quoted() {
        for (text, sql) in [
            ("cars", "\"cars\""),
            ("Mart.Cars", "\"Mart\".\"Cars\""),
            ("\"a.b\".c", "\"a.b\".\"c\""),
            ("\"say \"\"hi\"\"\"", "\"say \"\"hi\"\"\""),
            ("a; drop table b", "\"a; drop table b\""),
        ] {
            assert_eq!(TableName::parse(text).map(|name| name.quoted()), Ok(sql.into()), "{text}");
        }
        for text in ["", ".", "a.", ".a", "a.b.c", "a\"b", "\"a", "\"a\"b", &"x".repeat(64)] {
            assert!(TableName::parse(text).is_err(), "{text}");
        }
    }
}
