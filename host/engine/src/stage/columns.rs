//! Columns that a stage needs in its input, checked against the columns that the routes before it carry.
//!
//! A plugin lists them in its descriptor's `extra`, under [`NEEDS`]: a JSON array of objects with `name`,
//! `data_type` and `nullable`. A route that declares no columns is not checked, because nothing is known about it.

use serde::Deserialize;

use shardmill_core::escape::escaped;
pub use shardmill_plugin::{Column, Descriptor, Route, check_column};

/// Name of the entry in `descriptor.extra`.
pub const NEEDS: &str = "needs-columns";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NeededColumn {
    name: String,
    data_type: String,
    #[serde(default)]
    nullable: bool,
}

/// Returns the columns that a plugin needs; none if it lists none.
///
/// # Errors
/// Description of the invalid entry.
pub fn needed(descriptor: &Descriptor) -> Result<Vec<Column>, String> {
    let Some((_, json)) = descriptor.extra.iter().find(|(name, _)| name == NEEDS) else {
        return Ok(Vec::new());
    };
    let columns: Vec<NeededColumn> = serde_json::from_str(json).map_err(|error| {
        let error = escaped(&error.to_string(), &[]);
        format!("`{NEEDS}` in its descriptor is not a valid list of columns: {error}")
    })?;
    let columns = columns.into_iter().map(|NeededColumn { name, data_type, nullable }| {
        let column = Column { name, data_type, nullable };
        // JSON escapes may stand for characters that a descriptor must not contain.
        check_column(&column).map(|()| column)
    });
    columns.collect()
}

/// Checks a route's columns against the needed ones.
///
/// # Errors
/// The first column that does not fit, then both sides.
pub fn check(needed: &[Column], route: &Route) -> Result<(), (String, String)> {
    if needed.is_empty() || route.columns.is_empty() {
        return Ok(());
    }
    let complaint = needed.iter().find_map(|need| {
        let carried = route.columns.iter().find(|column| column.name == need.name);
        match carried {
            None if need.nullable => None,
            None => Some(format!("expected column `{}`, found none", need.name)),
            Some(carried) if !includes(&need.data_type, &carried.data_type) => Some(format!(
                "expected column `{}` as {}, found {}",
                need.name, need.data_type, carried.data_type
            )),
            Some(carried) if carried.nullable && !need.nullable => {
                Some(format!("expected column `{}` not null, found it nullable", need.name))
            }
            Some(_) => None,
        }
    });
    match complaint {
        None => Ok(()),
        Some(complaint) => Err((
            complaint,
            format!("needed:  {}\ncarried: {}", shown(needed), shown(&route.columns)),
        )),
    }
}

fn shown(columns: &[Column]) -> String {
    let columns = columns.iter().map(|column| {
        let null = if column.nullable { "" } else { " not null" };
        format!("{} {}{null}", column.name, column.data_type)
    });
    columns.collect::<Vec<_>>().join(", ")
}

/// Whether every value of the carried type is one of the needed type.
fn includes(needed: &str, carried: &str) -> bool {
    let (needed, carried) = (canonical_type(needed), canonical_type(carried));
    let wider: &[&str] = match needed.as_str() {
        "integer" => &["smallint"],
        "bigint" => &["smallint", "integer"],
        "real" => &["smallint"],
        "double precision" => &["smallint", "integer", "real"],
        "numeric" => &["smallint", "integer", "bigint", "real", "double precision"],
        "text" => &["varchar", "char", "citext", "name", "uuid"],
        "varchar" => &["text", "char", "citext", "name"],
        "jsonb" => &["json"],
        "json" => &["jsonb"],
        _ => &[],
    };
    needed == carried || wider.contains(&carried.as_str())
}

/// Returns a type's name in one spelling, without length or precision.
///
/// Source: PostgreSQL 15, table 8.1, "Data Types".
fn canonical_type(data_type: &str) -> String {
    let lower = data_type.trim().to_ascii_lowercase();
    let (name, rest) = lower.split_once('(').unwrap_or((&lower, ""));
    let with_zone = rest.contains("with time zone") || name.contains("with time zone");
    match name.trim() {
        "int2" => "smallint".into(),
        "int" | "int4" => "integer".into(),
        "int8" => "bigint".into(),
        "float4" => "real".into(),
        "float8" | "float" => "double precision".into(),
        "decimal" => "numeric".into(),
        "bool" => "boolean".into(),
        "character varying" => "varchar".into(),
        "character" | "bpchar" => "char".into(),
        name if name.starts_with("timestamp") && (with_zone || name == "timestamptz") => {
            "timestamptz".into()
        }
        name if name.starts_with("timestamp") => "timestamp".into(),
        name => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, data_type: &str, nullable: bool) -> Column {
        Column { name: name.into(), data_type: data_type.into(), nullable }
    }

    fn route(columns: Vec<Column>) -> Route {
        Route { name: "out".into(), format: "application/json".into(), columns }
    }

    #[test]
    fn types_have_many_spellings() {
        for (needed, carried) in [
            ("bigint", "int4"),
            ("timestamptz", "timestamp(3) with time zone"),
            ("timestamp with time zone", "timestamptz"),
            ("numeric(10, 2)", "DECIMAL"),
            ("text", "character varying(20)"),
        ] {
            assert!(includes(needed, carried), "{needed} ⊇ {carried}");
        }
        for (needed, carried) in
            [("integer", "bigint"), ("timestamptz", "timestamp"), ("uuid", "text")]
        {
            assert!(!includes(needed, carried), "{needed} ⊉ {carried}");
        }
    }

    #[test]
    fn both_sides_are_shown() {
        let needed = [column("id", "bigint", false), column("note", "text", true)];
        assert!(check(&needed, &route(vec![])).is_ok());
        assert!(check(&needed, &route(vec![column("id", "int", false)])).is_ok());
        let (complaint, sides) =
            check(&needed, &route(vec![column("id", "text", true)])).unwrap_err();
        assert_eq!(complaint, "expected column `id` as bigint, found text");
        assert_eq!(sides, "needed:  id bigint not null, note text\ncarried: id text");
        let (complaint, _) =
            check(&needed, &route(vec![column("id", "bigint", true)])).unwrap_err();
        assert!(complaint.contains("found it nullable"));
        let (complaint, _) = check(&needed, &route(vec![column("x", "bigint", true)])).unwrap_err();
        assert!(complaint.contains("`id`, found none"));
    }
}
