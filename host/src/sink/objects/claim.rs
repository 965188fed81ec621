//! The claim log of one sink and shard: links numbered from 1, each created once.
//!
//! `_shardmill/<pipeline>/<sink>/<stream>/<shard>/<link, 12 digits>.json`

use std::sync::Arc;

use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _, PutMode, PutOptions};
use serde::{Deserialize, Serialize};

use super::encode::Encoded;
use crate::record::{Position, ShardKey, SinkName};
use crate::sink::Commit;

/// The claim's format.
const VERSION: u32 = 1;
/// How often a create that was answered by a conflict, with nothing there, is tried again.
const CONFLICT_RETRIES_MAX: u32 = 10;

/// One link: what is promised, by whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The format.
    pub version: u32,
    /// Its number, from 1.
    pub link: u64,
    /// Exclusive; null: before everything.
    pub from: Option<Position>,
    /// Inclusive; null only before the first record.
    pub to: Option<Position>,
    /// The generation that made the rows; empty for a fence.
    pub generation: String,
    /// Who claims: another for each acquisition.
    pub owner: String,
    /// The objects; none: a fence, or a span without rows.
    pub data: Vec<DataObject>,
}

/// One object of a claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataObject {
    /// Below the sink's URL.
    pub key: String,
    /// The route of its rows.
    pub route: String,
    /// How many.
    pub rows: u64,
    /// Its size, compressed.
    pub bytes: u64,
}

impl Claim {
    /// The claim of a commit.
    pub fn new(
        link: u64,
        owner: &str,
        commit: &Commit,
        encoded: &[Encoded],
        shard: &ShardKey,
    ) -> Self {
        let data = encoded.iter().map(|object| DataObject {
            key: format!(
                "{}/{}/{}/{link:012}.{}",
                object.route, shard.stream.name, shard.shard, object.extension
            ),
            route: object.route.to_string(),
            rows: object.rows,
            bytes: object.bytes.len() as u64,
        });
        Self {
            version: VERSION,
            link,
            from: commit.span.from_exclusive.clone(),
            to: Some(commit.span.to_inclusive.clone()),
            generation: commit.generation.to_string(),
            owner: owner.into(),
            data: data.collect(),
        }
    }
}

/// What became of an attempt to claim.
pub enum Claimed {
    /// The link is ours.
    Ours,
    /// It is another's.
    Taken(Claim),
}

/// A shard taken over.
pub struct Fence {
    /// The number of our empty link.
    pub link: u64,
    /// Our empty link.
    pub claim: Claim,
    /// The last link before it that promises data.
    pub last_data_claim: Option<Claim>,
}

/// The log.
pub struct ClaimLog {
    store: Arc<dyn ObjectStore>,
    folder: String,
}

impl ClaimLog {
    /// The log of a sink and shard.
    pub fn new(store: Arc<dyn ObjectStore>, sink: &SinkName, shard: &ShardKey) -> Self {
        let stream = format!("{}@{}", shard.stream.name, shard.stream.created_ms);
        let folder = format!("_shardmill/{}/{sink}/{stream}/{}", shard.pipeline, shard.shard);
        Self { store, folder }
    }

    fn path(&self, link: u64) -> Path {
        Path::from(format!("{}/{link:012}.json", self.folder))
    }

    /// Claims the link, if it is not there.
    pub async fn create(&self, claim: &Claim) -> object_store::Result<Claimed> {
        let path = self.path(claim.link);
        let json = serde_json::to_vec(claim).map_err(generic)?;
        for _ in 0..CONFLICT_RETRIES_MAX {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            match self.store.put_opts(&path, json.clone().into(), options).await {
                Ok(_) => return Ok(Claimed::Ours),
                Err(object_store::Error::AlreadyExists { .. }) => {}
                Err(error) => return Err(error),
            }
            match self.read(claim.link).await? {
                // Our own: the reply to an earlier try was lost.
                Some(found) if found == *claim => return Ok(Claimed::Ours),
                Some(found) => return Ok(Claimed::Taken(found)),
                // A conflict with another request (S3's 409) reads as "exists": nothing is there.
                None => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
            }
        }
        Err(generic(format!("{path} conflicts, but is not there")))
    }

    /// Claims an empty link behind the last: from here on no earlier owner can claim.
    pub async fn fence(&self, owner: &str) -> object_store::Result<Fence> {
        loop {
            let last = self.last().await?;
            let (link, to, last_data_claim) = match last {
                Some((link, claim, data)) => (link + 1, claim.to, data),
                None => (1, None, None),
            };
            let claim = Claim {
                version: VERSION,
                link,
                from: to.clone(),
                to,
                generation: String::new(),
                owner: owner.into(),
                data: Vec::new(),
            };
            match self.create(&claim).await? {
                Claimed::Ours => return Ok(Fence { link, claim, last_data_claim }),
                // An earlier owner was quicker: look again.
                Claimed::Taken(_) => {}
            }
        }
    }

    /// The last link, and the last one that promises data (itself, perhaps).
    pub async fn last(&self) -> object_store::Result<Option<(u64, Claim, Option<Claim>)>> {
        let Some(link) = self.last_link().await? else { return Ok(None) };
        let claim = self.due(link).await?;
        let mut data_claim = claim.clone();
        while data_claim.data.is_empty() && data_claim.link > 1 {
            // A span without rows was committed after all data before it was written.
            if data_claim.from != data_claim.to {
                return Ok(Some((link, claim, None)));
            }
            data_claim = self.due(data_claim.link - 1).await?;
        }
        let data_claim = Some(data_claim).filter(|claim| !claim.data.is_empty());
        Ok(Some((link, claim, data_claim)))
    }

    /// The number of the last link. Links have no gaps: doubling, then halving, finds the end.
    async fn last_link(&self) -> object_store::Result<Option<u64>> {
        let (mut there, mut missing) = (0, 1);
        while self.exists(missing).await? {
            there = missing;
            missing *= 2;
        }
        while missing - there > 1 {
            let middle = there + (missing - there) / 2;
            match self.exists(middle).await? {
                true => there = middle,
                false => missing = middle,
            }
        }
        Ok(Some(there).filter(|link| *link > 0))
    }

    async fn exists(&self, link: u64) -> object_store::Result<bool> {
        match self.store.head(&self.path(link)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn read(&self, link: u64) -> object_store::Result<Option<Claim>> {
        let path = self.path(link);
        let bytes = match self.store.get(&path).await {
            Ok(found) => found.bytes().await?,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let claim: Claim = serde_json::from_slice(&bytes)
            .map_err(|error| generic(format!("{path} is no claim: {error}")))?;
        if claim.version != VERSION {
            let cause = format!("{path} has version {}, this host writes {VERSION}", claim.version);
            return Err(generic(cause));
        }
        Ok(Some(claim))
    }

    async fn due(&self, link: u64) -> object_store::Result<Claim> {
        let gone = || generic(format!("{} is gone from the claim log", self.path(link)));
        self.read(link).await?.ok_or_else(gone)
    }
}

fn generic(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> object_store::Error {
    object_store::Error::Generic { store: "claim log", source: source.into() }
}
