//! What was found is kept for a while, bounded by keys and bytes; who asks first, fetches.
//!
//! A batch takes the lock once for all of its keys. A key that another lane is fetching is waited
//! for instead of fetched again.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quick_cache::unsync::Cache as QuickCache;
use quick_cache::{OptionsBuilder, Weighter};

use crate::config::LookupCacheLimits;

/// A row as JSON text; `None`: the query has no row for the key.
pub(super) type Row = Option<Arc<str>>;

/// What keeping an entry costs beside its key and row: two reference-counted texts, the entry, and
/// its place in the table.
const ENTRY_BYTES: u64 = 96;

/// The answers of one lookup, shared by its lanes.
pub(super) struct Cache {
    state: Mutex<State>,
    /// Told whenever keys are no longer being fetched.
    fetched: Condvar,
    ttl: Duration,
}

struct State {
    kept: QuickCache<Arc<str>, Kept, Weight>,
    in_flight: HashSet<Arc<str>>,
}

#[derive(Clone)]
struct Kept {
    row: Row,
    since: Instant,
}

/// Counts an entry's bytes, but at least its share of them: so the number of entries is bounded by
/// the same sum.
#[derive(Clone)]
struct Weight {
    least: u64,
}

impl Weighter<Arc<str>, Kept> for Weight {
    fn weight(&self, key: &Arc<str>, kept: &Kept) -> u64 {
        let row = kept.row.as_ref().map_or(0, |row| row.len());
        (key.len() as u64 + row as u64 + ENTRY_BYTES).max(self.least)
    }
}

/// How the keys of a call stand.
pub(super) struct Standing<'c> {
    /// For each key of the call its row, if that is known.
    pub(super) known: Vec<Option<Row>>,
    /// The keys that this call is to fetch, each once.
    pub(super) claim: Claim<'c>,
    /// How many keys others are fetching.
    pub(super) awaited: usize,
}

/// Keys that one call fetches. Whoever waits for them goes on when it is dropped.
pub(super) struct Claim<'c> {
    cache: &'c Cache,
    pub(super) keys: Vec<Arc<str>>,
}

impl Cache {
    pub(super) fn new(limits: LookupCacheLimits) -> Self {
        let bytes_max = limits.bytes_max as u64;
        let entries_max = (limits.entries_max as u64).max(1);
        let options = OptionsBuilder::new()
            .estimated_items_capacity(limits.entries_max.min(1 << 16))
            .weight_capacity(bytes_max)
            .build();
        #[expect(clippy::expect_used, reason = "both capacities are given, which is all it asks")]
        let options = options.expect("complete options");
        let weight = Weight { least: bytes_max.div_ceil(entries_max) };
        let kept =
            QuickCache::with_options(options, weight, Default::default(), Default::default());
        let state = State { kept, in_flight: HashSet::new() };
        Self { state: Mutex::new(state), fetched: Condvar::new(), ttl: limits.ttl }
    }

    /// Says what is known of `keys`, and claims those that nobody is fetching. Places whose `known`
    /// is filled already are left alone.
    pub(super) fn stand(&self, keys: &[&str], mut known: Vec<Option<Row>>) -> Standing<'_> {
        let now = Instant::now();
        let (mut mine, mut own) = (Vec::new(), HashSet::new());
        let mut awaited = 0;
        let mut state = self.lock();
        for (key, known) in keys.iter().zip(&mut known).filter(|(_, known)| known.is_none()) {
            let fresh = state.kept.get(*key).filter(|kept| now - kept.since < self.ttl);
            if let Some(kept) = fresh {
                *known = Some(kept.row.clone());
            } else if own.contains(*key) {
                // A key that this call has claimed already.
            } else if state.in_flight.contains(*key) {
                awaited += 1;
            } else {
                let key: Arc<str> = Arc::from(*key);
                state.in_flight.insert(Arc::clone(&key));
                own.insert(Arc::clone(&key));
                mine.push(key);
            }
        }
        Standing { known, claim: Claim { cache: self, keys: mine }, awaited }
    }

    /// Waits until none of the places that are not known is being fetched; false: it is `deadline`.
    pub(super) fn wait(&self, keys: &[&str], known: &[Option<Row>], deadline: Instant) -> bool {
        let mut state = self.lock();
        loop {
            let is_awaited = |(key, known): (&&str, &Option<Row>)| {
                known.is_none() && state.in_flight.contains(*key)
            };
            if !keys.iter().zip(known).any(is_awaited) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.fetched.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A panic elsewhere leaves the state whole: every change of it is a single call.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.lock().kept.len()
    }
}

impl Claim<'_> {
    /// Keeps what was found; a key without a row in `found` has none.
    pub(super) fn keep(&self, found: &HashMap<Arc<str>, Arc<str>>) {
        if self.cache.ttl.is_zero() {
            return;
        }
        let since = Instant::now();
        let mut state = self.cache.lock();
        for key in &self.keys {
            let row = found.get(key).cloned();
            state.kept.insert(Arc::clone(key), Kept { row, since });
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if self.keys.is_empty() {
            return;
        }
        let mut state = self.cache.lock();
        for key in &self.keys {
            state.in_flight.remove(key);
        }
        drop(state);
        self.cache.fetched.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(entries_max: usize, bytes_max: usize, ttl: Duration) -> Cache {
        Cache::new(LookupCacheLimits { entries_max, bytes_max, ttl })
    }

    const HOUR: Duration = Duration::from_secs(3600);

    fn keep(cache: &Cache, key: &str, row: Option<&str>) {
        let standing = cache.stand(&[key], vec![None]);
        let found = row.map(|row| (Arc::from(key), Arc::from(row)));
        standing.claim.keep(&found.into_iter().collect());
    }

    fn known(cache: &Cache, key: &str) -> Option<Row> {
        cache.stand(&[key], vec![None]).known.remove(0)
    }

    #[test]
    fn rows_and_their_absence_are_kept() {
        let cache = cache(10, 1 << 20, HOUR);
        assert_eq!(known(&cache, "a"), None);
        keep(&cache, "a", Some("{}"));
        keep(&cache, "b", None);
        assert_eq!(known(&cache, "a"), Some(Some("{}".into())));
        assert_eq!(known(&cache, "b"), Some(None));
    }

    #[test]
    fn what_is_too_old_is_fetched_again() {
        let cache = cache(10, 1 << 20, Duration::from_nanos(1));
        keep(&cache, "a", Some("{}"));
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(known(&cache, "a"), None);
    }

    #[test]
    fn the_bounds_hold_whatever_comes() {
        for (entries_max, bytes_max, row_bytes) in
            [(10, 1 << 20, 0), (100, 1 << 30, 10), (100_000, 64 << 10, 1_000), (50, 4 << 10, 3_000)]
        {
            let cache = cache(entries_max, bytes_max, HOUR);
            let row = "x".repeat(row_bytes);
            for n in 0..1_000 {
                keep(&cache, &format!("key-{n}"), (n % 3 > 0).then_some(&row));
                assert!(cache.len() <= entries_max, "{} of {entries_max}", cache.len());
                let bytes: usize = {
                    let state = cache.lock();
                    let entry = |(key, kept): (&Arc<str>, &Kept)| {
                        key.len() + kept.row.as_ref().map_or(0, |row| row.len())
                    };
                    state.kept.iter().map(entry).sum()
                };
                assert!(bytes <= bytes_max, "{bytes} of {bytes_max}");
            }
            assert!(cache.len() > 0, "nothing is kept of {entries_max}, {bytes_max}");
        }
    }

    #[test]
    fn a_key_is_claimed_by_one_call_at_a_time() {
        let cache = cache(10, 1 << 20, HOUR);
        let first = cache.stand(&["a", "b", "a"], vec![None; 3]);
        assert_eq!((first.claim.keys.len(), first.awaited), (2, 0));
        let second = cache.stand(&["b", "c"], vec![None; 2]);
        assert_eq!((second.claim.keys.len(), second.awaited), (1, 1));
        assert!(!cache.wait(&["b"], &[None], Instant::now()), "it is being fetched");
        drop(first);
        assert!(cache.wait(&["b"], &[None], Instant::now()), "it was given up");
        assert_eq!(cache.stand(&["b", "c"], vec![None; 2]).claim.keys.len(), 1);
    }
}
