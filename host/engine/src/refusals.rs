//! Refused rows on their way to the dead letters.
//!
//! The order is fixed: a refused row's dead letter is durable before the sink commits the row's range, as pending.
//! It becomes visible after the commit. A crash in between leaves a pending dead letter, and the next acquisition
//! decides by the sink's position: the commit landed (visible), or the row is read again (deleted). Nothing is lost or
//! shown twice in either case.
//!
//! Refusals are counted against `rejected_max` with the commit in hand, but the count becomes final only when that
//! commit lands: a commit that is retried must not count its refusals twice.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use shardmill_config::RejectedMax;
use shardmill_core::record::{DeadLetterPlace, Row, SinkName};
use shardmill_core::sink::{Commit, Refusal, RefusalLog, SinkError};
use shardmill_state::RejectionWindow;
use shardmill_state::{DeadLetter, DeadLetterKey, DeadLetters, MadeBy};

/// The refusals of one sink and shard.
pub struct PendingRefusals {
    dead_letters: DeadLetters,
    sink: SinkName,
    counted: Mutex<Counted>,
}

struct Counted {
    window: RejectionWindow,
    /// The window as it will be when the commit in hand has landed.
    pending: Option<RejectionWindow>,
}

impl PendingRefusals {
    /// Makes a log that writes into `dead_letters`; beyond the limits a commit must not be made.
    pub fn new(dead_letters: DeadLetters, sink: SinkName, rejected_max: RejectedMax) -> Self {
        let window = RejectionWindow::new(rejected_max);
        Self { dead_letters, sink, counted: Mutex::new(Counted { window, pending: None }) }
    }

    /// Counts a commit that has landed.
    pub fn committed(&self, commit: &Commit) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        match counted.pending.take() {
            Some(pending) => counted.window = pending,
            None => counted.window.accept(commit.rows_gathered()),
        }
    }

    /// Counts the commit's rows on a copy of the window.
    fn count(&self, commit: &Commit, refusals: &[Refusal]) -> Result<(), String> {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = refusals.iter().map(|refusal| commit.number_of(refusal.row));
        let refused: Vec<usize> = refused.collect();
        let window = played(counted.window.clone(), commit.rows_gathered(), &refused)?;
        counted.pending = Some(window);
        Ok(())
    }

    fn too_many(&self, limit: &str) -> SinkError {
        SinkError::TooManyRefused {
            sink: self.sink.clone(),
            cause: format!("{limit}; nothing was written"),
        }
    }

    /// Makes the dead letter of a row that the sink did not take; `revision` made the row.
    pub fn dead_letter(&self, row: &Row, reason: String, revision: &Arc<str>) -> DeadLetter {
        let record = row.source();
        DeadLetter {
            key: DeadLetterKey {
                position: record.position.clone(),
                place: DeadLetterPlace::Sink(self.sink.clone()),
                output: row.ordinal,
            },
            partition_key: record.partition_key.clone(),
            original: record.payload.clone(),
            entered_key: row.key.clone(),
            entered: row.payload.clone(),
            route: row.route.name().clone(),
            arrived_ms: record.arrived_ms,
            plugin: "".into(),
            digest: "".into(),
            reason,
            backtrace: String::new(),
            made: MadeBy::of(&row.batch, revision),
        }
    }
}

/// Counts rows in a window, of which these were refused.
fn played(
    mut window: RejectionWindow,
    rows: usize,
    refused: &[usize],
) -> Result<RejectionWindow, String> {
    let mut refused = refused.iter().peekable();
    for row in 0..rows {
        window.count(refused.next_if_eq(&&row).is_some())?;
    }
    Ok(window)
}

#[async_trait]
impl RefusalLog for PendingRefusals {
    async fn record(&self, commit: &Commit, refusals: &[Refusal]) -> Result<(), SinkError> {
        let Some(last) = refusals.last() else { return Ok(()) };
        self.count(commit, refusals).map_err(|limit| {
            self.too_many(&format!("{limit}; the last reason: {}", last.reason))
        })?;
        let Some(row) = commit.rows.first() else { return Ok(()) };
        let dead_letter = |refusal: &Refusal| {
            self.dead_letter(&commit.rows[refusal.row], refusal.reason.clone(), &commit.revision)
        };
        let dead_letters: Vec<DeadLetter> = refusals.iter().map(dead_letter).collect();
        self.dead_letters.put(&row.batch.shard, dead_letters, true).await.map_err(|error| {
            SinkError::Unavailable { sink: self.sink.clone(), cause: error.to_string() }
        })
    }

    fn check(&self, commit: &Commit, refused: &[usize]) -> Result<(), SinkError> {
        let refused: Vec<usize> = refused.iter().map(|row| commit.number_of(*row)).collect();
        let rows = refused.last().map_or(0, |last| last + 1);
        let window = {
            let counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
            counted.window.clone()
        };
        // Rows after the last of these may all be accepted, so they are not counted.
        played(window, rows, &refused).map(drop).map_err(|limit| self.too_many(&limit))
    }
}
