//! Repairs a claim log that cannot continue by itself. An operator asks for it, and the log records it.
//!
//! | state of the log | repair | outcome for the rows |
//! |---|---|---|
//! | its last claim can never be finished | [`ObjectsSink::give_up`] | they run again and are claimed again |
//! | a link or the last object is gone | [`ObjectsSink::skip`] | those up to the checkpoint are a recorded hole |
//!
//! A claim can never be finished if a key is too long for the store, or if its revision is gone. Links and objects are
//! removed by a bucket's lifecycle rule, or by a person.
//!
//! Order: the link is appended first, then objects are removed. After the link, no owner writes under the claim any
//! more. In the other order, an owner could still write an object that nobody would remove.

use object_store::ObjectStoreExt as _;

use super::ObjectsSink;
use super::claim::{Appended, ClaimLog, LogLink, OwnerId, UnfinishedClaim};
use shardmill_core::boxed;
use shardmill_core::record::{Position, ShardKey};
use shardmill_core::sink::SinkError;

/// Report of a repair.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Number of the link that records it.
    pub link: u64,
    /// Position of the log before.
    pub from: Option<Position>,
    /// Position of the log after.
    pub to: Option<Position>,
    /// Keys of the objects that were removed.
    pub objects_removed: Vec<String>,
}

impl ObjectsSink {
    /// Gives up the last claim of a shard, and removes those of its objects that exist. The next run claims the rows
    /// again. The pipeline must not run.
    ///
    /// A call that was interrupted after it appended the link is finished by the next call.
    ///
    /// # Errors
    /// When the last claim is complete, when its rows would not be read again (it is the first of the log, and the
    /// `checkpoint` has passed it), or when the store cannot be written.
    #[boxed]
    pub async fn give_up(
        &self,
        shard: &ShardKey,
        checkpoint: Option<&Position>,
    ) -> Result<Recovered, SinkError> {
        let log = ClaimLog::new(self.place.clone(), shard);
        let nothing = || {
            self.place.unavailable(format!(
                "the claim log of {} has no unfinished claim: nothing is given up",
                shard.shard
            ))
        };
        let last = log.last().await?.ok_or_else(nothing)?;
        let (link, claim) = match last.gives_up {
            Some(number) => (last, log.claim(number).await?.ok_or_else(nothing)?),
            None => {
                let claim = log.unkept(&last).await?.ok_or_else(nothing)?;
                if claim.from.is_none() && checkpoint >= Some(&claim.to) {
                    return Err(self.place.unavailable(format!(
                        "the first claim of {} was complete before, since the checkpoint has passed it: its \
                         rows would not be read again; continue at the checkpoint: `shardmill objects \
                         skip`",
                        shard.shard
                    )));
                }
                let link = LogLink::giving_up(last.link + 1, OwnerId::random(), &claim);
                (self.append(&log, link).await?, claim)
            }
        };
        let objects_removed = self.remove_data(&log, &claim).await?;
        Ok(Recovered { link: link.link, from: Some(claim.to), to: link.to, objects_removed })
    }

    /// Continues the log of a shard at the checkpoint, if a link or its last object is gone. The log keeps `why`. The
    /// pipeline must not run.
    ///
    /// # Errors
    /// When nothing is missing, when the checkpoint is before the end of the last claim (its rows could come twice), or
    /// when the store cannot be written.
    #[boxed]
    pub async fn skip(
        &self,
        shard: &ShardKey,
        checkpoint: &Position,
        why: &str,
    ) -> Result<Recovered, SinkError> {
        let log = ClaimLog::new(self.place.clone(), shard);
        let last = log.last().await?;
        let from = match &last {
            None => None,
            Some(last) if log.is_claim_gone(last).await? => {
                last.from.clone().min(Some(checkpoint.clone()))
            }
            Some(last) => {
                let claim = log.unkept(last).await?.ok_or_else(|| {
                    self.place.unavailable(format!(
                        "the claim log of {} is complete: nothing is skipped",
                        shard.shard
                    ))
                })?;
                if claim.to > *checkpoint {
                    return Err(self.place.unavailable(format!(
                        "link {} of {} claims rows up to {}, and the checkpoint is {checkpoint}: rows \
                         could come twice{}",
                        claim.link,
                        shard.shard,
                        claim.to,
                        claim.way_out(&self.place, shard.shard.as_str())
                    )));
                }
                claim.from
            }
        };
        let number = last.map_or(0, |last| last.link) + 1;
        let link = LogLink::passing_over(
            number,
            OwnerId::random(),
            from.clone(),
            checkpoint.clone(),
            why.to_owned(),
        );
        let link = self.append(&log, link).await?;
        Ok(Recovered { link: link.link, from, to: link.to, objects_removed: Vec::new() })
    }

    async fn append(&self, log: &ClaimLog, link: LogLink) -> Result<LogLink, SinkError> {
        match log.append(&link).await? {
            Appended::Ours => Ok(link),
            Appended::Taken(_) => Err(self.place.unavailable(format!(
                "{} in {} was appended to meanwhile: stop the pipeline first",
                log.folder_path(),
                self.place.url
            ))),
        }
    }

    /// Removes the objects of a claim that exist; returns their keys.
    async fn remove_data(
        &self,
        log: &ClaimLog,
        claim: &UnfinishedClaim,
    ) -> Result<Vec<String>, SinkError> {
        let mut removed = Vec::new();
        for data in &claim.claim.data {
            let path = log.data_path(&data.key)?;
            // An object whose name is too long to look for cannot exist.
            if !self.place.exists(&path).await.unwrap_or(false) {
                continue;
            }
            match self.place.store.delete(&path).await {
                Ok(()) => removed.push(data.key.clone()),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(self.place.failed("remove", &path, &error)),
            }
        }
        Ok(removed)
    }
}
