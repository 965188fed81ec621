//! Probation: watches a new version for a while, and rolls it back if it does worse than the version before by more
//! than the configuration allows.
//!
//! The new version's counts start at zero (each loaded version has its own), and are compared with the counts of the
//! version before, as they were when the change was made. Small samples prove nothing, so rates need a minimum.
//!
//! | found | rolled back when |
//! |---|---|
//! | traps, or calls over a limit | more than `reload.probation.traps` |
//! | rejected records, of at least 100 | the share has grown by more than `reload.probation.rejected_percent` |
//! | time per record, with 50 ms in calls of both | more than `reload.probation.slower` times that of before |
//! | a lane that this stage blocks, and that was not blocked so before | at once |
//!
//! It ends early when the change is no longer in force. A rollback names the change that it undoes, so it cannot
//! undo a later change that comes in between. If the state cannot be read, the probation goes on: that says nothing
//! in favour of the version.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Swapper, candidate};
use crate::stage::{Health, Revision};
use shardmill_config::ProbationLimits;
use shardmill_core::metric;
use shardmill_core::record::StageName;

/// Interval of the checks.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Records below which shares of rejections are not compared.
const RECORDS_MIN: u64 = 100;
/// Time in calls below which speeds are not compared.
const BUSY_MIN: Duration = Duration::from_millis(50);

impl Swapper {
    /// Watches a stage that was changed, in the background.
    pub(super) fn begin_probation(
        &self,
        before: &Arc<Revision>,
        stage: &str,
        number: Option<i64>,
        limits: ProbationLimits,
    ) {
        let (Some(number), false) = (number, limits.window.is_zero()) else { return };
        let stage = StageName::from(stage);
        let Ok(incumbent) = candidate::stage(before, &stage) else { return };
        let (swapper, before) = (self.clone(), incumbent.health.seen());
        tokio::spawn(async move {
            let watched = async {
                if let Some(reason) = swapper.watch_stage(&stage, number, &before, limits).await {
                    swapper.undo(&stage, number, &reason).await;
                }
            };
            tokio::select! {
                () = watched => {}
                () = swapper.inner.ends.cancelled() => {}
            }
        });
    }

    /// Returns why the change must be undone; `None`: it has passed, or is no longer in force.
    async fn watch_stage(
        &self,
        stage: &StageName,
        number: i64,
        before: &Health,
        limits: ProbationLimits,
    ) -> Option<String> {
        let end = Instant::now() + limits.window;
        // Lanes that were blocked before may have another cause, or may not have tried again yet.
        let blocked_before = self.inner.setup.lock().await.shared.statuses.blocked_stages();
        while Instant::now() < end {
            tokio::time::sleep(POLL_INTERVAL.min(limits.window)).await;
            // While another change is under way, this waits for its end.
            let setup = self.inner.setup.lock().await;
            let (shared, running) = (setup.shared.clone(), setup.shared.revision());
            drop(setup);
            let own = candidate::stage(&running, stage).ok()?;
            match self.inner.changes.last_in_force(stage.as_str()).await {
                Ok(last) if last.as_ref().is_none_or(|last| last.number != number) => return None,
                Ok(_) => {}
                // A state that cannot be read says nothing in favour of the version: go on watching.
                Err(error) => {
                    tracing::warn!(
                        %error,
                        "failed to read whether the new version is in force; the probation goes on"
                    );
                }
            }
            let health = own.canary.as_ref().map_or(&own.health, |canary| &canary.stage.health);
            if let Some(reason) = worse(&health.seen(), before, &limits) {
                return Some(reason);
            }
            let blocked = shared.statuses.blocked_stages().into_iter().find(|one| {
                one.1.starts_with(&format!("stage {stage} ")) && !blocked_before.contains(one)
            });
            if let Some((shard, cause)) = blocked {
                return Some(format!("shard {shard} is blocked: {cause}"));
            }
        }
        None
    }

    /// Undoes a change, unless that has happened already.
    async fn undo(&self, stage: &StageName, number: i64, reason: &str) {
        tracing::error!(stage = %stage, reason, "the new version is rolled back");
        match self.inner.roll_back(stage, Some(number), reason).await {
            Ok(_) => {
                metrics::counter!(metric::CHANGES_TOTAL, "outcome" => "rolled-back").increment(1)
            }
            Err((_, failed)) => {
                tracing::error!(stage = %stage, cause = failed.cause, "the rollback failed");
            }
        }
    }
}

/// Says in what a version does worse than the one before, by more than is allowed.
fn worse(seen: &Health, before: &Health, limits: &ProbationLimits) -> Option<String> {
    if seen.traps > limits.traps_max {
        return Some(format!(
            "{} calls trapped or exceeded a limit: expected at most {} (reload.probation.traps)",
            seen.traps, limits.traps_max
        ));
    }
    let (share, share_before) = (seen.rejected_percent(), before.rejected_percent());
    if seen.records >= RECORDS_MIN && share > share_before + f64::from(limits.rejected_percent_max)
    {
        return Some(format!(
            "it rejects {share:.1} % of the records, the earlier version {share_before:.1} %: expected at most \
             {} % more (reload.probation.rejected_percent)",
            limits.rejected_percent_max
        ));
    }
    let (ns, ns_before) = (seen.ns_per_record(), before.ns_per_record());
    let is_comparable = seen.busy >= BUSY_MIN && before.busy >= BUSY_MIN;
    if is_comparable && ns > ns_before * f64::from(limits.slower_max) {
        return Some(format!(
            "it takes {ns:.0} ns per record, the earlier version {ns_before:.0} ns: expected at most {} times \
             as long (reload.probation.slower)",
            limits.slower_max
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(records: u64, rejected: u64, traps: u64, busy_ms: u64) -> Health {
        Health { records, rejected, traps, busy: Duration::from_millis(busy_ms) }
    }

    #[test]
    fn a_version_is_judged_by_the_one_before() {
        let limits = ProbationLimits::default();
        let before = health(1_000_000, 50_000, 3, 1_000);
        assert_eq!(worse(&health(1_000, 55, 0, 1), &before, &limits), None);
        assert_eq!(worse(&health(50, 50, 0, 1), &before, &limits), None, "too few to tell");
        let rejecting = worse(&health(1_000, 100, 0, 1), &before, &limits);
        assert!(rejecting.is_some_and(|why| why.contains("10.0 %")));
        assert!(
            worse(&health(10, 1, 1, 1), &before, &limits).is_some_and(|why| why.contains("trap"))
        );
        let slow = worse(&health(10_000, 0, 0, 100), &before, &limits);
        assert!(slow.is_some_and(|why| why.contains("10000 ns")));
        assert_eq!(worse(&health(10_000, 0, 0, 20), &before, &limits), None);
    }
}
