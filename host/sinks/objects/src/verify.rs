//! Checks the claim logs below a sink's URL against the objects: reports what is missing, claimed twice, or claimed by
//! nobody.
//!
//! Reads only. It lists first and reads the links afterwards, so a pipeline that runs meanwhile may show as an object
//! that nobody claims, or as a claim that has no object yet.
//!
//! | found | reported as |
//! |---|---|
//! | an object of the last claim of a log is missing | `unfinished`: a run writes it |
//! | an object of an earlier claim is missing, or numbers or positions are | gap |
//! | two claims with the same key, or a link that begins before the end of the one before it | overlap |
//! | an object in no claim, or only in a claim that was given up | orphan |
//! | another length or (with `content`) another content than claimed, or an unreadable link | damaged |
//! | `NAME#1` beside the data, in a folder | leftover |
//! | a link with a reason why positions are passed over | hole, which is not a problem |

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::Read;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::answers;
use super::claim::{Claim, Data, LINK_BYTES_MAX, LogLink, link_number};
use super::settings::{Compression, LOG_FOLDER, ObjectFormat};
use super::staged::STAGING_FOLDER;
use super::{ObjectsSink, PROBE};
use shardmill_core::record::Position;
use shardmill_core::sink::SinkError;

/// Most links that are read at the same time.
const READS_MAX: usize = 16;

/// Result of a check.
#[derive(Debug, Default, Serialize)]
pub struct Audit {
    /// Number of claim logs: one per pipeline, sink and shard.
    pub logs: u64,
    /// Number of their links: claims, fences of owners, and repairs.
    pub links: u64,
    /// Number of objects that are claimed and exist.
    pub objects: u64,
    /// Number of rows in these objects, as claimed.
    pub rows: u64,
    /// Length of these objects, in bytes.
    pub bytes: u64,
    /// Number of logs whose last claim misses an object: a run writes it.
    pub unfinished: u64,
    /// Number of files in the staging folder: being written, or left by a killed writer. No reader sees them.
    pub temporary: u64,
    /// Positions that an operator has passed over.
    pub holes: Vec<LogHole>,
    /// Problems.
    pub problems: Vec<AuditProblem>,
}

/// Positions of a shard whose rows are in no object.
#[derive(Debug, Serialize)]
pub struct LogHole {
    /// Log, as a key in the store.
    pub log: String,
    /// Start, exclusive.
    pub from: Option<String>,
    /// End, inclusive.
    pub to: Option<String>,
    /// Reason.
    pub why: String,
}

/// A problem.
#[derive(Debug, Serialize)]
pub struct AuditProblem {
    /// Kind.
    pub kind: ProblemKind,
    /// Log or object, as a key in the store.
    pub place: String,
    /// Description.
    pub detail: String,
}

impl LogHole {
    fn of(log: &str, link: &LogLink) -> Self {
        let shown = |position: &Option<Position>| position.as_ref().map(Position::to_string);
        let why = link.hole.clone().unwrap_or_default();
        Self { log: log.to_owned(), from: shown(&link.from), to: shown(&link.to), why }
    }
}

/// Kind of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ProblemKind {
    /// Positions, a link or an object are missing.
    Gap,
    /// Two claims have the same positions or the same key.
    Overlap,
    /// No claim names an object.
    Orphan,
    /// A link or an object does not have the expected content.
    Damaged,
    /// A file of an interrupted write is beside the data. Readers of the folder may read it as data.
    Leftover,
}

impl fmt::Display for ProblemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gap => "gap",
            Self::Overlap => "overlap",
            Self::Orphan => "orphan",
            Self::Damaged => "damaged",
            Self::Leftover => "leftover",
        })
    }
}

/// Objects below the URL.
#[derive(Default)]
struct Listing {
    /// Numbers and keys of the links, by log.
    logs: BTreeMap<String, BTreeMap<u64, Path>>,
    /// Lengths of the data objects, by key.
    data: BTreeMap<Path, u64>,
    /// Number of files in the staging folder.
    temporary: u64,
}

impl ObjectsSink {
    /// Checks all claim logs below the sink's URL. With `content`, reads every object too.
    ///
    /// # Errors
    /// [`SinkError::Unavailable`] when the store cannot be read.
    pub async fn verify(&self, content: bool) -> Result<Audit, SinkError> {
        let listing = self.list().await?;
        let logs = listing.logs.len() as u64;
        let mut audit = Audit { logs, temporary: listing.temporary, ..Audit::default() };
        let mut claimed: HashMap<Path, String> = HashMap::new();
        for (log, links) in &listing.logs {
            let links = self.read_links(log, links, &mut audit).await?;
            check_chain(log, &links, &mut audit);
            let last = links.iter().rev().find(|link| link.claim.is_some()).map(|link| link.link);
            let given_up: Vec<u64> = links.iter().filter_map(|link| link.gives_up).collect();
            for link in links.iter().filter(|link| !given_up.contains(&link.link)) {
                let Some(claim) = &link.claim else { continue };
                if link.renamed_from.is_some() {
                    // A copy of the last claim of the former name's log, where it is checked.
                    continue;
                }
                let is_last = last == Some(link.link);
                let found = self.check_claim(log, link, claim, is_last, &listing, &mut audit);
                for (key, data) in found {
                    if let Some(other) = claimed.insert(key.clone(), log.clone()) {
                        let detail = format!("{log} and {other} both claim it");
                        audit.problem(ProblemKind::Overlap, &key, detail);
                    }
                    // An object of another length was reported already.
                    let bytes = listing.data[&key];
                    let has_length = data.bytes.is_none_or(|expected| bytes == expected);
                    if content && has_length {
                        self.check_content(&key, claim, (data, bytes), &mut audit).await?;
                    }
                }
            }
        }
        for key in listing.data.keys().filter(|key| !claimed.contains_key(*key)) {
            audit.problem(ProblemKind::Orphan, key, "no claim names it".into());
        }
        if let Some(staged) = &self.place.staged {
            let leftovers = staged.leftovers().await;
            for file in leftovers.map_err(|error| self.place.unavailable(error))? {
                let detail = "left by an interrupted write, not data: remove it; a run removes those \
                              with names that the sink gives";
                audit.problem(ProblemKind::Leftover, file.display(), detail.into());
            }
        }
        Ok(audit)
    }

    async fn list(&self) -> Result<Listing, SinkError> {
        let place = &self.place;
        let mut found = Listing::default();
        let mut objects = place.store.list(Some(&place.prefix));
        let own = place.path([LOG_FOLDER]);
        let temporary = place.path([LOG_FOLDER, STAGING_FOLDER]);
        loop {
            let object = match objects.try_next().await {
                Ok(Some(object)) => object,
                Ok(None) => return Ok(found),
                Err(error) => return Err(place.failed("list", &place.prefix, &error)),
            };
            let key = object.location;
            if place.staged.is_some() && key.prefix_matches(&temporary) {
                found.temporary += 1;
                continue;
            }
            match (key.prefix_matches(&own), link_number(&key)) {
                (false, _) => {
                    found.data.insert(key, object.size);
                }
                (true, Some(number)) => {
                    let log = key.as_ref().rsplit_once('/').map_or("", |(log, _)| log).to_owned();
                    found.logs.entry(log).or_default().insert(number, key);
                }
                (true, None) if key.filename() == Some(PROBE) => {}
                (true, None) => {
                    found.data.insert(key, object.size);
                }
            }
        }
    }

    /// Returns the links that can be read, by number. Reports the others.
    async fn read_links(
        &self,
        log: &str,
        links: &BTreeMap<u64, Path>,
        audit: &mut Audit,
    ) -> Result<Vec<LogLink>, SinkError> {
        let reads = links.iter().map(|(number, path)| async move {
            Ok::<_, SinkError>((*number, self.read(path, LINK_BYTES_MAX).await?))
        });
        let read: Vec<(u64, Bytes)> =
            futures::stream::iter(reads).buffered(READS_MAX).try_collect().await?;
        audit.links += read.len() as u64;
        let mut found = Vec::new();
        for (number, bytes) in read {
            match serde_json::from_slice::<LogLink>(&bytes) {
                Ok(link) if link.link == number => found.push(link),
                Ok(link) => {
                    let detail = format!("expected link {number}, found link {}", link.link);
                    audit.problem(ProblemKind::Damaged, log, detail);
                }
                Err(error) => {
                    audit.problem(ProblemKind::Damaged, log, format!("link {number}: {error}"));
                }
            }
        }
        Ok(found)
    }

    async fn read(&self, path: &Path, bytes_max: u64) -> Result<Bytes, SinkError> {
        let read = answers::read(&*self.place.store, path, bytes_max).await;
        read.map_err(|error| self.place.failed("read", path, &error))
    }

    /// Looks for a claim's objects; returns those that exist.
    fn check_claim<'c>(
        &self,
        log: &str,
        link: &LogLink,
        claim: &'c Claim,
        is_last: bool,
        listing: &Listing,
        audit: &mut Audit,
    ) -> Vec<(Path, &'c Data)> {
        let mut found = Vec::new();
        let mut missing = Vec::new();
        for data in &claim.data {
            let Some(key) = self.place.below(&data.key) else {
                let detail = format!("link {} has an invalid key: {:?}", link.link, data.key);
                audit.problem(ProblemKind::Damaged, log, detail);
                continue;
            };
            let Some(bytes) = listing.data.get(&key) else {
                missing.push(data.key.as_str());
                continue;
            };
            if let Some(expected) = data.bytes.filter(|expected| expected != bytes) {
                let detail = format!("expected {expected} bytes as claimed, found {bytes}");
                audit.problem(ProblemKind::Damaged, &key, detail);
            }
            audit.objects += 1;
            audit.rows += data.rows;
            audit.bytes += bytes;
            found.push((key, data));
        }
        match missing.is_empty() {
            true => {}
            false if is_last => audit.unfinished += 1,
            false => {
                let detail = format!("link {} claims {missing:?}, which is missing", link.link);
                audit.problem(ProblemKind::Gap, log, detail);
            }
        }
        found
    }

    /// Reads an object and compares its content with its claim: the hash of its lines, or in Parquet the number of
    /// rows.
    async fn check_content(
        &self,
        key: &Path,
        claim: &Claim,
        (data, bytes_max): (&Data, u64),
        audit: &mut Audit,
    ) -> Result<(), SinkError> {
        let bytes = self.read(key, bytes_max).await?;
        let layout = claim.layout.clone();
        let (expected_hash, expected_rows) = (data.sha256.clone(), data.rows);
        let compared = tokio::task::spawn_blocking(move || match layout.format {
            ObjectFormat::Parquet => {
                let file = SerializedFileReader::new(bytes).map_err(|error| error.to_string())?;
                let rows = file.metadata().file_metadata().num_rows();
                match u64::try_from(rows) == Ok(expected_rows) {
                    true => Ok(()),
                    false => Err(format!("expected {expected_rows} rows as claimed, found {rows}")),
                }
            }
            ObjectFormat::Ndjson | ObjectFormat::Raw => {
                let found = hash(&bytes, layout.compression).map_err(|error| error.to_string())?;
                match found == expected_hash {
                    true => Ok(()),
                    false => Err(format!(
                        "expected a content hash of {expected_hash} as claimed, found {found}"
                    )),
                }
            }
        });
        let broken_off = |error| self.place.unavailable(format!("reading {key}: {error}"));
        if let Err(detail) = compared.await.map_err(broken_off)? {
            audit.problem(ProblemKind::Damaged, key, detail);
        }
        Ok(())
    }
}

/// Returns the SHA-256 of an object's decompressed content, in hex.
fn hash(bytes: &[u8], compression: Compression) -> std::io::Result<String> {
    let mut content: Box<dyn Read + '_> = match compression {
        Compression::None => Box::new(bytes),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(bytes)),
        Compression::Zstd => Box::new(zstd::Decoder::new(bytes)?),
    };
    let mut hash = Sha256::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        match content.read(&mut piece)? {
            0 => return Ok(hex::encode(hash.finalize())),
            read => hash.update(&piece[..read]),
        }
    }
}

/// Checks that each link begins where the one before it ended.
fn check_chain(log: &str, links: &[LogLink], audit: &mut Audit) {
    let shown = |at: &Option<Position>| {
        at.as_ref().map_or_else(|| "the beginning".to_owned(), Position::to_string)
    };
    if let Some(first) = links.first().filter(|link| link.hole.is_some()) {
        audit.holes.push(LogHole::of(log, first));
    }
    for pair in links.windows(2) {
        let [before, link] = pair else { continue };
        if link.link != before.link + 1 {
            let detail = format!("the links between {} and {} are gone", before.link, link.link);
            audit.problem(ProblemKind::Gap, log, detail);
        }
        if link.hole.is_some() {
            audit.holes.push(LogHole::of(log, link));
            continue;
        }
        // The log continues at the start of the claim that was given up.
        if link.gives_up.is_some() {
            continue;
        }
        // The first claim of a log begins at the position of its pipeline, whatever that is.
        let kind = match link.from.cmp(&before.to) {
            std::cmp::Ordering::Equal => continue,
            std::cmp::Ordering::Greater if before.to.is_none() => continue,
            std::cmp::Ordering::Greater => ProblemKind::Gap,
            std::cmp::Ordering::Less => ProblemKind::Overlap,
        };
        let detail = format!(
            "expected link {} to begin after {}, where the one before it ended, found {}",
            link.link,
            shown(&before.to),
            shown(&link.from)
        );
        audit.problem(kind, log, detail);
    }
    for link in links.iter().filter(|link| link.claim.is_some() && link.to <= link.from) {
        let detail = format!("link {} ends at or before its beginning", link.link);
        audit.problem(ProblemKind::Damaged, log, detail);
    }
}

impl Audit {
    fn problem(&mut self, kind: ProblemKind, place: impl fmt::Display, detail: String) {
        self.problems.push(AuditProblem { kind, place: place.to_string(), detail });
    }
}
