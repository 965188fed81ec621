//! What is shown of the lanes: nothing waits forever in silence.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::record::{Position, ShardId};

/// The state of every lane, for the admin port, the reports and the end of a run; cheap to clone.
#[derive(Clone, Default)]
pub struct Board {
    shards: Arc<Mutex<BTreeMap<ShardId, ShardStatus>>>,
}

/// One shard, as shown.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ShardStatus {
    /// Records handed to the sinks since the process started.
    pub records_read: u64,
    /// Of these, records that some sink had before.
    pub records_replayed: u64,
    /// Records that a stage did not take.
    pub dead_letters: u64,
    /// Reads in a row that brought nothing.
    pub idle_reads: u64,
    /// Milliseconds behind the end of the shard, as the server says.
    pub behind_ms: u64,
    /// The lane reads.
    pub running: bool,
    /// The shard was closed and is settled.
    pub ended: bool,
    /// The position that the lane started at.
    pub started_from: Option<String>,
    /// What does not go on, and why.
    pub blocked: BTreeMap<String, String>,
}

impl ShardStatus {
    /// The lane begins.
    pub fn acquired(&mut self, from: Option<&Position>) {
        self.running = true;
        self.started_from = from.map(ToString::to_string);
        self.blocked.clear();
    }

    /// Two reads in a row brought nothing and the server says that nothing is left.
    pub fn caught_up(&self) -> bool {
        self.ended || (self.running && self.idle_reads >= 2 && self.behind_ms == 0)
    }
}

impl Board {
    /// Changes the state of a shard.
    pub fn update(&self, shard: &ShardId, change: impl FnOnce(&mut ShardStatus)) {
        change(self.lock().entry(shard.clone()).or_default());
    }

    /// Marks a part of a lane as blocked; says so once per cause.
    pub fn block(&self, shard: &ShardId, part: &str, cause: &str) {
        let mut shards = self.lock();
        let status = shards.entry(shard.clone()).or_default();
        let before = status.blocked.insert(part.to_owned(), cause.to_owned());
        if before.as_deref() != Some(cause) {
            tracing::error!(shard = %shard, part, cause, "blocked");
        }
        gauge(shard, status);
    }

    /// The part goes on.
    pub fn unblock(&self, shard: &ShardId, part: &str) {
        let mut shards = self.lock();
        if let Some(status) = shards.get_mut(shard)
            && status.blocked.remove(part).is_some()
        {
            tracing::info!(shard = %shard, part, "goes on");
            gauge(shard, status);
        }
    }

    /// A copy of all.
    pub fn snapshot(&self) -> BTreeMap<ShardId, ShardStatus> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ShardId, ShardStatus>> {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn gauge(shard: &ShardId, status: &ShardStatus) {
    metrics::gauge!("shardmill_blocked", "shard" => shard.to_string())
        .set(status.blocked.len() as f64);
}
