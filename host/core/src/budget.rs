//! Limit on the bytes that several parts hold together: the buffers of sinks, what readers read ahead, the requests of
//! the intake.
//!
//! The invariant: memory is limited by configuration, and a blocked lane never stops another. Each lane has an
//! [`Account`]. Half of the bytes is reserved in equal parts for the accounts, the other half is common. [`ledger`]
//! decides without a clock and without waiting: who gets bytes, who waits, whose buffer must commit. This module adds
//! the waiting, the locks and the metric.
//!
//! - A request that cannot be granted gets a ticket and waits. Buffers are asked to commit, the largest first, so that
//!   a sink that rolls hourly gives way to shards that read.
//! - Bytes are given back when a [`Permit`] is dropped or shrinks. The same call grants what waits, under the same
//!   lock, so no wake-up is lost.
//! - A waiter also looks again every `LOOK_INTERVAL`, because the passing of time alone can give it a turn.
//! - A future that is dropped while it waits withdraws its request, also one that was granted in the meantime.

mod answer;
pub mod ledger;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

pub use self::answer::{ANSWER_BYTES_MAX, ANSWER_VALUES_MAX, READ_BYTES_MAX, occupied_while_read};
pub use self::ledger::LongWait;
use self::ledger::{AccountId, BudgetLedger, BufferId, Limits, Ticket};

/// How long an account that went beyond the limit may release nothing until another gets its turn, if not configured.
const TURN_MAX: Duration = Duration::from_secs(10);
/// How often a waiter looks again: a turn can end because time has passed.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A budget. Clones share it.
#[derive(Clone)]
pub struct Budget {
    shared: Arc<Shared>,
}

struct Shared {
    bytes_max: usize,
    /// Metric that shows how many bytes are held.
    gauge: &'static str,
    state: Mutex<State>,
}

struct State {
    ledger: BudgetLedger,
    /// Whom to wake when a ticket is granted.
    wakers: HashMap<Ticket, Arc<Notify>>,
    /// Whom to wake when a buffer must commit.
    committers: HashMap<BufferId, Arc<Notify>>,
    looked_at: Instant,
}

/// Account of a lane in a budget. Dropping it closes it; bytes that it took stay counted until they are released.
pub struct Account {
    shared: Arc<Shared>,
    id: AccountId,
}

/// Bytes taken from the budget; dropping it gives them back.
pub struct Permit {
    shared: Arc<Shared>,
    account: Option<AccountId>,
    bytes: usize,
}

/// Buffer that can commit when others need its bytes, until this is dropped.
pub struct OpenBuffer {
    shared: Arc<Shared>,
    id: BufferId,
}

impl Budget {
    /// Makes a budget of `bytes_max` bytes. The metric `gauge` shows how many are held.
    pub fn new(bytes_max: usize, gauge: &'static str) -> Self {
        Self::with_turn(bytes_max, gauge, TURN_MAX)
    }

    /// Makes a budget with a time for turns: an account that went beyond the limit and releases nothing for `turn_max`
    /// lets another do so.
    pub fn with_turn(bytes_max: usize, gauge: &'static str, turn_max: Duration) -> Self {
        let state = State {
            ledger: BudgetLedger::new(Limits { bytes_max, turn_max }),
            wakers: HashMap::new(),
            committers: HashMap::new(),
            looked_at: Instant::now(),
        };
        Self { shared: Arc::new(Shared { bytes_max, gauge, state: Mutex::new(state) }) }
    }

    /// Returns the configured limit, in bytes.
    pub fn bytes_max(&self) -> usize {
        self.shared.bytes_max
    }

    /// Opens an account with a reserved part. Its long waits are shown under this name.
    pub fn account(&self, name: impl Into<Arc<str>>) -> Account {
        let id = self.shared.lock().ledger.open(name.into(), Instant::now());
        Account { shared: self.shared.clone(), id }
    }

    /// Makes a permit of no account that holds nothing yet.
    pub fn empty(&self) -> Permit {
        Permit { shared: self.shared.clone(), account: None, bytes: 0 }
    }

    /// Takes bytes without an account; `None` if this many are not free now.
    #[cfg(test)]
    fn try_take(&self, bytes: usize) -> Option<Permit> {
        let mut permit = self.empty();
        permit.try_grow(bytes).then_some(permit)
    }

    /// Returns the accounts that have waited for `after` or longer, and who holds the bytes that they wait for.
    pub fn long_waits(&self, after: Duration) -> Vec<LongWait> {
        self.shared.lock().ledger.long_waits(after, Instant::now())
    }
}

impl Account {
    /// Takes bytes. Waits while there are not enough, and asks buffers to commit meanwhile. Dropping the future takes
    /// nothing.
    pub async fn take(&self, bytes: usize) -> Permit {
        self.take_between(bytes, bytes).await
    }

    /// Takes as much as is free now, between `bytes_min` and `bytes_max`. Waits for `bytes_min` if less is free. Within
    /// the account's part it never waits. Dropping the future takes nothing.
    pub async fn take_between(&self, bytes_min: usize, bytes_max: usize) -> Permit {
        let woken = Arc::new(Notify::new());
        let ticket = {
            let mut state = self.shared.lock();
            match state.ledger.request(self.id, bytes_min, bytes_max, Instant::now()) {
                Ok(bytes) => {
                    self.shared.show(&state);
                    return self.permit(bytes);
                }
                Err(ticket) => {
                    state.wakers.insert(ticket, woken.clone());
                    state.look(Instant::now());
                    ticket
                }
            }
        };
        let waiting = Waiting { shared: &self.shared, ticket };
        loop {
            {
                let mut state = self.shared.lock();
                if state.ledger.collect(ticket) {
                    self.shared.show(&state);
                    break;
                }
                let now = Instant::now();
                if now.duration_since(state.looked_at) >= LOOK_INTERVAL {
                    state.look(now);
                }
            }
            // `Notify` remembers a wake-up that comes before this wait.
            let _ = tokio::time::timeout(LOOK_INTERVAL, woken.notified()).await;
        }
        // The ticket was collected, so dropping the guard withdraws nothing. If this future is dropped earlier, the
        // guard also releases bytes that were granted in the meantime.
        drop(waiting);
        self.permit(bytes_min)
    }

    /// Takes bytes only if no wait is needed; no buffer is asked to commit. `None`: it would have to wait.
    pub fn take_at_once(&self, bytes: usize) -> Option<Permit> {
        let mut state = self.shared.lock();
        let now = Instant::now();
        match state.ledger.request(self.id, bytes, bytes, now) {
            Ok(bytes) => {
                self.shared.show(&state);
                Some(self.permit(bytes))
            }
            Err(ticket) => {
                // Withdrawn under the same lock, before `look` runs: no buffer is asked to commit for it.
                state.ledger.withdraw(ticket, now);
                None
            }
        }
    }

    /// Returns the bytes that the account can have without waiting, whatever others hold.
    pub fn part_bytes(&self) -> usize {
        self.shared.lock().ledger.part()
    }

    /// Returns the limit of bytes for rows that a sink encodes before it commits; `occupied` are already counted for
    /// them. Encoded rows may be many times as large as the rows.
    pub fn encoded_bytes_max(&self, occupied: usize) -> usize {
        self.shared.lock().ledger.encoded_bytes_max(self.id, occupied)
    }

    /// Counts bytes that already exist. Others wait longer for them.
    pub fn force(&self, bytes: usize) -> Permit {
        let mut permit = self.permit(0);
        permit.resize(bytes);
        permit
    }

    /// Registers a buffer of this account that commits when `commit` is notified.
    pub fn open_buffer(&self, commit: &Arc<Notify>) -> OpenBuffer {
        let mut state = self.shared.lock();
        let id = state.ledger.open_buffer(self.id);
        state.committers.insert(id, commit.clone());
        OpenBuffer { shared: self.shared.clone(), id }
    }

    fn permit(&self, bytes: usize) -> Permit {
        Permit { shared: self.shared.clone(), account: Some(self.id), bytes }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ledger.close(self.id);
        // The parts of the others have grown.
        state.look(Instant::now());
    }
}

/// A waiting request; dropping it withdraws the request.
struct Waiting<'a> {
    shared: &'a Shared,
    ticket: Ticket,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.wakers.remove(&self.ticket);
        let now = Instant::now();
        state.ledger.withdraw(self.ticket, now);
        state.look(now);
        self.shared.show(&state);
    }
}

impl OpenBuffer {
    /// Sets the number of bytes in the buffer.
    pub fn resize(&self, bytes: usize) {
        self.shared.lock().ledger.resize_buffer(self.id, bytes);
    }
}

impl Drop for OpenBuffer {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ledger.close_buffer(self.id);
        state.committers.remove(&self.id);
    }
}

impl State {
    /// Grants what can be granted, and asks for commits if that is not enough.
    fn look(&mut self, now: Instant) {
        if !self.ledger.has_waiters() {
            return;
        }
        self.looked_at = now;
        for ticket in self.ledger.admit(now) {
            if let Some(waker) = self.wakers.remove(&ticket) {
                waker.notify_one();
            }
        }
        for buffer in self.ledger.ask(now) {
            if let Some(commit) = self.committers.get(&buffer) {
                commit.notify_one();
            }
        }
    }
}

impl Shared {
    fn change(&self, account: Option<AccountId>, occupied: usize, bytes: usize) {
        let mut state = self.lock();
        let now = Instant::now();
        // Released bytes are granted under the same lock, so a new request cannot overtake a waiting one.
        match (bytes < occupied, account) {
            (true, Some(account)) => state.ledger.release(account, occupied - bytes, now),
            (true, None) => state.ledger.release_free(occupied - bytes),
            (false, account) => state.ledger.force(account, bytes - occupied),
        }
        if bytes < occupied {
            state.look(now);
        }
        self.show(&state);
    }

    fn show(&self, state: &State) {
        metrics::gauge!(self.gauge).set(state.ledger.occupied() as f64);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit {
    /// Returns the number of bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes more bytes without an account. Returns false, and takes nothing, if this many are not free now.
    pub fn try_grow(&mut self, bytes: usize) -> bool {
        let mut state = self.shared.lock();
        let is_taken = state.ledger.take_free(bytes);
        if is_taken {
            self.bytes += bytes;
            self.shared.show(&state);
        }
        is_taken
    }

    /// Changes the number of bytes that are held. An increase never waits: the bytes already exist, and others wait
    /// longer.
    pub fn resize(&mut self, bytes: usize) {
        if bytes != self.bytes {
            self.shared.change(self.account, self.bytes, bytes);
            self.bytes = bytes;
        }
    }

    /// Splits it: the new permit holds `bytes`, or all if there are fewer.
    pub fn split(&mut self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self { shared: self.shared.clone(), account: self.account, bytes }
    }

    /// Adds the bytes of another permit of the same account.
    pub fn absorb(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.shared.change(self.account, self.bytes, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[tokio::test]
    async fn over_the_budget_the_largest_buffer_commits() {
        let budget = Budget::new(2 * MIB, "test");
        let lane = budget.account("lane");
        let (large, small) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let mut permit = lane.take(2 * MIB).await;
        let own = permit.split(MIB / 2);
        let (one, other) = (lane.open_buffer(&large), lane.open_buffer(&small));
        one.resize(permit.bytes());
        other.resize(own.bytes());
        let waiter = tokio::spawn(async move { lane.take(MIB).await.bytes });
        large.notified().await;
        drop(permit);
        assert_eq!(waiter.await.expect("taken"), MIB);
    }

    #[tokio::test]
    async fn a_wait_that_is_given_up_takes_nothing() {
        let budget = Budget::new(2 * MIB, "test");
        let lane = budget.account("lane");
        let permit = lane.take(2 * MIB).await;
        let waits = tokio::time::timeout(Duration::from_millis(20), lane.take(1_000)).await;
        assert!(waits.is_err(), "there is nothing left");
        drop(permit);
        assert_eq!(budget.shared.lock().ledger.occupied(), 0);
        assert_eq!(lane.take(2 * MIB).await.bytes, 2 * MIB);
    }

    #[tokio::test]
    async fn who_waits_for_long_is_shown_with_who_occupies_it() {
        let budget = Budget::new(2 * MIB, "test");
        let (one, other) = (budget.account("shard-1"), budget.account("shard-2"));
        let _permit = one.take(3 * MIB / 2).await;
        let waiter = async {
            let _own = other.take(MIB / 2).await;
            other.take(MIB / 2).await
        };
        assert!(tokio::time::timeout(Duration::from_millis(20), waiter).await.is_err());
        // The wait was dropped, so nobody waits.
        assert_eq!(budget.long_waits(Duration::ZERO), []);
        let _own = other.take(MIB / 2).await;
        let waiter = other.take(MIB / 2);
        tokio::pin!(waiter);
        let waited = tokio::time::timeout(Duration::from_millis(20), waiter.as_mut()).await;
        assert!(waited.is_err());
        let waits = budget.long_waits(Duration::from_millis(10));
        let [LongWait { account, cause }] = &waits[..] else { panic!("{waits:?}") };
        assert_eq!(&**account, "shard-2");
        assert!(cause.contains("1536 KiB by shard-1"), "{cause}");
    }

    #[test]
    fn what_is_not_free_is_not_taken() {
        let budget = Budget::new(10, "test");
        let mut permit = budget.try_take(8).expect("free");
        assert!(budget.try_take(3).is_none());
        permit.resize(7);
        assert!(budget.try_take(3).is_some());
    }

    #[tokio::test]
    async fn what_is_larger_than_the_budget_passes() {
        let budget = Budget::new(10, "test");
        assert_eq!(budget.account("lane").take(2 * MIB).await.bytes, 2 * MIB);
    }
}
