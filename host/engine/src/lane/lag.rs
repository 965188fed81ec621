//! Lag of each sink: the age of the oldest record that it has not committed.
//!
//! The lag grows with the clock, not with reads: records that wait for a blocked sink get older although nobody
//! reads. After a restart it is computed from the arrival of the last record that the sink committed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::delivery::DeliveryProgress;
use shardmill_core::record::{Position, SinkName};

/// Batches whose arrival times are kept. Beyond this, neighbours are merged, with the older time of both.
const BATCHES_MAX: usize = 1_024;
/// Time after which a read that brought nothing says nothing any more: records may have arrived since.
const QUIET_FOR: Duration = Duration::from_secs(30);

/// A batch that was read.
#[derive(Clone, Debug)]
struct ReadBatch {
    to_inclusive: Position,
    /// When its first record arrived, in milliseconds since 1970.
    first_ms: i64,
    /// When its last record arrived.
    last_ms: i64,
}

/// Progress of one sink.
#[derive(Clone, Debug)]
struct SinkLag {
    name: SinkName,
    committed: Option<Position>,
    /// Arrival of the last record that it committed, if known.
    arrived_ms: Option<i64>,
}

/// Progress of one shard. All times are milliseconds since 1970.
#[derive(Clone, Debug, Default)]
pub struct ShardLag {
    sinks: Vec<SinkLag>,
    /// Batches that some sink has not committed, in order.
    read: VecDeque<ReadBatch>,
    /// Every record that had arrived by this time is committed by all sinks, as noted before the start.
    caught_up_ms: Option<i64>,
    /// Time of the last read that brought nothing, unless more was read since.
    quiet_ms: Option<i64>,
    ended: bool,
}

impl ShardLag {
    /// Makes the lag of sinks whose last records arrived at these times; everything that had arrived by
    /// `caught_up_ms` is committed.
    pub fn new(
        sinks: impl IntoIterator<Item = (SinkName, Option<i64>)>,
        caught_up_ms: Option<i64>,
    ) -> Self {
        let sinks = sinks.into_iter();
        let sinks = sinks.map(|(name, arrived_ms)| SinkLag { name, committed: None, arrived_ms });
        Self { sinks: sinks.collect(), caught_up_ms, ..Self::default() }
    }

    /// Notes a batch that was read.
    pub fn read(&mut self, to_inclusive: &Position, first_ms: u64, last_ms: u64) {
        self.quiet_ms = None;
        if self.read.back().is_some_and(|last| last.to_inclusive >= *to_inclusive) {
            return;
        }
        let ms = |at: u64| i64::try_from(at).unwrap_or(i64::MAX);
        let (first_ms, last_ms) = (ms(first_ms), ms(last_ms));
        self.read.push_back(ReadBatch { to_inclusive: to_inclusive.clone(), first_ms, last_ms });
        if self.read.len() > BATCHES_MAX {
            let mut joined = VecDeque::with_capacity(BATCHES_MAX);
            let mut batches = std::mem::take(&mut self.read).into_iter();
            while let Some(first) = batches.next() {
                joined.push_back(match batches.next() {
                    Some(second) => ReadBatch { first_ms: first.first_ms, ..second },
                    None => first,
                });
            }
            self.read = joined;
        }
    }

    /// Notes that the shard has no more records now.
    pub fn quiet(&mut self, now_ms: i64) {
        self.quiet_ms = Some(now_ms);
    }

    /// Notes that the shard was read to its end and everything is committed.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Notes how far a sink is; returns the arrival of the last record that it committed.
    pub fn committed(&mut self, sink: &SinkName, position: Option<&Position>) -> Option<i64> {
        let own = self.sinks.iter_mut().find(|own| own.name == *sink)?;
        if let Some(position) = position
            && own.committed.as_ref().is_none_or(|committed| committed < position)
        {
            let had = self.read.iter().take_while(|batch| batch.to_inclusive <= *position).last();
            own.arrived_ms = had.map(|batch| batch.last_ms).or(own.arrived_ms);
            own.committed = Some(position.clone());
        }
        let arrived_ms = own.arrived_ms;
        let all = self.sinks.iter().map(|own| own.committed.as_ref()).min().flatten();
        while self.read.front().is_some_and(|batch| Some(&batch.to_inclusive) <= all) {
            self.read.pop_front();
        }
        arrived_ms
    }

    /// Returns the age of the oldest record that each sink has not committed.
    pub(crate) fn ages(&self, now_ms: i64) -> Vec<(SinkName, Duration)> {
        let age =
            |since_ms: i64| Duration::from_millis(u64::try_from(now_ms - since_ms).unwrap_or(0));
        let of = |own: &SinkLag| {
            let mut missing = self.read.iter();
            let missing = missing.find(|batch| Some(&batch.to_inclusive) > own.committed.as_ref());
            match (missing, self.quiet_ms) {
                _ if self.ended => Duration::ZERO,
                (Some(missing), _) => age(missing.first_ms),
                (None, Some(quiet_ms)) => {
                    Some(age(quiet_ms)).filter(|age| *age > QUIET_FOR).unwrap_or_default()
                }
                // Records that are not read yet arrived after the last record that the sink committed.
                (None, None) => own.arrived_ms.max(self.caught_up_ms).map(age).unwrap_or_default(),
            }
        };
        self.sinks.iter().map(|own| (own.name.clone(), of(own))).collect()
    }
}

/// A shard's lag, with the current progress of its sinks.
#[derive(Clone, Default)]
pub struct LiveLag {
    /// The shard's progress.
    pub shard: ShardLag,
    /// The sinks' deliveries, once the lane has begun.
    pub deliveries: Vec<LiveDelivery>,
}

/// A delivery, as seen from outside its lane.
#[derive(Clone)]
pub struct LiveDelivery {
    /// The sink.
    pub sink: SinkName,
    /// How far it is.
    pub progress: watch::Receiver<DeliveryProgress>,
    /// Notified when what is in hand is to be committed, though more would fit.
    pub commit_now: Arc<Notify>,
}

impl LiveLag {
    /// The age of the oldest record that each sink has not committed.
    pub(crate) fn ages(&mut self, now_ms: i64) -> Vec<(SinkName, Duration)> {
        for own in &self.deliveries {
            self.shard.committed(&own.sink, own.progress.borrow().position.as_ref());
        }
        self.shard.ages(now_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardmill_core::record::SequenceNumber;

    const NOW: i64 = 1_000_000;

    fn at(sequence: u64) -> Position {
        Position { sequence: SequenceNumber::from(sequence), sub_sequence: 0 }
    }

    fn seconds(lag: &ShardLag, now_ms: i64) -> Vec<u64> {
        lag.ages(now_ms).into_iter().map(|(_, age)| age.as_secs()).collect()
    }

    fn of_two(arrived_ms: Option<i64>) -> ShardLag {
        ShardLag::new([("a".into(), arrived_ms), ("b".into(), arrived_ms)], None)
    }

    #[test]
    fn fault_35_what_waits_behind_a_blocked_sink_gets_older() {
        let mut lag = of_two(None);
        lag.read(&at(10), 900_000, 901_000);
        lag.read(&at(20), 950_000, 960_000);
        assert_eq!(lag.committed(&"a".into(), Some(&at(20))), Some(960_000));
        assert_eq!(lag.committed(&"b".into(), None), None);
        lag.quiet(NOW);
        assert_eq!(seconds(&lag, NOW), [0, 100]);
        assert_eq!(seconds(&lag, NOW + 20_000), [0, 120], "by the clock alone");
        lag.committed(&"b".into(), Some(&at(10)));
        assert_eq!(seconds(&lag, NOW), [0, 50]);
        lag.committed(&"b".into(), Some(&at(20)));
        assert_eq!(seconds(&lag, NOW), [0, 0]);
        assert!(lag.read.is_empty(), "nothing is kept of what all have");
    }

    #[test]
    fn fault_35_after_a_restart_it_is_known_by_the_last_committed_record() {
        let mut lag = of_two(Some(400_000));
        assert_eq!(seconds(&lag, NOW), [600, 600]);
        let noted = ShardLag::new([("a".into(), Some(400_000))], Some(990_000));
        assert_eq!(seconds(&noted, NOW), [10], "everything that arrived until then is committed");
        lag.quiet(NOW);
        assert_eq!(seconds(&lag, NOW), [0, 0], "nothing waits");
        assert_eq!(seconds(&lag, NOW + 29_000), [0, 0]);
        assert_eq!(seconds(&lag, NOW + 60_000), [60, 60], "nobody has looked for a minute");
    }

    #[test]
    fn fault_35_what_is_not_read_yet_is_younger_than_what_was_read_last() {
        let mut lag = of_two(None);
        assert_eq!(seconds(&lag, NOW), [0, 0], "nothing is known");
        lag.read(&at(10), 900_000, 980_000);
        for sink in ["a", "b"] {
            lag.committed(&sink.into(), Some(&at(10)));
        }
        assert_eq!(seconds(&lag, NOW), [20, 20]);
        lag.end();
        assert_eq!(seconds(&lag, NOW), [0, 0]);
    }

    #[test]
    fn fault_35_many_batches_cost_little() {
        let mut lag = of_two(None);
        for number in 1..=100_000 {
            lag.read(&at(number), number, number);
        }
        assert!(lag.read.len() <= BATCHES_MAX);
        assert_eq!(lag.ages(NOW)[0].1, Duration::from_millis(999_999));
        lag.committed(&"a".into(), Some(&at(99_999)));
        let age = lag.ages(NOW)[0].1;
        assert!(age >= Duration::from_millis(900_000) && age < Duration::from_millis(999_999));
    }
}
