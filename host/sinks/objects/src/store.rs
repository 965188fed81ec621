//! Opens the store of a URL (`file://`, `s3://`, `gs://`, `az://`), creates objects in it, and words its errors.
//!
//! Options of the pipeline file take precedence over the environment (`AWS_…`, `GOOGLE_…`, `AZURE_…`). An option that
//! the store does not know is an error, never ignored.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    ClientConfigKey, ObjectStore, ObjectStoreExt, ObjectStoreScheme, PutMode, PutPayload,
    RetryConfig,
};
use url::Url;

use super::answers::Bounded;
use super::chunks;
use super::keys::KeyLimits;
use super::staged::{Created, Staged, StagedError};
use shardmill_core::escape::quoted;
use shardmill_core::masking::sanitized;
use shardmill_core::record::SinkName;
use shardmill_core::retry::RetryPolicy;
use shardmill_core::sink::SinkError;

/// Longest time of one request: a large object on a slow line. The option `timeout` overrides it.
const REQUEST_TIMEOUT: &str = "120 seconds";
/// Most retries inside one request. Few, because the delivery's own backoff is visible to users, and this one is not.
const RETRIES_MAX: usize = 3;
/// Time after which a request is not retried any more.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);
/// Retries of a conditional write. S3 answers 409 while another conditional write of the same key is under way, and
/// `object_store` reports that as "already exists".
const CONFLICT_RETRY: RetryPolicy =
    RetryPolicy::doubling(Duration::from_millis(20), Duration::from_millis(320)).tries(6);

/// Bytes of a part: larger objects are uploaded in parts. S3 accepts parts of 5 MiB to 5 GiB, and 10,000 of them (user
/// guide, "Amazon S3 multipart upload limits").
const PART_BYTES: usize = 32 << 20;
/// Most parts of one object that are uploaded at the same time.
const PARTS_AT_ONCE: usize = 4;

/// A store, a sink's place in it, and the names of both for messages.
#[derive(Clone, Debug)]
pub struct StorePlace {
    /// Sink.
    pub sink: SinkName,
    /// Store.
    pub store: Arc<dyn ObjectStore>,
    /// Folder in the store.
    pub prefix: Path,
    /// URL for error texts; without secrets.
    pub url: Arc<str>,
    /// Longest keys of the store.
    pub limits: KeyLimits,
    /// Creator of files, if the store is a folder.
    pub staged: Option<Staged>,
}

impl StorePlace {
    /// Makes a place in a store that is open already.
    pub fn over(sink: SinkName, store: Arc<dyn ObjectStore>, prefix: Path, url: Arc<str>) -> Self {
        Self { sink, store, prefix, url, limits: KeyLimits::ANY, staged: None }
    }

    /// Opens the store of a URL. Connects to nothing yet.
    pub fn open(
        sink: SinkName,
        url: &Url,
        options: &BTreeMap<String, String>,
    ) -> Result<Self, SinkError> {
        let limits = KeyLimits::of(url, options);
        let opened = open_store(url, options);
        match opened {
            Ok((store, prefix)) => {
                let is_local = url.scheme() == "file";
                let staged = is_local.then(|| Staged::below(&prefix));
                Ok(Self { sink, store, prefix, url: shown(url).into(), limits, staged })
            }
            Err(cause) => Err(SinkError::Unavailable {
                sink,
                cause: format!("cannot open {}: {cause}", shown(url)),
            }),
        }
    }

    /// Returns the path of these parts under the sink's prefix. Each part is percent-encoded where needed.
    pub fn path<'a>(&self, parts: impl IntoIterator<Item = &'a str>) -> Path {
        parts.into_iter().fold(self.prefix.clone(), |path, part| path.join(part))
    }

    /// Returns the path of an encoded key under the sink's prefix; `None`: the key is not a valid path.
    pub(super) fn below(&self, key: &str) -> Option<Path> {
        let key = Path::parse(key).ok()?;
        Some(key.parts().fold(self.prefix.clone(), |path, part| path.join(part)))
    }

    /// Writes a data object unless it exists. A large one is uploaded in parts, each of which can be retried alone.
    ///
    /// An upload in parts is not a conditional create: another owner of the same claim may write the object between the
    /// look and the end of the upload. Then it is replaced by an object with the same rows.
    pub async fn create_data(
        &self,
        path: &Path,
        payload: impl Into<PutPayload>,
    ) -> Result<(), SinkError> {
        let payload = payload.into();
        if payload.content_length() <= PART_BYTES || self.staged.is_some() {
            return self.create(path, payload).await.map(drop);
        }
        if self.exists(path).await? {
            return Ok(());
        }
        let failed = |error| self.failed("write", path, &error);
        let mut upload = self.store.put_multipart(path).await.map_err(failed)?;
        let parts = chunks::parts(&payload, PART_BYTES).into_iter();
        let parts: Vec<_> = parts.map(|part| upload.put_part(part)).collect();
        let sent =
            futures::stream::iter(parts).buffer_unordered(PARTS_AT_ONCE).try_collect::<()>().await;
        let ended = match sent {
            Ok(()) => upload.complete().await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            // Parts that are not removed cost money until a lifecycle rule of the bucket removes them.
            if let Err(left) = upload.abort().await {
                let error = quoted(&sanitized(left));
                tracing::warn!(sink = %self.sink, %path, %error, "cannot abort an upload, its parts stay");
            }
            return Err(failed(error));
        }
        Ok(())
    }

    /// Writes an object unless one with that key exists.
    ///
    /// "Already exists" followed by "not found" is S3's 409 for a write that is under way, so it is retried.
    pub(super) async fn create(
        &self,
        path: &Path,
        payload: impl Into<PutPayload>,
    ) -> Result<Created, SinkError> {
        let payload = payload.into();
        if let Some(staged) = &self.staged {
            return staged
                .create(path, payload)
                .await
                .map_err(|error| self.not_staged(path, &error));
        }
        let mut retries = CONFLICT_RETRY.start();
        loop {
            let put = self.store.put_opts(path, payload.clone(), PutMode::Create.into()).await;
            match put {
                Ok(_) => return Ok(Created::New),
                Err(object_store::Error::AlreadyExists { .. }) => {}
                Err(error) => return Err(self.failed("write", path, &error)),
            }
            if self.exists(path).await? {
                return Ok(Created::Exists);
            }
            let Some(pause) = retries.next_pause_or_end() else { break };
            tokio::time::sleep(pause).await;
        }
        Err(self.unavailable(format!(
            "cannot write {path} in {}: the store reports both that it exists and that it does not; \
             another writer may be writing it",
            self.url
        )))
    }

    /// Returns whether an object exists.
    pub(super) async fn exists(&self, path: &Path) -> Result<bool, SinkError> {
        match self.store.head(path).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.failed("look up", path, &error)),
        }
    }

    /// Makes the error of a failed request, with a hint for a usual cause.
    pub(super) fn failed(
        &self,
        action: &str,
        path: &Path,
        error: &object_store::Error,
    ) -> SinkError {
        use object_store::Error::{NotFound, NotImplemented, PermissionDenied, Unauthenticated};
        let way_out = match error {
            PermissionDenied { .. } | Unauthenticated { .. } => {
                "; the credentials must be allowed to get, put and list there"
            }
            NotFound { .. } => "; check that the bucket exists",
            NotImplemented { .. } => "; the claim log needs conditional creation",
            _ => "",
        };
        // The error contains the body of the server's answer.
        let said = sanitized(error);
        self.unavailable(format!("cannot {action} {path} in {}: {said}{way_out}", self.url))
    }

    /// Makes the error of a file that was not written.
    fn not_staged(&self, path: &Path, error: &StagedError) -> SinkError {
        self.unavailable(format!("cannot write {path} in {}: {error}", self.url))
    }

    /// Adds a way out to an error.
    pub(super) fn with_way_out(&self, error: SinkError, way_out: &str) -> SinkError {
        match error {
            SinkError::Unavailable { cause, .. } => self.unavailable(format!("{cause}{way_out}")),
            other => other,
        }
    }

    /// Makes an error of this sink.
    pub fn unavailable(&self, cause: impl Display) -> SinkError {
        SinkError::Unavailable { sink: self.sink.clone(), cause: cause.to_string() }
    }
}

fn open_store(
    url: &Url,
    options: &BTreeMap<String, String>,
) -> Result<(Arc<dyn ObjectStore>, Path), String> {
    shardmill_tls::install();
    let (scheme, prefix) = ObjectStoreScheme::parse(url).map_err(|error| error.to_string())?;
    let store: Arc<dyn ObjectStore> = match scheme {
        ObjectStoreScheme::Local => return open_local(url, options),
        ObjectStoreScheme::AmazonS3 => {
            let builder = AmazonS3Builder::from_env().with_url(url.as_str()).with_retry(retry());
            let set = AmazonS3Builder::with_config;
            let builder = configure(builder, set, AmazonS3ConfigKey::Client, options)?;
            check_endpoints(
                [AmazonS3ConfigKey::Endpoint, AmazonS3ConfigKey::S3Endpoint]
                    .map(|key| builder.get_config_value(&key)),
            )?;
            let builder = builder.with_http_connector(Bounded);
            Arc::new(builder.build().map_err(|error| error.to_string())?)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder =
                GoogleCloudStorageBuilder::from_env().with_url(url.as_str()).with_retry(retry());
            let set = GoogleCloudStorageBuilder::with_config;
            let builder = configure(builder, set, GoogleConfigKey::Client, options)?;
            check_endpoints([GoogleConfigKey::BaseUrl].map(|key| builder.get_config_value(&key)))?;
            let builder = builder.with_http_connector(Bounded);
            Arc::new(builder.build().map_err(|error| error.to_string())?)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let builder =
                MicrosoftAzureBuilder::from_env().with_url(url.as_str()).with_retry(retry());
            let set = MicrosoftAzureBuilder::with_config;
            let builder = configure(builder, set, AzureConfigKey::Client, options)?;
            check_endpoints([AzureConfigKey::Endpoint].map(|key| builder.get_config_value(&key)))?;
            let builder = builder.with_http_connector(Bounded);
            Arc::new(builder.build().map_err(|error| error.to_string())?)
        }
        _ => return Err("the scheme must be file, s3, gs or az".into()),
    };
    Ok((store, prefix))
}

fn open_local(
    url: &Url,
    options: &BTreeMap<String, String>,
) -> Result<(Arc<dyn ObjectStore>, Path), String> {
    if let Some(name) = options.keys().next() {
        return Err(format!("unknown option {name:?}: a folder takes no options"));
    }
    let folder = url
        .to_file_path()
        .map_err(|()| format!("expected file:// and an absolute path, found {url}"))?;
    let prefix = Path::from_absolute_path(&folder).map_err(|error| error.to_string())?;
    Ok((Arc::new(LocalFileSystem::new().with_fsync(true)), prefix))
}

/// Sets our defaults, then each option. An option that the store does not know is an error.
fn configure<Builder, Key: FromStr>(
    mut builder: Builder,
    set: impl Fn(Builder, Key, String) -> Builder,
    client_key: impl Fn(ClientConfigKey) -> Key,
    options: &BTreeMap<String, String>,
) -> Result<Builder, String> {
    builder = set(builder, client_key(ClientConfigKey::Timeout), REQUEST_TIMEOUT.into());
    for (name, value) in options {
        let lower = name.to_ascii_lowercase();
        let key = lower.parse().map_err(|_| {
            format!("unknown option {name:?} of this store; see object_store's configuration keys")
        })?;
        if lower.ends_with("endpoint") && value.starts_with("http://") {
            builder = set(builder, client_key(ClientConfigKey::AllowHttp), "true".into());
        }
        builder = set(builder, key, value.clone());
    }
    Ok(builder)
}

/// Checks the addresses of servers. Errors of a store repeat them, so they must not have a password.
fn check_endpoints(endpoints: impl IntoIterator<Item = Option<String>>) -> Result<(), String> {
    for endpoint in endpoints.into_iter().flatten() {
        let url: Url = endpoint.parse().map_err(|error| {
            format!("expected an endpoint such as https://host:9000, found an invalid URL: {error}")
        })?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err("expected an endpoint without a user and a password, found one that has them; give \
                        credentials by the options or variables that the store has for them"
                .into());
        }
    }
    Ok(())
}

fn retry() -> RetryConfig {
    RetryConfig { max_retries: RETRIES_MAX, retry_timeout: RETRY_TIMEOUT, ..RetryConfig::default() }
}

/// Returns the URL without parts that could be a secret.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    if url.password().is_some() {
        // Fails only for URLs that cannot have a password.
        let _ = url.set_password(None);
    }
    url.to_string()
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    #[test]
    fn wall_02_what_a_store_says_is_one_line_of_bounded_length() {
        let store = Arc::new(InMemory::new());
        let place = StorePlace::over(SinkName::new("s"), store, Path::default(), "s3://b".into());
        let said = |body: String| {
            let error = object_store::Error::Generic { store: "S3", source: body.into() };
            place.failed("write", &Path::from("a"), &error).to_string()
        };
        let short = said("<Error>\nerror: forged\r</Error>".into());
        assert!(short.contains("<Error>\\nerror: forged\\r</Error>"), "{short}");
        let long = said("x".repeat(3 << 20));
        assert!(long.len() < 9 << 10 && long.contains("bytes in all)"), "{} bytes", long.len());
    }
}
