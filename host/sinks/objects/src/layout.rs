//! Names of objects: the file name of a claim's object, and the folder of a row by its template.
//!
//! A claim keeps the layout that it was made with. So its rows can be produced again under the same keys after the
//! configuration has changed.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use chrono::{DateTime, Datelike as _, Timelike as _, Utc};
use object_store::path::{Path, PathPart};
use serde::Deserializer as _;
use serde::de::{MapAccess, Visitor};
use serde_json::value::RawValue;

use super::settings::{FolderTemplate, LOG_FOLDER, ObjectLayout, Part};
use shardmill_core::record::{RouteName, Row, ShardKey, SinkName};
use shardmill_sinks_common::rows::value;
pub use shardmill_sinks_common::rows::value::Json;

/// Folder text for a field that is missing or null, as in Hive and its readers.
const NO_VALUE: &str = "__HIVE_DEFAULT_PARTITION__";
/// Most bytes of a row's field in a key, before encoding; `keys` limits the whole key.
const FIELD_BYTES_MAX: usize = 200;
/// Hex digits of the owner's id in an object's name. With them, two logs that share a folder and a link number (of two
/// pipelines, or of a stream that was created again) never share a key.
pub(super) const OWNER_DIGITS: usize = 12;

/// Returns the name of an object in its folder.
pub(super) fn file_name(
    layout: &ObjectLayout,
    link: u64,
    owner: &str,
    route: &RouteName,
) -> PathPart<'static> {
    let owner: String = owner.chars().take(OWNER_DIGITS).collect();
    let ending = layout.extension();
    // If the folder does not have the route's name, two routes would have the same key.
    match layout.folder.names_route() {
        true => format!("{link:012}-{owner}.{ending}").into(),
        false => format!("{link:012}-{owner}-{route}.{ending}").into(),
    }
}

/// Returns the fields of a payload that the template uses.
fn fields_of<'p>(
    template: &FolderTemplate,
    payload: &'p [u8],
) -> Result<BTreeMap<Cow<'p, str>, &'p RawValue>, String> {
    let mut json = serde_json::Deserializer::from_slice(payload);
    json.deserialize_map(NamedFields(template))
        .and_then(|fields| json.end().map(|()| fields))
        .map_err(|error| {
            format!(
                "expected a JSON object, whose fields name the sink's folders, found another payload: {error}"
            )
        })
}

/// Returns the folder of a row, as a path below the sink's URL.
///
/// # Errors
/// The reason why the row has no folder, as a fragment for a dead letter.
pub(super) fn folder_of(
    template: &FolderTemplate,
    row: &Row,
    shard: &ShardKey,
    sink: &SinkName,
) -> Result<Path, String> {
    let arrived_ms = row.batch.records[row.record as usize].arrived_ms;
    let arrived = i64::try_from(arrived_ms).ok().and_then(DateTime::from_timestamp_millis);
    let at: DateTime<Utc> = arrived.unwrap_or_default();
    let mut fields: Option<BTreeMap<Cow<'_, str>, &RawValue>> = None;
    let mut folder = Path::default();
    for parts in &template.levels {
        let mut level = String::new();
        for part in parts {
            let _infallible = match part {
                Part::Text(text) => write!(level, "{text}"),
                Part::Pipeline => write!(level, "{}", shard.pipeline),
                Part::Sink => write!(level, "{sink}"),
                Part::Stream => write!(level, "{}", shard.stream.name),
                Part::Shard => write!(level, "{}", shard.shard),
                Part::Route => write!(level, "{}", row.route.name()),
                Part::Date => {
                    write!(level, "{:04}-{:02}-{:02}", at.year(), at.month(), at.day())
                }
                Part::Year => write!(level, "{:04}", at.year()),
                Part::Month => write!(level, "{:02}", at.month()),
                Part::Day => write!(level, "{:02}", at.day()),
                Part::Hour => write!(level, "{:02}", at.hour()),
                Part::Row(name) => {
                    let fields = match &mut fields {
                        Some(fields) => fields,
                        none => none.insert(fields_of(template, &row.payload)?),
                    };
                    write!(level, "{}", field(fields, name)?)
                }
            };
        }
        folder = folder.join(level);
    }
    match folder.parts().next() {
        Some(first) if first.as_ref() == LOG_FOLDER => {
            Err(format!("its folder would be {LOG_FOLDER}, which is reserved for the claim log"))
        }
        _ => Ok(folder),
    }
}

/// Visitor that keeps only the fields that a template uses: all fields could use many times the payload's bytes.
struct NamedFields<'t>(&'t FolderTemplate);

impl<'p> Visitor<'p> for NamedFields<'_> {
    type Value = BTreeMap<Cow<'p, str>, &'p RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'p>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = BTreeMap::new();
        while let Some((name, value)) = map.next_entry::<Cow<'p, str>, &'p RawValue>()? {
            if self.0.names_field(&name) {
                fields.insert(name, value);
            }
        }
        Ok(fields)
    }
}

/// Returns the text of a field for a folder's name.
fn field<'f>(
    fields: &BTreeMap<Cow<'_, str>, &'f RawValue>,
    name: &str,
) -> Result<Cow<'f, str>, String> {
    let Some(raw) = fields.get(name) else { return Ok(NO_VALUE.into()) };
    let misfit = |why: &str| format!("the field {name:?} cannot name a folder: {why}");
    let text = match Json::of((*raw).into()).map_err(|why| misfit(&why))? {
        Json::Null => return Ok(NO_VALUE.into()),
        json => value::text(&json).map_err(|why| misfit(&why))?.to_owned(),
    };
    match text.len() {
        0 => Ok(NO_VALUE.into()),
        bytes if bytes > FIELD_BYTES_MAX => {
            Err(misfit(&format!("it has {bytes} bytes, at most {FIELD_BYTES_MAX} are allowed")))
        }
        _ => Ok(text.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use shardmill_core::record::{
        Batch, Entry, Position, PositionRange, Record, SequenceNumber, StreamIdentity,
    };

    fn folder(template: &str, payload: &str) -> Result<String, String> {
        let sequence = SequenceNumber::parse("1").expect("a number");
        let position = Position { sequence, sub_sequence: 0 };
        let stream = StreamIdentity { name: "cars".into(), arn: "arn".into(), created_ms: 0 };
        let shard = ShardKey {
            pipeline: "mart".into(),
            stream: Arc::new(stream),
            shard: "shardId-000000000000".into(),
        };
        let record = Record {
            position: position.clone(),
            partition_key: "key".into(),
            payload: "".into(),
            arrived_ms: 1_388_534_399_999,
        };
        let range = PositionRange { from_exclusive: None, to_inclusive: position };
        let batch =
            Batch { shard: shard.clone(), records: vec![record], range, entry: Entry::Source };
        let row = Row {
            batch: Arc::new(batch),
            record: 0,
            ordinal: 0,
            route: "sold".into(),
            key: "key".into(),
            payload: payload.to_owned().into(),
        };
        let template = FolderTemplate::try_from(template.to_owned())?;
        folder_of(&template, &row, &shard, &"logs".into()).map(|path| path.to_string())
    }

    #[test]
    fn fields_stand_for_what_they_say() {
        let all = "{pipeline}/{sink}/{stream}/{shard}/{route}/{date}/{year}-{month}-{day}T{hour}";
        assert_eq!(
            folder(all, "").as_deref(),
            Ok("mart/logs/cars/shardId-000000000000/sold/2013-12-31/2013-12-31T23")
        );
        let by_row = "by/make={row.make}";
        assert_eq!(folder(by_row, r#"{"make":"Honda"}"#).as_deref(), Ok("by/make=Honda"));
        assert_eq!(folder(by_row, r#"{"make":7}"#).as_deref(), Ok("by/make=7"));
        let repeated = r#"{"make":7,"other":[1],"m\u0061ke":8}"#;
        assert_eq!(folder(by_row, repeated).as_deref(), Ok("by/make=8"));
        let none = "by/make=__HIVE_DEFAULT_PARTITION__";
        for payload in ["{}", r#"{"make":null}"#, r#"{"make":""}"#] {
            assert_eq!(folder(by_row, payload).as_deref(), Ok(none), "{payload}");
        }
    }

    #[test]
    fn a_row_leads_nowhere_else() {
        assert_eq!(folder("{row.a}", r#"{"a":"../../x"}"#).as_deref(), Ok("..%2F..%2Fx"));
        assert_eq!(folder("{row.a}/b", r#"{"a":".."}"#).as_deref(), Ok("%2E%2E/b"));
        let own = folder("{row.a}/b", r#"{"a":"_shardmill"}"#);
        assert!(own.is_err_and(|why| why.contains("claim log")));
        let long = format!(r#"{{"a":"{}"}}"#, "x".repeat(201));
        assert!(folder("{row.a}", &long).is_err_and(|why| why.contains("201 bytes")));
        assert!(folder("{row.a}", r#"{"a":[1]}"#).is_err_and(|why| why.contains("\"a\"")));
        assert!(folder("{row.a}", "[1]").is_err_and(|why| why.contains("expected a JSON object")));
    }

    #[test]
    fn a_template_that_names_no_folder_is_refused() {
        for (text, part) in [
            ("", "\"\""),
            ("a//b", "\"\""),
            ("a/../b", "\"..\""),
            ("{route", "without its"),
            ("{rout}", "unknown field {rout}"),
            ("{row.}", "unknown field {row.}"),
            ("_shardmill/x", "claim log"),
        ] {
            let error = FolderTemplate::try_from(text.to_owned()).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
