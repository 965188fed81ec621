//! Cache of one lookup, shared by all lanes. The first lane that asks for a key fetches it; the others wait.
//!
//! **Bounds.** Entries are kept for `ttl`, up to a number of keys and bytes.
//!
//! **One lock for all lanes.** It is held for at most [`KEYS_PER_LOCK`] keys at a time, and only to look up and to
//! insert. Keys are copied before it is taken, and rows are shared.
//!
//! **Claims.** A key that a lane fetches is in `in_flight`; other lanes wait for it instead of fetching it again. A
//! lane claims the keys of one query at a time. If a call with very many keys claimed all of them, it would hold
//! the popular ones during all of its queries, and every other lane would wait. [`FetchClaim`] releases its keys on
//! drop, so also after an error or a panic; a waiting lane then finds the row, or fetches it itself.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quick_cache::unsync::Cache as QuickCache;
use quick_cache::{OptionsBuilder, Weighter};

use shardmill_config::LookupCacheLimits;

/// A row as JSON text; `None`: the query has no row for the key.
pub(super) type CachedRow = Option<Arc<str>>;

/// Cost of an entry besides its key and row: two reference-counted texts, the entry, and its slot in the table.
const ENTRY_BYTES: u64 = 96;

/// Number of keys that are looked at while the lock is held. A call may have 100,000, and other lanes must not wait
/// for all.
const KEYS_PER_LOCK: usize = 512;

/// Limits on the keys of one query. With more keys, or more bytes, several queries are made: one array of all would
/// be a message too large for servers and their logs, and takes several times the bytes of the keys.
const KEYS_PER_QUERY_MAX: usize = 10_000;
const KEY_BYTES_PER_QUERY_MAX: usize = 1 << 20;

/// Counts the keys of one query.
#[derive(Default)]
struct Query {
    keys: usize,
    bytes: usize,
}

impl Query {
    /// Adds a key if it is the first, or if there is room for it.
    fn takes(&mut self, key: &str) -> bool {
        let bytes = self.bytes + key.len();
        let has_room = self.keys < KEYS_PER_QUERY_MAX && bytes <= KEY_BYTES_PER_QUERY_MAX;
        let takes = self.keys == 0 || has_room;
        if takes {
            (self.keys, self.bytes) = (self.keys + 1, bytes);
        }
        takes
    }
}

/// The answers of one lookup, shared by its lanes.
pub(super) struct Cache {
    state: Mutex<State>,
    /// Notified when keys are no longer being fetched.
    fetched: Condvar,
    ttl: Duration,
}

struct State {
    kept: QuickCache<Arc<str>, Kept, Weight>,
    in_flight: HashSet<Arc<str>>,
}

#[derive(Clone)]
struct Kept {
    row: CachedRow,
    since: Instant,
}

/// Weighs an entry by its bytes, but at least by its share of the byte limit: so the same sum bounds the number of
/// entries.
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

/// The state of the keys of a call.
pub(super) struct KeysStanding<'c> {
    /// For each key of the call: its row, if known.
    pub(super) known: Vec<Option<CachedRow>>,
    /// The keys that this call must fetch, by one query. Each occurs once.
    pub(super) claim: FetchClaim<'c>,
    /// Whether further keys were not looked at yet. Other lanes may fetch them first.
    pub(super) is_partial: bool,
    /// Number of keys that other lanes are fetching or have just fetched.
    pub(super) awaited: usize,
}

/// Keys that one call fetches. Dropping it wakes the lanes that wait for them.
pub(super) struct FetchClaim<'c> {
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

    /// Looks up `keys`, and claims unknown ones that no other lane is fetching, as many as fit into one query.
    /// Entries of `known` that are filled already are not looked up again.
    pub(super) fn stand(
        &self,
        keys: &[&str],
        mut known: Vec<Option<CachedRow>>,
    ) -> KeysStanding<'_> {
        let now = Instant::now();
        let asked: Vec<usize> = (0..keys.len()).filter(|place| known[*place].is_none()).collect();
        let mut unknown = Vec::new();
        for places in asked.chunks(KEYS_PER_LOCK) {
            let state = self.lock();
            for place in places {
                match state.fresh(keys[*place], now, self.ttl) {
                    Some(row) => known[*place] = Some(row),
                    None => unknown.push(keys[*place]),
                }
            }
        }
        // A call may name the same key several times.
        let mut once = HashSet::with_capacity(unknown.len());
        unknown.retain(|key| once.insert(*key));
        let keys_max = unknown.len().min(KEYS_PER_QUERY_MAX);
        let mut claim = FetchClaim { cache: self, keys: Vec::with_capacity(keys_max) };
        let (mut query, mut awaited) = (Query::default(), 0);
        for keys in unknown.chunks(KEYS_PER_LOCK) {
            // Copied before the lock is taken.
            let copied: Vec<Arc<str>> = keys.iter().map(|key| Arc::from(*key)).collect();
            let mut state = self.lock();
            for key in &copied {
                // Looked up once more: another lane may have fetched it since the first pass.
                let is_fetched = state.fresh(key, now, self.ttl).is_some();
                if is_fetched || state.in_flight.contains(key) {
                    awaited += 1;
                } else if query.takes(key) {
                    // If nothing is kept, a lane that waited would have to fetch the key as well.
                    if !self.ttl.is_zero() {
                        state.in_flight.insert(Arc::clone(key));
                    }
                    claim.keys.push(Arc::clone(key));
                } else {
                    return KeysStanding { known, claim, is_partial: true, awaited };
                }
            }
        }
        KeysStanding { known, claim, is_partial: false, awaited }
    }

    /// Waits until no unknown key is being fetched by another lane any more. Returns false if `deadline` comes
    /// first.
    pub(super) fn wait(
        &self,
        keys: &[&str],
        known: &[Option<CachedRow>],
        deadline: Instant,
    ) -> bool {
        let mut state = self.lock();
        let mut looked_at = 0;
        for (key, _) in keys.iter().zip(known).filter(|(_, known)| known.is_none()) {
            while state.in_flight.contains(*key) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return false;
                }
                let waited = self.fetched.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            looked_at += 1;
            if looked_at % KEYS_PER_LOCK == 0 {
                drop(state);
                state = self.lock();
            }
        }
        true
    }

    /// Locks the state. A panic elsewhere leaves it consistent: every change is a single call.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.lock().kept.len()
    }
}

impl State {
    /// Returns the kept row of a key, unless it is too old.
    fn fresh(&self, key: &str, now: Instant, ttl: Duration) -> Option<CachedRow> {
        let kept = self.kept.get(key).filter(|kept| {
            // Another lane may have inserted it after `now` was read.
            now.saturating_duration_since(kept.since) < ttl
        });
        kept.map(|kept| kept.row.clone())
    }
}

impl FetchClaim<'_> {
    /// Keeps the result of a query; a key that is not in `found` has no row.
    pub(super) fn keep(&self, found: &HashMap<Arc<str>, Arc<str>>) {
        if self.cache.ttl.is_zero() {
            return;
        }
        let since = Instant::now();
        for keys in self.keys.chunks(KEYS_PER_LOCK) {
            let mut state = self.cache.lock();
            for key in keys {
                let row = found.get(key).cloned();
                state.kept.insert(Arc::clone(key), Kept { row, since });
            }
        }
    }
}

impl Drop for FetchClaim<'_> {
    fn drop(&mut self) {
        for keys in self.keys.chunks(KEYS_PER_LOCK) {
            let mut state = self.cache.lock();
            for key in keys {
                state.in_flight.remove(key);
            }
            drop(state);
            self.cache.fetched.notify_all();
        }
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

    fn known(cache: &Cache, key: &str) -> Option<CachedRow> {
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

    /// Returns the sizes of the queries that a call with keys of these lengths makes.
    fn sizes(lengths: &[usize]) -> Vec<usize> {
        let cache = cache(1_000_000, 1 << 30, HOUR);
        let key = |(place, length): (usize, &usize)| {
            let number = place.to_string();
            "x".repeat(length - number.len()) + &number
        };
        let names: Vec<String> = lengths.iter().enumerate().map(key).collect();
        let keys: Vec<&str> = names.iter().map(String::as_str).collect();
        let (mut sizes, mut known) = (Vec::new(), vec![None; keys.len()]);
        loop {
            let standing = cache.stand(&keys, known);
            known = standing.known;
            sizes.push(standing.claim.keys.len());
            standing.claim.keep(&HashMap::new());
            if !standing.is_partial {
                return sizes;
            }
        }
    }

    #[test]
    fn wall_06_keys_go_by_queries_of_bounded_size() {
        assert_eq!(sizes(&[]), [0]);
        assert_eq!(sizes(&[5; 10_000]), [10_000]);
        assert_eq!(sizes(&[5; 25_000]), [10_000, 10_000, 5_000]);
        assert_eq!(sizes(&[8 << 10; 300]), [128, 128, 44]);
        assert_eq!(sizes(&[2 << 20, 2 << 20, 1]), [1, 1, 1]);
    }

    #[test]
    fn wall_06_a_call_of_very_many_keys_keeps_those_of_one_query_alone() {
        let cache = cache(1_000_000, 1 << 30, HOUR);
        let names: Vec<String> = (0..25_000).map(|n| format!("key-{n}")).collect();
        let keys: Vec<&str> = names.iter().map(String::as_str).collect();
        let first = cache.stand(&keys, vec![None; keys.len()]);
        assert_eq!((first.claim.keys.len(), first.is_partial), (KEYS_PER_QUERY_MAX, true));
        // The keys of its later queries are free.
        let other = cache.stand(&["key-5", "key-20000"], vec![None; 2]);
        assert_eq!((other.claim.keys.len(), other.awaited), (1, 1));
        assert_eq!(&*other.claim.keys[0], "key-20000");
        first.claim.keep(&HashMap::new());
        drop(first.claim);
        // The result of the first query is available before the second one.
        assert!(cache.wait(&["key-5"], &[None], Instant::now()));
        assert_eq!(known(&cache, "key-5"), Some(None));
        let second = cache.stand(&keys, first.known);
        assert_eq!((second.claim.keys.len(), second.is_partial), (KEYS_PER_QUERY_MAX, true));
        let third = cache.stand(&keys[20_000..], vec![None; 5_000]);
        assert_eq!((third.claim.keys.len(), third.is_partial), (4_999, false));
        assert_eq!(third.awaited, 1, "the other call has it");
    }

    #[test]
    fn wall_06_where_nothing_is_kept_no_lane_waits_for_another() {
        let cache = cache(10, 1 << 20, Duration::ZERO);
        let first = cache.stand(&["a"], vec![None]);
        let second = cache.stand(&["a"], vec![None]);
        assert_eq!((second.claim.keys.len(), second.awaited), (1, 0));
        drop(first);
        assert!(cache.wait(&["a"], &[None], Instant::now()));
    }

    /// Concurrent calls with very many keys: together they fetch each key once.
    #[test]
    fn wall_06_lanes_that_ask_for_the_same_keys_at_once_fetch_each_once() {
        let cache = cache(1_000_000, 1 << 30, HOUR);
        let names: Vec<String> = (0..25_000).map(|n| format!("key-{n}")).collect();
        let keys: Vec<&str> = names.iter().chain(&names).map(String::as_str).collect();
        let fetched = std::sync::atomic::AtomicUsize::new(0);
        let ask = || {
            let deadline = Instant::now() + Duration::from_secs(60);
            let mut known = vec![None; keys.len()];
            loop {
                let standing = cache.stand(&keys, known);
                known = standing.known;
                let claim = standing.claim;
                let rows = claim.keys.iter().map(|key| (key.clone(), Arc::from("{}")));
                let found: HashMap<Arc<str>, Arc<str>> = rows.collect();
                fetched.fetch_add(found.len(), std::sync::atomic::Ordering::Relaxed);
                claim.keep(&found);
                for (key, known) in keys.iter().zip(&mut known).filter(|(_, known)| known.is_none())
                {
                    *known = found.get(*key).map(|row| Some(row.clone()));
                }
                drop(claim);
                if standing.is_partial {
                    continue;
                }
                if standing.awaited == 0 {
                    assert!(known.iter().all(|row| *row == Some(Some("{}".into()))));
                    return;
                }
                assert!(cache.wait(&keys, &known, deadline));
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| _ = scope.spawn(ask)));
        assert_eq!(fetched.into_inner(), names.len());
    }
}
