//! Sink of objects in a bucket or a folder, exactly once by a claim log: one object per route, folder and commit.
//!
//! ```text
//! <url>/<folder>/<link>-<owner>.ndjson[.gz|.zst]                                 the data
//! <url>/_shardmill/<pipeline>/<sink>/<stream>@<created ms>/<shard>/<link>.json   the claim log
//! <url>/_shardmill/.tmp/…                        in a folder: files that are being written
//! ```
//!
//! Readers of the data need not know the log: an object appears whole or not at all, and each row is in one object. But
//! they must not remove the newest object of a shard before a newer one follows. Without it, the sink considers its
//! last claim unfinished and writes it again. The same is true for lifecycle rules of a bucket: on a quiet shard they
//! remove the last link or object after some time. `recovery` repairs a log after that.
//!
//! [`TYPE`] is the entry in the program's registry of sinks: `settings` reads `type = "objects"`, lists its keys and
//! makes the sink.

mod answers;
mod chunks;
mod claim;
mod encode;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod keys;
mod layout;
mod parquet;
mod recovery;
mod settings;
mod staged;
mod store;
mod verify;
mod writer;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use async_trait::async_trait;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::ObjectStore;
use object_store::path::Path;
use url::Url;

use self::claim::{ClaimLog, LogLink, OwnerId, WrittenBy};
pub use self::encode::Encoded;
use self::encode::RouteForm;
use self::parquet::ParquetSchema;
pub use self::recovery::Recovered;
use self::settings::LOG_FOLDER;
pub use self::settings::{
    Compression, FolderTemplate, ObjectFormat, ObjectLayout, ObjectsTarget, TYPE,
};
use self::staged::Created;
pub use self::store::StorePlace;
pub use self::verify::{Audit, AuditProblem, ProblemKind};
use self::writer::{ObjectsWriter, Shared};
use shardmill_core::owner::Ownership;
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{PipelineName, Position, RouteName, ShardId, ShardKey, SinkName};
use shardmill_core::sink::{Acquired, KeptPosition, Sink, SinkError};
use shardmill_sinks_common::line::{LINE_MEDIA_TYPES, LineFormat};
use shardmill_sinks_common::local;

/// Name of the object that `prepare` creates to verify that the store does not overwrite.
const PROBE: &str = "conditional-create-probe.txt";
const PROBE_TEXT: &str =
    "shardmill wrote this to learn whether the store refuses to overwrite it.\n";

/// Most claim logs that are read at the same time.
const LOGS_AT_ONCE: usize = 16;

/// A sink of objects.
pub struct ObjectsSink {
    place: StorePlace,
    layout: ObjectLayout,
    forms: RwLock<HashMap<RouteName, RouteForm>>,
    /// Whether leftovers of earlier versions were looked for.
    swept: AtomicBool,
    /// Process that writes; unset in a sink that is only read from.
    ownership: OnceLock<Ownership>,
}

impl ObjectsSink {
    /// Makes a sink at a URL: `file:///…`, `s3://bucket/prefix`, `gs://…`, `az://…`. Connects to nothing yet. Options
    /// are those of `object_store`, and take precedence over the environment.
    ///
    /// # Errors
    /// For a URL or an option that no store knows.
    pub fn new(
        name: SinkName,
        url: &Url,
        options: &BTreeMap<String, String>,
        layout: impl Into<ObjectLayout>,
    ) -> Result<Self, SinkError> {
        Ok(Self::at(StorePlace::open(name, url, options)?, layout.into()))
    }

    /// Makes a sink on a store that is open already.
    pub fn with_store(
        name: SinkName,
        store: Arc<dyn ObjectStore>,
        prefix: Path,
        layout: impl Into<ObjectLayout>,
    ) -> Self {
        let url = format!("{store}/{prefix}").into();
        Self::at(StorePlace::over(name, store, prefix, url), layout.into())
    }

    fn at(place: StorePlace, layout: ObjectLayout) -> Self {
        Self {
            place,
            layout,
            forms: RwLock::default(),
            swept: AtomicBool::new(false),
            ownership: OnceLock::new(),
        }
    }

    /// Removes files that killed writers left in a folder. A failure is only logged.
    async fn sweep(&self, log: &ClaimLog, unfinished: &[Path]) {
        let Some(staged) = &self.place.staged else { return };
        let (staging, beside) =
            (staged.sweep().await, staged.sweep_beside(unfinished.to_vec()).await);
        let removed = [staging, beside, staged.sweep_log(&log.folder_path()).await];
        let mut count = 0;
        for swept in removed {
            match swept {
                Ok(removed) => count += removed,
                Err(error) => {
                    tracing::warn!(sink = %self.place.sink, %error, "cannot remove leftover files");
                }
            }
        }
        if count > 0 {
            tracing::info!(sink = %self.place.sink, files = count, "removed leftover files");
        }
        if !self.swept.swap(true, Ordering::Relaxed) {
            staged.clone().sweep_all_aside(self.place.sink.clone());
        }
    }

    /// Checks that claim logs can be written, by a key as long as that of a usual shard.
    fn check_log_path(&self) -> Result<(), SinkError> {
        const SHARD: &str = "x@1700000000000/shardId-000000000000/000000000001.json";
        let folder = self.place.path([LOG_FOLDER, "x", self.place.sink.as_str()]);
        let key = SHARD.split('/').fold(folder, |path, part| path.join(part));
        self.place.limits.check(&key).map_err(|why| {
            self.place.unavailable(format!(
                "cannot write claim logs in {}: {why}: set `url` to a place with a shorter path",
                self.place.url
            ))
        })
    }

    /// Creates one object twice. The second create must be refused: on a server that ignores the condition and
    /// overwrites (there are such servers), two owners could claim the same number.
    async fn probe(&self) -> Result<(), SinkError> {
        let path = self.place.path([LOG_FOLDER, PROBE]);
        if self.place.create(&path, PROBE_TEXT).await? == Created::Exists {
            return Ok(());
        }
        match self.place.create(&path, PROBE_TEXT).await? {
            Created::Exists => Ok(()),
            Created::New => Err(self.place.unavailable(format!(
                "{} overwrites objects that must only be created (If-None-Match is ignored): \
                 exactly-once is impossible there; use another store",
                self.place.url
            ))),
        }
    }

    fn shared(&self) -> Arc<Shared> {
        let forms = self.forms.read().unwrap_or_else(PoisonError::into_inner);
        let (place, layout) = (self.place.clone(), self.layout.clone());
        let ownership = self.ownership.get().cloned();
        Arc::new(Shared { place, layout, forms: Arc::new(forms.clone()), ownership })
    }

    fn check_routes(
        &self,
        routes: &[BoundRoute],
    ) -> Result<HashMap<RouteName, RouteForm>, SinkError> {
        let check = |route: &BoundRoute| {
            let form = self.form(route).map_err(|cause| self.place.unavailable(cause))?;
            Ok((route.name.clone(), form))
        };
        routes.iter().map(check).collect()
    }

    /// Returns the forms that the route's rows can have. The configured format must be one of them.
    fn form(&self, route: &BoundRoute) -> Result<RouteForm, String> {
        let name = &route.name;
        if self.layout.folder.names_route() && matches!(name.as_str(), "" | LOG_FOLDER) {
            return Err(format!(
                "route {name:?} cannot be a folder: the name is empty or reserved for the claim log"
            ));
        }
        let line = LineFormat::of_media_type(&route.format);
        let schema = ParquetSchema::of(&route.columns);
        match (self.layout.format, line, &schema) {
            (ObjectFormat::Ndjson, None, _) => Err(format!(
                "route {name} carries {}, an objects sink takes {LINE_MEDIA_TYPES}: add a stage \
                 that makes JSON of it, or set format = \"raw\"",
                route.format
            )),
            (ObjectFormat::Parquet, line, _) if line != Some(LineFormat::Json) => Err(format!(
                "route {name} carries {}, a Parquet file takes application/json objects: add a \
                 stage that makes them",
                route.format
            )),
            (ObjectFormat::Parquet, _, Err(cause)) => {
                Err(format!("route {name} cannot become Parquet: {cause}"))
            }
            _ => Ok(RouteForm { line, schema: schema.ok().map(Arc::new) }),
        }
    }
}

#[async_trait]
impl Sink for ObjectsSink {
    fn name(&self) -> &SinkName {
        &self.place.sink
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        let forms = self.check_routes(routes)?;
        self.check_log_path()?;
        self.forms.write().unwrap_or_else(PoisonError::into_inner).extend(forms);
        self.probe().await
    }

    async fn check(&self, routes: &[BoundRoute]) -> Result<Vec<String>, SinkError> {
        self.check_routes(routes)?;
        self.check_log_path()?;
        if let Some(staged) = &self.place.staged {
            let folder = staged.folder().map_err(|error| self.place.unavailable(error))?;
            local::check_writable(&folder).map_err(|cause| self.place.unavailable(cause))?;
            return Ok(Vec::new());
        }
        // Shows that the bucket exists and can be read. Writes nothing.
        let probe = self.place.path([LOG_FOLDER, PROBE]);
        let known = self.place.exists(&probe).await?;
        Ok(match known {
            true => Vec::new(),
            false => vec![format!(
                "writing to {} was not tried, since that would create an object: `shardmill check \
                 --write` tries it",
                self.place.url
            )],
        })
    }

    async fn reach(&self, shard: &ShardKey) -> Result<(), SinkError> {
        let log = ClaimLog::new(self.place.clone(), shard);
        log.check_path()?;
        log.reach().await
    }

    fn acquires_last(&self) -> bool {
        true
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let log = ClaimLog::new(self.place.clone(), shard);
        log.check_path()?;
        let by = self.ownership.get().map(WrittenBy::now);
        let fence = log.fence(&OwnerId::random(), by).await?;
        let standing = log.standing(&fence).await?;
        let promised = standing.unfinished.iter().flat_map(|claim| &claim.claim.data);
        let promised: Vec<Path> = promised.filter_map(|data| self.place.below(&data.key)).collect();
        self.sweep(&log, &promised).await;
        let position = standing.position;
        let must_cut_at = standing.unfinished.as_ref().map(|claim| claim.to.clone());
        let writer = ObjectsWriter::new(
            self.shared(),
            shard.clone(),
            log,
            &fence,
            position.clone(),
            standing.unfinished,
        );
        Ok(Acquired { writer: Box::new(writer), position, keeps_position: true, must_cut_at })
    }

    async fn position(&self, shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        let log = ClaimLog::new(self.place.clone(), shard);
        match log.last().await? {
            Some(last) => Ok(log.standing(&last).await?.position),
            None => Ok(None),
        }
    }

    async fn adopt(&self, old: &SinkName, shard: &ShardKey) -> Result<(), SinkError> {
        let place = StorePlace { sink: old.clone(), ..self.place.clone() };
        let log = ClaimLog::new(self.place.clone(), shard);
        log.adopt(&ClaimLog::new(place, shard), &OwnerId::random()).await
    }

    fn set_ownership(&self, ownership: Ownership) {
        // The first one stays: a sink has the same owner for its whole life.
        let _ = self.ownership.set(ownership);
    }

    async fn kept_positions(
        &self,
        pipeline: &PipelineName,
        shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        let mut looks = Vec::with_capacity(shards.len());
        for shard in shards {
            looks.push(self.kept_of(shard));
        }
        let looks: Vec<Option<KeptPosition>> =
            futures::stream::iter(looks).buffer_unordered(LOGS_AT_ONCE).try_collect().await?;
        let mut kept: Vec<KeptPosition> = looks.into_iter().flatten().collect();
        if let Some((shard, link)) = claim::newest_redrive(&self.place, pipeline).await? {
            kept.push(as_kept(String::new(), shard.as_str().into(), link.to.clone(), &link));
        }
        Ok(Some(kept))
    }
}

impl ObjectsSink {
    async fn kept_of(&self, shard: &ShardKey) -> Result<Option<KeptPosition>, SinkError> {
        let log = ClaimLog::new(self.place.clone(), shard);
        let Some(last) = log.last().await? else { return Ok(None) };
        let position = log.standing(&last).await?.position;
        Ok(Some(as_kept(shard.stream.key(), shard.shard.clone(), position, &last)))
    }
}

fn as_kept(
    stream: String,
    shard: ShardId,
    position: Option<Position>,
    last: &LogLink,
) -> KeptPosition {
    let (mark, owner) = (last.by.as_ref().map(WrittenBy::mark), last.by.as_ref());
    KeptPosition { stream, shard, position, mark, owner: owner.and_then(WrittenBy::owner) }
}
