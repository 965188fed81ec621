//! `[timing]`: deadlines and pauses of a run.

use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::check::Check;
use super::raw::RawTiming;
use super::shape::shaped;

/// A pause below 10 ms would keep a core busy with requests; one above an hour is of no use.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(3_600);
/// Healthy servers would miss a deadline of less than 50 ms.
const DEADLINES: RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(86_400);

/// Deadlines and pauses of a run. The defaults suit production; tests shorten them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Time of a shutdown for lanes, copies of dead letters, checkpoints and the intake together.
    pub drain_max: Duration,
    /// Longest pause between two tries of anything that failed: a commit, a stage, dead letters, a lane.
    pub retry_pause_max: Duration,
    /// Pause between two searches for new shards.
    pub shard_sync_interval: Duration,
    /// Pause between two writes of a checkpoint that moves.
    pub checkpoint_interval: Duration,
    /// Silence of the Kinesis API (and of STS) after which a try counts as failed.
    pub kinesis_silence_max: Duration,
    /// Silence of a PostgreSQL server after which its connection counts as lost. Longer than a usual
    /// `statement_timeout`, so that the error of the server comes first.
    pub postgres_silence_max: Duration,
    /// The same for Redshift, where one COPY may take many minutes.
    pub redshift_silence_max: Duration,
    /// Time without an answer after which a call is shown as blocked.
    pub call_blocked_after: Duration,
    /// Time after which a lane that waits for memory is shown as blocked.
    pub memory_blocked_after: Duration,
    /// Time after which a blocked lane loses its turn to exceed the memory limit.
    pub memory_turn_max: Duration,
    /// Time after which a blocked lane drops what it has read ahead.
    pub give_back_after: Duration,
    /// Time of a candidate for all records of its trial.
    pub trial_max: Duration,
    /// The same for the incumbent: the version that is replaced often fails.
    pub trial_incumbent_max: Duration,
    /// Deadlines of connections to the admin, control and intake ports.
    pub http: HttpDeadlines,
}

/// Deadlines of a port's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpDeadlines {
    /// Time for the head of a request to arrive, from its first byte on.
    pub head_max: Duration,
    /// Time for the body of a request to arrive, in addition to the time that its size allows; and how long a client
    /// may read nothing of an answer.
    pub body_max: Duration,
    /// How long a connection may be idle. Load balancers keep idle connections for 60 s, and answer 502 if the server
    /// closes one earlier.
    pub idle_max: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            drain_max: seconds(20),
            retry_pause_max: seconds(10),
            shard_sync_interval: seconds(10),
            checkpoint_interval: seconds(1),
            kinesis_silence_max: seconds(30),
            postgres_silence_max: seconds(90),
            redshift_silence_max: seconds(1_200),
            call_blocked_after: seconds(30),
            memory_blocked_after: seconds(5),
            memory_turn_max: seconds(10),
            give_back_after: seconds(60),
            trial_max: seconds(30),
            trial_incumbent_max: seconds(10),
            http: HttpDeadlines {
                head_max: seconds(10),
                body_max: seconds(30),
                idle_max: seconds(75),
            },
        }
    }
}

/// Reads `[timing]`.
pub(super) fn read(table: Spanned<DeValue<'_>>, check: &mut Check) -> Option<Timing> {
    let raw: RawTiming = shaped(table, check)?;
    let default = Timing::default();
    let drain = check.duration(&raw.drain, default.drain_max, DEADLINES);
    let retry_pause = check.duration(&raw.retry_pause, default.retry_pause_max, PAUSES);
    let shard_sync = check.duration(&raw.shard_sync, default.shard_sync_interval, PAUSES);
    let checkpoint = check.duration(&raw.checkpoint, default.checkpoint_interval, PAUSES);
    let kinesis = check.duration(&raw.kinesis_silence, default.kinesis_silence_max, DEADLINES);
    let postgres = check.duration(&raw.postgres_silence, default.postgres_silence_max, DEADLINES);
    let redshift = check.duration(&raw.redshift_silence, default.redshift_silence_max, DEADLINES);
    let call = check.duration(&raw.call_blocked, default.call_blocked_after, DEADLINES);
    let memory = check.duration(&raw.memory_blocked, default.memory_blocked_after, DEADLINES);
    let turn = check.duration(&raw.memory_turn, default.memory_turn_max, DEADLINES);
    let give_back = check.duration(&raw.give_back, default.give_back_after, DEADLINES);
    let trial = check.duration(&raw.trial, default.trial_max, DEADLINES);
    let incumbent = check.duration(&raw.trial_incumbent, default.trial_incumbent_max, DEADLINES);
    let head = check.duration(&raw.http_head, default.http.head_max, DEADLINES);
    let body = check.duration(&raw.http_body, default.http.body_max, DEADLINES);
    let idle = check.duration(&raw.http_idle, default.http.idle_max, DEADLINES);
    Some(Timing {
        drain_max: drain?,
        retry_pause_max: retry_pause?,
        shard_sync_interval: shard_sync?,
        checkpoint_interval: checkpoint?,
        kinesis_silence_max: kinesis?,
        postgres_silence_max: postgres?,
        redshift_silence_max: redshift?,
        call_blocked_after: call?,
        memory_blocked_after: memory?,
        memory_turn_max: turn?,
        give_back_after: give_back?,
        trial_max: trial?,
        trial_incumbent_max: incumbent?,
        http: HttpDeadlines { head_max: head?, body_max: body?, idle_max: idle? },
    })
}
