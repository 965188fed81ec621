//! Ways on for a claim log that cannot go on by itself: a person asks for them, and the log says so.
//!
//! | the log | the way on | what becomes of rows |
//! |---|---|---|
//! | its last claim can never be kept (a key too long, a revision that is gone) | [`ObjectsSink::give_up`] | they are run and claimed again from the claim's beginning |
//! | a link or the last object is gone (a lifecycle rule) | [`ObjectsSink::skip`] | the log goes on at the checkpoint; what lies between is recorded as a hole |

use object_store::ObjectStoreExt as _;

use super::ObjectsSink;
use super::claim::{Appended, ClaimLog, LogLink, OwnerId, UnfinishedClaim};
use shardmill_core::boxed;
use shardmill_core::record::{Position, ShardKey};
use shardmill_core::sink::SinkError;

/// What was done to a log.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The link that says so.
    pub link: u64,
    /// Where the log stood.
    pub from: Option<Position>,
    /// Where it stands now.
    pub to: Option<Position>,
    /// Objects that were removed.
    pub objects_removed: Vec<String>,
}

impl ObjectsSink {
    /// Gives the last claim of a shard up, and removes those of its objects that are written: the rows
    /// are claimed again by the next run. The pipeline must not run.
    ///
    /// The link comes first: from there on nobody writes under the claim. A call that was broken off
    /// after it is finished by another one.
    ///
    /// # Errors
    /// When the last claim is complete, when nothing would say from where its rows are read again (it is
    /// the log's first, and the `checkpoint` has passed it), or when the store cannot be written.
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
                        "the first claim of {} was kept once, since the checkpoint has passed it: its \
                         rows would not be read again; go on at the checkpoint by `shardmill objects \
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

    /// Lets the log of a shard whose link or last object is gone go on at the checkpoint. The pipeline
    /// must not run. `why` is kept in the log.
    ///
    /// # Errors
    /// When the log is sound, when the checkpoint lies before what the log still has (rows would come
    /// twice), or when the store cannot be written.
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
                        "the claim log of {} is sound: nothing is skipped",
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

    /// Removes what is there of a claim's data.
    async fn remove_data(
        &self,
        log: &ClaimLog,
        claim: &UnfinishedClaim,
    ) -> Result<Vec<String>, SinkError> {
        let mut removed = Vec::new();
        for data in &claim.claim.data {
            let path = log.data_path(&data.key)?;
            // What cannot be looked for, for the length of its name, cannot be there either.
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
