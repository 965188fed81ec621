//! Settings of an objects sink: `[[sink]]` with `type = "objects"`.

mod layout;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;
use url::Url;

use self::layout::FOLDER_FIELDS;
pub(crate) use self::layout::LOG_FOLDER;
pub(crate) use self::layout::Part;
pub use self::layout::{Compression, FolderTemplate, ObjectFormat, ObjectLayout};
use crate::ObjectsSink;
use shardmill_config::reading::{
    Check, Maybe, RawCommit, Spanned, Text, options, suggest, without_user,
};
use shardmill_config::{
    CommitPolicy, Key, KeyDefault, KeyForm, ReadSink, SharedParts, SinkBuildError, SinkContext,
    SinkSettings, SinkTable, SinkType,
};
use shardmill_core::record::SinkName;
use shardmill_core::sink::{Sink, SinkError};

/// Sink type of objects.
pub const TYPE: &dyn SinkType = &ObjectsType;

/// Schemes of `url` whose stores have conditional creation, which the claim log needs.
const SCHEMES: [&str; 9] = ["file", "s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss"];

/// Options of `object_store` that name another server.
const ENDPOINTS: [&str; 9] = [
    "aws_endpoint_url_s3",
    "aws_endpoint_url",
    "aws_endpoint",
    "azure_storage_endpoint",
    "azure_endpoint",
    "endpoint_url",
    "endpoint",
    "google_base_url",
    "base_url",
];

struct ObjectsType;

/// Objects in a bucket or a folder.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectsTarget {
    /// `file:///…`, `s3://bucket/prefix`, `gs://…`, `az://…`.
    pub url: Url,
    /// Options for `object_store`, for example `aws_endpoint`.
    pub options: BTreeMap<String, String>,
    /// Format, compression and folders.
    pub layout: ObjectLayout,
}

/// `[[sink]]` with `type = "objects"`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawObjects {
    name: Spanned<Text>,
    #[serde(rename = "type")]
    _kind: IgnoredAny,
    url: Spanned<Text>,
    format: Maybe<Text>,
    compression: Maybe<Text>,
    folder: Maybe<Text>,
    options: Option<BTreeMap<String, Text>>,
    commit: Option<RawCommit>,
}

impl SinkType for ObjectsType {
    fn name(&self) -> &'static str {
        "objects"
    }

    fn about(&self) -> &'static str {
        "Objects in a bucket or a folder, exactly once by a claim log. An object appears whole or not at all."
    }

    fn keys(&self) -> &'static [Key] {
        &[
            Key {
                name: "url",
                form: KeyForm::Text,
                default: KeyDefault::Required("\"data/logs\""),
                about: "A folder, or a URL: `file:///…`, `s3://bucket/prefix`, `gs://…`, `az://…`.",
            },
            Key {
                name: "format",
                form: KeyForm::Text,
                default: KeyDefault::Value("\"ndjson\""),
                about: "Format of objects: `ndjson`, one row per line; `raw`, payloads as they are; `parquet`, which \
                        needs JSON and the columns that the plugin declares.",
            },
            Key {
                name: "compression",
                form: KeyForm::Text,
                default: KeyDefault::Value("\"gzip\""),
                about: "`gzip`, `zstd` or `none`; Parquet compresses each page, by default with `zstd`.",
            },
            Key {
                name: "folder",
                form: KeyForm::Text,
                default: KeyDefault::Value("\"{route}/{stream}/{shard}\""),
                about: "The folder of each object, of `{pipeline}`, `{sink}`, `{stream}`, `{shard}`, `{route}`, \
                        `{date}`, `{year}`, `{month}`, `{day}`, `{hour}` and `{row.FIELD}`.",
            },
            Key {
                name: "options",
                form: KeyForm::Table,
                default: KeyDefault::None,
                about: "Options of the object store, as `object_store` names them.",
            },
        ]
    }

    fn commit_policy(&self) -> CommitPolicy {
        // Few large objects. Rows are bounded because each uses memory in addition to its bytes.
        CommitPolicy::patient(100_000, 64 << 20, Duration::from_secs(300))
    }

    fn read(&self, table: SinkTable<'_>, check: &mut Check) -> Option<ReadSink> {
        let base = table.base();
        let raw: RawObjects = table.shaped(check)?;
        let settings = target(&raw, base, check);
        Some(ReadSink::new(raw.name, raw.commit, settings))
    }
}

fn target(raw: &RawObjects, base: &Path, check: &mut Check) -> Option<ObjectsTarget> {
    let url = object_url(&raw.url, base, check);
    let format = check.choice(
        &raw.format,
        "format",
        ObjectFormat::Ndjson,
        &[
            ("ndjson", ObjectFormat::Ndjson),
            ("raw", ObjectFormat::Raw),
            ("parquet", ObjectFormat::Parquet),
        ],
    );
    let compression = check.choice(
        &raw.compression,
        "compression",
        if format == Some(ObjectFormat::Parquet) { Compression::Zstd } else { Compression::Gzip },
        &[("gzip", Compression::Gzip), ("zstd", Compression::Zstd), ("none", Compression::None)],
    );
    let folder = match &raw.folder {
        None => Some(FolderTemplate::default()),
        Some(text) => match FolderTemplate::try_from(text.get_ref().0.clone()) {
            Ok(folder) => Some(folder),
            Err(cause) => {
                let help = format!("fields are {FOLDER_FIELDS}");
                check.problem(text.span(), cause, help);
                None
            }
        },
    };
    let options = options(raw.options.as_ref());
    let layout = ObjectLayout { format: format?, compression: compression?, folder: folder? };
    Some(ObjectsTarget { url: url?, options, layout })
}

/// Reads a URL, or makes one of a folder's path.
fn object_url(raw: &Spanned<Text>, base: &Path, check: &mut Check) -> Option<Url> {
    let text = check.filled(raw, "folder or URL")?;
    if !text.contains("://") {
        let folder = std::path::absolute(base.join(&text)).ok();
        let url = folder.and_then(|folder| Url::from_directory_path(folder).ok());
        if url.is_none() {
            check.problem(raw.span(), "this folder has no absolute path", "name another folder");
        }
        return url;
    }
    match Url::parse(&text) {
        Ok(url) if url.scheme() == "file" && url.host().is_some() => {
            let help = "write file:///absolute/folder, or a plain path relative to this file";
            check.problem(raw.span(), "a file:// URL with two slashes names a host", help);
            None
        }
        Ok(url) if SCHEMES.contains(&url.scheme()) => Some(url),
        Ok(url) => {
            let message = format!("unsupported object store `{}://`", url.scheme());
            check.problem(raw.span(), message, suggest(url.scheme(), "allowed", &SCHEMES));
            None
        }
        Err(cause) => {
            let help = "write for example \"s3://bucket/logs\" or a folder's path";
            check.problem(raw.span(), format!("invalid URL: {cause}"), help);
            None
        }
    }
}

impl ObjectsTarget {
    /// Makes the sink with this name. Connects to nothing yet.
    ///
    /// # Errors
    /// For a URL or an option that no store knows.
    pub fn sink(&self, name: SinkName) -> Result<ObjectsSink, SinkError> {
        ObjectsSink::new(name, &self.url, &self.options, self.layout.clone())
    }
}

impl SinkSettings for ObjectsTarget {
    fn destination(&self) -> Option<String> {
        let mut server = self
            .options
            .iter()
            .filter(|(key, _)| ENDPOINTS.contains(&key.to_ascii_lowercase().as_str()))
            .map(|(_, value)| format!(" at {}", without_user(value)));
        let server = server.next().unwrap_or_default();
        let mut url = self.url.clone();
        // A URL that cannot have a user or a password returns an error, and has none.
        let _ = url.set_password(None);
        let _ = url.set_username("");
        url.set_query(None);
        Some(format!("objects {}{server}", url.as_str().trim_end_matches('/')))
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn promises_rows(&self) -> bool {
        true
    }

    fn encodes_early(&self) -> bool {
        true
    }

    fn build(
        &self,
        context: &SinkContext<'_>,
        _shared: &mut SharedParts,
    ) -> Result<Arc<dyn Sink>, SinkBuildError> {
        Ok(Arc::new(self.sink(context.name.clone())?))
    }
}
