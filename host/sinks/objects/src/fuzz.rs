//! Fuzz target of claim logs, as owners, operators and lifecycle rules leave them: compares the position of a log with
//! one computed from all of its links.

#![allow(clippy::expect_used, reason = "a finding is a panic")]

use std::collections::BTreeMap;
use std::sync::Arc;

use fastrand::Rng;
use futures::TryStreamExt as _;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore as _, ObjectStoreExt as _};

use super::claim::{Appended, Claim, ClaimLog, Data, LogLink, OwnerId};
use super::settings::{Compression, ObjectLayout};
use super::store::StorePlace;
use shardmill_core::fuzzing::{Choices, FuzzTarget};
use shardmill_core::record::{
    PipelineName, Position, RouteName, SequenceNumber, ShardId, ShardKey, SinkName, StreamIdentity,
};

pub use super::parquet::fuzz::COLUMNS as PARQUET_COLUMNS;

/// Target that checks that a claim log gives its position or reports damage, and that a new owner continues from there.
pub const CLAIMS: FuzzTarget = FuzzTarget {
    name: "claims",
    run,
    grow,
    words: &[
        "{\"version\":3,\"link\":1",
        "\"to\":null",
        "\"claim\":",
        "..",
        "/",
        "\"last_claim\":1",
    ],
};

/// Newest version of the link format that is read.
const VERSION_MAX: u32 = 3;

/// Event in the life of a log.
enum Step {
    /// The owner claims this number of objects, and writes this number of them.
    Claim(usize, usize),
    Fence,
    GiveUp,
    PassOver,
    /// Somebody writes other bytes in the place of the next link.
    Damage(Vec<u8>),
    /// A lifecycle rule removes a link.
    Expire(u64),
    /// Another program writes a file into the folder.
    Stray(&'static str),
}

struct World {
    place: StorePlace,
    log: ClaimLog,
    /// Position that the log must have while only its owners write to it.
    position: Option<Position>,
    /// Last link that was appended.
    last: Option<LogLink>,
    /// Objects of the last claim that are not written.
    missing: Vec<String>,
    is_intact: bool,
    sequence: u64,
}

/// Names of files that somebody may put among the links.
const STRAYS: [&str; 5] =
    ["notes.txt", "7.json", "000000000001.json.tmp", "99999999999999999999.json", "-1.json"];

fn run(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let mut choices = Choices::new(data);
        let mut world = World::new();
        for _ in 0..choices.below(12) {
            let step = Step::of(&mut choices);
            world.take(step, &mut choices).await;
        }
        world.check().await;
    });
}

impl Step {
    fn of(choices: &mut Choices<'_>) -> Self {
        match choices.below(16) {
            0..=5 => {
                let objects = choices.below(3);
                Self::Claim(objects, choices.below(objects + 1))
            }
            6..=8 => Self::Fence,
            9 | 10 => Self::GiveUp,
            11 => Self::PassOver,
            12 | 13 => {
                let length = choices.below(200);
                Self::Damage(choices.bytes(length).to_vec())
            }
            14 => Self::Expire(choices.byte().into()),
            _ => Self::Stray(choices.one_of::<&str>(&STRAYS)),
        }
    }
}

impl World {
    fn new() -> Self {
        let sink = SinkName::new("files");
        let store = Arc::new(InMemory::new());
        let place = StorePlace::over(sink, store, Path::from("below"), "memory:///below".into());
        let stream = StreamIdentity { name: "cars".into(), arn: "arn".into(), created_ms: 7 };
        let shard = ShardKey {
            pipeline: PipelineName::new("cars"),
            stream: Arc::new(stream),
            shard: ShardId::new("shardId-000000000000"),
        };
        let log = ClaimLog::new(place.clone(), &shard);
        Self {
            place,
            log,
            position: None,
            last: None,
            missing: Vec::new(),
            is_intact: true,
            sequence: 0,
        }
    }

    async fn take(&mut self, step: Step, choices: &mut Choices<'_>) {
        match step {
            Step::Claim(objects, written) => self.claim(objects, written, choices).await,
            Step::Fence => {
                let owner = OwnerId::random();
                match self.log.fence(&owner, None).await {
                    Ok(fence) => self.last = Some(fence),
                    Err(error) => assert!(!self.is_intact, "{error}"),
                }
            }
            Step::GiveUp => {
                let Some(last) = self.last.clone().filter(|_| self.is_intact) else { return };
                let Ok(Some(unkept)) = self.log.unkept(&last).await else { return };
                let link = LogLink::giving_up(last.link + 1, OwnerId::random(), &unkept);
                self.append(link).await;
                self.missing.clear();
            }
            Step::PassOver => {
                let Some(last) = self.last.clone().filter(|_| self.is_intact) else { return };
                let to = self.next_position();
                let from = last.to.clone();
                self.append(LogLink::passing_over(
                    last.link + 1,
                    last.owner,
                    from,
                    to.clone(),
                    "why".into(),
                ))
                .await;
                self.missing.clear();
                self.position = Some(to);
            }
            Step::Damage(bytes) => {
                let bytes = self.spoilt(bytes);
                let number = self.last.as_ref().map_or(0, |last| last.link) + 1;
                self.put(&self.link_path(number), bytes).await;
                self.is_intact = false;
            }
            Step::Expire(number) => {
                let last = self.last.as_ref().map_or(0, |last| last.link);
                let number = 1 + number % last.max(1);
                let _missing = self.place.store.delete(&self.link_path(number)).await;
                self.is_intact = false;
            }
            Step::Stray(name) => self.put(&self.log.folder_path().join(name), b"{}".to_vec()).await,
        }
    }

    async fn claim(&mut self, objects: usize, written: usize, choices: &mut Choices<'_>) {
        let Some(last) = self.last.clone().filter(|_| self.is_intact) else { return };
        // An owner keeps what it has claimed before it claims more.
        for key in std::mem::take(&mut self.missing) {
            self.put(&self.log.data_path(&key).expect("a path"), b"data".to_vec()).await;
        }
        let from = self.log.standing(&last).await.expect("intact").position;
        let to = self.next_position();
        let data: Vec<Data> = (0..objects)
            .map(|object| Data {
                route: RouteName::new("rows"),
                key: format!(
                    "{}/{}-{object}.ndjson",
                    choices.one_of(&["a", "year=2013", "é%2F"]),
                    last.link
                ),
                rows: 1,
                line_bytes: 1,
                sha256: String::new(),
                bytes: Some(4),
            })
            .collect();
        let keys: Vec<String> = data.iter().map(|data| data.key.clone()).collect();
        let layout = ObjectLayout {
            format: Default::default(),
            compression: Compression::None,
            folder: Default::default(),
        };
        let claim = Claim { revision: "g".into(), layout, limits: None, data };
        let link = LogLink::claim(last.link + 1, last.owner, from.clone(), to.clone(), claim);
        self.append(link).await;
        for key in &keys[..written] {
            self.put(&self.log.data_path(key).expect("a path"), b"data".to_vec()).await;
        }
        self.missing = keys[written..].to_vec();
        self.position = if self.missing.is_empty() { Some(to) } else { from };
    }

    /// Makes bytes that damage the log: the chosen ones, or the last link with some bytes changed.
    fn spoilt(&self, bytes: Vec<u8>) -> Vec<u8> {
        match (&self.last, bytes.first()) {
            (Some(last), Some(1..=127)) => {
                let mut json = serde_json::to_vec(last).expect("JSON");
                for pair in bytes[1..].chunks(2) {
                    let place = usize::from(pair[0]) * 3 % json.len();
                    json[place] = pair.get(1).copied().unwrap_or(b'0');
                }
                json
            }
            _ => bytes,
        }
    }

    fn next_position(&mut self) -> Position {
        self.sequence += 1;
        Position { sequence: SequenceNumber::from(self.sequence), sub_sequence: 0 }
    }

    async fn append(&mut self, link: LogLink) {
        match self.log.append(&link).await.expect("the store is there") {
            Appended::Ours => self.last = Some(link),
            Appended::Taken(other) => panic!("link {} is taken by {other:?}", link.link),
        }
    }

    fn link_path(&self, number: u64) -> Path {
        self.log.folder_path().join(format!("{number:012}.json"))
    }

    async fn put(&self, path: &Path, bytes: Vec<u8>) {
        self.place.store.put(path, bytes.into()).await.expect("memory takes all");
    }

    /// Reads all links.
    async fn links(&self) -> BTreeMap<u64, Option<LogLink>> {
        let folder = self.log.folder_path();
        let found: Vec<_> =
            self.place.store.list(Some(&folder)).try_collect().await.expect("listed");
        let mut links = BTreeMap::new();
        for object in found {
            let name = object.location.filename().expect("a name");
            let digits = name.strip_suffix(".json").filter(|digits| digits.len() == 12);
            let Some(number) = digits.and_then(|digits| digits.parse::<u64>().ok()) else {
                continue;
            };
            let bytes = self.place.store.get(&object.location).await.expect("there").bytes().await;
            let link: Option<LogLink> = serde_json::from_slice(&bytes.expect("bytes")).ok();
            let is_sound = |link: &LogLink| link.version <= VERSION_MAX && link.link == number;
            links.insert(number, link.filter(is_sound));
        }
        links
    }

    async fn check(&self) {
        let links = self.links().await;
        let found = self.log.last().await;
        let last = match links.last_key_value() {
            None => {
                assert!(found.expect("an empty log is readable").is_none());
                return;
            }
            Some((number, None)) => {
                assert!(found.is_err(), "link {number} is damaged, and was taken for {found:?}");
                return;
            }
            Some((_, Some(last))) => {
                assert_eq!(found.expect("the last link is sound").as_ref(), Some(last));
                last
            }
        };
        let expected = self.reference(&links, last).await;
        let standing = self.log.standing(last).await;
        let position = standing.as_ref().ok().map(|standing| standing.position.clone());
        assert_eq!(position, expected, "after {last:?}");
        if self.is_intact {
            assert_eq!(position, Some(self.position.clone()), "the owners know where they are");
        }
        // The next owner of the shard continues from there.
        let owner = OwnerId::random();
        let fence = self.log.fence(&owner, None).await.expect("nobody else appends");
        assert_eq!(fence.link, last.link + 1);
        assert_eq!(self.log.last().await.expect("readable").as_ref(), Some(&fence));
        let after = self.log.standing(&fence).await.ok().map(|standing| standing.position);
        assert_eq!(after, expected, "a fence moves nothing");
    }

    /// Computes the position of the log, by the first table of the module `claim`. `None`: a link is damaged or gone.
    async fn reference(
        &self,
        links: &BTreeMap<u64, Option<LogLink>>,
        last: &LogLink,
    ) -> Option<Option<Position>> {
        let claim = match (&last.claim, last.last_claim) {
            (Some(_), _) => last,
            (None, Some(number)) => links.get(&number)?.as_ref()?,
            (None, None) => return Some(last.to.clone()),
        };
        let (to, promised) = (claim.to.clone()?, claim.claim.as_ref()?);
        for data in &promised.data {
            let path = self.place.below(&data.key)?;
            assert!(path.prefix_matches(&self.place.prefix), "{path} is not the sink's");
            if self.place.store.head(&path).await.is_err() {
                return Some(claim.from.clone());
            }
        }
        Some(Some(to))
    }
}

fn grow(random: &mut Rng) -> Vec<u8> {
    (0..random.usize(10..80)).map(|_| random.u8(..)).collect()
}
