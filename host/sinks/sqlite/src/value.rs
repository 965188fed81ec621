//! Converts JSON values to SQLite values, by the column's declared type.
//!
//! Invariant: SQLite stores a value as it is bound, or the row is refused. SQLite has five storage classes and converts
//! between them by a column's affinity, which may round. A value that a conversion would change is refused here: a
//! decimal that a double cannot represent does not fit a `numeric` column (declare `text` for those).
//!
//! Dates and times are checked and stored as text, as they were written; documents likewise. UUIDs are stored in one
//! form, so that equal ones compare equal.

use std::borrow::Cow;

use rusqlite::types::{ToSqlOutput, Value, ValueRef};

use shardmill_sinks_common::rows::decimal::Decimal;
use shardmill_sinks_common::rows::time;
pub use shardmill_sinks_common::rows::time::Zone;
use shardmill_sinks_common::rows::value;
pub use shardmill_sinks_common::rows::value::{Json, RawJson, Why};

/// Kind of a column's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    Integer,
    Real,
    /// A number that SQLite stores exactly: an integer, or a double with the same shortest digits.
    Numeric,
    Text,
    /// A document in a column whose affinity turns a bare number into a double.
    Json,
    /// A document in a column that keeps all text, since its type's name contains `text`.
    JsonText,
    Uuid,
    Date,
    Time,
    Timestamp,
    Timestamptz,
    Blob,
    /// No declared type, or an unknown one: the value's own storage class.
    Any,
}

/// Storage class that SQLite converts a column's values to, where it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Affinity {
    Integer,
    Real,
    Numeric,
    Text,
    /// No conversion. SQLite calls it BLOB.
    None,
}

/// Kind and affinity of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ColumnType {
    pub(super) kind: Kind,
    pub(super) affinity: Affinity,
}

impl ColumnType {
    /// Returns the type of a live column. In a STRICT table `ANY` converts nothing; elsewhere the same word has the
    /// affinity NUMERIC.
    pub(super) fn of(declared: &str, is_strict: bool) -> Self {
        let keeps_all = is_strict && declared.trim().eq_ignore_ascii_case("any");
        let affinity = if keeps_all { Affinity::None } else { Affinity::of(declared) };
        Self { kind: Kind::of(declared), affinity }
    }

    /// Returns whether the column accepts texts, except those that look like a number: SQLite would store the number
    /// instead.
    pub(super) fn takes_some_texts_only(self) -> bool {
        self.kind == Kind::Any && self.affinity.converts_text()
    }
}

impl Affinity {
    /// Returns the affinity of a declared type. The whole type counts, with its parentheses, and so does the order of
    /// the rules: `FLOATING POINT` has the affinity INTEGER, because of the `INT` in it.
    ///
    /// Source: sqlite.org/datatype3.html, 3.1, "Determination Of Column Affinity".
    pub(super) fn of(declared: &str) -> Self {
        let upper = declared.to_ascii_uppercase();
        let has = |part: &str| upper.contains(part);
        if has("INT") {
            Self::Integer
        } else if has("CHAR") || has("CLOB") || has("TEXT") {
            Self::Text
        } else if has("BLOB") || upper.trim().is_empty() {
            Self::None
        } else if has("REAL") || has("FLOA") || has("DOUB") {
            Self::Real
        } else {
            Self::Numeric
        }
    }

    fn converts_text(self) -> bool {
        matches!(self, Self::Integer | Self::Real | Self::Numeric)
    }

    /// Checks that SQLite stores a value as it is bound.
    fn check(self, bound: &ToSqlOutput<'_>) -> Result<(), Why> {
        let (text, integer) = match bound {
            ToSqlOutput::Borrowed(ValueRef::Text(text)) => (Some(*text), None),
            ToSqlOutput::Owned(Value::Text(text)) => (Some(text.as_bytes()), None),
            ToSqlOutput::Owned(Value::Integer(integer)) => (None, Some(*integer)),
            _ => (None, None),
        };
        if self.converts_text() && text.is_some_and(looks_like_a_number) {
            return Err(
                "SQLite would store this text as a number in a column of this type; a column \
                        of type TEXT keeps it"
                    .into(),
            );
        }
        if self == Self::Real && integer.is_some_and(|integer| !is_exact_as_double(integer)) {
            return Err(ROUNDED.into());
        }
        Ok(())
    }
}

/// Reason why an integer does not fit a column of doubles.
const ROUNDED: &str =
    "SQLite would round this integer to a double; a column of type INTEGER or TEXT keeps it";

fn is_exact_as_double(integer: i64) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "the loss is what is looked for")]
    let double = integer as f64;
    Decimal::parse(&format!("{double:.0}"))
        .and_then(|exact| exact.to_i64())
        .is_some_and(|exact| exact == integer)
}

/// Returns whether SQLite's affinities turn a text into a number: `sqlite3AtoF` accepts all of it, with white space
/// around it.
fn looks_like_a_number(text: &[u8]) -> bool {
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | 0x0b | 0x0c | b'\r');
    let begin = text.iter().position(|byte| !is_space(byte)).unwrap_or(text.len());
    let end = text.iter().rposition(|byte| !is_space(byte)).map_or(begin, |last| last + 1);
    let digits = |text: &[u8]| text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let signed = |text: &[u8]| usize::from(matches!(text.first(), Some(b'+' | b'-')));
    let mut rest = &text[begin..end];
    rest = &rest[signed(rest)..];
    let whole = digits(rest);
    rest = &rest[whole..];
    let mut fraction = 0;
    if let [b'.', after @ ..] = rest {
        fraction = digits(after);
        rest = &after[fraction..];
    }
    if whole + fraction == 0 {
        return false;
    }
    match rest {
        [] => true,
        [b'e' | b'E', exponent @ ..] => {
            let exponent = &exponent[signed(exponent)..];
            !exponent.is_empty() && digits(exponent) == exponent.len()
        }
        _ => false,
    }
}

impl Kind {
    /// Returns the kind of a declared type: by its name, otherwise by SQLite's rules of affinity.
    pub(super) fn of(declared: &str) -> Self {
        let lower = declared.to_ascii_lowercase();
        let base = lower.split('(').next().unwrap_or_default().trim();
        match base {
            "bool" | "boolean" => Self::Bool,
            "json" | "jsonb" => Self::Json,
            "json_text" => Self::JsonText,
            "uuid" => Self::Uuid,
            "date" => Self::Date,
            "time" | "time without time zone" => Self::Time,
            "timestamp" | "datetime" | "timestamp without time zone" => Self::Timestamp,
            "timestamptz" | "timestamp with time zone" => Self::Timestamptz,
            "bytea" | "blob" => Self::Blob,
            "numeric" | "decimal" => Self::Numeric,
            "" | "any" => Self::Any,
            _ => Self::by_words(base, Affinity::of(declared)),
        }
    }

    /// Returns the kind of a type by the words of its name. A type whose affinity comes from a part of a word (`POINT`,
    /// `INTERVAL`) says nothing about its values.
    fn by_words(base: &str, affinity: Affinity) -> Self {
        const INTEGERS: [&str; 12] = [
            "int",
            "integer",
            "tinyint",
            "smallint",
            "mediumint",
            "bigint",
            "int2",
            "int4",
            "int8",
            "big",
            "unsigned",
            "signed",
        ];
        const REALS: [&str; 7] =
            ["real", "float", "float4", "float8", "double", "precision", "unsigned"];
        let all = |known: &[&str]| base.split_ascii_whitespace().all(|word| known.contains(&word));
        match affinity {
            Affinity::Integer if all(&INTEGERS) => Self::Integer,
            Affinity::Real if all(&REALS) => Self::Real,
            Affinity::Text => Self::Text,
            Affinity::None => Self::Blob,
            Affinity::Integer | Affinity::Real | Affinity::Numeric => Self::Any,
        }
    }

    /// Returns the type to create a column with: a name whose affinity keeps the values as they are.
    pub(super) fn created_as(self, declared: &str) -> &str {
        match self {
            Self::Json => "JSON_TEXT",
            Self::Blob => "BLOB",
            // Without a type nothing is converted. An unknown type would have the affinity NUMERIC, and turn texts into
            // numbers.
            Self::Any => "",
            _ => declared,
        }
    }

    /// Returns whether a column of this kind can store every value of the declared kind.
    pub(super) fn accepts(self, declared: Self) -> bool {
        match self {
            Self::Any => true,
            Self::Text => !matches!(declared, Self::Blob | Self::Json | Self::JsonText),
            Self::Json | Self::JsonText => matches!(declared, Self::Json | Self::JsonText),
            Self::Numeric => matches!(declared, Self::Integer | Self::Real | Self::Numeric),
            Self::Real => matches!(declared, Self::Integer | Self::Real),
            Self::Timestamptz => matches!(declared, Self::Timestamp | Self::Timestamptz),
            _ => declared == self,
        }
    }
}

/// Reads a JSON value for a column, as SQLite will store it.
pub(super) fn bound<'r>(column: ColumnType, raw: RawJson<'r>) -> Result<ToSqlOutput<'r>, Why> {
    let bound = read(column.kind, raw)?;
    column.affinity.check(&bound)?;
    Ok(bound)
}

/// Reads a JSON value by a column's kind.
fn read(kind: Kind, raw: RawJson<'_>) -> Result<ToSqlOutput<'_>, Why> {
    let json = Json::of(raw)?;
    if json == Json::Null {
        return Ok(ToSqlOutput::Owned(Value::Null));
    }
    let value = match kind {
        Kind::Bool => Value::Integer(value::boolean(&json)?.into()),
        Kind::Integer => Value::Integer(value::integer(&json)?),
        Kind::Real => Value::Real(double(&json)?),
        Kind::Numeric => number(&value::decimal(&json)?, json.number()?)?,
        Kind::Blob => Value::Blob(value::bytes(&json)?),
        Kind::Uuid => Value::Text(value::uuid(&json)?.to_string()),
        Kind::Json => match json {
            Json::Number(text) => number(&value::decimal(&json)?, text)?,
            _ => return borrowed(value::document(raw)?),
        },
        Kind::JsonText => return borrowed(value::document(raw)?),
        Kind::Any => match json {
            Json::Bool(value) => Value::Integer(value.into()),
            Json::Number(text) => number(&value::decimal(&json)?, text)?,
            Json::Nested(_) => return borrowed(value::document(raw)?),
            Json::Null | Json::Text(_) => return text(json),
        },
        Kind::Text => return text(json),
        Kind::Date | Kind::Time | Kind::Timestamp | Kind::Timestamptz => {
            check_time(kind, value::time_text(&json)?)?;
            return text(json);
        }
    };
    Ok(ToSqlOutput::Owned(value))
}

fn borrowed(text: &str) -> Result<ToSqlOutput<'_>, Why> {
    Ok(ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())))
}

/// Returns a text that SQLite can store, borrowed where possible.
fn text(json: Json<'_>) -> Result<ToSqlOutput<'_>, Why> {
    value::text(&json)?;
    match json {
        Json::Text(Cow::Borrowed(text)) | Json::Number(text) => borrowed(text),
        Json::Text(Cow::Owned(text)) => Ok(ToSqlOutput::Owned(Value::Text(text))),
        Json::Bool(value) => borrowed(if value { "true" } else { "false" }),
        Json::Null | Json::Nested(_) => Err("expected a string".into()),
    }
}

fn check_time(kind: Kind, text: &str) -> Result<(), Why> {
    match kind {
        Kind::Date => time::date(text).map(drop),
        Kind::Time => time::time(text).map(drop),
        Kind::Timestamp => time::timestamp(text, Zone::WallClock).map(drop),
        _ => time::timestamp(text, Zone::Instant).map(drop),
    }
}

/// Refuses NaN, which SQLite would store as NULL.
fn not_nan(value: f64) -> Result<f64, Why> {
    if value.is_nan() { Err("SQLite cannot store NaN".into()) } else { Ok(value) }
}

/// Reads a double. Fractions are rounded, as usual for doubles; an integer is not.
fn double(json: &Json<'_>) -> Result<f64, Why> {
    let double = not_nan(value::float64(json)?)?;
    if !double.is_finite() {
        return Ok(double);
    }
    let written = value::decimal(json)?;
    if !written.is_integer() {
        return Ok(double);
    }
    // The integer must equal the shortest digits of the double, or all of its digits: 1e300 is accepted, and so is
    // 2^70.
    let shown = [format!("{double:e}"), format!("{double:.0}")];
    let is_same =
        |shown: &String| Decimal::parse(shown).is_some_and(|shown| shown.is_same_number(&written));
    if shown.iter().any(is_same) { Ok(double) } else { Err(ROUNDED.into()) }
}

/// Reads a number that SQLite stores with all its digits.
fn number(decimal: &Decimal<'_>, written: &str) -> Result<Value, Why> {
    if let Some(integer) = decimal.to_i64() {
        return Ok(Value::Integer(integer));
    }
    let double: Option<f64> = written.parse().ok().filter(|d: &f64| d.is_finite());
    let shown = double.map(|double| format!("{double:e}"));
    match (double, shown.as_deref().and_then(Decimal::parse)) {
        (Some(double), Some(shown)) if shown.is_same_number(decimal) => Ok(Value::Real(double)),
        _ => Err("SQLite's numbers would round it; a column of type text keeps it".into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::*;

    fn read(kind: Kind, json: &str) -> Result<Value, Why> {
        bound_in(ColumnType { kind, affinity: Affinity::None }, json)
    }

    fn bound_in(column: ColumnType, json: &str) -> Result<Value, Why> {
        let raw: Box<RawValue> = serde_json::from_str(json).expect("JSON");
        bound(column, (&*raw).into()).map(|bound| match bound {
            ToSqlOutput::Owned(value) => value,
            ToSqlOutput::Borrowed(value) => value.try_into().expect("a value"),
            other => panic!("{other:?}"),
        })
    }

    const DECLARED: [&str; 24] = [
        "STRING",
        "ENUM(2)",
        "NAME",
        "MONEY",
        "ANY",
        "POINT",
        "INTERVAL",
        "FLOATING POINT",
        "REALTY",
        "",
        "TEXT",
        "VARCHAR(9)",
        "NATIVE CHARACTER",
        "CLOB",
        "BLOB",
        "geometry",
        "inet",
        "xml",
        "INTEGER",
        "BIGINT",
        "REAL",
        "DOUBLE PRECISION",
        "NUMERIC(10, 2)",
        "TINYBLOB(1)",
    ];

    /// Checks with SQLite itself that a bound value is read back as it was written.
    #[test]
    fn fault_29_what_is_bound_is_kept_by_sqlite_as_it_is() {
        let database = rusqlite::Connection::open_in_memory().expect("a database");
        let mut random = fastrand::Rng::with_seed(29);
        let mut values: Vec<String> = [
            "01234",
            "15E2621",
            "1e5",
            " 12 ",
            "12\t",
            "+7",
            ".5",
            "5.",
            ".",
            "",
            "-",
            "1e",
            "1e+",
            "0x10",
            "1_000",
            "Inf",
            "NaN",
            "abc",
            "1 2",
            "9007199254740993",
            "1.50",
            "\u{b}3",
        ]
        .iter()
        .map(|text| serde_json::to_string(text).expect("JSON"))
        .collect();
        values.extend(
            ["12", "9007199254740993", "9007199254740992", "0.1", "1e300", "true"].map(Into::into),
        );
        for _ in 0..2_000 {
            let length = random.usize(0..7);
            let text: String = (0..length)
                .map(|_| char::from(*random.choice(b"01259+-.eE \tx_").expect("one")))
                .collect();
            values.push(serde_json::to_string(&text).expect("JSON"));
        }
        let mut refused = 0;
        for (place, declared) in DECLARED.into_iter().enumerate() {
            for is_strict in [false, true] {
                let allowed = ["INTEGER", "REAL", "TEXT", "BLOB", "ANY"];
                if is_strict && !allowed.contains(&declared) {
                    continue;
                }
                let (table, strict) =
                    (format!("t{place}{is_strict}"), if is_strict { "STRICT" } else { "" });
                let create = format!("CREATE TABLE {table} (v {declared}) {strict}");
                database.execute(&create, ()).expect(&create);
                let column = ColumnType::of(declared, is_strict);
                for json in &values {
                    let Ok(value) = bound_in(column, json) else {
                        refused += 1;
                        continue;
                    };
                    let sql = format!("INSERT INTO {table} VALUES (?1) RETURNING v");
                    let kept: Value =
                        database.query_row(&sql, [&value], |row| row.get(0)).expect(json);
                    let same = match (&value, &kept) {
                        // Integral doubles and integers are the same number in all of SQLite.
                        #[expect(clippy::cast_precision_loss, reason = "compared exactly")]
                        (Value::Real(one), Value::Integer(other)) => *one == *other as f64,
                        #[expect(clippy::cast_possible_truncation, reason = "compared exactly")]
                        (Value::Integer(one), Value::Real(other)) => *one == *other as i64,
                        _ => value == kept,
                    };
                    assert!(same, "{declared} {strict}: {json}: {value:?} became {kept:?}");
                }
            }
        }
        assert!(refused > 0);
    }

    /// Checks that no text is refused that SQLite would store as it is.
    #[test]
    fn fault_29_texts_that_are_no_numbers_are_taken() {
        for declared in ["STRING", "NAME", "POINT", "ANY", "REALTY"] {
            let column = ColumnType::of(declared, false);
            for text in ["", "abc", "0x10", "1e", "1 2", "Inf", "-", ".", "1_000", "12 Main St"] {
                let json = serde_json::to_string(text).expect("JSON");
                assert_eq!(bound_in(column, &json), Ok(Value::Text(text.into())), "{declared}");
            }
            assert!(bound_in(column, "\"01234\"").is_err(), "{declared}");
            assert!(column.takes_some_texts_only());
        }
        assert_eq!(
            bound_in(ColumnType::of("ANY", true), "\"01234\""),
            Ok(Value::Text("01234".into()))
        );
    }

    #[test]
    fn fault_29_an_integer_that_a_double_would_round_is_refused() {
        assert!(read(Kind::Real, "9007199254740993").is_err());
        assert!(read(Kind::Real, "\"9007199254740993\"").is_err());
        assert!(read(Kind::Real, "100000000000000000000000000000000000000000001.0").is_err());
        assert_eq!(read(Kind::Real, "9007199254740992"), Ok(Value::Real(9_007_199_254_740_992.0)));
        assert_eq!(read(Kind::Real, "1180591620717411303424"), Ok(Value::Real(2f64.powi(70))));
        assert_eq!(read(Kind::Real, "1e300"), Ok(Value::Real(1e300)));
        assert_eq!(read(Kind::Real, "0.1"), Ok(Value::Real(0.1)));
        assert_eq!(read(Kind::Real, "\"Infinity\""), Ok(Value::Real(f64::INFINITY)));
    }

    #[test]
    fn numbers_keep_their_digits_or_are_refused() {
        assert_eq!(read(Kind::Numeric, "12.50"), Ok(Value::Real(12.5)));
        assert_eq!(read(Kind::Numeric, "\"0.1\""), Ok(Value::Real(0.1)));
        assert_eq!(read(Kind::Numeric, r#""\u0030.1""#), Ok(Value::Real(0.1)));
        assert_eq!(read(Kind::Numeric, "1e3"), Ok(Value::Integer(1000)));
        assert_eq!(read(Kind::Any, "9223372036854775807"), Ok(Value::Integer(i64::MAX)));
        for json in ["9223372036854775809", "0.12345678901234567890", "1e400", "1e-400"] {
            assert!(read(Kind::Numeric, json).is_err(), "{json}");
        }
    }

    #[test]
    fn types_are_read_by_name_then_by_affinity() {
        for (declared, kind) in [
            ("BIGINT", Kind::Integer),
            ("varchar(20)", Kind::Text),
            ("double precision", Kind::Real),
            ("numeric(10, 2)", Kind::Numeric),
            ("timestamptz", Kind::Timestamptz),
            ("", Kind::Any),
            ("geometry", Kind::Any),
        ] {
            assert_eq!(Kind::of(declared), kind, "{declared}");
        }
    }

    #[test]
    fn texts_are_checked_and_kept_as_written() {
        let written = "2013-01-01T05:00:00.123456-05:00";
        let kept = read(Kind::Timestamptz, &format!("{written:?}"));
        assert_eq!(kept, Ok(Value::Text(written.into())));
        assert!(read(Kind::Date, "\"2013-02-30\"").is_err());
        assert!(read(Kind::Text, r#""a\u0000b""#).is_err());
        assert_eq!(read(Kind::Json, "{\"a\": 1.10}"), Ok(Value::Text("{\"a\": 1.10}".into())));
    }
}
