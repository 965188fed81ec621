//! A store whose faults are drawn from a seed: before a request, after it, or as S3's false conflict.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// Small generator (splitmix64): a seed reproduces a run.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

/// Kinds of faults.
#[derive(Clone, Copy, Debug)]
pub enum Plan {
    /// This percentage of requests fails. About half of the failing writes take effect.
    Percent(u64),
    /// Every write of data fails and has no effect.
    DataNeverLands,
    /// Writes of data fail and have no effect, except those of one route.
    OnlyRoute(&'static str),
    /// `If-None-Match` is ignored, as some servers do.
    Overwrites,
    /// Every write takes effect, but its reply is lost.
    RepliesLost,
}

/// Store with faults.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn ObjectStore>,
    plan: Plan,
    random: Mutex<Random>,
}

enum Fault {
    None,
    Before,
    After,
    FalseConflict,
}

impl Faulty {
    pub fn over(inner: Arc<dyn ObjectStore>, plan: Plan, seed: u64) -> Arc<dyn ObjectStore> {
        Arc::new(Self { inner, plan, random: Mutex::new(Random::new(seed)) })
    }

    fn draw(&self, key: &Path) -> Fault {
        let data = !key.as_ref().contains("_shardmill/");
        match self.plan {
            Plan::DataNeverLands if data => Fault::Before,
            Plan::OnlyRoute(route) if data && !key.as_ref().contains(route) => Fault::Before,
            Plan::RepliesLost => Fault::After,
            Plan::Percent(chance) => {
                let mut random = self.random.lock().expect("a lock");
                match random.percent(chance) {
                    false => Fault::None,
                    true => match random.below(5) {
                        0 | 1 => Fault::Before,
                        2 | 3 => Fault::After,
                        _ => Fault::FalseConflict,
                    },
                }
            }
            _ => Fault::None,
        }
    }

    fn read_fails(&self, key: &Path) -> Result<()> {
        match (self.plan, self.draw(key)) {
            (Plan::Percent(_), Fault::Before) => Err(broken("nothing was read")),
            _ => Ok(()),
        }
    }
}

fn broken(what: &str) -> Error {
    Error::Generic { store: "faulty", source: format!("planned fault: {what}").into() }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "faulty {}", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        key: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> Result<PutResult> {
        if matches!(self.plan, Plan::Overwrites) {
            options.mode = PutMode::Overwrite;
        }
        match self.draw(key) {
            Fault::None => self.inner.put_opts(key, payload, options).await,
            Fault::Before => Err(broken("nothing was written")),
            Fault::After => {
                self.inner.put_opts(key, payload, options).await?;
                Err(broken("the reply was lost"))
            }
            Fault::FalseConflict => Err(Error::AlreadyExists {
                path: key.to_string(),
                source: "planned fault: 409 ConditionalRequestConflict".into(),
            }),
        }
    }

    async fn put_multipart_opts(
        &self,
        key: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(key, options).await
    }

    async fn get_opts(&self, key: &Path, options: GetOptions) -> Result<GetResult> {
        self.read_fails(key)?;
        self.inner.get_opts(key, options).await
    }

    async fn get_ranges(&self, key: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.inner.get_ranges(key, ranges).await
    }

    fn delete_stream(
        &self,
        keys: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(keys)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
