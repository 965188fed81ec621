//! Refusals of the builder, and runs of a pipeline that a program has built.

use std::sync::Mutex;

use async_trait::async_trait;

use super::*;
use shardmill_core::record::{
    Batch, BoundRoute, Entry, Position, PositionRange, Record, ShardId, ShardKey,
};
use shardmill_core::sink::{
    Acquired, Commit, Committed, KeptPosition, RefusalLog, SinkError, SinkWriter,
};
use shardmill_core::source::{
    BatchReader, NextBatch, ResumePoint, Shard, SourceError, StartPosition,
};

/// Records of the one shard.
const RECORDS: u64 = 100;

/// Numbers from 1, as text.
struct Numbers;

#[async_trait]
impl ShardSource for Numbers {
    async fn identity(&self) -> Result<StreamIdentity, SourceError> {
        Ok(StreamIdentity { name: "numbers".into(), arn: "test:numbers".into(), created_ms: 0 })
    }

    async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        Ok(vec![Shard::only(ShardId::new("only"))])
    }

    fn start(&self) -> &StartPosition {
        &StartPosition::TrimHorizon
    }

    async fn open(
        &self,
        shard: &ShardKey,
        from: ResumePoint<'_>,
    ) -> Result<Box<dyn BatchReader>, SourceError> {
        Ok(Box::new(NumbersReader { shard: shard.clone(), after: from.after.cloned() }))
    }
}

struct NumbersReader {
    shard: ShardKey,
    after: Option<Position>,
}

#[async_trait]
impl BatchReader for NumbersReader {
    async fn next_batch(&mut self) -> Result<NextBatch, SourceError> {
        let last: u64 = self
            .after
            .as_ref()
            .map_or(0, |after| after.sequence.as_str().parse().expect("a number"));
        if last == RECORDS {
            tokio::time::sleep(Duration::from_millis(5)).await;
            return Ok(NextBatch::Idle { lag_ms: 0, caught_up_ms: None });
        }
        let position = Position { sequence: (last + 1).into(), sub_sequence: 0 };
        let record = Record {
            position: position.clone(),
            partition_key: "key".into(),
            payload: (last + 1).to_string().into(),
            arrived_ms: 0,
        };
        let from_exclusive = self.after.replace(position.clone());
        Ok(NextBatch::Batch(Batch {
            shard: self.shard.clone(),
            records: vec![record],
            range: PositionRange { from_exclusive, to_inclusive: position },
            entry: Entry::Source,
        }))
    }
}

/// Rows in memory, with the position.
#[derive(Clone)]
struct Memory {
    name: SinkName,
    kept: Arc<Mutex<(Vec<String>, Option<Position>)>>,
    /// Asked to stop once there are this many rows.
    stops: Option<(usize, Stop)>,
}

impl Memory {
    fn named(name: &str) -> Arc<Self> {
        Arc::new(Self { name: SinkName::new(name), kept: Arc::default(), stops: None })
    }

    fn rows(&self) -> Vec<String> {
        self.kept.lock().expect("the rows").0.clone()
    }
}

#[async_trait]
impl Sink for Memory {
    fn name(&self) -> &SinkName {
        &self.name
    }

    async fn prepare(&self, _routes: &[BoundRoute]) -> Result<(), SinkError> {
        Ok(())
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let position = self.position(shard).await?;
        let writer = Box::new(self.clone());
        Ok(Acquired { writer, position, keeps_position: true, must_cut_at: None })
    }

    async fn position(&self, _shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        Ok(self.kept.lock().expect("the position").1.clone())
    }

    async fn kept_positions(
        &self,
        _pipeline: &PipelineName,
        shards: &[ShardKey],
    ) -> Result<Option<Vec<KeptPosition>>, SinkError> {
        let position = self.kept.lock().expect("the position").1.clone();
        let kept = |key: &ShardKey| KeptPosition {
            stream: key.stream.key(),
            shard: key.shard.clone(),
            position: position.clone(),
            mark: None,
            owner: None,
        };
        Ok(Some(shards.iter().map(kept).collect()))
    }
}

#[async_trait]
impl SinkWriter for Memory {
    async fn commit(
        &mut self,
        commit: &Commit,
        _refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        let mut kept = self.kept.lock().expect("the rows");
        let rows = commit.rows.iter();
        kept.0.extend(rows.map(|row| String::from_utf8_lossy(&row.payload).into_owned()));
        kept.1 = Some(commit.range.to_inclusive.clone());
        if let Some((rows, stop)) = &self.stops
            && kept.0.len() >= *rows
        {
            stop.ask();
        }
        Ok(Committed { rows_written: commit.rows.len() as u64, ..Committed::default() })
    }
}

fn whole() -> PipelineBuilder {
    Pipeline::builder("cars").source(Arc::new(Numbers)).sink(Memory::named("mart"))
}

fn decode() -> Stage {
    Stage::component("decode", "decode.wasm")
}

#[test]
fn a_builder_says_what_does_not_fit() {
    let many = CommitPolicy { bytes_max: BUFFER_BYTES + 1, ..DEFAULT_COMMIT_POLICY };
    let none = CommitPolicy { rows_max: 0, ..DEFAULT_COMMIT_POLICY };
    let never = CommitPolicy { linger_max: Duration::ZERO, ..DEFAULT_COMMIT_POLICY };
    let with = |policy| whole().sink_with(Memory::named("logs"), policy);
    for (builder, says) in [
        (
            Pipeline::builder("a/b").source(Arc::new(Numbers)).sink(Memory::named("mart")),
            "invalid name of a pipeline: expected letters, digits, `-` and `_`, starting with a letter or \
             digit, at most 64 characters, found \"a/b\"",
        ),
        (whole().sink(Memory::named("")), "invalid name of a sink"),
        (
            whole().stage(Stage::component("-d", "d.wasm").route("rows", "mart")),
            "invalid name of a stage",
        ),
        (
            whole().sink(Memory::named("mart")),
            "two stages or sinks have the name \"mart\": give each its own",
        ),
        (
            whole().stage(Stage::component("mart", "d.wasm").route("rows", "mart")),
            "two stages or sinks have the name \"mart\"",
        ),
        (
            whole().dead_letter_sink(Memory::named("mart")),
            "two stages or sinks have the name \"mart\"",
        ),
        (Pipeline::builder("cars").sink(Memory::named("mart")), "the source is missing"),
        (
            Pipeline::builder("cars").source(Arc::new(Numbers)),
            "expected at least one sink, found none",
        ),
        (
            whole().stage(decode().route("cars", "marts")),
            "route \"cars\" of stage decode goes to an unknown sink, \"marts\": the sinks: `mart`",
        ),
        (
            // This sink gets only dead letters.
            whole().dead_letter_sink(Memory::named("dead")).stage(decode().route("cars", "dead")),
            "route \"cars\" of stage decode goes to an unknown sink, \"dead\"",
        ),
        (
            whole().stage(decode()),
            "the last stage, decode, binds no route: call `route` of `Stage`",
        ),
        (whole().stage(decode().drop_route("cars")), "no route leads to sink mart"),
        (
            whole().sink(Memory::named("logs")).stage(decode().route("cars", "mart")),
            "no route leads to sink logs: bind one, or leave the sink out",
        ),
        (
            whole().stage(decode().config(serde_json::json!([1])).route("cars", "mart")),
            "invalid configuration of stage decode: expected a JSON object, found [1]",
        ),
        (
            whole().stage(decode().grant(Capability::Http).route("cars", "mart")),
            "unsupported grant of stage decode: `http` needs tables or hosts",
        ),
        (
            with(many),
            "`bytes_max` of the commit policy of sink logs is out of range: expected 1 to 104857600 bytes, \
             the buffer, found 104857601",
        ),
        (with(none), "`rows_max` of the commit policy of sink logs is out of range"),
        (with(never), "`linger_max` of the commit policy of sink logs is out of range"),
    ] {
        let error = builder.build().err().map(|error| error.to_string());
        let error = error.unwrap_or_else(|| panic!("it was built; expected: {says}"));
        assert!(error.starts_with(says), "{error}\nexpected: {says}");
    }
    for builder in [
        whole(),
        whole().sink(Memory::named("logs")).dead_letter_sink(Memory::named("dead")),
        whole().stage(decode().drop_route("other").route("cars", "mart")),
    ] {
        assert!(builder.build().is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_goes_on_where_its_last_run_has_stopped() {
    let folder = tempfile::tempdir().expect("a folder");
    let stop = Stop::new(Duration::from_secs(20));
    let mart = Memory::named("mart");
    let stopping = Memory { stops: Some((RECORDS as usize / 2, stop.clone())), ..(*mart).clone() };
    let one = CommitPolicy { rows_max: 1, ..DEFAULT_COMMIT_POLICY };
    let pipeline = |sink: Arc<Memory>| {
        let builder = Pipeline::builder("numbers").source(Arc::new(Numbers)).sink_with(sink, one);
        builder.state_dir(folder.path()).build().expect("a pipeline")
    };

    let first = pipeline(Arc::new(stopping)).run(&stop).await.expect("a run");
    let half = mart.rows().len();
    assert!((RECORDS as usize / 2..RECORDS as usize).contains(&half), "{half} rows");
    assert_eq!(first.records, half as u64);

    let pipeline = pipeline(mart.clone());
    let again = Stop::new(Duration::from_secs(20));
    let second = pipeline.run_until_caught_up(&again).await.expect("a run");
    assert_eq!(second.records, RECORDS - first.records);
    let expected: Vec<String> = (1..=RECORDS).map(|number| number.to_string()).collect();
    assert_eq!(mart.rows(), expected);

    // A run that has ended does not stop the other parts of the program.
    assert!(!again.is_asked());
    let third = pipeline.run_until_caught_up(&again).await.expect("a run");
    assert_eq!((third.records, mart.rows().len()), (0, expected.len()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_component_that_is_missing_is_named_without_a_place_in_a_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipeline = whole().state_dir(folder.path()).stage(decode().route("cars", "mart"));
    let pipeline = pipeline.build().expect("a pipeline");
    let stop = Stop::new(Duration::from_secs(20));
    let error = pipeline.run(&stop).await.expect_err("no component");
    assert!(matches!(error, PipelineError::Misfit(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.starts_with("failed to read plugin decode.wasm"), "{text}");
    assert!(!stop.is_asked());
}
