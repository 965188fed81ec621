//! Shared by the tests of objects: records, commits, and readers of what was written.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use shardmill_core::record::{
    Batch, Entry, Position, PositionRange, Record, Row, RowRoute, SequenceNumber, ShardKey,
    SinkName, StreamIdentity,
};
use shardmill_core::sink::{Commit, Refusal, RefusalLog, SinkError};
use shardmill_sink_objects::{Compression, ObjectsSink};

use super::s3;

/// A store, and the prefix in it that belongs to one test.
#[derive(Clone)]
pub struct Place {
    pub store: Arc<dyn ObjectStore>,
    pub prefix: Path,
    /// Keeps a folder until the test ends.
    pub _folder: Option<Arc<tempfile::TempDir>>,
}

impl Place {
    /// Makes a new folder, without fsync: the test cannot cut the power, so fsync would prove nothing.
    pub fn folder() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = object_store::local::LocalFileSystem::new_with_prefix(folder.path());
        Self {
            store: Arc::new(store.expect("a folder is a store")),
            prefix: Path::from("out put"),
            _folder: Some(Arc::new(folder)),
        }
    }

    /// Returns the place of a server's prefix.
    pub fn in_bucket(server: &s3::Server) -> Self {
        Self {
            store: Arc::clone(&server.store),
            prefix: server.prefix.clone(),
            _folder: Some(Arc::clone(&server.folder)),
        }
    }

    pub fn sink(&self, compression: Compression) -> ObjectsSink {
        self.sink_on(Arc::clone(&self.store), compression)
    }

    pub fn sink_on(&self, store: Arc<dyn ObjectStore>, compression: Compression) -> ObjectsSink {
        ObjectsSink::with_store(SinkName::from("logs"), store, self.prefix.clone(), compression)
    }

    /// Returns all keys below the prefix that are data (or links), in order.
    pub async fn keys(&self, links: bool) -> Vec<Path> {
        let listing = self.store.list(Some(&self.prefix));
        let objects: Vec<_> = listing.try_collect().await.expect("a listing");
        let keys = objects.into_iter().map(|object| object.location);
        let is_link = |key: &Path| key.as_ref().contains("/_shardmill/");
        let mut keys: Vec<_> = keys.filter(|key| is_link(key) == links).collect();
        keys.sort();
        keys
    }

    pub async fn get(&self, key: &Path) -> Bytes {
        let found = self.store.get(key).await.expect("an object");
        found.bytes().await.expect("its bytes")
    }

    /// Returns every line of every data object, by route.
    pub async fn lines(&self) -> BTreeMap<String, Vec<String>> {
        let mut lines: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for key in self.keys(false).await {
            let route = key.parts().nth(self.prefix.parts_count()).expect("a route");
            let text = decompressed(&key, &self.get(&key).await);
            assert!(text.ends_with('\n'), "{key} does not end with a line end");
            lines
                .entry(route.as_ref().to_owned())
                .or_default()
                .extend(text.lines().map(String::from));
        }
        lines.values_mut().for_each(|lines| lines.sort());
        lines
    }

    /// Returns the links as JSON, ordered by number.
    pub async fn links(&self) -> Vec<serde_json::Value> {
        let mut links = Vec::new();
        for key in self.keys(true).await {
            if key.extension() != Some("json") {
                continue;
            }
            links.push(serde_json::from_slice(&self.get(&key).await).expect("a link is JSON"));
        }
        links
    }
}

fn decompressed(key: &Path, bytes: &[u8]) -> String {
    let mut text = String::new();
    let read = match key.extension() {
        Some("gz") => flate2::read::GzDecoder::new(bytes).read_to_string(&mut text),
        Some("zst") => zstd::Decoder::new(bytes).and_then(|mut it| it.read_to_string(&mut text)),
        _ => (&mut &bytes[..]).read_to_string(&mut text),
    };
    read.unwrap_or_else(|error| panic!("{key}: {error}"));
    text
}

pub fn shard() -> ShardKey {
    ShardKey {
        pipeline: "cars".into(),
        stream: Arc::new(StreamIdentity {
            name: "test".into(),
            arn: "arn:aws:kinesis:eu-west-1:000000000000:stream/test".into(),
            created_ms: 1_400_000_000_000,
        }),
        shard: "shardId-000000000003".into(),
    }
}

pub fn position(number: u64) -> Position {
    let sequence = SequenceNumber::parse(&number.to_string()).expect("digits");
    Position { sequence, sub_sequence: 0 }
}

pub fn number(position: Option<&Position>) -> u64 {
    position.map_or(0, |position| position.sequence.as_str().parse().expect("a small number"))
}

/// Returns the route of a record: every third record is filtered.
pub fn route_of(record: u64) -> Option<&'static str> {
    ["even", "odd"].get((record % 3) as usize).copied()
}

pub fn line_of(record: u64) -> String {
    format!("{{\"id\":{record}}}")
}

/// Returns the lines expected for the records `1..=last`.
pub fn expected(last: u64) -> BTreeMap<String, Vec<String>> {
    let mut lines: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for record in 1..=last {
        if let Some(route) = route_of(record) {
            lines.entry(route.into()).or_default().push(line_of(record));
        }
    }
    lines.values_mut().for_each(|lines| lines.sort());
    lines
}

/// Makes the commit of the records `from+1..=to`.
pub fn commit(from: u64, to: u64) -> Commit {
    commit_of(from, to, |record| line_of(record).into())
}

/// Like `commit`, with these payloads.
pub fn commit_of(from: u64, to: u64, payload: impl Fn(u64) -> Bytes) -> Commit {
    let range = PositionRange {
        from_exclusive: (from > 0).then(|| position(from)),
        to_inclusive: position(to),
    };
    let records = (from + 1..=to).map(|record| Record {
        position: position(record),
        partition_key: "key".into(),
        payload: payload(record),
        arrived_ms: 0,
    });
    let batch = Arc::new(Batch {
        shard: shard(),
        records: records.collect(),
        range: range.clone(),
        entry: Entry::Source,
    });
    let rows = (from + 1..=to).zip(0..).filter_map(|(record, index)| {
        Some(Row {
            batch: Arc::clone(&batch),
            record: index,
            ordinal: 0,
            route: RowRoute::from(route_of(record)?),
            key: "key".into(),
            payload: payload(record),
        })
    });
    Commit { range, rows: Arc::new(rows.collect()), encoded: None, revision: "generation-1".into() }
}

/// Log that remembers the reasons of refused rows, or fails as if its store were unreachable.
#[derive(Default)]
pub struct Refusals {
    pub recorded: Mutex<Vec<String>>,
    pub out_of_reach: bool,
}

#[async_trait]
impl RefusalLog for Refusals {
    async fn record(&self, _commit: &Commit, refusals: &[Refusal]) -> Result<(), SinkError> {
        if self.out_of_reach {
            let cause = "the dead-letter store is out of reach".into();
            return Err(SinkError::Unavailable { sink: "logs".into(), cause });
        }
        let mut recorded = self.recorded.lock().expect("a lock");
        recorded.extend(refusals.iter().map(|refusal| refusal.reason.clone()));
        Ok(())
    }
}
