//! Decides which connections a port keeps.
//!
//! The invariants:
//! - A port keeps `connections_max` connections, and `health_max` more for `/health`, so that it does not use up the
//!   file descriptors that lanes need. A new connection that replaces another waits until that one is closed
//!   ([`Pass::room`]).
//! - `/health` is answered also while the port is full: some connections are reserved for it.
//! - Only a connection that waits for its client is closed to make room, never one whose request is being answered.
//!
//! | state of the port | new connection |
//! |---|---|
//! | the peer has its maximum of connections | replaces the one of this peer that has waited longest, or is refused |
//! | a place is free | kept |
//! | full, and a connection waits for its client | replaces the one that has waited longest |
//! | full, and all are busy or new | kept for `/health` only, if a health place is free or can be freed |
//! | as before, but no health place can be freed | tries again for [`ROOM_MAX`], then it is closed |
//!
//! A race shapes the last two rows: between the accept and the first read nobody knows whether a connection is a health
//! check whose request has already arrived. So a health connection that was not read yet is not replaced: under a flood
//! of connections each health check would otherwise be replaced before it is read.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use super::PortRules;
use super::activity::{Activity, Wait};
use shardmill_core::metric;
use shardmill_core::system;
use shardmill_core::system::PortFiles;

/// How long a connection may wait for a request or an answer before it makes room for another, because these need time
/// to arrive. A connection between two requests may be replaced at once; otherwise a client that sends requests all the
/// time would keep all others out.
const WAIT_MIN: Duration = Duration::from_secs(1);

/// How long a new connection waits for one that makes room.
const ROOM_MAX: Duration = Duration::from_millis(100);

/// Pause before the next check whether there is room for a health check.
const LATER_PAUSE: Duration = Duration::from_millis(1);

type ConnectionId = u64;

/// Unit in which connections are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Peer {
    /// IPv4 address.
    Address(IpAddr),
    /// IPv6 network: one host has all of its addresses.
    Network([u16; 4]),
}

impl Peer {
    /// Returns the peer of an address; `None` for loopback, because all users of this machine, and proxies, connect
    /// from there.
    fn of(address: IpAddr) -> Option<Self> {
        match address.to_canonical() {
            address if address.is_loopback() => None,
            address @ IpAddr::V4(_) => Some(Self::Address(address)),
            IpAddr::V6(address) => {
                let [one, two, three, four, ..] = address.segments();
                Some(Self::Network([one, two, three, four]))
            }
        }
    }
}

/// Limits of a port.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    connections_max: usize,
    per_peer_max: Option<usize>,
    health_max: usize,
}

/// Decision about a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    /// Keep it, and close the given one.
    Kept { instead_of: Option<ConnectionId> },
    /// Keep it for a request of `/health` only.
    ForHealth { instead_of: Option<ConnectionId> },
    /// Try again soon: all health connections are being answered, or were not read yet.
    Later,
    /// Close it.
    Refused,
}

/// Answer to a new connection.
enum Entry {
    Pass(Pass),
    Later,
    Refused,
}

/// Connection that is kept.
struct Kept {
    peer: Option<Peer>,
    is_for_health: bool,
    activity: Activity,
    end: CancellationToken,
    gone: CancellationToken,
}

/// Connections of a port. Clones share them.
#[derive(Clone)]
pub(super) struct Gate {
    name: &'static str,
    bounds: Bounds,
    state: Arc<Mutex<State>>,
    files: Arc<Option<PortFiles>>,
}

#[derive(Default)]
struct State {
    kept: HashMap<ConnectionId, Kept>,
    next_id: ConnectionId,
}

/// Permission of one connection. Dropping it removes the connection from the gate.
pub(super) struct Pass {
    gate: Gate,
    id: ConnectionId,
    is_for_health: bool,
    activity: Activity,
    end: CancellationToken,
    gone: CancellationToken,
    /// Cancelled when the connection that makes room for this one is closed.
    room: Option<CancellationToken>,
}

impl Gate {
    /// Opens a gate, and reserves the file descriptors for its connections.
    pub fn open(rules: &PortRules, health_max: usize) -> Self {
        let connections_max =
            system::port_connections_max(rules.connections_max, rules.keeps_files);
        if connections_max < rules.connections_max {
            tracing::info!(
                port = rules.name,
                "at most {connections_max} connections are kept, not {}, because of the limit of open files \
                 (ulimit -n)",
                rules.connections_max
            );
        }
        let bounds = Bounds { connections_max, per_peer_max: rules.per_peer_max, health_max };
        let files = rules.keeps_files.then(|| PortFiles::keep(connections_max + health_max));
        let files = Arc::new(files);
        Self { name: rules.name, bounds, state: Arc::default(), files }
    }

    /// Lets a connection in, or refuses it. A connection that makes room for it is asked to end. Later connections wait
    /// in the system's queue meanwhile.
    pub async fn admit(&self, address: IpAddr) -> Option<Pass> {
        let begun = Instant::now();
        loop {
            let now = Instant::now();
            match self.try_admit(address, now) {
                Entry::Pass(pass) => return Some(pass),
                Entry::Later if now.saturating_duration_since(begun) < ROOM_MAX => {
                    tokio::time::sleep(LATER_PAUSE).await;
                }
                Entry::Later => {
                    self.closed("room");
                    return None;
                }
                Entry::Refused => {
                    self.closed("peer");
                    return None;
                }
            }
        }
    }

    fn try_admit(&self, address: IpAddr, now: Instant) -> Entry {
        let peer = Peer::of(address);
        let mut state = self.lock();
        let admission = admission(&self.bounds, peer, &state.kept, now);
        let (is_for_health, instead_of) = match admission {
            Admission::Kept { instead_of } => (false, instead_of),
            Admission::ForHealth { instead_of } => (true, instead_of),
            Admission::Later => return Entry::Later,
            Admission::Refused => return Entry::Refused,
        };
        let room = instead_of.and_then(|id| self.end(&mut state, id));
        let id = state.next_id;
        state.next_id += 1;
        let activity = Activity::new(now);
        let (end, gone) = (CancellationToken::new(), CancellationToken::new());
        let kept = Kept {
            peer,
            is_for_health,
            activity: activity.clone(),
            end: end.clone(),
            gone: gone.clone(),
        };
        state.kept.insert(id, kept);
        self.files.iter().for_each(PortFiles::opened);
        self.show(&state);
        drop(state);
        Entry::Pass(Pass { gate: self.clone(), id, is_for_health, activity, end, gone, room })
    }

    /// Closes the connection that has waited longest for its client. Returns whether there was one.
    pub(crate) fn make_room(&self, now: Instant) -> bool {
        let mut state = self.lock();
        let longest = longest_wait(&state.kept, |_| true, Duration::ZERO, now);
        if let Some(id) = longest {
            self.end(&mut state, id);
        }
        longest.is_some()
    }

    fn end(&self, state: &mut State, id: ConnectionId) -> Option<CancellationToken> {
        let kept = state.kept.remove(&id)?;
        kept.end.cancel();
        self.closed("room");
        Some(kept.gone)
    }

    fn leave(&self, id: ConnectionId) {
        let mut state = self.lock();
        state.kept.remove(&id);
        self.files.iter().for_each(PortFiles::closed);
        self.show(&state);
    }

    fn closed(&self, why: &'static str) {
        let (name, port) = (metric::PORT_CONNECTIONS_CLOSED_TOTAL, self.name);
        metrics::counter!(name, "port" => port, "for" => why).increment(1);
    }

    fn show(&self, state: &State) {
        let count = state.kept.len() as f64;
        metrics::gauge!(metric::PORT_CONNECTIONS, "port" => self.name).set(count);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass {
    pub(crate) fn is_for_health(&self) -> bool {
        self.is_for_health
    }

    pub(crate) fn activity(&self) -> &Activity {
        &self.activity
    }

    /// Waits until the connection that makes room for this one is closed. Otherwise a burst would open more files than
    /// allowed. The wait is short.
    pub async fn room(&self) {
        if let Some(room) = &self.room {
            let _ = tokio::time::timeout(ROOM_MAX, room.cancelled()).await;
        }
    }

    /// Completes when the connection must make room for another.
    pub fn ended(&self) -> WaitForCancellationFuture<'_> {
        self.end.cancelled()
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.leave(self.id);
        self.gone.cancel();
    }
}

/// Decides about a new connection; see the table of the module.
///
/// A health connection that was read once, and still has no complete request, is replaced at once: a real health check
/// has sent its request when it is accepted.
fn admission(
    bounds: &Bounds,
    peer: Option<Peer>,
    kept: &HashMap<ConnectionId, Kept>,
    now: Instant,
) -> Admission {
    if let (Some(peer), Some(max)) = (peer, bounds.per_peer_max) {
        let is_of_peer = |one: &Kept| one.peer == Some(peer);
        if kept.values().filter(|one| is_of_peer(one)).count() >= max {
            let id = longest_wait(kept, is_of_peer, WAIT_MIN, now);
            return match id {
                // It is of the same peer, so the number of its connections does not grow.
                Some(_) => Admission::Kept { instead_of: id },
                None => Admission::Refused,
            };
        }
    }
    let for_health = kept.values().filter(|one| one.is_for_health).count();
    if kept.len() - for_health < bounds.connections_max {
        return Admission::Kept { instead_of: None };
    }
    if let Some(id) = longest_wait(kept, |one| !one.is_for_health, WAIT_MIN, now) {
        return Admission::Kept { instead_of: Some(id) };
    }
    if for_health < bounds.health_max {
        return Admission::ForHealth { instead_of: None };
    }
    match first_for_health(kept) {
        Some(id) => Admission::ForHealth { instead_of: Some(id) },
        None => Admission::Later,
    }
}

/// Returns the health connection that makes room. One that has sent a part of a head goes first: a real health check
/// sends its head in one piece. One that was not read yet stays, because it may be a health check.
fn first_for_health(kept: &HashMap<ConnectionId, Kept>) -> Option<ConnectionId> {
    let waits = kept.iter().filter(|(_, one)| one.is_for_health).filter_map(|(id, one)| {
        let (wait, since): (Wait, Instant) = one.activity.wait()?;
        Some((wait != Wait::Head, wait, since, *id))
    });
    waits.min().map(|(_, _, _, id)| id)
}

/// Returns the connection that makes room: by what it waits for, then by how long it has waited.
fn longest_wait(
    kept: &HashMap<ConnectionId, Kept>,
    may_go: impl Fn(&Kept) -> bool,
    wait_min: Duration,
    now: Instant,
) -> Option<ConnectionId> {
    let waits = kept.iter().filter(|(_, one)| may_go(one)).filter_map(|(id, one)| {
        let (wait, since): (Wait, Instant) = one.activity.wait()?;
        let has_waited =
            wait == Wait::NextRequest || now.saturating_duration_since(since) >= wait_min;
        has_waited.then_some((wait, since, *id))
    });
    waits.min().map(|(_, _, id)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { connections_max: 2, per_peer_max: Some(1), health_max: 1 };

    fn kept(peer: &str, is_for_health: bool, since: Instant) -> Kept {
        let activity = Activity::new(since);
        activity.nothing_came();
        Kept {
            peer: Peer::of(peer.parse().expect("an address")),
            is_for_health,
            activity,
            end: CancellationToken::new(),
            gone: CancellationToken::new(),
        }
    }

    #[test]
    fn wall_03_peers_are_counted_but_for_loopback() {
        let of = |text: &str| Peer::of(text.parse().expect("an address"));
        for loopback in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(of(loopback), None, "{loopback}");
        }
        assert_eq!(of("192.0.2.7"), of("::ffff:192.0.2.7"));
        assert_ne!(of("192.0.2.7"), of("192.0.2.8"));
        // A host can use any address of its network.
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
    }

    #[test]
    fn wall_03_who_waits_longest_makes_room_and_health_is_let_in() {
        let now = Instant::now();
        let ago = |seconds| now.checked_sub(Duration::from_secs(seconds)).expect("uptime");
        let admit = |peer: &str, connections: Vec<Kept>| {
            let kept = connections.into_iter().enumerate();
            let kept = kept.map(|(id, one)| (id as ConnectionId, one)).collect();
            admission(&BOUNDS, Peer::of(peer.parse().expect("an address")), &kept, now)
        };
        let local = |is_for_health, since| kept("127.0.0.1", is_for_health, since);
        let busy = || {
            let one = local(false, ago(9));
            // Its request is answered by a handler that never ends.
            std::mem::forget(one.activity.begin_request());
            one
        };
        let free = Admission::Kept { instead_of: None };
        assert_eq!(admit("127.0.0.1", vec![]), free);
        assert_eq!(admit("127.0.0.1", vec![local(false, ago(9)), local(true, ago(9))]), free);
        let idle = vec![local(false, ago(5)), local(false, ago(9))];
        assert_eq!(admit("127.0.0.1", idle), Admission::Kept { instead_of: Some(1) });
        assert_eq!(
            admit("127.0.0.1", vec![busy(), local(false, ago(2))]),
            Admission::Kept { instead_of: Some(1) }
        );
        // A connection that sends requests all the time is between two requests.
        let asked = local(false, ago(9));
        drop(asked.activity.begin_request());
        assert_eq!(
            admit("127.0.0.1", vec![busy(), asked]),
            Admission::Kept { instead_of: Some(1) }
        );
        // All are busy, or new.
        let full = || vec![busy(), local(false, now)];
        assert_eq!(admit("127.0.0.1", full()), Admission::ForHealth { instead_of: None });
        let mut full_of_health = full();
        full_of_health.push(local(true, now));
        assert_eq!(
            admit("127.0.0.1", full_of_health),
            Admission::ForHealth { instead_of: Some(2) }
        );
        // A peer may have one connection; that one makes room for the next.
        assert_eq!(admit("192.0.2.7", vec![kept("192.0.2.7", false, now)]), Admission::Refused);
        assert_eq!(
            admit("192.0.2.7", vec![kept("192.0.2.7", false, ago(9))]),
            Admission::Kept { instead_of: Some(0) }
        );
        assert_eq!(admit("192.0.2.8", vec![kept("192.0.2.7", false, ago(9))]), free);
    }

    #[test]
    fn wall_03_a_health_check_is_not_pushed_out_before_it_is_read() {
        let bounds = Bounds { connections_max: 0, per_peer_max: None, health_max: 3 };
        let now = Instant::now();
        let ago = |seconds| now.checked_sub(Duration::from_secs(seconds)).expect("uptime");
        let unread = || Kept { activity: Activity::new(ago(9)), ..kept("127.0.0.1", true, now) };
        let nothing = |seconds| kept("127.0.0.1", true, ago(seconds));
        let part = || {
            let one = kept("127.0.0.1", true, now);
            one.activity.came();
            one
        };
        let answered = || {
            let one = kept("127.0.0.1", true, ago(9));
            // Its answer is never written.
            std::mem::forget(one.activity.begin_request());
            one
        };
        for (name, connections, makes_room) in [
            ("none was looked at", [unread(), unread(), unread()], None),
            ("two are answered", [answered(), unread(), answered()], None),
            ("one has sent nothing", [unread(), nothing(1), answered()], Some(1)),
            ("two have sent nothing", [nothing(1), nothing(2), unread()], Some(1)),
            ("one has sent half a head", [nothing(9), nothing(8), part()], Some(2)),
        ] {
            let kept = connections.into_iter().enumerate();
            let kept = kept.map(|(id, one)| (id as ConnectionId, one)).collect();
            let expected = match makes_room {
                Some(id) => Admission::ForHealth { instead_of: Some(id) },
                None => Admission::Later,
            };
            assert_eq!(admission(&bounds, None, &kept, now), expected, "{name}");
        }
    }
}
