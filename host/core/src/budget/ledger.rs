//! The decisions of a budget, without a clock and without waiting: who gets bytes now, who waits, whose
//! buffer is to be committed so that others go on.
//!
//! Half of the bytes is reserved, an equal part for each account (a lane); the other half is common. What
//! an account holds beyond its part comes out of the common half.
//!
//! | request of an account that | is granted |
//! |---|---|
//! | stays within its part | at once |
//! | holds less than its part, up to [`LARGE_BYTES`] | at once: nobody who blocks can stop it |
//! | holds its part or more, up to [`LARGE_BYTES`] | when the common half has room, in order of arrival |
//! | goes beyond its part by more than [`LARGE_BYTES`] | the same, or, one at a time, beyond the bound |
//!
//! Who went beyond the bound keeps that turn until the common half is no longer overdrawn, or until it
//! holds no more than its part, or until it has released nothing for [`Limits::turn_max`]: then it is
//! blocked, and the turn passes on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The smallest part of an account: about a batch.
pub(super) const PART_BYTES_MIN: usize = 256 << 10;
/// Requests above this are few, and may go beyond the bound one at a time.
pub(super) const LARGE_BYTES: usize = 1 << 20;
/// How much of the common half one request that takes what there is may take.
const GREED: usize = 4;
/// Commits that a lane may have of one sink at once: one that grows, one that waits for its place, one in it,
/// and one under way.
const COMMITS_AT_ONCE: usize = 4;
/// Bytes that an account may hold beyond its part while its rows are encoded: room for a compressor (3.5 MiB) or
/// a usual batch, so that neither ends a commit early.
const ENCODED_BEYOND_BYTES: usize = 4 << 20;
/// For how long a buffer that was asked to commit counts as bytes that come back soon. One that is
/// blocked does not count longer, and others are asked.
const ASKED_FOR: Duration = Duration::from_secs(2);

/// Bound of a budget.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) bytes_max: usize,
    /// After so long without a release, who went beyond the bound counts as blocked.
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

/// Bound of all accounts together, large requests beyond it left out.
pub fn bytes_bound(bytes_max: usize, accounts: usize) -> usize {
    let reserved = (bytes_max / 2).max(accounts.saturating_mul(PART_BYTES_MIN));
    // An account below its part takes one more request.
    let crossing = accounts.saturating_mul(LARGE_BYTES);
    (bytes_max / 2).saturating_add(reserved).saturating_add(crossing)
}

/// Bound of what the rows of one sink may become beyond [`bytes_bound`], in all accounts together.
pub fn encoded_bound(bytes_max: usize, accounts: usize) -> usize {
    // One commit has all that is free, and the others have their share of the account's part.
    let reserved = (bytes_max / 2).max(accounts.saturating_mul(PART_BYTES_MIN));
    accounts.saturating_mul(ENCODED_BEYOND_BYTES).saturating_add(reserved)
}

/// Names an account.
pub(super) type AccountId = u64;
/// Names a request that waits, in order of arrival.
pub(super) type Ticket = u64;
/// Names a buffer that could commit.
pub(super) type BufferId = u64;

/// A request that waits.
#[derive(Debug)]
struct Waiter {
    account: AccountId,
    bytes: usize,
    since: Instant,
    /// It has its bytes, and has not heard so yet.
    granted: bool,
}

#[derive(Debug)]
struct AccountState {
    name: Arc<str>,
    occupied: usize,
    /// When it last gave bytes back.
    released_at: Instant,
    /// Its requests that wait.
    waiting: usize,
}

/// A buffer that holds bytes and could commit.
#[derive(Debug)]
struct Buffer {
    account: AccountId,
    bytes: usize,
    is_asked: bool,
}

/// A commit that was asked for and has not given its bytes back.
#[derive(Debug)]
struct Asked {
    account: AccountId,
    bytes: usize,
    at: Instant,
}

/// Who went beyond the bound last.
#[derive(Clone, Copy, Debug)]
struct Turn {
    account: AccountId,
    granted_at: Instant,
}

/// By what right a request is granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grant {
    Part,
    Common,
    Turn,
}

/// A request that waits for long, as shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LongWait {
    /// The account that waits.
    pub account: Arc<str>,
    /// What it waits for, and who holds it.
    pub cause: String,
}

/// Who holds what, and who waits.
#[derive(Debug)]
pub(super) struct BudgetLedger {
    limits: Limits,
    accounts: BTreeMap<AccountId, AccountState>,
    /// Bytes of all accounts, and of those who take without one.
    occupied: usize,
    /// Bytes of accounts beyond their parts.
    common: usize,
    /// Those that wait for the common half, in order of arrival: up to [`LARGE_BYTES`], and above.
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

    /// Opens an account: all parts become smaller.
    pub(super) fn open(&mut self, name: Arc<str>, now: Instant) -> AccountId {
        let id = self.new_id();
        self.accounts.insert(id, AccountState { name, occupied: 0, released_at: now, waiting: 0 });
        self.recount();
        id
    }

    /// Closes an account. What it holds still is counted until it is released.
    pub(super) fn close(&mut self, account: AccountId) {
        self.accounts.remove(&account);
        self.recount();
    }

    /// Asks for bytes, at least `bytes_min`, at most `bytes_max`, depending on what is free.
    ///
    /// # Errors
    /// The ticket under which at least `bytes_min` are waited for.
    pub(super) fn request(
        &mut self,
        account: AccountId,
        bytes_min: usize,
        bytes_max: usize,
        now: Instant,
    ) -> Result<usize, Ticket> {
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

    /// Whether a ticket has its bytes; it is gone then.
    pub(super) fn collect(&mut self, ticket: Ticket) -> bool {
        let is_granted = self.waiters.get(&ticket).is_some_and(|waiter| waiter.granted);
        if is_granted {
            self.waiters.remove(&ticket);
        }
        is_granted
    }

    /// Takes back a request that waits, or its bytes.
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

    /// Counts bytes that are there already.
    pub(super) fn force(&mut self, account: Option<AccountId>, bytes: usize) {
        self.occupied = self.occupied.saturating_add(bytes);
        let Some(state) = account.and_then(|id| self.accounts.get_mut(&id)) else { return };
        let before = state.occupied;
        state.occupied += bytes;
        let (before, after) = (before, state.occupied);
        self.common += self.excess(after) - self.excess(before);
    }

    /// Takes bytes for nobody's account, if the whole budget has them.
    pub(super) fn take_free(&mut self, bytes: usize) -> bool {
        let fits = self.occupied.saturating_add(bytes) <= self.limits.bytes_max;
        if fits {
            self.force(None, bytes);
        }
        fits
    }

    /// Counts bytes of an account as given back.
    pub(super) fn release(&mut self, account: AccountId, bytes: usize, now: Instant) {
        self.release_free(bytes);
        let Some(state) = self.accounts.get_mut(&account) else { return };
        let before = state.occupied;
        state.occupied = state.occupied.saturating_sub(bytes);
        state.released_at = now;
        let after = state.occupied;
        self.common = self.common.saturating_sub(self.excess(before) - self.excess(after));
        let mut left = bytes;
        for asked in self.asked.iter_mut().filter(|asked| asked.account == account) {
            let back = asked.bytes.min(left);
            asked.bytes -= back;
            left -= back;
        }
        self.asked.retain(|asked| asked.bytes > 0);
    }

    /// Counts bytes of nobody's account as given back.
    pub(super) fn release_free(&mut self, bytes: usize) {
        self.occupied = self.occupied.saturating_sub(bytes);
    }

    /// Grants what can be granted now; gives the tickets that have their bytes.
    pub(super) fn admit(&mut self, now: Instant) -> Vec<Ticket> {
        let mut admitted = Vec::new();
        for is_large in [false, true] {
            let queue = std::mem::take(if is_large { &mut self.large } else { &mut self.small });
            let mut left = VecDeque::with_capacity(queue.len());
            for ticket in queue {
                let Some(waiter) = self.waiters.get(&ticket) else { continue };
                let (account, bytes) = (waiter.account, waiter.bytes);
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

    /// A buffer begins to hold bytes.
    pub(super) fn open_buffer(&mut self, account: AccountId) -> BufferId {
        let id = self.new_id();
        self.buffers.insert(id, Buffer { account, bytes: 0, is_asked: false });
        id
    }

    /// A buffer holds this many bytes.
    pub(super) fn resize_buffer(&mut self, buffer: BufferId, bytes: usize) {
        if let Some(buffer) = self.buffers.get_mut(&buffer) {
            buffer.bytes = bytes;
        }
    }

    /// A buffer is empty, or commits already.
    pub(super) fn close_buffer(&mut self, buffer: BufferId) {
        self.buffers.remove(&buffer);
    }

    /// The buffers to commit now, so that those who wait get their bytes: the largest of those that help,
    /// and no more than are needed. To ask more often would cut the others' commits small.
    pub(super) fn ask(&mut self, now: Instant) -> Vec<BufferId> {
        let wanted: usize =
            self.small.iter().chain(&self.large).map(|it| self.waiters[it].bytes).sum();
        self.asked.retain(|asked| now.duration_since(asked.at) < ASKED_FOR);
        let mut coming: usize = self.asked.iter().map(|asked| asked.bytes).sum();
        let mut chosen = Vec::new();
        while coming < wanted {
            let helpful = self.buffers.iter().filter(|(_, buffer)| {
                let Some(state) = self.accounts.get(&buffer.account) else { return false };
                let frees = self.excess(state.occupied) > 0 || state.waiting > 0;
                frees && !buffer.is_asked && buffer.bytes > 0
            });
            // The lower id is the older one.
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

    /// The accounts that have waited for `after` or longer.
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

    /// Who holds most, in words.
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
        format!("{occupied} of {max} are held, {}{others}", most.join(", "))
    }

    /// Bytes that an account could have now without waiting, its part always included.
    fn free_to(&self, account: AccountId) -> usize {
        let occupied = self.accounts.get(&account).map_or(0, |state| state.occupied);
        let own = self.part().saturating_sub(occupied);
        let common = self.limits.common_max().saturating_sub(self.common);
        own + if self.waiters.is_empty() { common / GREED } else { 0 }
    }

    /// Most bytes that rows may have once they are encoded, where `occupied` bytes are counted for them: what is
    /// counted, the rest of the account's part ([`ENCODED_BEYOND_BYTES`] more), and an equal share of what the
    /// common half has, since others may be at the same point. At least what fits into the part as often as
    /// there may be commits: those before it may have all the rest.
    pub(super) fn encoded_bytes_max(&self, account: AccountId, occupied: usize) -> usize {
        let part = self.part();
        let of_account = self.accounts.get(&account).map_or(0, |state| state.occupied);
        let own = (part + ENCODED_BEYOND_BYTES).saturating_sub(of_account);
        let common = self.limits.common_max().saturating_sub(self.common);
        let free = own + common / self.accounts.len().max(1);
        occupied.saturating_add(free).max(part / COMMITS_AT_ONCE)
    }

    /// Whether a request can be granted now, and by what right. `has_earlier`: another of its size waits
    /// for longer.
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
        if occupied.saturating_add(bytes) <= part || (occupied < part && !is_large) {
            return Some(Grant::Part);
        }
        let more = self.excess(occupied.saturating_add(bytes)) - self.excess(occupied);
        if !has_earlier && self.common.saturating_add(more) <= self.limits.common_max() {
            return Some(Grant::Common);
        }
        (is_large && !has_earlier && self.is_turn_free(now)).then_some(Grant::Turn)
    }

    /// Whether nobody is beyond the bound who still moves.
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

    /// Part that each account has to itself, in bytes.
    pub(super) fn part(&self) -> usize {
        self.limits.part(self.accounts.len())
    }

    fn excess(&self, occupied: usize) -> usize {
        occupied.saturating_sub(self.part())
    }

    /// Counts the common half again, after the parts have changed.
    fn recount(&mut self) {
        self.common = self.accounts.values().map(|state| self.excess(state.occupied)).sum();
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }
}

/// Bytes for people.
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
