//! Booking of memory for an answer: the bound on what it uses while it is read.
//!
//! A reader books memory before a call, by the size of the records that came before. A server may answer with more:
//! records have grown, or it ignores the requested number. So the HTTP client counts the answer as it comes
//! (`silence`).
//!
//! | the answer needs | then |
//! |---|---|
//! | no more than is booked, plus a slack of 64 KiB | it is read on |
//! | more, and that is free now | more is booked, and it is read on |
//! | more, and that is not free | the call is dropped: [`Read::Outgrown`]; the reader books enough and calls again |
//!
//! Invariant: no call waits for memory while it has a part of an answer. Otherwise all lanes could wait at the same
//! time, each with its part, and one blocked sink would keep them all waiting.
//!
//! Race: when an answer has outgrown its booking, its body returns `Pending` without a waker. So the reader must be
//! woken by `outgrown`, and must not poll the call again: that is why the `select!` in [`read`] is biased.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use shardmill_core::budget::{Account, Permit};

/// Bytes that an answer may use beyond its booking before more is booked: for its last lines, and for a record somewhat
/// larger than the others. Less than the minimum that counts for each lane, so that the bound holds.
const SLACK_BYTES: usize = 64 << 10;

tokio::task_local! {
    /// Booking of the call that this task waits for.
    static BOOKING: Booking;
}

/// Memory for the answer of one call; clones share it.
#[derive(Clone)]
pub(super) struct Booking(Arc<Shared>);

struct Shared {
    account: Arc<Account>,
    state: Mutex<State>,
    /// Wakes the reader that waits for the call: the answer is not read on.
    outgrown: Notify,
}

struct State {
    /// `None`: the call has ended.
    permit: Option<Permit>,
    /// Bytes of memory that the answer of the last attempt has used, as far as it came.
    bytes: usize,
    /// Bytes of memory that the answer needs, if that was more than was free.
    needed: Option<usize>,
    is_too_long: bool,
}

/// Bytes of memory that an answer needs while it is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// Bytes that it uses now.
    pub(super) by_now: usize,
    /// Bytes that it will use at least, as far as is known.
    pub(super) known: usize,
    /// Bytes that it is likely to use once it is whole. They are booked before the next call. With only the known
    /// bytes, an answer of unknown length would be requested many times, each time for one more part.
    pub(super) likely: usize,
}

/// Outcome of a call.
pub(super) enum Read<T> {
    /// The call ended.
    Ended {
        /// Result of the call.
        answer: T,
        /// Booking, with the bytes that were added meanwhile.
        permit: Permit,
        /// Bytes of memory that the answer used while it was read.
        bytes: usize,
        /// Whether the call failed because its answer was longer than any may be.
        is_too_long: bool,
    },
    /// The answer needs more memory than was free, and the call was dropped. Nothing is booked any more.
    Outgrown {
        /// Bytes of memory to book before the next call.
        needed: usize,
    },
}

impl Booking {
    fn new(account: Arc<Account>, permit: Permit) -> Self {
        let state = State { permit: Some(permit), bytes: 0, needed: None, is_too_long: false };
        Self(Arc::new(Shared { account, state: Mutex::new(state), outgrown: Notify::new() }))
    }

    /// Returns the booking of the call that this task makes, if it has one.
    pub(super) fn of_call() -> Option<Self> {
        BOOKING.try_with(Clone::clone).ok()
    }

    /// Returns whether an answer may be read on. If not, the call ends as [`Read::Outgrown`].
    pub(super) fn covers(&self, need: Need) -> bool {
        let mut state = self.lock();
        state.bytes = need.by_now;
        let Some(permit) = &mut state.permit else { return false };
        let more = need.known.saturating_sub(permit.bytes().saturating_add(SLACK_BYTES));
        if more == 0 {
            return true;
        }
        if let Some(taken) = self.0.account.take_at_once(more) {
            permit.absorb(taken);
            return true;
        }
        state.needed = Some(need.likely);
        self.0.outgrown.notify_one();
        false
    }

    /// Notes that the answer is longer than any may be.
    pub(super) fn is_too_long(&self) {
        self.lock().is_too_long = true;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a call whose answer may use what is booked, plus what `account` can book without waiting. Dropping the future
/// gives the booking back.
pub(super) async fn read<T>(
    account: &Arc<Account>,
    permit: Permit,
    call: impl Future<Output = T>,
) -> Read<T> {
    let booking = Booking::new(account.clone(), permit);
    let answer = tokio::select! {
        // Comes first: after this notice, the call must not be polled again.
        biased;
        () = booking.0.outgrown.notified() => None,
        answer = BOOKING.scope(booking.clone(), call) => Some(answer),
    };
    let mut state = booking.lock();
    match (answer, state.permit.take()) {
        (Some(answer), Some(permit)) => {
            Read::Ended { answer, permit, bytes: state.bytes, is_too_long: state.is_too_long }
        }
        _ => Read::Outgrown { needed: state.needed.unwrap_or(state.bytes) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardmill_core::budget::Budget;

    const MIB: usize = 1 << 20;

    /// Reads an answer with these needs, one after the other. Returns the bytes booked at its end, or those that it
    /// needs.
    async fn comes(account: &Arc<Account>, booked: usize, needs: &[usize]) -> Result<usize, usize> {
        let permit = account.take(booked).await;
        let of = |bytes| Need { by_now: bytes, known: bytes, likely: 2 * bytes };
        let call = async {
            for needed in needs {
                if !Booking::of_call().expect("in a call").covers(of(*needed)) {
                    std::future::pending::<()>().await;
                }
            }
        };
        match read(account, permit, call).await {
            Read::Ended { permit, .. } => Ok(permit.bytes()),
            Read::Outgrown { needed } => Err(needed),
        }
    }

    #[tokio::test]
    async fn wall_02_an_answer_that_outgrows_its_booking_takes_what_is_free_or_is_given_up() {
        let budget = Budget::new(16 * MIB, "test");
        let (account, other) = (Arc::new(budget.account("lane")), budget.account("other"));
        // Part of each: 4 MiB; common: 8 MiB.
        assert_eq!(comes(&account, MIB, &[1, MIB]).await, Ok(MIB), "it fits");
        assert_eq!(comes(&account, MIB, &[MIB + SLACK_BYTES]).await, Ok(MIB), "as good as");
        let grown = comes(&account, MIB, &[2 * MIB, 6 * MIB]).await;
        assert_eq!(grown, Ok(6 * MIB - SLACK_BYTES), "what is free is taken");
        // The other account has all of the common half, and more.
        let _all = other.take(20 * MIB).await;
        assert_eq!(comes(&account, MIB, &[2 * MIB, 6 * MIB]).await, Err(12 * MIB));
        assert_eq!(comes(&account, MIB, &[4 * MIB]).await.ok(), Some(4 * MIB - SLACK_BYTES));
        assert_eq!(account.part_bytes(), 4 * MIB);
        // The dropped calls have given back everything.
        assert!(account.take_at_once(4 * MIB).is_some());
    }

    #[tokio::test]
    async fn wall_02_a_call_that_is_dropped_gives_its_booking_back() {
        let budget = Budget::new(2 * MIB, "test");
        let account = Arc::new(budget.account("lane"));
        let permit = account.take(2 * MIB).await;
        let call = read(&account, permit, std::future::pending::<()>());
        let waited = tokio::time::timeout(std::time::Duration::from_millis(20), call).await;
        assert!(waited.is_err());
        assert!(account.take_at_once(2 * MIB).is_some());
        assert!(Booking::of_call().is_none(), "outside of a call");
    }
}
