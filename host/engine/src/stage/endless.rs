//! Records that ran out of time: without this memory, each would cost a full deadline again whenever it is run with
//! others.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::flow::Item;
use shardmill_core::record::{Batch, Position, ShardId};

/// Number of remembered records; the oldest are forgotten first.
const KNOWN_MAX: usize = 10_000;

/// Records of one stage's version that ran out of time. A batch may come again: after a failure of a later stage, or
/// in another instance of the lane.
#[derive(Debug, Default)]
pub struct Endless {
    /// Whether there are any. Usually there are none, and then no lane waits for the lock.
    is_used: AtomicBool,
    known: Mutex<Known>,
}

type Key = (ShardId, Position, u32);

#[derive(Debug, Default)]
struct Known {
    keys: HashSet<Key>,
    oldest_first: VecDeque<Key>,
}

impl Endless {
    /// Remembers a record that ran out of time alone.
    pub(super) fn note(&self, batch: &Batch, item: &Item) {
        let (key, mut known) = (key(batch, item), self.lock());
        if known.keys.insert(key.clone()) {
            known.oldest_first.push_back(key);
        }
        if known.oldest_first.len() > KNOWN_MAX
            && let Some(oldest) = known.oldest_first.pop_front()
        {
            known.keys.remove(&oldest);
        }
        drop(known);
        self.is_used.store(true, Ordering::Release);
    }

    /// Returns the indexes of the items that are remembered, in order.
    pub(super) fn among(&self, batch: &Batch, items: &[Item]) -> Vec<usize> {
        if !self.is_used.load(Ordering::Acquire) {
            return Vec::new();
        }
        let known = self.lock();
        let is_known = |item: &Item| known.keys.contains(&key(batch, item));
        (0..items.len()).filter(|index| is_known(&items[*index])).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(batch: &Batch, item: &Item) -> Key {
    let position = batch.records[item.record as usize].position.clone();
    (batch.shard.shard.clone(), position, item.ordinal)
}
