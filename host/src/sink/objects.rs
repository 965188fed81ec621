//! Objects in a bucket or folder, exactly once by a claim log.
//!
//! A commit first *claims* the next link of the shard's log: a small JSON object, created only if
//! it is not there, that names the span and the data objects to come. Then it writes the data under
//! those keys. Whoever takes the shard over claims an empty link: an earlier owner finds its number
//! taken and stops. A claim whose data is missing is produced again, under the same keys, by the
//! same generation, so a second writer of them writes the same bytes.

mod claim;
mod encode;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt as _};
use url::Url;

use super::{Acquired, BoundRoute, Commit, Committed, RefusalLog, Sink, SinkError, SinkWriter};
use crate::config::Compression;
use crate::record::{Position, ShardKey, SinkName};
use claim::{Claim, ClaimLog, Claimed};

/// What NDJSON can hold.
const FORMATS: [&str; 3] = ["application/json", "application/x-ndjson", "text/plain"];

/// Writes objects.
pub struct ObjectsSink {
    name: SinkName,
    store: Arc<dyn ObjectStore>,
    compression: Compression,
}

impl ObjectsSink {
    /// Writes below a URL: `file:///folder`, `s3://bucket/prefix`, `gs://…`, `az://…`. Options are
    /// object_store's; for AWS, the environment's as well.
    ///
    /// # Errors
    /// A URL or options that no store takes, or a folder that cannot be made.
    pub fn new(
        name: SinkName,
        url: &Url,
        options: &BTreeMap<String, String>,
        compression: Compression,
    ) -> anyhow::Result<Self> {
        let store = open(url, options)
            .map_err(|error| anyhow::anyhow!("sink {name}: failed to open {url}: {error}"))?;
        Ok(Self::over(name, store, compression))
    }

    /// Writes into a store.
    pub fn over(name: SinkName, store: Arc<dyn ObjectStore>, compression: Compression) -> Self {
        Self { name, store, compression }
    }

    fn log(&self, shard: &ShardKey) -> ClaimLog {
        ClaimLog::new(self.store.clone(), &self.name, shard)
    }

    fn unavailable(&self, cause: impl std::fmt::Display) -> SinkError {
        SinkError::Unavailable { sink: self.name.clone(), cause: cause.to_string() }
    }

    /// The last claim with data, if some of its data is missing.
    async fn unfinished(&self, claim: Option<Claim>) -> Result<Option<Claim>, SinkError> {
        let Some(claim) = claim else { return Ok(None) };
        for data in &claim.data {
            match self.store.head(&Path::from(data.key.as_str())).await {
                Ok(_) => {}
                Err(object_store::Error::NotFound { .. }) => return Ok(Some(claim)),
                Err(error) => return Err(self.unavailable(error)),
            }
        }
        Ok(None)
    }
}

fn open(url: &Url, options: &BTreeMap<String, String>) -> anyhow::Result<Arc<dyn ObjectStore>> {
    if url.scheme() == "file" {
        let folder = url.to_file_path().map_err(|()| anyhow::anyhow!("it names no folder"))?;
        std::fs::create_dir_all(&folder)?;
        return Ok(Arc::new(LocalFileSystem::new_with_prefix(folder)?.with_fsync(true)));
    }
    crate::tls::install();
    let from_environment = std::env::vars()
        .filter(|(name, _)| name.starts_with("AWS_"))
        .map(|(name, value)| (name.to_ascii_lowercase(), value));
    let given = options.iter().map(|(name, value)| (name.clone(), value.clone()));
    let (store, prefix) = object_store::parse_url_opts(url, from_environment.chain(given))?;
    Ok(Arc::new(PrefixStore::new(store, prefix)))
}

#[async_trait]
impl Sink for ObjectsSink {
    fn name(&self) -> &SinkName {
        &self.name
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        let misfit = routes
            .iter()
            .find(|route| !route.format.is_empty() && !FORMATS.contains(&route.format.as_str()));
        match misfit {
            None => Ok(()),
            Some(route) => Err(self.unavailable(format!(
                "route {} carries {}, but objects of JSON lines hold {}",
                route.name,
                route.format,
                FORMATS.join(", ")
            ))),
        }
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let log = self.log(shard);
        let owner = uuid::Uuid::new_v4().simple().to_string();
        let fence = log.fence(&owner).await.map_err(|error| self.unavailable(error))?;
        let unfinished = self.unfinished(fence.last_data_claim).await?;
        let position = match &unfinished {
            Some(claim) => claim.from.clone(),
            None => fence.claim.to.clone(),
        };
        let must_cut_at = unfinished.as_ref().and_then(|claim| claim.to.clone());
        let writer = ObjectsWriter {
            name: self.name.clone(),
            shard: shard.clone(),
            store: self.store.clone(),
            compression: self.compression,
            log,
            owner,
            next_link: fence.link + 1,
            unfinished,
        };
        Ok(Acquired { writer: Box::new(writer), position, keeps_position: true, must_cut_at })
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        let last = self.log(shard).last().await.map_err(|error| self.unavailable(error))?;
        let Some((_, claim, last_data_claim)) = last else { return Ok(None) };
        Ok(match self.unfinished(last_data_claim).await? {
            Some(unfinished) => unfinished.from,
            None => claim.to,
        })
    }
}

struct ObjectsWriter {
    name: SinkName,
    shard: ShardKey,
    store: Arc<dyn ObjectStore>,
    compression: Compression,
    log: ClaimLog,
    owner: String,
    next_link: u64,
    /// Claimed, its data not yet written: an earlier owner's, or our own after an error.
    unfinished: Option<Claim>,
}

#[async_trait]
impl SinkWriter for ObjectsWriter {
    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        let (lines, refused) = encode::lines(commit);
        refusals.hold(commit, &refused).await?;
        let encoded = encode::compress(lines, self.compression).await;
        let encoded = encoded.map_err(|error| self.unavailable(error))?;
        let claim = self.claim(commit, &encoded).await?;
        let mut committed = Committed { rows_refused: refused.len() as u64, ..Committed::default() };
        for (object, data) in encoded.into_iter().zip(&claim.data) {
            committed.rows_written += object.rows;
            committed.bytes_written += object.bytes.len() as u64;
            let written = self.store.put(&Path::from(data.key.as_str()), object.bytes.into()).await;
            written.map_err(|error| self.unavailable(error))?;
        }
        self.unfinished = None;
        Ok(committed)
    }
}

impl ObjectsWriter {
    /// The claim of this commit: the unfinished one that it finishes, or the next link.
    async fn claim(
        &mut self,
        commit: &Commit,
        encoded: &[encode::Encoded],
    ) -> Result<Claim, SinkError> {
        if let Some(claim) = &self.unfinished {
            let same_end = claim.to.as_ref() == Some(&commit.span.to_inclusive);
            let same_routes = claim.data.len() == encoded.len()
                && claim.data.iter().zip(encoded).all(|(data, object)| data.route == object.route.as_str());
            if same_end && same_routes {
                return Ok(claim.clone());
            }
            return Err(self.unavailable(format!(
                "link {} of shard {} promises other objects up to {} than were made again now up to \
                 {}: a plugin does not give the same for the same records; restore the generation \
                 that ran first, {}",
                claim.link,
                self.shard.shard,
                claim.to.as_ref().map(ToString::to_string).unwrap_or_default(),
                commit.span.to_inclusive,
                claim.generation
            )));
        }
        let claim = Claim::new(self.next_link, &self.owner, commit, encoded, &self.shard);
        match self.log.create(&claim).await.map_err(|error| self.unavailable(error))? {
            Claimed::Ours => {
                self.next_link += 1;
                self.unfinished = Some(claim.clone());
                Ok(claim)
            }
            Claimed::Taken(other) => Err(SinkError::Fenced {
                sink: self.name.clone(),
                shard: self.shard.shard.to_string(),
                detail: format!("link {} is another owner's ({})", other.link, other.owner),
            }),
        }
    }

    fn unavailable(&self, cause: impl std::fmt::Display) -> SinkError {
        SinkError::Unavailable { sink: self.name.clone(), cause: cause.to_string() }
    }
}
