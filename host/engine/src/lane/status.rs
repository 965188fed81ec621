//! Status of the lanes: everything that waits is visible here, with its cause.
//!
//! Lanes write; the admin port, the reports, the metrics and the probation read. A part of a lane (a sink, the
//! stages, the source) is blocked under its own name, so that one cause does not hide another. Each cause is logged
//! once, and the metric of blocked parts follows.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Notify;

use super::lag::{LiveDelivery, LiveLag};
use shardmill_core::boxed;
use shardmill_core::escape::quoted;
use shardmill_core::masking::{message, report};
use shardmill_core::metric;
use shardmill_core::record::{Position, ShardId, SinkName};

/// Status of every lane, for the admin port, the reports and the end of a run. A clone is cheap and shares it.
#[derive(Clone, Default)]
pub struct StatusRegistry {
    shards: Arc<Mutex<BTreeMap<ShardId, ShardStatus>>>,
    /// Parts of the run as a whole that are blocked, with their causes.
    run: Arc<Mutex<BTreeMap<&'static str, String>>>,
    /// Lag of the sinks.
    lags: Arc<Mutex<BTreeMap<ShardId, LiveLag>>>,
    /// Notified when a lane runs another revision, or cannot start it.
    changed: Arc<Notify>,
}

/// A lane that has changed to another revision.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LaneChange {
    /// Its shard.
    pub shard: ShardId,
    /// The swap pause in microseconds: from the end of the last batch of the old revision until the new one is ready
    /// for the next batch. It includes the hand-over to the sinks and the write to the ledger, but not the wait for
    /// records. `None`: the lane was restarted, or began with the revision.
    pub pause_us: Option<u64>,
}

/// A lane that has not changed to another revision yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WaitingLane {
    /// Its shard.
    pub shard: ShardId,
    /// The cause of the wait.
    pub why: String,
}

/// Status of one shard.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ShardStatus {
    /// Records handed to the sinks since the process started.
    pub records_read: u64,
    /// Of these, records that some sink had already.
    pub records_replayed: u64,
    /// Records that a stage rejected.
    pub dead_letters: u64,
    /// Consecutive reads that brought nothing.
    pub idle_reads: u64,
    /// Whether every sink had committed everything that was read, at the last of these reads.
    #[serde(skip)]
    pub is_committed: bool,
    /// The age of the oldest record that a sink has not committed, in seconds, by sink.
    pub committed_lag_seconds: BTreeMap<String, f64>,
    /// Milliseconds between the last record read and the end of the shard, as the server says. Deprecated: it stays
    /// 0 while records wait for a blocked sink.
    #[serde(rename = "behind_ms")]
    pub lag_ms: u64,
    /// The lane reads.
    pub running: bool,
    /// The shard was closed, and all its records are committed.
    pub ended: bool,
    /// The position that the lane started at.
    pub started_from: Option<String>,
    /// Blocked parts, with their causes.
    pub blocked: BTreeMap<String, String>,
    /// The revision at work.
    #[serde(rename = "generation")]
    pub revision: Option<String>,
    /// The swap pause of the last change of revision, in microseconds; see [`LaneChange::pause_us`].
    pub change_pause_us: Option<u64>,
    /// A revision that did not start here, and the cause.
    pub does_not_start: Option<(String, String)>,
}

/// Text in the place of a cause, for requests that may not see records.
const CAUSE_HIDDEN: &str = "send the token to see the cause";

impl ShardStatus {
    /// Hides the causes: plugins and databases quote records in their messages.
    pub fn hide_causes(&mut self) {
        let does_not_start = self.does_not_start.as_mut().map(|(_, cause)| cause);
        for cause in self.blocked.values_mut().chain(does_not_start) {
            CAUSE_HIDDEN.clone_into(cause);
        }
    }

    /// Notes that the lane begins.
    pub fn acquired(&mut self, from: Option<&Position>) {
        self.running = true;
        self.started_from = from.map(ToString::to_string);
        self.blocked.clear();
    }

    /// Says what a lane waits for that does not reach its next batch.
    fn waits_for(&self) -> String {
        if self.blocked.is_empty() {
            return "it has not finished its batch, or it replays records that the earlier version ran first"
                .into();
        }
        let parts = self.blocked.iter().map(|(part, cause)| format!("{part}: {cause}"));
        parts.collect::<Vec<_>>().join("; ")
    }

    /// Whether everything is read and committed: two reads in a row brought nothing, the server says that nothing is
    /// left, and every sink has committed everything. The commits must be waited for here, because the shutdown
    /// drops what a sink does not take in time.
    pub fn caught_up(&self) -> bool {
        let has_read_all = self.running && self.idle_reads >= 2 && self.lag_ms == 0;
        self.ended || (has_read_all && self.is_committed)
    }
}

impl StatusRegistry {
    /// Changes the status of a shard.
    pub fn update(&self, shard: &ShardId, change: impl FnOnce(&mut ShardStatus)) {
        let mut shards = self.lock();
        let status = shards.entry(shard.clone()).or_default();
        let blocked = status.blocked.len();
        change(status);
        if status.blocked.len() != blocked {
            gauge(shard, status);
        }
    }

    /// Marks a part of a lane as blocked. Logs each cause once.
    pub fn block(&self, shard: &ShardId, part: &str, cause: &str) {
        // A plugin or a server may have worded the cause.
        let cause = &message(cause)[..];
        let mut shards = self.lock();
        let status = shards.entry(shard.clone()).or_default();
        let before = status.blocked.insert(part.to_owned(), cause.to_owned());
        // The progress of a search changes all the time, so only its beginning is logged.
        let is_news = match part == super::SEARCH {
            true => before.is_none(),
            false => before.as_deref() != Some(cause),
        };
        if is_news {
            tracing::error!(shard = %shard, part, cause = %quoted(cause), "blocked");
        }
        gauge(shard, status);
    }

    /// Marks a part of a lane as no longer blocked.
    pub(crate) fn unblock(&self, shard: &ShardId, part: &str) {
        let mut shards = self.lock();
        if let Some(status) = shards.get_mut(shard)
            && status.blocked.remove(part).is_some()
        {
            tracing::info!(shard = %shard, part, "goes on");
            gauge(shard, status);
        }
    }

    /// Marks a part of the run that belongs to no shard as blocked. Logs each cause once.
    pub(crate) fn block_run(&self, part: &'static str, cause: &str) {
        let cause = &message(cause)[..];
        let mut run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        let before = run.insert(part, cause.to_owned());
        if before.as_deref() != Some(cause) {
            tracing::error!(part, cause = %quoted(cause), "blocked");
        }
    }

    /// Marks a part of the run as no longer blocked.
    pub(crate) fn unblock_run(&self, part: &'static str) {
        let mut run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        if run.remove(part).is_some() {
            tracing::info!(part, "goes on");
        }
    }

    /// Returns the blocked parts of the run as a whole, with their causes.
    pub fn blocked_run(&self) -> BTreeMap<&'static str, String> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes that the lane runs this revision now; `pause` is as in [`LaneChange::pause_us`].
    pub fn runs(&self, shard: &ShardId, revision: &str, pause: Option<Duration>) {
        self.update(shard, |status| {
            status.revision = Some(revision.to_owned());
            status.change_pause_us = pause.map(|pause| pause.as_micros() as u64);
            status.does_not_start = None;
        });
        self.changed.notify_waiters();
    }

    /// Notes that the lane cannot start this revision, and goes on with the one before.
    pub(crate) fn does_not_start(&self, shard: &ShardId, revision: &str, cause: &str) {
        self.update(shard, |status| {
            let cause = report(cause);
            status.does_not_start = Some((revision.to_owned(), cause));
        });
        self.changed.notify_waiters();
    }

    /// Waits until every lane that reads runs a revision and every lane of `let_go` reads again, but at most until
    /// `end`. Returns the lanes that have changed, and those that have not.
    ///
    /// # Errors
    /// Why a lane cannot start it.
    #[boxed]
    pub(crate) async fn changed_to(
        &self,
        revision: &str,
        let_go: &[ShardId],
        end: tokio::time::Instant,
    ) -> Result<(Vec<LaneChange>, Vec<WaitingLane>), String> {
        loop {
            let notified = self.changed.notified();
            let (mut changed, mut waiting) = (Vec::new(), Vec::new());
            for (shard, status) in self.snapshot() {
                if !status.running {
                    if !status.ended && let_go.contains(&shard) {
                        let why =
                            "it has stopped for the change and has not restarted yet".to_owned();
                        waiting.push(WaitingLane { shard, why });
                    }
                    continue;
                }
                if let Some((_, cause)) =
                    status.does_not_start.as_ref().filter(|(id, _)| id == revision)
                {
                    return Err(format!("it does not start in shard {shard}: {cause}"));
                }
                match status.revision.as_deref() == Some(revision) {
                    true => changed.push(LaneChange { shard, pause_us: status.change_pause_us }),
                    false => waiting.push(WaitingLane { why: status.waits_for(), shard }),
                }
            }
            if waiting.is_empty() || tokio::time::timeout_at(end, notified).await.is_err() {
                return Ok((changed, waiting));
            }
        }
    }

    /// Returns the lanes that read, and what each waits for if it does not reach its next batch.
    pub fn running(&self) -> Vec<WaitingLane> {
        let running = self.snapshot().into_iter().filter(|(_, status)| status.running);
        running.map(|(shard, status)| WaitingLane { why: status.waits_for(), shard }).collect()
    }

    /// Returns the lanes whose stages are blocked, with the causes. Lanes that a busy machine blocks are left out.
    pub(crate) fn blocked_stages(&self) -> Vec<(ShardId, String)> {
        let shards = self.lock();
        let blocked = shards.iter().filter_map(|(shard, status)| {
            status.blocked.get(super::STAGES).map(|cause| (shard.clone(), cause.clone()))
        });
        blocked.collect()
    }

    /// Returns a copy of all statuses, with the current lags.
    pub fn snapshot(&self) -> BTreeMap<ShardId, ShardStatus> {
        let mut shards = self.lock().clone();
        for (shard, sink, age) in self.committed_lags() {
            if let Some(status) = shards.get_mut(&shard) {
                status.committed_lag_seconds.insert(sink.to_string(), age.as_secs_f64());
            }
        }
        shards
    }

    /// Runs `note` on a shard's lag and returns its result.
    pub fn lag<T>(&self, shard: &ShardId, note: impl FnOnce(&mut LiveLag) -> T) -> T {
        note(self.lags().entry(shard.clone()).or_default())
    }

    /// Returns the deliveries of every shard whose lane has begun.
    pub(super) fn deliveries(&self) -> Vec<(ShardId, LiveDelivery)> {
        let lags = self.lags();
        let of = |(shard, lag): (&ShardId, &LiveLag)| {
            let own = lag.deliveries.iter().cloned();
            own.map(|own| (shard.clone(), own)).collect::<Vec<_>>()
        };
        lags.iter().flat_map(of).collect()
    }

    /// Returns the age of the oldest record that a sink has not committed, by shard and sink.
    pub(crate) fn committed_lags(&self) -> Vec<(ShardId, SinkName, Duration)> {
        let now_ms = chrono::Utc::now().timestamp_millis();
        let mut lags = self.lags();
        let of = |(shard, lag): (&ShardId, &mut LiveLag)| {
            let ages = lag.ages(now_ms).into_iter();
            ages.map(|(sink, age)| (shard.clone(), sink, age)).collect::<Vec<_>>()
        };
        lags.iter_mut().flat_map(of).collect()
    }

    /// Sets the lag metric to the current lags.
    pub fn show_lags(&self) {
        for (shard, sink, age) in self.committed_lags() {
            metrics::gauge!(metric::COMMITTED_LAG_SECONDS,
                "shard" => shard.to_string(), "sink" => sink.to_string())
            .set(age.as_secs_f64());
        }
    }

    fn lags(&self) -> MutexGuard<'_, BTreeMap<ShardId, LiveLag>> {
        self.lags.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ShardId, ShardStatus>> {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn gauge(shard: &ShardId, status: &ShardStatus) {
    metrics::gauge!(metric::BLOCKED, "shard" => shard.to_string()).set(status.blocked.len() as f64);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::{STAGES, STARVED};

    #[test]
    fn wall_10_no_version_is_judged_by_a_lane_that_a_busy_machine_delays() {
        let (statuses, shard) = (StatusRegistry::default(), ShardId::from("a"));
        statuses.block(&shard, STARVED, "stage s: the machine is too busy");
        assert!(statuses.blocked_stages().is_empty());
        statuses.block(&shard, STAGES, "stage s: every record fails");
        assert_eq!(statuses.blocked_stages(), [(shard, "stage s: every record fails".to_owned())]);
    }

    #[test]
    fn wall_02_a_cause_is_one_line_of_bounded_length() {
        let (statuses, shard) = (StatusRegistry::default(), ShardId::from("a"));
        let cause = format!("the server says:\n{}", "x".repeat(20 << 20));
        statuses.block(&shard, "sink s", &cause);
        statuses.block_run("shards", &cause);
        statuses.does_not_start(&shard, "2", &cause);
        let status = statuses.lock().get(&shard).cloned().expect("a status");
        let (run, start) = (statuses.blocked_run(), status.does_not_start.expect("a cause").1);
        for cause in [&status.blocked["sink s"], &run["shards"]] {
            assert!(cause.starts_with("the server says:\\nxxx"), "{cause:.64}");
            assert!(cause.len() < 17 << 10, "{} bytes", cause.len());
        }
        assert!(start.len() < 65 << 10, "{} bytes", start.len());
    }
}
