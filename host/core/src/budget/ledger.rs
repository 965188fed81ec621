//! Decisions of a budget, without a clock and without waiting: who gets bytes now, who waits, and whose buffer must
//! commit so that others go on.
//!
//! Half of the bytes is reserved in equal parts for the accounts (lanes); the other half is common. What an account
//! holds beyond its part counts against the common half.
//!
//! The invariants:
//! - An account that holds less than its part gets an ordinary request at once. So a blocked lane cannot stop another.
//! - All requests up to [`LARGE_BYTES`] together stay within [`bytes_bound`]. Larger ones may go beyond it, one account
//!   at a time. Bytes that already exist (`BudgetLedger::force`) are counted without a limit.
//! - Waiters of the common half are served in the order of arrival, small and large ones in queues of their own: a
//!   large request that waits does not hold up small ones.
//!
//! | request of an account that | is granted |
//! |---|---|
//! | stays within its part | at once |
//! | holds less than its part, up to [`LARGE_BYTES`] | at once |
//! | holds its part or more, up to [`LARGE_BYTES`] | when the common half has room, in order of arrival |
//! | goes beyond its part, above [`LARGE_BYTES`] | the same, or, one at a time, beyond the limit |
//!
//! An account that went beyond the limit has the *turn*. The turn ends when the common half is no longer overdrawn,
//! when the account holds no more than its part, or when it has released nothing for [`Limits::turn_max`]. In the last
//! case it counts as blocked, and another account may go beyond the limit, too: otherwise one blocked lane with a large
//! record would stop all large records.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Smallest part of an account: about one batch.
pub(super) const PART_BYTES_MIN: usize = 256 << 10;
/// Requests above this size are rare, and may go beyond the limit one at a time.
pub(super) const LARGE_BYTES: usize = 1 << 20;
/// Share of the common half that a request for "as much as is free" may take, as a divisor.
const GREED: usize = 4;
/// Commits of one sink that a lane may have at once: one that grows, one that waits for a place in the queue, one in
/// the queue, and one in progress.
const COMMITS_AT_ONCE: usize = 4;
/// Bytes that an account may hold beyond its part while its rows are encoded: room for a compressor (3.5 MiB) or a
/// usual batch, so that neither ends a commit early.
const ENCODED_BEYOND_BYTES: usize = 4 << 20;
/// How long a buffer that was asked to commit counts as bytes that come back soon. A blocked buffer stops counting
/// after that, and others are asked.
const ASKED_FOR: Duration = Duration::from_secs(2);

/// Limits of a budget.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) bytes_max: usize,
    /// Time without a release after which an account that went beyond the limit counts as blocked.
    pub(super) turn_max: Duration,
}

impl Limits {
    fn common_max(&self) -> usize {
        self.bytes_max / 2
    }

    fn part(&self, accounts: usize) -> usize {
        (self.bytes_max / 2 / accounts.max(1)).max(PART_BYTES_MIN)
    }
}

/// Returns the limit of all accounts together, without large requests beyond it.
pub fn bytes_bound(bytes_max: usize, accounts: usize) -> usize {
    let reserved = (bytes_max / 2).max(accounts.saturating_mul(PART_BYTES_MIN));
    // Each account below its part may take one more request.
    let crossing = accounts.saturating_mul(LARGE_BYTES);
    (bytes_max / 2).saturating_add(reserved).saturating_add(crossing)
}

/// Returns the limit of what the encoded rows of one sink may take beyond [`bytes_bound`], in all accounts together.
pub fn encoded_bound(bytes_max: usize, accounts: usize) -> usize {
    // One commit has all that is free, and the others have their share of the account's part.
    let reserved = (bytes_max / 2).max(accounts.saturating_mul(PART_BYTES_MIN));
    accounts.saturating_mul(ENCODED_BEYOND_BYTES).saturating_add(reserved)
}

/// Id of an account.
pub(super) type AccountId = u64;
/// Id of a waiting request, in order of arrival.
pub(super) type Ticket = u64;
/// Id of a buffer that can commit.
pub(super) type BufferId = u64;

/// Waiting request.
#[derive(Debug)]
struct Waiter {
    account: AccountId,
    bytes: usize,
    since: Instant,
    /// Its bytes are counted, but the waiter has not been woken yet.
    granted: bool,
}

#[derive(Debug)]
struct AccountState {
    name: Arc<str>,
    occupied: usize,
    /// Time of the last release.
    released_at: Instant,
    /// Number of its waiting requests.
    waiting: usize,
}

/// Buffer that holds bytes and can commit.
#[derive(Debug)]
struct Buffer {
    account: AccountId,
    bytes: usize,
    is_asked: bool,
}

/// Commit that was asked for and has not released its bytes yet.
#[derive(Debug)]
struct Asked {
    account: AccountId,
    bytes: usize,
    at: Instant,
}

/// Account that went beyond the limit last.
#[derive(Clone, Copy, Debug)]
struct Turn {
    account: AccountId,
    granted_at: Instant,
}

/// Reason why a request is granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grant {
    Part,
    Common,
    Turn,
}

/// Long wait, as users see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LongWait {
    /// Account that waits.
    pub account: Arc<str>,
    /// Reason of the wait, and who holds it.
    pub cause: String,
}

/// State of a budget: who holds what, and who waits.
#[derive(Debug)]
pub(super) struct BudgetLedger {
    limits: Limits,
    accounts: BTreeMap<AccountId, AccountState>,
    /// Bytes of all accounts, and of permits without an account.
    occupied: usize,
    /// Bytes of accounts beyond their parts.
    common: usize,
    /// Requests that wait for the common half, in order of arrival: up to [`LARGE_BYTES`], and above.
    small: VecDeque<Ticket>,
    large: VecDeque<Ticket>,
    waiters: BTreeMap<Ticket, Waiter>,
    turn: Option<Turn>,
    buffers: BTreeMap<BufferId, Buffer>,
    asked: Vec<Asked>,
    next_id: u64,
}

impl BudgetLedger {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            accounts: BTreeMap::new(),
            occupied: 0,
            common: 0,
            small: VecDeque::new(),
            large: VecDeque::new(),
            waiters: BTreeMap::new(),
            turn: None,
            buffers: BTreeMap::new(),
            asked: Vec::new(),
            next_id: 1,
        }
    }

    pub(super) fn occupied(&self) -> usize {
        self.occupied
    }

    pub(super) fn has_waiters(&self) -> bool {
        !self.waiters.is_empty()
    }

    /// Opens an account. The parts of all others become smaller.
    pub(super) fn open(&mut self, name: Arc<str>, now: Instant) -> AccountId {
        let id = self.new_id();
        self.accounts.insert(id, AccountState { name, occupied: 0, released_at: now, waiting: 0 });
        self.recount();
        id
    }

    /// Closes an account. What it still holds is counted until it is released.
    pub(super) fn close(&mut self, account: AccountId) {
        self.accounts.remove(&account);
        self.recount();
    }

    /// Requests bytes: at least `bytes_min`, at most `bytes_max`, depending on what is free.
    ///
    /// # Errors
    /// Gives a ticket if the request must wait for `bytes_min`.
    pub(super) fn request(
        &mut self,
        account: AccountId,
        bytes_min: usize,
        bytes_max: usize,
        now: Instant,
    ) -> Result<usize, Ticket> {
        // The request gets as much as is free now. If it must wait, it waits only for the minimum.
        let bytes = self.free_to(account).clamp(bytes_min, bytes_max.max(bytes_min));
        let is_large = bytes > LARGE_BYTES;
        let has_earlier = if is_large { !self.large.is_empty() } else { !self.small.is_empty() };
        if let Some(grant) = self.decide(account, bytes, has_earlier, now) {
            self.grant(account, bytes, grant, now);
            return Ok(bytes);
        }
        let ticket = self.new_id();
        let waiter = Waiter { account, bytes: bytes_min, since: now, granted: false };
        self.waiters.insert(ticket, waiter);
        let queue = if bytes_min > LARGE_BYTES { &mut self.large } else { &mut self.small };
        queue.push_back(ticket);
        if let Some(state) = self.accounts.get_mut(&account) {
            state.waiting += 1;
        }
        Err(ticket)
    }

    /// Whether a ticket is granted. If so, the ticket is removed.
    pub(super) fn collect(&mut self, ticket: Ticket) -> bool {
        let is_granted = self.waiters.get(&ticket).is_some_and(|waiter| waiter.granted);
        if is_granted {
            self.waiters.remove(&ticket);
        }
        is_granted
    }

    /// Withdraws a waiting request, or releases the bytes of a granted one.
    pub(super) fn withdraw(&mut self, ticket: Ticket, now: Instant) {
        let Some(waiter) = self.waiters.remove(&ticket) else { return };
        if waiter.granted {
            return self.release(waiter.account, waiter.bytes, now);
        }
        self.small.retain(|other| *other != ticket);
        self.large.retain(|other| *other != ticket);
        if let Some(state) = self.accounts.get_mut(&waiter.account) {
            state.waiting -= 1;
        }
    }

    /// Counts bytes that already exist.
    pub(super) fn force(&mut self, account: Option<AccountId>, bytes: usize) {
        self.occupied = self.occupied.saturating_add(bytes);
        let Some(state) = account.and_then(|id| self.accounts.get_mut(&id)) else { return };
        let before = state.occupied;
        state.occupied += bytes;
        let (before, after) = (before, state.occupied);
        self.common += self.excess(after) - self.excess(before);
    }

    /// Takes bytes without an account, if the whole budget has them.
    pub(super) fn take_free(&mut self, bytes: usize) -> bool {
        let fits = self.occupied.saturating_add(bytes) <= self.limits.bytes_max;
        if fits {
            self.force(None, bytes);
        }
        fits
    }

    /// Releases bytes of an account.
    pub(super) fn release(&mut self, account: AccountId, bytes: usize, now: Instant) {
        self.release_free(bytes);
        let Some(state) = self.accounts.get_mut(&account) else { return };
        let before = state.occupied;
        state.occupied = state.occupied.saturating_sub(bytes);
        state.released_at = now;
        let after = state.occupied;
        self.common = self.common.saturating_sub(self.excess(before) - self.excess(after));
        // Released bytes count for the commits that were asked of this account, the oldest first.
        let mut left = bytes;
        for asked in self.asked.iter_mut().filter(|asked| asked.account == account) {
            let back = asked.bytes.min(left);
            asked.bytes -= back;
            left -= back;
        }
        self.asked.retain(|asked| asked.bytes > 0);
    }

    /// Releases bytes of no account.
    pub(super) fn release_free(&mut self, bytes: usize) {
        self.occupied = self.occupied.saturating_sub(bytes);
    }

    /// Grants what can be granted now. Returns the granted tickets.
    pub(super) fn admit(&mut self, now: Instant) -> Vec<Ticket> {
        let mut admitted = Vec::new();
        // Small requests first: a large one that waits does not hold them up.
        for is_large in [false, true] {
            let queue = std::mem::take(if is_large { &mut self.large } else { &mut self.small });
            let mut left = VecDeque::with_capacity(queue.len());
            for ticket in queue {
                let Some(waiter) = self.waiters.get(&ticket) else { continue };
                let (account, bytes) = (waiter.account, waiter.bytes);
                // `left` contains earlier requests of this queue. Only a request within its account's part may overtake
                // them.
                match self.decide(account, bytes, !left.is_empty(), now) {
                    Some(grant) => {
                        self.grant(account, bytes, grant, now);
                        if let Some(state) = self.accounts.get_mut(&account) {
                            state.waiting -= 1;
                        }
                        if let Some(waiter) = self.waiters.get_mut(&ticket) {
                            waiter.granted = true;
                        }
                        admitted.push(ticket);
                    }
                    None => left.push_back(ticket),
                }
            }
            *(if is_large { &mut self.large } else { &mut self.small }) = left;
        }
        admitted
    }

    /// Registers a buffer.
    pub(super) fn open_buffer(&mut self, account: AccountId) -> BufferId {
        let id = self.new_id();
        self.buffers.insert(id, Buffer { account, bytes: 0, is_asked: false });
        id
    }

    /// Sets the number of bytes of a buffer.
    pub(super) fn resize_buffer(&mut self, buffer: BufferId, bytes: usize) {
        if let Some(buffer) = self.buffers.get_mut(&buffer) {
            buffer.bytes = bytes;
        }
    }

    /// Removes a buffer that is empty or already commits.
    pub(super) fn close_buffer(&mut self, buffer: BufferId) {
        self.buffers.remove(&buffer);
    }

    /// Chooses the buffers to commit now so that waiters get their bytes: the largest that help, and no more than
    /// needed. To ask for more would make the commits of others too small.
    pub(super) fn ask(&mut self, now: Instant) -> Vec<BufferId> {
        let wanted: usize =
            self.small.iter().chain(&self.large).map(|it| self.waiters[it].bytes).sum();
        self.asked.retain(|asked| now.duration_since(asked.at) < ASKED_FOR);
        let mut coming: usize = self.asked.iter().map(|asked| asked.bytes).sum();
        let mut chosen = Vec::new();
        // Bytes of commits that were asked for recently count as coming back, so they are not asked for twice.
        while coming < wanted {
            let helpful = self.buffers.iter().filter(|(_, buffer)| {
                let Some(state) = self.accounts.get(&buffer.account) else { return false };
                // A commit helps if its bytes return to the common half, or if its own account waits.
                let frees = self.excess(state.occupied) > 0 || state.waiting > 0;
                frees && !buffer.is_asked && buffer.bytes > 0
            });
            // A lower id is older.
            let largest =
                helpful.max_by_key(|(id, buffer)| (buffer.bytes, std::cmp::Reverse(**id)));
            let Some(id) = largest.map(|(id, _)| *id) else { break };
            if let Some(buffer) = self.buffers.get_mut(&id) {
                buffer.is_asked = true;
                coming += buffer.bytes;
                self.asked.push(Asked { account: buffer.account, bytes: buffer.bytes, at: now });
            }
            chosen.push(id);
        }
        chosen
    }

    /// Returns the accounts that have waited for `after` or longer.
    pub(super) fn long_waits(&self, after: Duration, now: Instant) -> Vec<LongWait> {
        let mut waits: Vec<LongWait> = Vec::new();
        let waiting = self.waiters.values().filter(|waiter| !waiter.granted);
        for waiter in waiting.filter(|waiter| now.duration_since(waiter.since) >= after) {
            let Some(state) = self.accounts.get(&waiter.account) else { continue };
            if waits.iter().any(|other| other.account == state.name) {
                continue;
            }
            waits.push(LongWait {
                account: state.name.clone(),
                cause: format!("waits for {} of memory: {}", text(waiter.bytes), self.occupants()),
            });
        }
        waits
    }

    /// Says in words which accounts hold most.
    fn occupants(&self) -> String {
        let mut occupants: Vec<_> =
            self.accounts.values().filter(|state| state.occupied > 0).collect();
        occupants.sort_by_key(|state| std::cmp::Reverse(state.occupied));
        let most = occupants.iter().take(3);
        let most: Vec<_> =
            most.map(|state| format!("{} by {}", text(state.occupied), state.name)).collect();
        let others = match occupants.len().saturating_sub(3) {
            0 => String::new(),
            others => format!(" and the rest by {others} others"),
        };
        let (occupied, max) = (text(self.occupied), text(self.limits.bytes_max));
        format!("{occupied} of {max} are in use, {}{others}", most.join(", "))
    }

    /// Returns the bytes that an account could have now without waiting; its part is always included.
    fn free_to(&self, account: AccountId) -> usize {
        let occupied = self.accounts.get(&account).map_or(0, |state| state.occupied);
        let own = self.part().saturating_sub(occupied);
        let common = self.limits.common_max().saturating_sub(self.common);
        own + if self.waiters.is_empty() { common / GREED } else { 0 }
    }

    /// Returns the highest number of bytes that rows may have once they are encoded. `occupied` bytes are already
    /// counted for them.
    ///
    /// The limit is the sum of `occupied`, the rest of the account's part and [`ENCODED_BEYOND_BYTES`], and an equal
    /// share of what is free in the common half, since other lanes may be at the same point. It is at least the part
    /// divided by [`COMMITS_AT_ONCE`], because earlier commits may have taken all the rest.
    pub(super) fn encoded_bytes_max(&self, account: AccountId, occupied: usize) -> usize {
        let part = self.part();
        let of_account = self.accounts.get(&account).map_or(0, |state| state.occupied);
        let own = (part + ENCODED_BEYOND_BYTES).saturating_sub(of_account);
        let common = self.limits.common_max().saturating_sub(self.common);
        let free = own + common / self.accounts.len().max(1);
        occupied.saturating_add(free).max(part / COMMITS_AT_ONCE)
    }

    /// Decides whether a request can be granted now, and for which reason. `has_earlier`: another request of the same
    /// queue has waited longer.
    fn decide(
        &self,
        account: AccountId,
        bytes: usize,
        has_earlier: bool,
        now: Instant,
    ) -> Option<Grant> {
        let occupied = self.accounts.get(&account).map_or(0, |state| state.occupied);
        let part = self.part();
        let is_large = bytes > LARGE_BYTES;
        // This right does not depend on others. An account below its part may exceed it by one ordinary request, or a
        // batch that is larger than the rest of the part would have to wait for blocked lanes.
        if occupied.saturating_add(bytes) <= part || (occupied < part && !is_large) {
            return Some(Grant::Part);
        }
        let more = self.excess(occupied.saturating_add(bytes)) - self.excess(occupied);
        if !has_earlier && self.common.saturating_add(more) <= self.limits.common_max() {
            return Some(Grant::Common);
        }
        (is_large && !has_earlier && self.is_turn_free(now)).then_some(Grant::Turn)
    }

    /// Whether the turn is free: no account is beyond the limit that still releases bytes.
    fn is_turn_free(&self, now: Instant) -> bool {
        let Some(turn) = self.turn else { return true };
        let Some(occupant) = self.accounts.get(&turn.account) else { return true };
        let moved_at = turn.granted_at.max(occupant.released_at);
        self.common <= self.limits.common_max()
            || occupant.occupied <= self.part()
            || now.saturating_duration_since(moved_at) >= self.limits.turn_max
    }

    fn grant(&mut self, account: AccountId, bytes: usize, grant: Grant, now: Instant) {
        if grant == Grant::Turn {
            self.turn = Some(Turn { account, granted_at: now });
        }
        self.force(Some(account), bytes);
    }

    /// Returns the part of each account, in bytes.
    pub(super) fn part(&self) -> usize {
        self.limits.part(self.accounts.len())
    }

    fn excess(&self, occupied: usize) -> usize {
        occupied.saturating_sub(self.part())
    }

    /// Recomputes the use of the common half after the parts have changed.
    fn recount(&mut self) {
        self.common = self.accounts.values().map(|state| self.excess(state.occupied)).sum();
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }
}

/// Formats a number of bytes for people.
pub fn text(bytes: usize) -> String {
    match bytes {
        0..0x2800 => format!("{bytes} bytes"),
        0x2800..0x0100_0000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
