//! The time of one call of a plugin: CPU time for what the plugin does, wall time for what it waits for.
//!
//! Wall time alone would blame records for what others do: on a machine whose cores are busy, a plugin
//! that works for 35 ms may need half a second for it. So a call is ended
//!
//! - when the plugin itself has used up its CPU time, without that of the host's calls;
//! - when it has lasted [`WALL_TIMES`] as long as both of its budgets together. If it has spent that with
//!   waiting for the host, it is to blame; if it has got no CPU time, nobody is, and it is run again, with
//!   twice the time: else a record without end would never be found where a core has too many threads.
//!
//! A call of the host has wall time of its own, each one: what one record waits for is not taken from the
//! records that come after it in the same batch.
//!
//! The clocks are read when the epoch has advanced, not per call: most calls end before that, and a thread's
//! clock takes up to a microsecond to read. A call that is expected to last much longer than that is measured
//! from its beginning to its end ([`CallClock::begin_measured`]), so that how fast a version is can be told on
//! a machine whose cores are busy.

use std::time::{Duration, Instant};

use super::engine::EPOCH_TICK;

/// How many times the sum of its two budgets a call may last. A thread that gets less than a tenth of a
/// core for so long says nothing about the plugin.
const WALL_TIMES: u32 = 10;

/// How often the wall time of a call that was starved is doubled: a 1,280th of a core is enough then.
const DOUBLINGS_MAX: u32 = 6;

/// The most of a call that lies before its first look and after its last: a tick each.
const UNSEEN_MAX: Duration = EPOCH_TICK.saturating_mul(2);

/// The time that one call has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CallTime {
    /// CPU time of the plugin.
    pub cpu_max: Duration,
    /// Wall time of each call of the host that the plugin makes meanwhile.
    pub host_max: Duration,
    /// How often in a row it was starved before.
    pub starved: u32,
}

impl CallTime {
    /// With these, in milliseconds; without a `host_ms` a call of the host has as much as the plugin.
    pub(crate) fn of_ms(cpu_ms: u64, host_ms: Option<u64>) -> Self {
        Self {
            cpu_max: Duration::from_millis(cpu_ms),
            host_max: Duration::from_millis(host_ms.unwrap_or(cpu_ms)),
            starved: 0,
        }
    }

    /// Returns the same, of a call that was starved so often in a row.
    pub(crate) fn after_starved(self, starved: u32) -> Self {
        Self { starved, ..self }
    }

    /// Wall time of all calls of the host together.
    fn host_wall_max(self) -> Duration {
        self.cpu_max.saturating_add(self.host_max).saturating_mul(WALL_TIMES)
    }

    /// Wall time of the whole call.
    fn wall_max(self) -> Duration {
        self.host_wall_max().saturating_mul(1 << self.starved.min(DOUBLINGS_MAX))
    }
}

/// The time that a call has used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Spent {
    /// CPU time of the plugin itself.
    pub cpu: Duration,
    /// Wall time.
    pub wall: Duration,
    /// Of that, within calls of the host.
    pub host: Duration,
}

/// Why a call is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// The plugin has used up its CPU time.
    Cpu,
    /// It has waited for the host again and again.
    Host,
    /// It has got next to no CPU time: nobody's fault.
    Starved,
}

/// Whether a call is over. `Ok`: it goes on, and cannot be over before so much more time has passed.
fn judge(spent: Spent, time: CallTime) -> Result<Duration, Over> {
    let (wall_max, host_wall_max) = (time.wall_max(), time.host_wall_max());
    if spent.cpu >= time.cpu_max {
        return Err(Over::Cpu);
    }
    if spent.host >= host_wall_max {
        return Err(Over::Host);
    }
    if spent.wall >= wall_max {
        return Err(if spent.host >= wall_max / 2 { Over::Host } else { Over::Starved });
    }
    let left = (time.cpu_max - spent.cpu).min(wall_max - spent.wall);
    Ok(left.min(host_wall_max - spent.host))
}

/// The clocks of a sandbox's call.
#[derive(Debug)]
pub(super) struct CallClock {
    time: CallTime,
    /// The clocks when the epoch advanced first during the call, or at its beginning where it is measured.
    /// What was before is a tick at most, which no limit counts.
    first: Option<Reading>,
    /// Whether the clocks were read at the beginning.
    is_measured: bool,
    spent: Spent,
    /// CPU time within calls of the host.
    host_cpu: Duration,
    /// Wall time within calls of the host.
    host_wall: Duration,
    /// The first call of the host that has used up its budget.
    late: Option<&'static str>,
    over: Option<Over>,
}

/// The clocks at one time.
#[derive(Clone, Copy, Debug)]
struct Reading {
    at: Instant,
    /// Of this thread.
    cpu: Duration,
    /// Of the call's time, that within calls of the host.
    host_cpu: Duration,
    host_wall: Duration,
}

impl Reading {
    /// What was spent from an earlier reading to this one.
    fn since(&self, first: &Self) -> Spent {
        let cpu = self.cpu.saturating_sub(first.cpu);
        Spent {
            cpu: cpu.saturating_sub(self.host_cpu.saturating_sub(first.host_cpu)),
            wall: self.at.saturating_duration_since(first.at),
            host: self.host_wall.saturating_sub(first.host_wall),
        }
    }
}

/// A call of the host that is under way.
#[must_use]
pub(super) struct HostCall {
    name: &'static str,
    begun: Instant,
    cpu_begun: Duration,
    /// When it must have ended.
    pub deadline: Instant,
}

impl CallClock {
    pub fn new() -> Self {
        Self {
            time: CallTime::of_ms(0, None),
            first: None,
            is_measured: false,
            spent: Spent::default(),
            host_cpu: Duration::ZERO,
            host_wall: Duration::ZERO,
            late: None,
            over: None,
        }
    }

    /// A call of the plugin begins.
    pub fn begin(&mut self, time: CallTime) {
        *self = Self { time, ..Self::new() };
    }

    /// The same, of one that is expected to last long enough to read the thread's clock twice for it.
    pub(crate) fn begin_measured(&mut self, time: CallTime) {
        self.begin(time);
        self.is_measured = true;
        self.first = Some(self.read());
    }

    /// Reads the clocks, on the thread of the call.
    fn read(&self) -> Reading {
        Reading {
            at: Instant::now(),
            cpu: thread_cpu(),
            host_cpu: self.host_cpu,
            host_wall: self.host_wall,
        }
    }

    /// Looks at the clocks, on the thread of the call. `None`: the call is over; else what time may pass
    /// until the next look.
    pub fn look(&mut self) -> Option<Duration> {
        let now = self.read();
        let first = *self.first.get_or_insert(now);
        self.spent = now.since(&first);
        judge(self.spent, self.time).map_err(|over| self.over = Some(over)).ok()
    }

    /// The plugin calls the host for something that may take long.
    pub(crate) fn host_begins(&self, name: &'static str) -> HostCall {
        let begun = Instant::now();
        HostCall { name, begun, cpu_begun: thread_cpu(), deadline: begun + self.time.host_max }
    }

    /// The host has answered.
    pub(crate) fn host_ended(&mut self, call: HostCall) {
        let now = Instant::now();
        self.host_cpu += thread_cpu().saturating_sub(call.cpu_begun);
        self.host_wall += now.saturating_duration_since(call.begun);
        if now >= call.deadline {
            self.late.get_or_insert(call.name);
        }
    }

    /// The time of a call that has lasted `took` which was its own: at work, or waiting for the host. What it
    /// waited for a core is not in it; where it was not measured, as far as the looks show. On the thread of
    /// the call, before the next one begins.
    pub fn busy(&self, took: Duration) -> Duration {
        if let (Some(first), true) = (&self.first, self.is_measured) {
            return self.read().since(first).cpu + self.host_wall;
        }
        // Calls of the host outside of what the looks have seen.
        let host_unseen = self.host_wall.saturating_sub(self.spent.host);
        let unseen = took.saturating_sub(self.spent.wall + host_unseen).min(UNSEEN_MAX);
        self.spent.cpu + self.host_wall + unseen
    }

    /// What the call had and took, where it was ended for its time.
    pub fn over(&self) -> Option<(Over, Spent, CallTime)> {
        self.over.map(|over| (over, self.spent, self.time))
    }

    /// The first call of the host that has used up its budget, and that budget.
    pub fn late(&self) -> Option<(&'static str, Duration)> {
        self.late.map(|name| (name, self.time.host_max))
    }
}

/// CPU time of this thread.
fn thread_cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes a structure that lives here.
    let read = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    debug_assert_eq!(read, 0, "a thread has a clock");
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plugin's call with 100 ms of CPU time, whose calls of the host have 300 ms each: 4 s at most.
    const TIME: CallTime = CallTime {
        cpu_max: Duration::from_millis(100),
        host_max: Duration::from_millis(300),
        starved: 0,
    };

    #[test]
    fn wall_10_a_call_is_ended_by_its_own_time_and_nobody_is_blamed_for_a_busy_machine() {
        for (cpu_ms, wall_ms, host_ms, expected) in [
            (0, 0, 0, Ok(100)),
            (40, 500, 0, Ok(60)),
            (40, 3_990, 0, Ok(10)),
            (99, 1_000, 900, Ok(1)),
            (100, 100, 0, Err(Over::Cpu)),
            (100, 4_000, 4_000, Err(Over::Cpu)),
            (40, 4_000, 0, Err(Over::Starved)),
            (40, 4_000, 1_000, Err(Over::Starved)),
            (40, 4_000, 3_900, Err(Over::Host)),
        ] {
            let ms = Duration::from_millis;
            let spent = Spent { cpu: ms(cpu_ms), wall: ms(wall_ms), host: ms(host_ms) };
            assert_eq!(judge(spent, TIME), expected.map(ms), "{spent:?}");
        }
    }

    #[test]
    fn wall_10_a_call_that_was_starved_has_more_time_until_it_says_who_is_to_blame() {
        let ms = Duration::from_millis;
        for (starved, cpu_ms, wall_ms, host_ms, expected) in [
            (1, 40, 4_000, 0, Ok(60)),
            (1, 40, 8_000, 0, Err(Over::Starved)),
            (1, 100, 7_000, 0, Err(Over::Cpu)),
            // Calls of the host have no more than before.
            (1, 40, 7_000, 3_990, Ok(10)),
            (1, 40, 7_000, 4_000, Err(Over::Host)),
            (6, 99, 255_000, 0, Ok(1)),
            (6, 99, 256_000, 0, Err(Over::Starved)),
            (1_000, 99, 256_000, 0, Err(Over::Starved)),
        ] {
            let spent = Spent { cpu: ms(cpu_ms), wall: ms(wall_ms), host: ms(host_ms) };
            let judged = judge(spent, TIME.after_starved(starved));
            assert_eq!(judged, expected.map(ms), "{starved}: {spent:?}");
        }
    }

    #[test]
    fn wall_10_time_in_a_call_of_the_host_is_not_the_plugins() {
        let mut clock = CallClock::new();
        clock.begin(TIME);
        assert!(clock.look().is_some());
        let call = clock.host_begins("lookup.get");
        burn(Duration::from_millis(320));
        clock.host_ended(call);
        assert!(clock.look().is_some(), "{clock:?}");
        assert_eq!(clock.late(), Some(("lookup.get", TIME.host_max)));
        burn(Duration::from_millis(110));
        assert_eq!(clock.look(), None);
        assert!(matches!(clock.over(), Some((Over::Cpu, ..))), "{clock:?}");
        clock.begin(TIME);
        assert!(clock.look().is_some() && clock.late().is_none(), "{clock:?}");
    }

    #[test]
    fn wall_10_what_a_call_waits_for_a_core_is_not_its_own_time() {
        let ms = Duration::from_millis;
        let mut clock = CallClock::new();
        clock.begin(TIME);
        assert_eq!(clock.busy(ms(3)), ms(3), "it ended before the first look");
        clock.spent = Spent { cpu: ms(40), wall: ms(900), host: ms(200) };
        clock.host_wall = ms(200);
        assert_eq!(clock.busy(ms(904)), ms(244));
        assert_eq!(clock.busy(ms(990)), ms(250), "it waited after the last look too");
        clock.host_wall = ms(500);
        assert_eq!(clock.busy(ms(1_204)), ms(544), "a call of the host came before the first look");
    }

    #[test]
    fn wall_10_a_measured_call_has_taken_what_it_worked_and_waited_for_the_host() {
        let ms = Duration::from_millis;
        let mut clock = CallClock::new();
        clock.begin_measured(TIME);
        let begun = Instant::now();
        burn(ms(3));
        // As one that waits for a core: no look sees it.
        std::thread::sleep(ms(15));
        let call = clock.host_begins("http.send");
        std::thread::sleep(ms(4));
        clock.host_ended(call);
        let busy = clock.busy(begun.elapsed());
        assert!(
            busy >= ms(7) && busy + ms(14) < begun.elapsed(),
            "{busy:?}, {:?}",
            begun.elapsed()
        );
    }

    #[test]
    fn wall_10_a_thread_that_sleeps_has_used_no_time() {
        let mut clock = CallClock::new();
        clock.begin(TIME);
        clock.look();
        std::thread::sleep(Duration::from_millis(150));
        assert!(clock.look().is_some(), "{clock:?}");
    }

    /// Uses CPU time of this thread.
    fn burn(time: Duration) {
        let end = thread_cpu() + time;
        while thread_cpu() < end {
            std::hint::spin_loop();
        }
    }
}
