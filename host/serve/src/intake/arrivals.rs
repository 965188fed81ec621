//! Bodies that are arriving. Their bytes are reserved as they arrive, and a body that stalls or trickles gives
//! its bytes back when another body needs them.
//!
//! Otherwise a few clients that send all but the last byte would occupy the whole budget, and all other clients
//! would be refused until the deadline of those few.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::BODY_BYTES_MIN;
use shardmill_core::budget::{Budget, Permit};
use shardmill_ports::Pace;

/// Time by which a body must lag the minimum pace before it gives way. It is longer than the retransmission of
/// a packet takes.
const STALL_MIN: Duration = Duration::from_secs(1);
/// Longest wait for the bytes that a body gives back.
const GIVE_BACK_MAX: Duration = Duration::from_millis(200);
/// Interval between looks whether those bytes are free.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

type ArrivalId = u64;

/// Refusal: the bytes do not fit now.
#[derive(Debug)]
pub(super) struct NoRoom;

/// All arriving bodies, and the budget that they share with records in flight to the stream. Clones share it.
#[derive(Clone)]
pub(super) struct Arrivals {
    budget: Budget,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    arriving: HashMap<ArrivalId, Arriving>,
    next_id: ArrivalId,
}

/// A body that is not complete yet.
#[derive(Clone)]
struct Arriving {
    bytes: usize,
    pace: Pace,
    give_way: CancellationToken,
}

/// Handle of an arriving body. Dropping it returns its bytes.
pub(super) struct Arrival {
    id: ArrivalId,
    state: Arc<Mutex<State>>,
    give_way: CancellationToken,
    bytes: Vec<u8>,
    reserved: Permit,
}

impl Arrivals {
    pub fn new(budget: Budget) -> Self {
        Self { budget, state: Arc::default() }
    }

    /// Returns the limit of the budget, in bytes.
    pub fn bytes_max(&self) -> usize {
        self.budget.bytes_max()
    }

    /// Registers a new body. It occupies nothing yet.
    pub fn begin(&self) -> Arrival {
        let give_way = CancellationToken::new();
        let mut state = lock(&self.state);
        let id = state.next_id;
        state.next_id += 1;
        let pace = Pace::begin(Instant::now());
        let arriving = Arriving { bytes: 0, pace, give_way: give_way.clone() };
        state.arriving.insert(id, arriving);
        drop(state);
        let reserved = self.budget.empty();
        Arrival { id, state: self.state.clone(), give_way, bytes: Vec::new(), reserved }
    }

    /// Adds received bytes to a body of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// [`NoRoom`] if the budget has no room for them.
    pub async fn add(
        &self,
        arrival: &mut Arrival,
        piece: &[u8],
        bytes_max: usize,
    ) -> Result<(), NoRoom> {
        // Recorded before room is made, because this body may no longer be stalled.
        self.note(arrival, piece.len());
        let needed = arrival.bytes.len() + piece.len();
        let occupied = arrival.reserved.bytes();
        if needed > occupied {
            // The reserved bytes are counted, so the buffer grows only by what is reserved.
            let wanted = needed.max(occupied * 2).max(BODY_BYTES_MIN).min(bytes_max).max(needed);
            let own = Some(arrival.id);
            let is_there = self.grow(&mut arrival.reserved, wanted - occupied, own).await
                || self.grow(&mut arrival.reserved, needed - occupied, own).await;
            if !is_there {
                return Err(NoRoom);
            }
            let more = arrival.reserved.bytes() - arrival.bytes.len();
            arrival.bytes.reserve_exact(more);
        }
        arrival.bytes.extend_from_slice(piece);
        self.note(arrival, 0);
        Ok(())
    }

    /// Records how many bytes a body occupies, and that bytes of it arrived.
    fn note(&self, arrival: &Arrival, came: usize) {
        if let Some(arriving) = lock(&self.state).arriving.get_mut(&arrival.id) {
            arriving.bytes = arrival.reserved.bytes();
            arriving.pace.came(came, Instant::now());
        }
    }

    /// Reserves more bytes. If there are not enough, stalled bodies give theirs back.
    pub async fn try_grow(&self, reserved: &mut Permit, bytes: usize) -> bool {
        self.grow(reserved, bytes, None).await
    }

    /// Same as [`Self::try_grow`], for an arriving body, which never gives way to itself.
    async fn grow(&self, reserved: &mut Permit, bytes: usize, own: Option<ArrivalId>) -> bool {
        if reserved.try_grow(bytes) {
            return true;
        }
        if bytes > self.budget.bytes_max() || !self.ask(bytes, own, Instant::now()) {
            return false;
        }
        let begun = Instant::now();
        while begun.elapsed() < GIVE_BACK_MAX {
            tokio::time::sleep(LOOK_INTERVAL).await;
            if reserved.try_grow(bytes) {
                return true;
            }
        }
        false
    }

    /// Asks stalled bodies to give way, those that lag most first, until `bytes` will be free. Returns whether
    /// any body was asked.
    fn ask(&self, bytes: usize, own: Option<ArrivalId>, now: Instant) -> bool {
        let mut state = lock(&self.state);
        let asked = stalled(&state.arriving, bytes, own, now);
        for id in &asked {
            if let Some(arriving) = state.arriving.remove(id) {
                arriving.give_way.cancel();
            }
        }
        !asked.is_empty()
    }
}

/// Chooses the bodies that give way for `bytes` of the body `own`: other bodies that occupy bytes and lag by at
/// least [`STALL_MIN`], those that lag most first.
fn stalled(
    arriving: &HashMap<ArrivalId, Arriving>,
    bytes: usize,
    own: Option<ArrivalId>,
    now: Instant,
) -> Vec<ArrivalId> {
    let is_stalled = |one: &Arriving| {
        let lag = now.saturating_duration_since(one.pace.lagging_since());
        one.bytes > 0 && lag >= STALL_MIN
    };
    let others = arriving.iter().filter(|(id, _)| Some(**id) != own);
    let mut stalled: Vec<_> = others.filter(|(_, one)| is_stalled(one)).collect();
    stalled.sort_by_key(|(id, one)| (one.pace.lagging_since(), **id));
    let mut given = 0;
    let enough = stalled.into_iter().take_while(|(_, one)| {
        let is_needed = given < bytes;
        given += one.bytes;
        is_needed
    });
    enough.map(|(id, _)| *id).collect()
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Arrival {
    /// Returns the number of received bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Completes when the body must give way to another.
    pub async fn gave_way(&self) {
        self.give_way.cancelled().await;
    }

    /// Returns the complete body and its reservation.
    pub fn finish(mut self) -> (Bytes, Permit) {
        let bytes = std::mem::take(&mut self.bytes);
        // A `Vec` may have more capacity than requested, and keeps it, so the reservation follows the capacity.
        let mut reserved = self.reserved.split(usize::MAX);
        reserved.resize(bytes.capacity());
        (bytes.into(), reserved)
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        lock(&self.state).arriving.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_03_bodies_of_which_nothing_comes_give_way_the_longest_wait_first() {
        let now = Instant::now();
        let ago = |ms| now.checked_sub(Duration::from_millis(ms)).expect("uptime");
        let arriving: HashMap<_, _> = [(0, 10, 5_000), (1, 10, 9_000), (2, 10, 500), (3, 0, 9_999)]
            .into_iter()
            .map(|(id, bytes, ms)| {
                let pace = Pace::begin(ago(ms));
                (id, Arriving { bytes, pace, give_way: CancellationToken::new() })
            })
            .collect();
        for (bytes, asked) in [(0, &[][..]), (1, &[1]), (10, &[1]), (11, &[1, 0]), (99, &[1, 0])] {
            assert_eq!(stalled(&arriving, bytes, None, now), asked, "{bytes}");
        }
        assert_eq!(stalled(&arriving, 1, Some(1), now), [0], "a body does not give way to itself");
    }

    #[tokio::test]
    async fn wall_03_a_body_occupies_what_has_come_of_it() {
        let arrivals = Arrivals::new(Budget::new(100, "test"));
        let mut arrival = arrivals.begin();
        arrivals.add(&mut arrival, &[1; 10], 90).await.expect("room");
        // The second body can use what the first has declared but not sent.
        let mut other = arrivals.begin();
        assert!(arrivals.add(&mut other, &[2; 10], 10).await.is_ok());
        assert!(arrivals.add(&mut other, &[2; 90], 100).await.is_err());
        drop(other);
        let (bytes, reserved) = arrival.finish();
        assert_eq!((&bytes[..], reserved.bytes()), (&[1; 10][..], 90));
    }
}
