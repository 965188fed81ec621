//! The bound on the memory of an answer while it is read: the bytes that are booked for it.
//!
//! A reader books memory before it asks, by the size of the records that came before. A server may answer with more:
//! records have grown, or it does not keep to the number that it was asked for. So the HTTP client counts the answer
//! as it comes (`silence`). Where it needs more than is booked, more is taken, if that is free at once. If not, the
//! answer is given up before it is read, and asked for again once there is room for it.
//!
//! It must not wait for memory with a part of an answer in hand: all lanes could wait so at the same time, each with
//! its part, and a sink that is blocked would keep them all.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use shardmill_core::budget::{Account, Permit};

/// An answer may hold so much beyond what is booked before more is taken: its last lines, and a record that is
/// somewhat larger than the others. Less than what a lane counts for at least, so that the bound holds.
const SLACK_BYTES: usize = 64 << 10;

tokio::task_local! {
    /// The booking of the call that this task waits for.
    static BOOKING: Booking;
}

/// The memory of one call's answer; its clones share it.
#[derive(Clone)]
pub(super) struct Booking(Arc<Shared>);

struct Shared {
    account: Arc<Account>,
    state: Mutex<State>,
    /// Wakes who waits for the call: its answer is not read on.
    outgrown: Notify,
}

struct State {
    /// `None`: the call has ended.
    permit: Option<Permit>,
    /// Bytes that the answer of the last try held while it was read, as far as it came.
    bytes: usize,
    /// Bytes that the answer needs, where that was more than could be had.
    needed: Option<usize>,
    is_too_long: bool,
}

/// The bytes of memory that an answer needs while it is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// Bytes that it holds by now.
    pub(super) by_now: usize,
    /// Bytes that it will hold at least, as far as is known.
    pub(super) known: usize,
    /// Bytes that it is likely to hold once it is whole. It is booked before the answer is asked for again. With no
    /// more than is known, an answer of unknown length would be asked for again and again, each time for one more part.
    pub(super) likely: usize,
}

/// Outcome of a call.
pub(super) enum Read<T> {
    /// It ended.
    Ended {
        /// Its result.
        answer: T,
        /// The booking, with the bytes that were taken meanwhile.
        permit: Permit,
        /// The bytes of memory that the answer held while it was read.
        bytes: usize,
        /// The answer was given up because it was longer than any may be.
        is_too_long: bool,
    },
    /// The answer needs more memory than was free: it was given up. Nothing is booked any more.
    Outgrown {
        /// The bytes of memory to book before it is asked for again.
        needed: usize,
    },
}

impl Booking {
    fn new(account: Arc<Account>, permit: Permit) -> Self {
        let state = State { permit: Some(permit), bytes: 0, needed: None, is_too_long: false };
        Self(Arc::new(Shared { account, state: Mutex::new(state), outgrown: Notify::new() }))
    }

    /// The booking of the call that this task makes, if it has one.
    pub(super) fn of_call() -> Option<Self> {
        BOOKING.try_with(Clone::clone).ok()
    }

    /// Whether an answer may be read on. If not, the call ends as [`Read::Outgrown`].
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

    /// The answer is longer than any may be.
    pub(super) fn is_too_long(&self) {
        self.lock().is_too_long = true;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a call whose answer may hold what is booked, and what `account` can have more without waiting. Dropping the
/// future gives the booking back.
pub(super) async fn read<T>(
    account: &Arc<Account>,
    permit: Permit,
    call: impl Future<Output = T>,
) -> Read<T> {
    let booking = Booking::new(account.clone(), permit);
    let answer = tokio::select! {
        // First: who is told that the answer is not read on must not poll the call again.
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

    /// The needs of an answer as it comes, one after the other; whether it was read to its end.
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
        // The other one has all that is common, and goes beyond.
        let _all = other.take(20 * MIB).await;
        assert_eq!(comes(&account, MIB, &[2 * MIB, 6 * MIB]).await, Err(12 * MIB));
        assert_eq!(comes(&account, MIB, &[4 * MIB]).await.ok(), Some(4 * MIB - SLACK_BYTES));
        assert_eq!(account.part_bytes(), 4 * MIB);
        // Nothing is left of those that were given up.
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
