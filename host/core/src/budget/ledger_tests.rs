//! Properties and cases of the budget's ledger.

use std::collections::HashMap;

use super::*;

const MIB: usize = 1 << 20;
const TURN_MAX: Duration = Duration::from_secs(10);

fn ledger(bytes_max: usize) -> BudgetLedger {
    BudgetLedger::new(Limits { bytes_max, turn_max: TURN_MAX })
}

fn open(ledger: &mut BudgetLedger, count: usize, now: Instant) -> Vec<AccountId> {
    (0..count).map(|index| ledger.open(format!("lane-{index}").into(), now)).collect()
}

/// Requests, by what the account already holds, and what the others hold of the common half.
#[test]
fn fault_02_a_request_is_granted_by_part_then_by_the_common_half_then_by_turn() {
    // Two accounts: 16 MiB each, 32 MiB in common.
    for (own, common_by_other, bytes, expected) in [
        (0, 32 * MIB, 16 * MIB, Some(Grant::Part)),
        (0, 32 * MIB, MIB, Some(Grant::Part)),
        // An account below its part may go beyond it once, with an ordinary request.
        (16 * MIB - 1, 32 * MIB, MIB, Some(Grant::Part)),
        (16 * MIB, 32 * MIB, 1, None),
        (16 * MIB, 31 * MIB, MIB, Some(Grant::Common)),
        (16 * MIB, 31 * MIB, MIB + 1, Some(Grant::Turn)),
        (0, 0, 48 * MIB, Some(Grant::Common)),
        (0, 1, 48 * MIB, Some(Grant::Turn)),
    ] {
        let now = Instant::now();
        let mut ledger = ledger(64 * MIB);
        let accounts = open(&mut ledger, 2, now);
        ledger.force(Some(accounts[0]), own);
        ledger.force(Some(accounts[1]), 16 * MIB + common_by_other);
        assert_eq!(
            ledger.decide(accounts[0], bytes, false, now),
            expected,
            "{own} {common_by_other}"
        );
    }
}

/// Limit of encoded rows, by the bytes that the account holds, that the others hold of the common half, and that are
/// counted for the rows.
#[test]
fn wall_02_what_rows_become_is_bounded_by_what_is_free() {
    // Two accounts: 16 MiB each, 32 MiB in common.
    for (own, common_by_other, occupied, expected) in [
        // Its part with 4 MiB beyond, and half of the common half.
        (0, 0, 0, 36),
        (2, 0, 2, 36),
        (20, 0, 20, 34),
        // The common half is used up.
        (16, 32, 16, 20),
        (40, 8, 40, 40),
        // Earlier commits hold everything: a quarter of its part.
        (40, 8, 0, 4),
        (40, 8, 2, 4),
    ] {
        let now = Instant::now();
        let mut ledger = ledger(64 * MIB);
        let accounts = open(&mut ledger, 2, now);
        ledger.force(Some(accounts[0]), own * MIB);
        ledger.force(Some(accounts[1]), (16 + common_by_other) * MIB);
        let bytes_max = ledger.encoded_bytes_max(accounts[0], occupied * MIB);
        assert_eq!(bytes_max, expected * MIB, "{own} {common_by_other} {occupied}");
    }
}

#[test]
fn fault_02_the_turn_passes_on_once_its_lane_stands_still() {
    let begun = Instant::now();
    let mut ledger = ledger(4 * MIB);
    let lanes = open(&mut ledger, 3, begun);
    let large = 8 * MIB;
    assert_eq!(ledger.request(lanes[0], large, large, begun), Ok(large));
    let second = ledger.request(lanes[1], large, large, begun).expect_err("waits");
    let third = ledger.request(lanes[2], large, large, begun).expect_err("waits");
    let at = |seconds| begun + Duration::from_secs(seconds);
    assert_eq!(ledger.admit(at(9)), [0u64; 0]);
    // The first releases bytes: it keeps its turn.
    ledger.release(lanes[0], MIB, at(9));
    assert_eq!(ledger.admit(at(18)), [0u64; 0]);
    assert_eq!(ledger.admit(at(19)), [second]);
    // The second has finished, the first releases nothing: the third is next.
    ledger.release(lanes[1], large, at(20));
    assert_eq!(ledger.admit(at(20)), [third]);
}

#[test]
fn fault_02_no_more_buffers_are_asked_than_are_needed() {
    let now = Instant::now();
    let mut ledger = ledger(4 * MIB);
    let lanes = open(&mut ledger, 2, now);
    let buffers: Vec<_> = [MIB, 3 * MIB, 2 * MIB]
        .into_iter()
        .map(|bytes| {
            let buffer = ledger.open_buffer(lanes[0]);
            ledger.force(Some(lanes[0]), bytes);
            ledger.resize_buffer(buffer, bytes);
            buffer
        })
        .collect();
    assert_eq!(ledger.ask(now), [0u64; 0], "nobody waits");
    ledger.request(lanes[0], MIB, MIB, now).expect_err("waits");
    assert_eq!(ledger.ask(now), [buffers[1]], "the largest");
    assert_eq!(ledger.ask(now + Duration::from_millis(200)), [0u64; 0], "it is on its way");
    // It is blocked, so another buffer is asked.
    assert_eq!(ledger.ask(now + ASKED_FOR), [buffers[2]]);
}

#[test]
fn fault_02_a_request_that_takes_what_there_is_leaves_some_to_others() {
    let now = Instant::now();
    let mut ledger = ledger(64 * MIB);
    let lanes = open(&mut ledger, 1_000, now);
    let mut before = usize::MAX;
    for lane in &lanes {
        let taken = ledger.request(*lane, PART_BYTES_MIN, 10 * MIB, now).expect("never waits");
        assert!(taken >= PART_BYTES_MIN && taken <= before);
        before = taken;
    }
    assert!(ledger.common <= 32 * MIB);
}

/// Simulated lanes that take, release and stop by seed.
struct World {
    ledger: BudgetLedger,
    lanes: Vec<Lane>,
    now: Instant,
    random: fastrand::Rng,
}

struct Lane {
    account: AccountId,
    occupied: Vec<usize>,
    waits: Option<(Ticket, usize)>,
    is_blocked: bool,
}

impl World {
    fn new(seed: u64, mib: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let now = Instant::now();
        let mut ledger = ledger(mib * MIB);
        let count = random.usize(1..20);
        let is_blocked = |random: &mut fastrand::Rng| random.u8(0..4) == 0;
        let lanes = open(&mut ledger, count, now).into_iter().map(|account| Lane {
            account,
            occupied: Vec::new(),
            waits: None,
            is_blocked: is_blocked(&mut random),
        });
        let lanes = lanes.collect();
        Self { ledger, lanes, now, random }
    }

    fn take(&mut self, lane: usize, bytes: usize) {
        let occupied: usize = self.lanes[lane].occupied.iter().sum();
        match self.ledger.request(self.lanes[lane].account, bytes, bytes, self.now) {
            Ok(bytes) => self.lanes[lane].occupied.push(bytes),
            Err(ticket) => {
                let is_below = occupied < self.ledger.part() && bytes <= LARGE_BYTES;
                assert!(
                    !is_below,
                    "a lane below its part waits: {occupied} of {}",
                    self.ledger.part()
                );
                self.lanes[lane].waits = Some((ticket, bytes));
            }
        }
    }

    fn release(&mut self, lane: usize) {
        let lane = &mut self.lanes[lane];
        if let Some(bytes) = lane.occupied.pop() {
            self.ledger.release(lane.account, bytes, self.now);
        }
    }

    fn admit(&mut self) {
        let admitted = self.ledger.admit(self.now);
        for lane in &mut self.lanes {
            if let Some((ticket, bytes)) =
                lane.waits.filter(|(ticket, _)| admitted.contains(ticket))
            {
                assert!(self.ledger.collect(ticket));
                lane.occupied.push(bytes);
                lane.waits = None;
            }
        }
    }

    /// The ledger counts what is really held, and only large requests go beyond the limit.
    fn check(&self, seed: u64) {
        let each = |lane: &Lane| lane.occupied.iter().sum::<usize>();
        let occupied: usize = self.lanes.iter().map(each).sum();
        assert_eq!(self.ledger.occupied(), occupied, "seed {seed}");
        let excess: usize = self.lanes.iter().map(|lane| self.ledger.excess(each(lane))).sum();
        assert_eq!(self.ledger.common, excess, "seed {seed}");
        let large: usize =
            self.lanes.iter().flat_map(|it| &it.occupied).filter(|it| **it > LARGE_BYTES).sum();
        let bound = bytes_bound(self.ledger.limits.bytes_max, self.lanes.len());
        assert!(
            occupied - large <= bound,
            "seed {seed}: {occupied} held, {large} of them large, of {bound}"
        );
    }
}

#[test]
fn fault_02_every_request_is_granted_while_others_stand_still() {
    for seed in 0..300 {
        let mut world = World::new(seed, 4);
        for _ in 0..300 {
            let lane = world.random.usize(0..world.lanes.len());
            let can_release = !world.lanes[lane].is_blocked;
            let large = world.random.u8(0..10) == 0;
            let bytes = world.random.usize(1..if large { 8 * MIB } else { LARGE_BYTES });
            match world.random.u8(0..3) {
                0 if can_release => world.release(lane),
                1 => world.now += Duration::from_millis(world.random.u64(0..2_000)),
                _ if world.lanes[lane].waits.is_none() => world.take(lane, bytes),
                _ => {}
            }
            world.admit();
            world.check(seed);
        }
        // The blocked lanes keep what they have. The others release theirs, and each of them gets what it waits for.
        for _ in 0..1_000 {
            world.now += Duration::from_secs(1);
            for lane in 0..world.lanes.len() {
                if !world.lanes[lane].is_blocked {
                    world.release(lane);
                }
            }
            world.admit();
            world.check(seed);
        }
        for (index, lane) in world.lanes.iter().enumerate().filter(|(_, lane)| !lane.is_blocked) {
            assert_eq!(lane.waits, None, "seed {seed}: lane {index} waits for ever");
        }
    }
}

#[test]
fn fault_02_one_lane_goes_beyond_the_bound_at_a_time_while_it_moves() {
    for seed in 0..300 {
        let mut world = World::new(seed, 4);
        let mut beyond: HashMap<usize, Instant> = HashMap::new();
        for _ in 0..300 {
            world.now += Duration::from_millis(world.random.u64(0..500));
            let lane = world.random.usize(0..world.lanes.len());
            match world.lanes[lane].waits {
                None if world.random.bool() => {
                    let bytes = world.random.usize(LARGE_BYTES + 1..16 * MIB);
                    world.take(lane, bytes);
                }
                _ => world.release(lane),
            }
            if world.ledger.common <= world.ledger.limits.common_max() {
                beyond.clear();
            }
            world.admit();
            // An account beyond the limit has released something in the last ten seconds, or is the only one.
            let is_over = world.ledger.common > world.ledger.limits.common_max();
            let Some(turn) = world.ledger.turn.filter(|_| is_over) else {
                beyond.clear();
                continue;
            };
            let occupant =
                world.lanes.iter().position(|it| it.account == turn.account).expect("a lane");
            let new =
                beyond.insert(occupant, turn.granted_at).is_none_or(|at| at != turn.granted_at);
            if new && let Some(before) = beyond.keys().find(|other| **other != occupant) {
                let state = &world.ledger.accounts[&world.lanes[*before].account];
                let stands = turn.granted_at.saturating_duration_since(state.released_at);
                let is_done = state.occupied <= world.ledger.part();
                assert!(is_done || stands >= TURN_MAX, "seed {seed}: two are beyond the bound");
                beyond.retain(|lane, _| *lane == occupant);
            }
        }
    }
}
