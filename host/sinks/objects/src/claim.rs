//! Claim log of one shard: links that are written once, in order, and never changed.
//!
//! A link says who owns the shard from then on. A claim also says which data its owner is about to write. This module
//! stores, finds and appends links; what they mean for a commit is in `writer`.
//!
//! Invariants:
//! - Links have the numbers 1, 2, 3 … without a gap. A link is written with a conditional create, so each number
//!   belongs to the first writer that used it. The number is the fence: the store itself refuses the second writer.
//! - A claim that is not the last one is complete: its successor was appended after its data was written.
//! - `from` of a link is `to` of the link before it, except on a link that gives up a claim or passes over a hole.
//!
//! | the last claim | its data | the sink's position |
//! |---|---|---|
//! | none | | none, or the position in the last fence |
//! | `(from, to]` | complete, or no object promised | `to` |
//! | `(from, to]` | an object is missing | `from`; `(from, to]` must be produced again |
//!
//! | link | `from` | `to` | written by |
//! |---|---|---|---|
//! | fence | `to` of the link before it | the same | each acquisition of the shard |
//! | claim | `to` of the link before it | end of its data | each commit |
//! | `gives_up` | start of the claim that is given up | the same | `shardmill objects give-up` |
//! | `hole` | start of what is missing, as far as known | the checkpoint | `shardmill objects skip` |
//!
//! The first link of a renamed sink's log is a fence or a claim that continues the log of the former name
//! (`renamed_from`).
//!
//! Order of an acquisition: append a fence, then look whether the data of the last claim is complete. The other order
//! would miss an earlier owner that claims in between. After the fence, an earlier owner cannot append; it can only
//! finish the data of the claim that it has.
//!
//! Races:
//! - Two processes acquire at the same time. One gets the number, the other tries the next one; the last fence owns.
//! - An append succeeds and its answer is lost. The retry finds a link equal to its own (only `by` may differ) and
//!   takes it as its own: the owner id is random for each acquisition.
//! - A link is appended while [`ClaimLog::last`] searches. The result was the last link at some moment since the call;
//!   an append after it then finds its number taken.
//! - A bucket's lifecycle rule removes old links. The search by numbers ends at the first missing one, so a listing
//!   looks for later links.

use std::fmt;

use futures::TryStreamExt;
use object_store::path::Path;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::answers;
use super::keys::KeyLimits;
use super::settings::{LOG_FOLDER, ObjectLayout};
use super::staged::Created;
use super::store::StorePlace;
use shardmill_core::owner::{OwnerName, Ownership, StateMark};
use shardmill_core::record::REDRIVE_SHARD;
use shardmill_core::record::{PipelineName, Position, RouteName, ShardKey};
use shardmill_core::sink::SinkError;

/// Version of the link format that this code writes, and the newest that it reads. Version 1 had no `format`, `folder`
/// and `bytes`; version 2 had no `limits`, `gives_up` and `hole`.
const LINK_VERSION: u32 = 3;
/// Most tries of an acquisition while an earlier owner keeps appending.
const FENCE_ATTEMPTS_MAX: u32 = 100;
/// Most bytes of a link. A claim with the most objects of a commit and the longest keys has a tenth of it.
pub(super) const LINK_BYTES_MAX: u64 = 16 << 20;
/// Most links of a log: their numbers have 12 digits.
const LINKS_MAX: u64 = 1_000_000_000_000;

/// Owner of a shard: one id per acquisition, 32 hex digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct OwnerId(String);

impl OwnerId {
    /// Makes an id that no one else has.
    pub(super) fn random() -> Self {
        Self(Uuid::new_v4().simple().to_string())
    }

    /// Returns the id's digits.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One link of a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LogLink {
    /// Version of the format.
    pub(super) version: u32,
    /// Number of the link, from 1, without gaps.
    pub(super) link: u64,
    /// Owner that wrote it: one id per acquisition.
    pub(super) owner: OwnerId,
    /// Position of the log before this link, exclusive; null: before everything.
    pub(super) from: Option<Position>,
    /// Position of the log after this link, inclusive; a fence repeats `from`.
    pub(super) to: Option<Position>,
    /// On a fence: number of the last claim before it.
    pub(super) last_claim: Option<u64>,
    /// Data that the owner is about to write; null: a fence, written on acquiring the shard.
    pub(super) claim: Option<Claim>,
    /// Former name of the sink whose log this link continues. If the link is a claim, it is the last one of that log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) renamed_from: Option<String>,
    /// On a link that an operator asked for: number of the claim that is given up. The log is at the start of that
    /// claim again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) gives_up: Option<u64>,
    /// On a link that an operator asked for: reason why the positions in `(from, to]` are passed over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) hole: Option<String>,
    /// Process that wrote the link, and its state; missing in links of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) by: Option<WrittenBy>,
}

/// Process that wrote a link, and its state at that time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WrittenBy {
    /// Process, in the form of [`OwnerName::to_text`].
    owner: String,
    /// Id of its state database.
    state_id: String,
    /// Number of the state's last durable write before the link.
    state_number: i64,
}

impl WrittenBy {
    /// Returns the owner and its state at this moment.
    pub(super) fn now(ownership: &Ownership) -> Self {
        let mark = ownership.mark();
        Self {
            owner: ownership.owner.to_text(),
            state_id: mark.state.to_string(),
            state_number: mark.number,
        }
    }

    /// Returns the process; `None`: the text is not valid.
    pub(super) fn owner(&self) -> Option<OwnerName> {
        OwnerName::parse(&self.owner)
    }

    /// Returns the state.
    pub(super) fn mark(&self) -> StateMark {
        StateMark { state: self.state_id.as_str().into(), number: self.state_number }
    }
}

/// Promise to write data under keys that nobody else uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Claim {
    /// Revision (stages, digests, configuration) that makes the rows.
    #[serde(rename = "generation")]
    pub(super) revision: String,
    /// Layout of the data.
    #[serde(flatten)]
    pub(super) layout: ObjectLayout,
    /// Longest names and keys: rows that need longer ones were refused. Claims of versions before 3 refused none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) limits: Option<KeyLimits>,
    /// Objects, by route name and folder; empty: the range has no rows.
    pub(super) data: Vec<Data>,
}

/// One promised object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Data {
    /// Route of its rows.
    pub(super) route: RouteName,
    /// Key under the sink's URL.
    pub(super) key: String,
    /// Number of its rows.
    pub(super) rows: u64,
    /// Length of its rows as lines, before they are compressed or become columns.
    pub(super) line_bytes: u64,
    /// SHA-256 of these lines, in hex.
    pub(super) sha256: String,
    /// Length of the object; missing in claims of version 1.
    #[serde(default)]
    pub(super) bytes: Option<u64>,
}

impl Data {
    /// Returns the object's folder below the sink's URL.
    pub(super) fn folder(&self) -> &str {
        self.key.rsplit_once('/').map_or("", |(folder, _)| folder)
    }
}

/// Outcome of an append.
#[derive(Debug)]
pub(super) enum Appended {
    /// The link is in the log, by this call or by an earlier one whose answer was lost.
    Ours,
    /// The number belongs to another link.
    Taken(Box<LogLink>),
}

/// Position of a log, and its unfinished claim.
#[derive(Debug)]
pub(super) struct Standing {
    /// Last position up to which all data exists.
    pub(super) position: Option<Position>,
    /// Claim after that position whose data is not complete.
    pub(super) unfinished: Option<UnfinishedClaim>,
}

/// A claim whose data is not complete.
#[derive(Clone, Debug)]
pub(super) struct UnfinishedClaim {
    /// Number of the claim's link.
    pub(super) link: u64,
    /// Start of its position range, exclusive.
    pub(super) from: Option<Position>,
    /// End of its position range, inclusive.
    pub(super) to: Position,
    /// Data that it promises.
    pub(super) claim: Claim,
}

impl UnfinishedClaim {
    /// Returns the commands that help if the claim can never be finished, as the end of an error text.
    pub(super) fn way_out(&self, place: &StorePlace, shard: &str) -> String {
        let log = format!("--sink {} --shard {shard}", place.sink);
        format!(
            "; if that is not possible, stop the pipeline and give up the claim, so that its rows are \
             claimed again: `shardmill objects give-up {log}`; if its objects were removed after they \
             were written, continue at the checkpoint: `shardmill objects skip {log}`"
        )
    }
}

/// Returns the last link of the pipeline's newest redrive, with its shard; `None`: there was no redrive. Of all links
/// that redrives wrote, it has the newest mark of the state.
pub(super) async fn newest_redrive(
    place: &StorePlace,
    pipeline: &PipelineName,
) -> Result<Option<(String, LogLink)>, SinkError> {
    let folder = place.path([LOG_FOLDER, pipeline.as_str(), place.sink.as_str()]);
    let listed = place.store.list_with_delimiter(Some(&folder)).await;
    let listed = listed.map_err(|error| place.failed("list", &folder, &error))?;
    let begun_ms = |folder: &Path| -> Option<i64> {
        folder.filename()?.strip_prefix("letters@")?.parse().ok()
    };
    let redrives = listed.common_prefixes.iter();
    let newest = redrives.filter_map(|folder| Some((begun_ms(folder)?, folder))).max();
    let Some((begun_ms, _)) = newest else { return Ok(None) };
    let log = ClaimLog {
        place: place.clone(),
        folder: vec![
            LOG_FOLDER.into(),
            pipeline.as_str().into(),
            place.sink.as_str().into(),
            format!("letters@{begun_ms}"),
            REDRIVE_SHARD.into(),
        ],
    };
    Ok(log.last().await?.map(|link| (REDRIVE_SHARD.to_owned(), link)))
}

/// Claim log of one shard.
#[derive(Clone, Debug)]
pub(super) struct ClaimLog {
    place: StorePlace,
    folder: Vec<String>,
}

impl ClaimLog {
    /// Makes the log of a shard, without a request.
    pub(super) fn new(place: StorePlace, shard: &ShardKey) -> Self {
        let folder = vec![
            LOG_FOLDER.into(),
            shard.pipeline.as_str().into(),
            place.sink.as_str().into(),
            format!("{}@{}", shard.stream.name, shard.stream.created_ms),
            shard.shard.as_str().into(),
        ];
        Self { place, folder }
    }

    /// Returns the last link; `None`: the log is empty. Another owner may append meanwhile: the result was the last
    /// link at some moment since the call.
    pub(super) async fn last(&self) -> Result<Option<LogLink>, SinkError> {
        let mut number = self.gallop(0).await?;
        // shardmill never deletes links, but a bucket may have a lifecycle rule that removes old objects. A search that
        // expects every number would then end too early.
        while let Some(later) = self.newest_after(number).await? {
            number = self.gallop(later).await?;
        }
        if number == 0 {
            return Ok(None);
        }
        self.read(number)
            .await?
            .map(Some)
            .ok_or_else(|| self.gone(number, "it existed a moment ago"))
    }

    /// Appends a fence after the last link. From then on no earlier owner can append a claim.
    pub(super) async fn fence(
        &self,
        owner: &OwnerId,
        by: Option<WrittenBy>,
    ) -> Result<LogLink, SinkError> {
        let mut last = self.last().await?;
        for _ in 0..FENCE_ATTEMPTS_MAX {
            let fence = LogLink { by: by.clone(), ..fence_after(last.as_ref(), owner) };
            match self.append(&fence).await? {
                Appended::Ours => return Ok(fence),
                Appended::Taken(_) => last = self.last().await?,
            }
        }
        Err(self.place.unavailable(format!(
            "cannot acquire {} in {}: another owner has appended {FENCE_ATTEMPTS_MAX} times \
             meanwhile; stop the other process",
            self.folder_path(),
            self.place.url
        )))
    }

    /// Continues the log of the sink's former name, to which nobody can append from then on. Does nothing if that log
    /// is empty, or was continued before.
    ///
    /// The first link is a copy of the old log's last claim if its data is not complete, and otherwise a fence at the
    /// old log's position. The copy keeps the keys, so that the data is finished under the keys that were promised.
    pub(super) async fn adopt(&self, old: &Self, owner: &OwnerId) -> Result<(), SinkError> {
        let name = old.place.sink.to_string();
        if let Some(last) = self.last().await? {
            let first = self.read(1).await?.and_then(|first| first.renamed_from);
            let went_on = [&first, &last.renamed_from].contains(&&Some(name.clone()));
            if went_on || old.last().await?.is_none() {
                return Ok(());
            }
            if last.to.is_some() {
                return Err(self.place.unavailable(format!(
                    "{} and {} in {} are both claim logs with claims: remove the wrong one",
                    self.folder_path(),
                    old.folder_path(),
                    self.place.url
                )));
            }
        }
        if old.last().await?.is_none() {
            return Ok(());
        }
        let fence = old.fence(owner, None).await?;
        let Standing { position, unfinished } = old.standing(&fence).await?;
        let number = self.last().await?.map_or(0, |last| last.link) + 1;
        let mut link = match unfinished {
            Some(UnfinishedClaim { from, to, claim, .. }) => {
                LogLink::claim(number, owner.clone(), from, to, claim)
            }
            None => LogLink {
                link: number,
                from: position.clone(),
                to: position,
                last_claim: None,
                ..fence_after(None, owner)
            },
        };
        link.renamed_from = Some(name);
        match self.append(&link).await? {
            Appended::Ours => Ok(()),
            Appended::Taken(_) => Err(self.place.unavailable(format!(
                "cannot continue {} in {}: another process appends to it; stop the other process",
                old.folder_path(),
                self.folder_path()
            ))),
        }
    }

    /// Writes a link under its number, unless the number is taken. A link that equals ours counts as ours.
    pub(super) async fn append(&self, link: &LogLink) -> Result<Appended, SinkError> {
        let json = serde_json::to_vec_pretty(link)
            .map_err(|error| self.place.unavailable(format!("cannot write a link: {error}")))?;
        if self.place.create(&self.path(link.link), json).await? == Created::New {
            return Ok(Appended::Ours);
        }
        match self.read(link.link).await? {
            // A retry of the same commit. `by` may differ: the state may have advanced between the tries.
            Some(found) if LogLink { by: link.by.clone(), ..found.clone() } == *link => {
                Ok(Appended::Ours)
            }
            Some(found) => Ok(Appended::Taken(Box::new(found))),
            None => Err(self.gone(link.link, "it existed a moment ago")),
        }
    }

    /// Returns the position of the log after its last link, and its unfinished claim.
    pub(super) async fn standing(&self, last: &LogLink) -> Result<Standing, SinkError> {
        let Some(unfinished) = self.last_claim(last).await? else {
            return Ok(Standing { position: last.to.clone(), unfinished: None });
        };
        match self.is_kept(&unfinished).await? {
            true => Ok(Standing { position: Some(unfinished.to), unfinished: None }),
            false => {
                let position = unfinished.from.clone();
                Ok(Standing { position, unfinished: Some(unfinished) })
            }
        }
    }

    /// Returns whether all objects of a claim exist.
    async fn is_kept(&self, claim: &UnfinishedClaim) -> Result<bool, SinkError> {
        for data in &claim.claim.data {
            let found = self.place.exists(&self.data_path(&data.key)?).await;
            let way_out = || claim.way_out(&self.place, self.shard());
            if !found.map_err(|error| self.place.with_way_out(error, &way_out()))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns the last claim if its data is not complete, or if the store refuses even to look for it.
    pub(super) async fn unkept(
        &self,
        last: &LogLink,
    ) -> Result<Option<UnfinishedClaim>, SinkError> {
        let Some(claim) = self.last_claim(last).await? else { return Ok(None) };
        let is_kept = self.is_kept(&claim).await.unwrap_or(false);
        Ok(Some(claim).filter(|_| !is_kept))
    }

    /// Returns whether the link of the last claim, which a fence points at, is gone.
    pub(super) async fn is_claim_gone(&self, last: &LogLink) -> Result<bool, SinkError> {
        match (&last.claim, last.last_claim) {
            (None, Some(number)) => Ok(self.read(number).await?.is_none()),
            _ => Ok(false),
        }
    }

    /// Returns the claim with a link number.
    pub(super) async fn claim(&self, number: u64) -> Result<Option<UnfinishedClaim>, SinkError> {
        match self.read(number).await? {
            Some(link) => self.as_claim(link).map(Some),
            None => Ok(None),
        }
    }

    fn shard(&self) -> &str {
        self.folder.last().map_or("", String::as_str)
    }

    /// Returns the path of a data key.
    pub(super) fn data_path(&self, key: &str) -> Result<Path, SinkError> {
        self.place.below(key).ok_or_else(|| {
            self.place.unavailable(format!(
                "a link in {} has an invalid key: {key:?}",
                self.folder_path()
            ))
        })
    }

    /// Returns the last claim up to a link: its own, or the one that the fence points at.
    async fn last_claim(&self, last: &LogLink) -> Result<Option<UnfinishedClaim>, SinkError> {
        if last.claim.is_some() {
            return self.as_claim(last.clone()).map(Some);
        }
        let Some(number) = last.last_claim else { return Ok(None) };
        let Some(link) = self.read(number).await? else {
            return Err(self.gone(number, &format!("link {} refers to it", last.link)));
        };
        self.as_claim(link).map(Some)
    }

    fn as_claim(&self, link: LogLink) -> Result<UnfinishedClaim, SinkError> {
        match (link.to, link.claim) {
            (Some(to), Some(claim)) => {
                Ok(UnfinishedClaim { link: link.link, from: link.from, to, claim })
            }
            _ => Err(self.damaged(link.link, "expected a claim with an end")),
        }
    }

    async fn read(&self, number: u64) -> Result<Option<LogLink>, SinkError> {
        let path = self.path(number);
        let bytes = match answers::read(&*self.place.store, &path, LINK_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(self.place.failed("read", &path, &error)),
        };
        let link: LogLink = serde_json::from_slice(&bytes)
            .map_err(|error| self.damaged(number, &error.to_string()))?;
        if link.version > LINK_VERSION {
            return Err(self.place.unavailable(format!(
                "{path} in {} has the unsupported format {}, expected at most {LINK_VERSION}: run the newer \
                 version of shardmill that wrote it",
                self.place.url, link.version
            )));
        }
        if link.link != number {
            return Err(self.damaged(number, &format!("its number is {}", link.link)));
        }
        Ok(Some(link))
    }

    /// Returns the last number of the unbroken run after `present`, in O(log n) requests: doubles the step while links
    /// exist, then halves the rest.
    async fn gallop(&self, present: u64) -> Result<u64, SinkError> {
        let (mut low, mut step) = (present, 1);
        while self.has(low + step).await? {
            low += step;
            step *= 2;
            if step > LINKS_MAX {
                return Err(self.place.unavailable(format!(
                    "expected an end of the claim log in {}, found that the store has every link that is \
                     requested; check its `url` and its server",
                    self.place.url
                )));
            }
        }
        let mut high = low + step;
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.has(middle).await? {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    async fn has(&self, number: u64) -> Result<bool, SinkError> {
        self.place.exists(&self.path(number)).await
    }

    /// Returns the highest link number above `number`, by listing.
    async fn newest_after(&self, number: u64) -> Result<Option<u64>, SinkError> {
        let folder = self.folder_path();
        let mut listing = self.place.store.list_with_offset(Some(&folder), &self.path(number));
        let mut newest = None;
        loop {
            match listing.try_next().await {
                Ok(Some(object)) => newest = newest.max(link_number(&object.location)),
                Ok(None) => return Ok(newest.filter(|newest| *newest > number)),
                Err(error) => return Err(self.place.failed("list", &folder, &error)),
            }
        }
    }

    /// Checks that links can be written.
    pub(super) fn check_path(&self) -> Result<(), SinkError> {
        self.place.limits.check(&self.path(1)).map_err(|why| {
            self.place.unavailable(format!(
                "the claim log {} in {} cannot be written: {why}: set `url` to a place with a shorter \
                 path",
                self.folder_path(),
                self.place.url
            ))
        })
    }

    /// Makes one small request, to see whether the store answers.
    pub(super) async fn reach(&self) -> Result<(), SinkError> {
        self.has(1).await.map(drop)
    }

    fn path(&self, number: u64) -> Path {
        self.folder_path().join(format!("{number:012}.json"))
    }

    /// Returns the log's folder.
    pub(super) fn folder_path(&self) -> Path {
        self.place.path(self.folder.iter().map(String::as_str))
    }

    fn gone(&self, number: u64, why: &str) -> SinkError {
        self.place.unavailable(format!(
            "{} in {} is missing ({why}): restore it, or stop the pipeline and continue at the checkpoint: \
             `shardmill objects skip --sink {} --shard {}`",
            self.path(number),
            self.place.url,
            self.place.sink,
            self.shard()
        ))
    }

    fn damaged(&self, number: u64, why: &str) -> SinkError {
        self.place.unavailable(format!(
            "{} in {} is damaged: {why}; restore it",
            self.path(number),
            self.place.url
        ))
    }
}

impl LogLink {
    /// Makes the link that claims `(from, to]`.
    pub(super) fn claim(
        number: u64,
        owner: OwnerId,
        from: Option<Position>,
        to: Position,
        claim: Claim,
    ) -> Self {
        Self {
            version: LINK_VERSION,
            link: number,
            owner,
            from,
            to: Some(to),
            last_claim: None,
            claim: Some(claim),
            renamed_from: None,
            gives_up: None,
            hole: None,
            by: None,
        }
    }

    /// Makes the link that gives up an unfinished claim: the log is at the start of that claim again.
    pub(super) fn giving_up(number: u64, owner: OwnerId, claim: &UnfinishedClaim) -> Self {
        Self {
            version: LINK_VERSION,
            link: number,
            owner,
            from: claim.from.clone(),
            to: claim.from.clone(),
            last_claim: None,
            claim: None,
            renamed_from: None,
            gives_up: Some(claim.link),
            hole: None,
            by: None,
        }
    }

    /// Makes the link that passes over `(from, to]`.
    pub(super) fn passing_over(
        number: u64,
        owner: OwnerId,
        from: Option<Position>,
        to: Position,
        why: String,
    ) -> Self {
        Self {
            version: LINK_VERSION,
            link: number,
            owner,
            from,
            to: Some(to),
            last_claim: None,
            claim: None,
            renamed_from: None,
            gives_up: None,
            hole: Some(why),
            by: None,
        }
    }
}

fn fence_after(last: Option<&LogLink>, owner: &OwnerId) -> LogLink {
    let to = last.and_then(|last| last.to.clone());
    LogLink {
        version: LINK_VERSION,
        link: last.map_or(0, |last| last.link) + 1,
        owner: owner.clone(),
        from: to.clone(),
        to,
        last_claim: last.and_then(|last| match last.claim {
            Some(_) => Some(last.link),
            None => last.last_claim,
        }),
        claim: None,
        renamed_from: None,
        gives_up: None,
        hole: None,
        by: None,
    }
}

/// Returns the number of the link at a path; `None`: it is another file.
pub(super) fn link_number(path: &Path) -> Option<u64> {
    let digits = path.filename()?.strip_suffix(".json")?;
    let number: u64 = digits.parse().ok()?;
    (format!("{number:012}") == digits).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_20_only_links_have_the_names_of_links() {
        for (name, number) in [
            ("000000000007.json", Some(7)),
            ("1000000000000.json", Some(1_000_000_000_000)),
            ("7.json", None),
            ("+00000000007.json", None),
            ("000000000007.json.tmp", None),
            ("99999999999999999999.json", None),
        ] {
            assert_eq!(link_number(&Path::from(format!("log/{name}"))), number, "{name}");
        }
    }
}
