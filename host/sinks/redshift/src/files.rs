//! The files of a load on S3, their manifest, and the COPY that reads them.
//!
//! Each load has keys of its own. They are removed once COPY has read them; what a crash leaves is
//! never read again, and a lifecycle rule on the prefix removes it.

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

/// Files that go up at the same time.
const UPLOADS_MAX: usize = 4;

/// Rows of one commit that COPY may leave out and report, at most; past them it fails.
const ERRORS_MAX: usize = 1_000;

/// The role that means the cluster's own.
const DEFAULT_ROLE: &str = "default";

/// Where the files wait for COPY, and how the cluster gets at them.
pub(super) struct StagingBucket {
    place: StorePlace,
    /// `s3://bucket`.
    bucket_url: String,
    iam_role: String,
    region: Option<String>,
}

/// A load's files, which are there.
pub(super) struct Upload {
    /// Of the manifest and the files.
    paths: Vec<Path>,
    /// Statement that loads them.
    pub(super) copy: String,
    /// Part of their paths that no other load has.
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

    /// Writes files and their manifest under keys that nobody else has.
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

    /// Removes a load's files, which nobody needs any more. What cannot be removed stays.
    pub(super) async fn remove(&self, upload: &Upload) {
        for path in &upload.paths {
            match self.place.store.delete(path).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => {
                    let error = quoted(&sanitized(error));
                    tracing::warn!(sink = %self.place.sink, %path, %error, "a file is left over");
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

    /// Source: guide, "COPY". What a line lacks is null, and left to the merge.
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
