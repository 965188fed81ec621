//! Shared by the tests of the SQL sinks: commits made of JSON lines, and a log of refused rows.

pub mod keyed;
pub mod proxy;

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use shardmill_core::record::{
    Batch, Entry, Position, PositionRange, Record, Row, SequenceNumber, ShardKey, StreamIdentity,
};
use shardmill_core::record::{BoundRoute, Column};
use shardmill_core::sink::{Commit, Refusal, RefusalLog, Sink, SinkError};

/// Makes a shard; tests give their shards different names.
pub fn shard(name: &str) -> ShardKey {
    let stream = StreamIdentity {
        name: "test".into(),
        arn: "arn:aws:kinesis:eu-central-1:000000000000:stream/test".into(),
        created_ms: 1_400_000_000_000,
    };
    ShardKey { pipeline: "cars".into(), stream: Arc::new(stream), shard: name.into() }
}

/// Returns position `n`, with a sequence number of 129 digits.
pub fn position(n: u64) -> Position {
    let sequence = SequenceNumber::parse(&format!("9{n:0128}")).expect("a sequence number");
    Position { sequence, sub_sequence: n % 3 }
}

/// Makes a commit that begins after position `from` (0: at the beginning) and has one record per payload.
pub fn commit(from: u64, payloads: &[impl AsRef<[u8]>]) -> Commit {
    let count = payloads.len() as u64;
    let range = PositionRange {
        from_exclusive: (from > 0).then(|| position(from)),
        to_inclusive: position(from + count.max(1)),
    };
    let record = |place: u64| Record {
        position: position(from + 1 + place),
        partition_key: "key".into(),
        payload: "the original".into(),
        arrived_ms: 0,
    };
    let records = (0..count).map(record).collect();
    let batch = Arc::new(Batch {
        shard: shard("any"),
        records,
        range: range.clone(),
        entry: Entry::Source,
    });
    let row = |(place, payload): (usize, &_)| Row {
        batch: Arc::clone(&batch),
        record: u32::try_from(place).expect("few rows"),
        ordinal: 0,
        route: "cars".into(),
        key: "key".into(),
        payload: AsRef::<[u8]>::as_ref(payload).to_vec().into(),
    };
    let rows = Arc::new(payloads.iter().enumerate().map(row).collect());
    Commit { range, rows, encoded: None, revision: "1".into() }
}

/// Makes a route that carries JSON, with columns written as `name type`; `?` after the type means nullable.
pub fn route(columns: &[&str]) -> BoundRoute {
    let column = |text: &&str| {
        let (name, data_type) = text.split_once(' ').expect("a name and a type");
        Column {
            name: name.into(),
            data_type: data_type.trim_end_matches('?').into(),
            nullable: data_type.ends_with('?'),
        }
    };
    BoundRoute {
        name: "cars".into(),
        format: "application/json".into(),
        columns: columns.iter().map(column).collect(),
    }
}

/// Log that keeps refused rows in memory, or fails.
#[derive(Default)]
pub struct Log {
    recorded: Mutex<Vec<(usize, String)>>,
    is_full: bool,
}

impl Log {
    /// Makes a log that accepts nothing.
    pub fn full() -> Self {
        Self { is_full: true, ..Self::default() }
    }

    /// Takes the refused rows since the last call.
    pub fn take(&self) -> Vec<(usize, String)> {
        std::mem::take(&mut self.recorded.lock().expect("a lock"))
    }

    /// Asserts that these rows, and no others, were refused, each with a reason that contains this text.
    pub fn expect(&self, expected: &[(usize, &str)]) {
        let recorded = self.take();
        let rows: Vec<usize> = recorded.iter().map(|(row, _)| *row).collect();
        let expected_rows: Vec<usize> = expected.iter().map(|(row, _)| *row).collect();
        assert_eq!(rows, expected_rows, "{recorded:#?}");
        for ((row, reason), (_, part)) in recorded.iter().zip(expected) {
            assert!(reason.contains(part), "row {row}: {reason:?} does not contain {part:?}");
        }
    }
}

#[async_trait]
impl RefusalLog for Log {
    async fn record(&self, _: &Commit, refusals: &[Refusal]) -> Result<(), SinkError> {
        if self.is_full {
            let cause = "the log is full".into();
            return Err(SinkError::TooManyRefused { sink: "test".into(), cause });
        }
        let new = refusals.iter().map(|refusal| (refusal.row, refusal.reason.clone()));
        self.recorded.lock().expect("a lock").extend(new);
        Ok(())
    }
}

/// Asserts that a new owner of a shard fences the previous one: the rows 1 and 2 of a column `id` come from one owner
/// each. `again` is another sink on the same table, as another process would have.
pub async fn assert_fences(sink: &dyn Sink, again: &dyn Sink) {
    let (shard, log) = (shard("shardId-000000000000"), Log::default());
    let mut zombie = sink.acquire(&shard).await.expect("acquired").writer;
    zombie.commit(&commit(0, &[r#"{"id":1}"#]), &log).await.expect("committed");
    let acquired = again.acquire(&shard).await.expect("acquired");
    assert_eq!(acquired.position, Some(position(1)));
    let mut owner = acquired.writer;
    expect_fenced(zombie.commit(&commit(1, &[r#"{"id":2}"#]), &log).await);
    expect_fenced(zombie.commit(&commit(0, &[r#"{"id":1}"#]), &log).await);
    owner.commit(&commit(1, &[r#"{"id":2}"#]), &log).await.expect("committed");
    expect_fenced(owner.commit(&commit(5, &[r#"{"id":9}"#]), &log).await);
}

/// Asserts that a call failed with [`SinkError::Unavailable`], with this text.
pub fn expect_unavailable<T>(outcome: Result<T, SinkError>, part: &str) {
    match outcome {
        Err(SinkError::Unavailable { cause, .. }) => {
            assert!(cause.contains(part), "{cause:?} does not contain {part:?}");
        }
        Err(other) => panic!("expected unavailable ({part}), found {other}"),
        Ok(_) => panic!("expected unavailable ({part}), found success"),
    }
}

/// Asserts that a call failed with [`SinkError::Fenced`].
pub fn expect_fenced<T>(outcome: Result<T, SinkError>) {
    match outcome {
        Err(SinkError::Fenced { .. }) => {}
        Err(other) => panic!("expected fenced, found {other}"),
        Ok(_) => panic!("expected fenced, found success"),
    }
}
