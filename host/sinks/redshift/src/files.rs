//! The files of a load on S3, their manifest, and the COPY that reads them.
//!
//! Each load has its own keys. Its files are removed after COPY has read them. Files that a crash leaves are never
//! read; a lifecycle rule on the prefix should remove them.

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::ObjectStoreExt as _;
use object_store::path::Path;
use serde::Serialize;
use uuid::Uuid;

use super::encode::EncodedFile;
use super::merge::STAGING;
use super::session::literal;
use super::settings::{CopySource, bucket_of};
use shardmill_core::escape::quoted;
use shardmill_core::masking::sanitized;
use shardmill_core::record::ShardKey;
use shardmill_core::sink::SinkError;
use shardmill_sink_objects::StorePlace;

/// Files that are uploaded at the same time.
const UPLOADS_MAX: usize = 4;

/// Number of errors at which a COPY fails (MAXERROR). With fewer it skips the rows and reports them.
const ERRORS_MAX: usize = 1_000;

/// Role that means the default role of the cluster.
const DEFAULT_ROLE: &str = "default";

/// Where the files wait for COPY, and how the cluster reads them.
pub(super) struct StagingBucket {
    place: StorePlace,
    /// `s3://bucket`.
    bucket_url: String,
    iam_role: String,
    region: Option<String>,
}

/// Uploaded files of a load.
pub(super) struct Upload {
    /// Paths of the files and the manifest.
    paths: Vec<Path>,
    /// Statement that loads them.
    pub(super) copy: String,
    /// Part of their paths that is unique to this load.
    pub(super) load: String,
}

/// Source: guide, "Using a manifest to specify data files".
#[derive(Serialize)]
struct Manifest {
    entries: Vec<ManifestEntry>,
}

#[derive(Serialize)]
struct ManifestEntry {
    url: String,
    mandatory: bool,
}

impl StagingBucket {
    pub(super) fn new(place: StorePlace, source: &CopySource) -> Self {
        let bucket = bucket_of(&source.url).unwrap_or_default();
        Self {
            place,
            bucket_url: format!("s3://{bucket}"),
            iam_role: source.iam_role.clone(),
            region: source.region.clone(),
        }
    }

    /// Uploads files and their manifest under unique keys.
    pub(super) async fn upload(
        &self,
        shard: &ShardKey,
        files: &[EncodedFile],
    ) -> Result<Upload, SinkError> {
        let load = Uuid::new_v4().simple().to_string();
        let path = |file: &str| {
            let (stream, sink) = (&*shard.stream.name, self.place.sink.as_str());
            let (pipeline, shard) = (shard.pipeline.as_str(), shard.shard.as_str());
            self.place.path([pipeline, sink, stream, shard, &load, file])
        };
        let file_path = |number: usize| path(&format!("{number:05}.json.gz"));
        let mut paths: Vec<Path> = (0..files.len()).map(file_path).collect();
        let entry = |path: &Path| ManifestEntry { url: self.url(path), mandatory: true };
        let manifest = Manifest { entries: paths.iter().map(entry).collect() };
        let manifest = serde_json::to_vec(&manifest)
            .map_err(|error| self.place.unavailable(format!("cannot write a manifest: {error}")))?;
        let puts = paths.iter().zip(files).map(|(path, file)| self.put(path, file.bytes.clone()));
        let puts: Vec<_> = puts.collect();
        let written =
            futures::stream::iter(puts).buffer_unordered(UPLOADS_MAX).try_collect::<()>().await;
        let manifest_path = path("manifest.json");
        let written = match written {
            Ok(()) => self.put(&manifest_path, manifest.into()).await,
            Err(error) => Err(error),
        };
        let copy = self.copy(&manifest_path);
        paths.push(manifest_path);
        let upload = Upload { paths, copy, load: load.clone() };
        match written {
            Ok(()) => Ok(upload),
            Err(error) => {
                self.remove(&upload).await;
                Err(error)
            }
        }
    }

    /// Removes the files of a load. Files that cannot be removed stay, with a warning.
    pub(super) async fn remove(&self, upload: &Upload) {
        for path in &upload.paths {
            match self.place.store.delete(path).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => {
                    let error = quoted(&sanitized(error));
                    tracing::warn!(sink = %self.place.sink, %path, %error, "failed to remove a file of a load");
                }
            }
        }
    }

    async fn put(&self, path: &Path, bytes: Bytes) -> Result<(), SinkError> {
        self.place.create_data(path, bytes).await
    }

    fn url(&self, path: &Path) -> String {
        format!("{}/{path}", self.bucket_url)
    }

    /// Returns the COPY statement. A column that a line does not have is null; the merge handles it. Source: guide,
    /// "COPY".
    fn copy(&self, manifest: &Path) -> String {
        let role = match self.iam_role.as_str() {
            DEFAULT_ROLE => DEFAULT_ROLE.to_owned(),
            role => literal(role),
        };
        let region = self.region.as_deref().map(literal);
        let region = region.map_or(String::new(), |region| format!(" REGION {region}"));
        format!(
            "COPY {STAGING} FROM {} IAM_ROLE {role}{region} MANIFEST GZIP FORMAT AS JSON 'auto' \
             DATEFORMAT 'auto' TIMEFORMAT 'auto' COMPUPDATE OFF STATUPDATE OFF MAXERROR {ERRORS_MAX}",
            literal(&self.url(manifest))
        )
    }
}
