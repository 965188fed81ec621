//! Configured layout of objects: format, compression, and the template of folders.

use serde::{Deserialize, Serialize};

/// Folder of the claim logs, below the URL of a sink of objects.
pub(crate) const LOG_FOLDER: &str = "_shardmill";

/// Format of objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectFormat {
    /// One row, one line.
    #[default]
    Ndjson,
    /// Payloads as they are, one after the other.
    Raw,
    /// Apache Parquet, with the columns that the route declares.
    Parquet,
}

/// Compression of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// No compression.
    None,
    /// gzip, `.gz`.
    Gzip,
    /// Zstandard, `.zst`.
    Zstd,
}

/// Layout of objects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectLayout {
    /// Format.
    #[serde(default)]
    pub format: ObjectFormat,
    /// Compression; in Parquet, of each page.
    pub compression: Compression,
    /// Folder of each object below the sink's URL.
    #[serde(default)]
    pub folder: FolderTemplate,
}

/// Makes the layout of lines in folders by route, stream and shard.
impl From<Compression> for ObjectLayout {
    fn from(compression: Compression) -> Self {
        let format = ObjectFormat::default();
        Self { format, compression, folder: FolderTemplate::default() }
    }
}

/// Template of a folder, such as `{route}/dt={date}/country={row.country}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FolderTemplate {
    text: String,
    /// Parts of each level.
    pub levels: Vec<Vec<Part>>,
}

/// Part of a folder's name: text, or a value of the row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text, as it is written.
    Text(String),
    /// Name of the pipeline.
    Pipeline,
    /// Name of the sink.
    Sink,
    /// Name of the stream.
    Stream,
    /// Id of the shard.
    Shard,
    /// Name of the route.
    Route,
    /// Day on which the record arrived, `YYYY-MM-DD` in UTC.
    Date,
    /// Year of that day, four digits.
    Year,
    /// Month of that day, two digits.
    Month,
    /// Day of the month, two digits.
    Day,
    /// Hour at which the record arrived, two digits.
    Hour,
    /// Field of the row.
    Row(String),
}

/// Fields of a template, for error texts.
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
            return Err(format!("the folder {LOG_FOLDER} is reserved for the claim log"));
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
        return Err(format!("invalid folder name {text:?}"));
    }
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        let (field, after) = after.split_once('}').ok_or("a `{` without its `}`")?;
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
                _ => return Err(format!("unknown field {{{field}}}")),
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
    /// Returns the file name's extension.
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
    /// Returns whether rows of one route and shard may have different folders.
    pub(crate) fn differs_by_row(&self) -> bool {
        let fixed = |part: &Part| {
            use Part::{Pipeline, Route, Shard, Sink, Stream, Text};
            matches!(part, Text(_) | Pipeline | Sink | Stream | Shard | Route)
        };
        !self.levels.iter().flatten().all(fixed)
    }

    /// Returns whether routes have different folders.
    pub(crate) fn names_route(&self) -> bool {
        self.levels.iter().flatten().any(|part| *part == Part::Route)
    }

    /// Returns whether it uses this field of rows.
    pub(crate) fn names_field(&self, field: &str) -> bool {
        let is_named = |part: &Part| matches!(part, Part::Row(name) if name == field);
        self.levels.iter().flatten().any(is_named)
    }
}
