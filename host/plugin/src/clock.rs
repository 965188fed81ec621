//! Limits the time of one call of a plugin: CPU time for its work, wall time for what it waits for.
//!
//! Wall time alone would blame records for what others do: on a busy machine, a plugin that works for 35 ms may
//! need half a second. So there are two budgets, CPU time of the plugin itself (`cpu_max`) and wall time of each
//! host call that it makes (`host_max`). A call is ended by the first of these:
//!
//! | spent | outcome | to blame |
//! |---|---|---|
//! | `cpu_max` of CPU time, without that of host calls | [`Over::Cpu`] | the plugin: a record of the batch |
//! | [`WALL_TIMES`] × (`cpu_max` + `host_max`) in host calls | [`Over::Host`] | the plugin: it calls again and again |
//! | the same in all, at least half of it in host calls | [`Over::Host`] | the plugin |
//! | the same in all, otherwise | [`Over::Starved`] | nobody: it got no CPU time, and is run again |
//!
//! After a starved call the next one has twice the wall time, up to [`DOUBLINGS_MAX`] times. Without that, a record
//! with an endless loop would never use up its CPU time on a core with too many threads, and would be retried for
//! ever.
//!
//! Each host call has its own wall time: what one record waits for is not taken from the records after it in the
//! batch.
//!
//! The clocks are read when the epoch advances, not per call: most calls end before the first tick, and reading a
//! thread's clock takes up to a microsecond. A call that is expected to be much longer is measured from its
//! beginning to its end ([`CallClock::begin_measured`]), so that versions can be compared in speed on a busy
//! machine.

use std::time::{Duration, Instant};

use super::engine::EPOCH_TICK;

/// Factor of the wall time of a call, relative to the sum of its two budgets. A thread that gets less than a tenth
/// of a core for that long says nothing about the plugin.
const WALL_TIMES: u32 = 10;

/// Number of times that the wall time of a starved call is doubled. After the last, a 1,280th of a core is enough if
/// both budgets are equal.
const DOUBLINGS_MAX: u32 = 6;

/// Part of a call that the clocks may miss: up to one tick before the first reading, and one after the last.
const UNSEEN_MAX: Duration = EPOCH_TICK.saturating_mul(2);

/// The time that a call may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CallTime {
    /// CPU time of the plugin itself.
    pub cpu_max: Duration,
    /// Wall time of each host call that the plugin makes.
    pub host_max: Duration,
    /// Number of starved calls in a row before this one.
    pub starved: u32,
}

impl CallTime {
    /// Converts from milliseconds. Without `host_ms`, a host call may take as long as the plugin.
    pub(crate) fn of_ms(cpu_ms: u64, host_ms: Option<u64>) -> Self {
        Self {
            cpu_max: Duration::from_millis(cpu_ms),
            host_max: Duration::from_millis(host_ms.unwrap_or(cpu_ms)),
            starved: 0,
        }
    }

    /// Returns the same for a call after `starved` starved calls in a row.
    pub(crate) fn after_starved(self, starved: u32) -> Self {
        Self { starved, ..self }
    }

    /// Returns the limit on the wall time of all host calls together.
    fn host_wall_max(self) -> Duration {
        self.cpu_max.saturating_add(self.host_max).saturating_mul(WALL_TIMES)
    }

    /// Returns the limit on the wall time of the call.
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
    /// Wall time within host calls, a part of `wall`.
    pub host: Duration,
}

/// The reason why a call was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// The plugin used up its CPU time.
    Cpu,
    /// The plugin spent the time waiting for the host.
    Host,
    /// The call got next to no CPU time: nobody is to blame.
    Starved,
}

/// Decides whether a call is over. `Ok`: it goes on, and cannot be over before this much more time has passed.
fn judge(spent: Spent, time: CallTime) -> Result<Duration, Over> {
    let (wall_max, host_wall_max) = (time.wall_max(), time.host_wall_max());
    // CPU time first: a plugin that has used it up is to blame, however long it has also waited.
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

/// The clocks of a sandbox's current call.
#[derive(Debug)]
pub(super) struct CallClock {
    time: CallTime,
    /// The clocks at the first epoch tick of the call, or at its beginning if it is measured. The time before the
    /// first tick counts towards no limit: it is at most one tick.
    first: Option<Reading>,
    /// Whether the clocks were read at the beginning of the call.
    is_measured: bool,
    spent: Spent,
    /// CPU time within host calls.
    host_cpu: Duration,
    /// Wall time within host calls.
    host_wall: Duration,
    /// The first host call that used up its time.
    late: Option<&'static str>,
    over: Option<Over>,
}

/// Values of the clocks at one moment.
#[derive(Clone, Copy, Debug)]
struct Reading {
    at: Instant,
    /// CPU time of this thread.
    cpu: Duration,
    /// CPU time of the call so far within host calls, and the wall time.
    host_cpu: Duration,
    host_wall: Duration,
}

impl Reading {
    /// Returns the time spent between an earlier reading and this one.
    fn since(&self, first: &Self) -> Spent {
        let cpu = self.cpu.saturating_sub(first.cpu);
        Spent {
            cpu: cpu.saturating_sub(self.host_cpu.saturating_sub(first.host_cpu)),
            wall: self.at.saturating_duration_since(first.at),
            host: self.host_wall.saturating_sub(first.host_wall),
        }
    }
}

/// A host call in progress.
#[must_use]
pub(super) struct HostCall {
    name: &'static str,
    begun: Instant,
    cpu_begun: Duration,
    /// Deadline of the host call.
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

    /// Starts the clock for a call of the plugin.
    pub fn begin(&mut self, time: CallTime) {
        *self = Self { time, ..Self::new() };
    }

    /// Does the same for a call that is expected to be long: reads the thread's clock at once.
    pub(crate) fn begin_measured(&mut self, time: CallTime) {
        self.begin(time);
        self.is_measured = true;
        self.first = Some(self.read());
    }

    /// Reads the clocks. Call it on the thread of the call.
    fn read(&self) -> Reading {
        Reading {
            at: Instant::now(),
            cpu: thread_cpu(),
            host_cpu: self.host_cpu,
            host_wall: self.host_wall,
        }
    }

    /// Reads the clocks and decides whether the call is over (`None`); otherwise returns the time until the next
    /// look. Call it on the thread of the call.
    pub fn look(&mut self) -> Option<Duration> {
        let now = self.read();
        let first = *self.first.get_or_insert(now);
        self.spent = now.since(&first);
        judge(self.spent, self.time).map_err(|over| self.over = Some(over)).ok()
    }

    /// Notes that the plugin calls the host for something that may take long.
    pub(crate) fn host_begins(&self, name: &'static str) -> HostCall {
        let begun = Instant::now();
        HostCall { name, begun, cpu_begun: thread_cpu(), deadline: begun + self.time.host_max }
    }

    /// Notes that the host has answered.
    pub(crate) fn host_ended(&mut self, call: HostCall) {
        let now = Instant::now();
        self.host_cpu += thread_cpu().saturating_sub(call.cpu_begun);
        self.host_wall += now.saturating_duration_since(call.begun);
        if now >= call.deadline {
            self.late.get_or_insert(call.name);
        }
    }

    /// Returns the time of a call that lasted `took` without what it waited for a core: its work, and its waits for
    /// the host. If the call was not measured, as far as the readings show. Call it on the thread of the call,
    /// before the next one.
    pub fn busy(&self, took: Duration) -> Duration {
        if let (Some(first), true) = (&self.first, self.is_measured) {
            return self.read().since(first).cpu + self.host_wall;
        }
        // Time of host calls after the last reading.
        let host_unseen = self.host_wall.saturating_sub(self.spent.host);
        let unseen = took.saturating_sub(self.spent.wall + host_unseen).min(UNSEEN_MAX);
        self.spent.cpu + self.host_wall + unseen
    }

    /// Returns why the call was ended for its time, what it spent, and what it had; `None` if it was not.
    pub fn over(&self) -> Option<(Over, Spent, CallTime)> {
        self.over.map(|over| (over, self.spent, self.time))
    }

    /// Returns the first host call that used up its time, and that time.
    pub fn late(&self) -> Option<(&'static str, Duration)> {
        self.late.map(|name| (name, self.time.host_max))
    }
}

/// Returns the CPU time of this thread.
fn thread_cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to a structure on this stack frame.
    let read = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    debug_assert_eq!(read, 0, "a thread has a clock");
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A call with 100 ms of CPU time and 300 ms for each host call: 4 s of wall time at most.
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
            // Host calls have no more time than before.
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
        // Stands for waiting for a core: no reading sees it.
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
