//! How rows lie in objects, as the configuration says it: their format, and the folders that a template names.

use serde::{Deserialize, Serialize};

/// The folder of the claim logs, below the URL of a sink of objects.
pub(crate) const LOG_FOLDER: &str = "_shardmill";

/// What objects hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectFormat {
    /// One row, one line.
    #[default]
    Ndjson,
    /// Payloads as they are, one behind the other.
    Raw,
    /// Apache Parquet, with the columns that the route declares.
    Parquet,
}

/// How objects are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, `.gz`.
    Gzip,
    /// Zstandard, `.zst`.
    Zstd,
}

/// How an objects sink lays rows out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectLayout {
    /// What objects hold.
    #[serde(default)]
    pub format: ObjectFormat,
    /// How they are compressed; in Parquet, each page.
    pub compression: Compression,
    /// The folder of each object under the sink's URL.
    #[serde(default)]
    pub folder: FolderTemplate,
}

/// Lines in folders by route, stream and shard.
impl From<Compression> for ObjectLayout {
    fn from(compression: Compression) -> Self {
        let format = ObjectFormat::default();
        Self { format, compression, folder: FolderTemplate::default() }
    }
}

/// A folder with fields, such as `{route}/dt={date}/country={row.country}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FolderTemplate {
    text: String,
    /// The parts of each level.
    pub levels: Vec<Vec<Part>>,
}

/// Part of a folder's name: text, or a value of the row that is put there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text, as it is written.
    Text(String),
    /// The pipeline's name.
    Pipeline,
    /// The sink's name.
    Sink,
    /// The stream's name.
    Stream,
    /// The shard's id.
    Shard,
    /// The route's name.
    Route,
    /// The day on which the record arrived, `YYYY-MM-DD` in UTC.
    Date,
    /// Its year, of four digits.
    Year,
    /// Its month, of two digits.
    Month,
    /// Its day of the month, of two digits.
    Day,
    /// Its hour, of two digits.
    Hour,
    /// A field of the row.
    Row(String),
}

/// The fields of a template, for error texts.
pub(crate) const FOLDER_FIELDS: &str = "{pipeline}, {sink}, {stream}, {shard}, {route}, {date}, {year}, \
     {month}, {day}, {hour} (of the record's arrival, UTC) and {row.FIELD}";

impl Default for FolderTemplate {
    fn default() -> Self {
        let levels = vec![vec![Part::Route], vec![Part::Stream], vec![Part::Shard]];
        Self { text: "{route}/{stream}/{shard}".into(), levels }
    }
}

impl TryFrom<String> for FolderTemplate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let levels: Vec<Vec<Part>> = text.split('/').map(level).collect::<Result<_, _>>()?;
        if levels.first().is_some_and(|first| *first == [Part::Text(LOG_FOLDER.into())]) {
            return Err(format!("the folder {LOG_FOLDER} is the claim log's own"));
        }
        Ok(Self { text, levels })
    }
}

impl From<FolderTemplate> for String {
    fn from(template: FolderTemplate) -> Self {
        template.text
    }
}

/// Reads one level of a template.
fn level(text: &str) -> Result<Vec<Part>, String> {
    if matches!(text, "" | "." | "..") {
        return Err(format!("a folder is named {text:?}"));
    }
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        let (field, after) = after.split_once('}').ok_or("a `{` is not closed")?;
        if !before.is_empty() {
            parts.push(Part::Text(before.into()));
        }
        parts.push(match field {
            "pipeline" => Part::Pipeline,
            "sink" => Part::Sink,
            "stream" => Part::Stream,
            "shard" => Part::Shard,
            "route" => Part::Route,
            "date" => Part::Date,
            "year" => Part::Year,
            "month" => Part::Month,
            "day" => Part::Day,
            "hour" => Part::Hour,
            _ => match field.strip_prefix("row.") {
                Some(name) if !name.is_empty() => Part::Row(name.into()),
                _ => return Err(format!("there is no field {{{field}}}")),
            },
        });
        rest = after;
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest.into()));
    }
    Ok(parts)
}

impl ObjectLayout {
    /// The file name's ending.
    pub fn extension(&self) -> &'static str {
        match (self.format, self.compression) {
            (ObjectFormat::Ndjson, Compression::None) => "ndjson",
            (ObjectFormat::Ndjson, Compression::Gzip) => "ndjson.gz",
            (ObjectFormat::Ndjson, Compression::Zstd) => "ndjson.zst",
            (ObjectFormat::Raw, Compression::None) => "bin",
            (ObjectFormat::Raw, Compression::Gzip) => "bin.gz",
            (ObjectFormat::Raw, Compression::Zstd) => "bin.zst",
            (ObjectFormat::Parquet, _) => "parquet",
        }
    }
}

impl FolderTemplate {
    /// Whether rows of one route and shard may lie in different folders.
    pub(crate) fn differs_by_row(&self) -> bool {
        let fixed = |part: &Part| {
            use Part::{Pipeline, Route, Shard, Sink, Stream, Text};
            matches!(part, Text(_) | Pipeline | Sink | Stream | Shard | Route)
        };
        !self.levels.iter().flatten().all(fixed)
    }

    /// Whether it tells routes apart.
    pub(crate) fn names_route(&self) -> bool {
        self.levels.iter().flatten().any(|part| *part == Part::Route)
    }

    /// Whether it names this field of rows.
    pub(crate) fn names_field(&self, field: &str) -> bool {
        let is_named = |part: &Part| matches!(part, Part::Row(name) if name == field);
        self.levels.iter().flatten().any(is_named)
    }
}
