//! Compares the state with the sinks before the first record, and acts on the result.
//!
//! The decisions are pure functions in [`shardmill_state::agreement`]; this module asks and writes. The order
//! matters:
//!
//! 1. The remembered positions are read before the sinks are asked. A position that moves in between then looks
//!    ahead of what is remembered, which is harmless; the other order would make it look like a restored sink.
//! 2. The sinks are asked for all positions and for the mark of the state that wrote them.
//! 3. The state's own mark is read after that, because other processes may write to the same database in between.
//! 4. A state that is older than a mark, or that did not write it, stops the start, unless `--trust-sinks` is given.
//! 5. Only then does the state count its writes, and the sinks learn who writes.
//! 6. Sinks that lag what is remembered were restored: stop, reopen their shards, or record holes, as
//!    `on_position_mismatch` says.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::{LaneError, Shared};
use shardmill_config::PipelineConfig;
use shardmill_core::boxed;
use shardmill_core::owner::OwnerName;
use shardmill_core::record::{PipelineName, ShardId, ShardKey, StreamIdentity};
use shardmill_core::retry::RetryPolicy;
use shardmill_core::sink::{KeptPosition, Sink};
use shardmill_core::source::Shard;
use shardmill_state::agreement::{
    Age, Lost, MarkSeen, ShardFacts, Stands, age, all_marks, compare,
};
use shardmill_state::{AllGivenUp, Checkpoints, Hole, Remembered, Roster, ShardState, StateStore};

/// Part of a lane, in the status: sinks have not answered where they are.
const PART: &str = "positions";
/// Retries of a question to the sinks, up to the longest pause that is configured.
const RETRY: RetryPolicy =
    RetryPolicy::doubling(Duration::from_millis(100), Duration::MAX).with_jitter();

/// Sinks that keep positions, with what they keep.
type Kept = Vec<(Arc<dyn Sink>, Vec<KeptPosition>)>;

/// The shards of a stream at a start.
pub(crate) struct FoundShards<'f> {
    pub(crate) stream: &'f Arc<StreamIdentity>,
    pub(crate) listed: &'f [Shard],
    /// The shards that the state has begun.
    pub(crate) known: &'f HashMap<ShardId, ShardState>,
}

/// Compares the state with the sinks. Reopens shards where a sink was restored and the configuration says so.
/// Returns the shards that the state does not know and in which a sink has a position. The state counts its writes from
/// here on, so no sink may be written to before this has returned.
///
/// # Errors
/// [`LaneError::Fatal`] when a person must decide.
pub(crate) async fn before_first_record(
    shared: &Shared,
    state: &StateStore,
    found: FoundShards<'_>,
    trust_sinks: bool,
) -> Result<Vec<ShardId>, LaneError> {
    let FoundShards { stream, listed, known } = found;
    let pipeline = &shared.config.name;
    let of_stream = |shard: &ShardId| ShardKey {
        pipeline: pipeline.clone(),
        stream: stream.clone(),
        shard: shard.clone(),
    };
    let unlisted = known.keys().filter(|shard| !listed.iter().any(|other| other.id == **shard));
    let keys: Vec<ShardKey> =
        listed.iter().map(|shard| &shard.id).chain(unlisted).map(of_stream).collect();
    // Before the sinks are asked: a position that moves in between is then ahead of what is remembered, never before
    // it.
    let (remembered, given_up) = shared.checkpoints.remembered(stream).await?;
    let kept = ask_patiently(shared, pipeline, &keys).await;
    let stream_key = stream.key();
    let is_known = |own: &KeptPosition| own.stream == stream_key && known.contains_key(&own.shard);
    accept_state(state, &kept, is_known, trust_sinks).await?;
    for sink in &shared.sinks {
        sink.set_ownership(state.ownership());
    }

    let mut facts: BTreeMap<ShardId, ShardFacts> = BTreeMap::new();
    for shard in listed {
        facts.entry(shard.id.clone()).or_default().listed_parents = Some(shard.parents.clone());
    }
    for (shard, own) in known {
        let facts = facts.entry(shard.clone()).or_default();
        if !own.ended {
            // It is read on, whether listed or not: the server decides whether it is really gone.
            facts.listed_parents.get_or_insert_default();
        }
        facts.state = Some(own.clone());
    }
    note_sinks(&mut facts, &kept, &stream_key, (&remembered, &given_up));
    let plan = compare(&facts, shared.config.on_position_mismatch);
    if let Some(refusal) = plan.refusal() {
        return Err(LaneError::Fatal(refusal));
    }
    if let Some(loss) = plan.loss() {
        tracing::warn!("{loss}");
    }
    if !plan.lost.is_empty() {
        let hole = |lost: &Lost| {
            let why = match lost.is_unlisted {
                true => {
                    "its destination was restored, and the stream does not list the shard any more"
                }
                false => {
                    "its destination was restored, and `on_position_mismatch` went on from the checkpoint"
                }
            };
            Some(Hole {
                sink: Some(lost.sink.clone()),
                shard: of_stream(&lost.shard),
                from_exclusive: lost.mismatch.stands.clone(),
                to_inclusive: Some(lost.without_to.clone()?),
                why: why.into(),
            })
        };
        let holes = plan.lost.iter().filter_map(hole).collect();
        shared.checkpoints.accept_losses(stream, plan.lost, holes).await?;
    }
    for reopened in &plan.reopened {
        let sinks: Vec<&str> = reopened.sinks.iter().map(|(sink, _)| sink.as_str()).collect();
        tracing::warn!(shard = %reopened.shard, sinks = sinks.join(", "),
            from = reopened.checkpoint.as_ref().map(tracing::field::display),
            "the shard is read again: a sink was restored from a backup, here or in a parent shard");
    }
    if !plan.reopened.is_empty() {
        shared.checkpoints.reopen(stream, plan.reopened).await?;
    }
    if known.is_empty() && !plan.adopted.is_empty() {
        tracing::warn!(
            shards = plan.adopted.len(),
            "the pipeline's state is new, but sinks have positions: each of these sinks goes on after its own \
             position. Everything else that the earlier state knew is missing: dead letters, and which \
             revision ran where"
        );
    }
    Ok(plan.adopted)
}

/// Adds each sink's position in each shard, as the sink and as the state have it.
fn note_sinks(
    facts: &mut BTreeMap<ShardId, ShardFacts>,
    kept: &Kept,
    stream_key: &str,
    (remembered, given_up): (&Remembered, &AllGivenUp),
) {
    for (sink, kept) in kept {
        let mut positions: HashMap<&ShardId, _> = HashMap::new();
        for own in kept.iter().filter(|own| own.stream == stream_key) {
            positions.insert(&own.shard, own.position.clone());
        }
        for (shard, facts) in facts.iter_mut() {
            let key = (shard.clone(), sink.name().clone());
            let own = positions.remove(shard).flatten();
            // A sink before its position of that time was restored, and needs again what was given up.
            let given_up = given_up.get(&key).filter(|range| own >= range.from_exclusive);
            let stands = own.clone().max(given_up.map(|range| range.to_inclusive.clone()));
            let remembered = remembered.get(&key).cloned();
            facts.sinks.insert(sink.name().clone(), Stands { stands, remembered });
        }
    }
}

/// Returns warnings about the next start, without changing anything: sinks that are before what the state remembers,
/// and a state that is older than the sinks have seen, or another one. `stream` is the stream that a start would
/// read; `None`: a Kinesis stream, whose server is not asked.
///
/// # Errors
/// When the state or a sink cannot be read.
#[boxed]
pub async fn start_warnings(
    config: &PipelineConfig,
    state: &StateStore,
    sinks: &[Arc<dyn Sink>],
    stream: Option<&StreamIdentity>,
) -> anyhow::Result<Vec<String>> {
    let checkpoints = Checkpoints::new(state.clone());
    let mut said = Vec::new();
    let keys = Roster::new(state.clone()).streams().await?;
    for stream in compared(keys, stream, &config.source.stream_name()) {
        let (key, stream) = (stream.key(), Arc::new(stream));
        let known = checkpoints.shards(&stream).await?;
        let of_stream = |shard: &ShardId| ShardKey {
            pipeline: config.name.clone(),
            stream: stream.clone(),
            shard: shard.clone(),
        };
        let keys: Vec<ShardKey> = known.keys().map(of_stream).collect();
        // In the order of a start, because the pipeline may be running.
        let (remembered, given_up) = checkpoints.remembered(&stream).await?;
        let kept = ask(sinks, &config.name, &keys).await?;
        let is_known = |own: &KeptPosition| own.stream == key && known.contains_key(&own.shard);
        let noted = checkpoints.noted_marks().await?;
        match age(&state.mark().await?, &noted, &marks(&kept, is_known)) {
            Age::Newest(_) => {}
            Age::Older(one) => said.push(older(&one)),
            Age::Another(one) => said.push(another(&one)),
        }
        let fact = |(shard, own): (&ShardId, &ShardState)| {
            let (listed_parents, state) = (Some(Vec::new()), Some(own.clone()));
            (shard.clone(), ShardFacts { listed_parents, state, ..ShardFacts::default() })
        };
        let mut facts: BTreeMap<ShardId, ShardFacts> = known.iter().map(fact).collect();
        note_sinks(&mut facts, &kept, &key, (&remembered, &given_up));
        let plan = compare(&facts, config.on_position_mismatch);
        said.extend(plan.refusal());
        said.extend(plan.loss());
        if !plan.reopened.is_empty() {
            said.push(format!(
                "a sink was restored from a backup: the next start reads {} shards of stream {} again for it",
                plan.reopened.len(),
                stream.name
            ));
        }
    }
    Ok(said)
}

/// Returns the streams of the state that a start compares with the sinks: the one that it reads. Sinks keep
/// positions under a stream's name as well as under its key, and only for a Kinesis stream does the key contain the
/// name. With a made-up name for a file, an objects sink would look for another log and find no position.
pub(super) fn compared(
    keys: Vec<String>,
    stream: Option<&StreamIdentity>,
    name: &str,
) -> Vec<StreamIdentity> {
    match stream {
        Some(stream) if keys.contains(&stream.key()) => vec![stream.clone()],
        // Nothing was read from it yet.
        Some(_) => Vec::new(),
        None => {
            let streams = keys.iter().filter_map(|key| StreamIdentity::of_key(key));
            streams.filter(|stream| *stream.name == *name).collect()
        }
    }
}

/// Refuses a redrive with a state that is older than a sink has seen: its dead letters may have been redriven
/// already.
///
/// # Errors
/// [`LaneError::Fatal`] when the state is older, [`LaneError::Sink`] when a sink cannot be reached.
#[boxed]
pub async fn refuse_older_state(
    state: &StateStore,
    sinks: &[Arc<dyn Sink>],
    pipeline: &PipelineName,
) -> Result<(), LaneError> {
    let kept = ask(sinks, pipeline, &[]).await?;
    let own = state.mark().await?;
    match age(&own, &HashMap::new(), &marks(&kept, |_| false)) {
        Age::Older(seen) => Err(LaneError::Fatal(format!(
            "{}. A redrive with it could deliver dead letters twice that were redriven since; restore the \
             newest copy of the state folder",
            older(&seen)
        ))),
        _ => Ok(()),
    }
}

/// Accepts the state as the one to continue with, or says why not.
async fn accept_state(
    state: &StateStore,
    kept: &Kept,
    is_known: impl Fn(&KeptPosition) -> bool,
    trust_sinks: bool,
) -> Result<(), LaneError> {
    let checkpoints = Checkpoints::new(state.clone());
    let noted = checkpoints.noted_marks().await?;
    // After the sinks were asked: other processes may write to the same database in between.
    let own = state.mark().await?;
    let seen = marks(kept, is_known);
    let age = age(&own, &noted, &seen);
    let is_older = matches!(age, Age::Older(_));
    let (marks, problem) = match age {
        Age::Newest(marks) => (marks, None),
        Age::Older(one) => (all_marks(&seen), Some(older(&one))),
        Age::Another(one) => (all_marks(&seen), Some(another(&one))),
    };
    match problem {
        Some(problem) if !trust_sinks => {
            return Err(LaneError::Fatal(format!(
                "{problem}. With this state, records that only some sinks have would run with another revision \
                 than the one that ran first, and later dead letters are missing from it. Restore the newest \
                 copy of the state folder; or start once with `--trust-sinks`: each sink then goes on after \
                 its own position, the current revision runs the records that only some sinks have, and the \
                 later dead letters stay lost"
            )));
        }
        Some(problem) => {
            tracing::warn!(
                "{problem}; going on from the sinks' positions, because `--trust-sinks` was given"
            );
            if is_older {
                checkpoints.doubt_dead_letters().await?;
            }
        }
        None => {}
    }
    let others = marks.iter().filter(|mark| mark.state != own.state).cloned().collect();
    checkpoints.note_marks(others).await?;
    let above = marks.iter().filter(|mark| mark.state == own.state).map(|mark| mark.number).max();
    state.begin_counting(above.unwrap_or_default()).await?;
    Ok(())
}

fn older(seen: &MarkSeen) -> String {
    format!(
        "the pipeline's state folder is older than sink {}: {} wrote to the sink with a newer state than this \
         copy",
        seen.sink,
        by(seen.owner.as_ref())
    )
}

fn another(seen: &MarkSeen) -> String {
    format!(
        "sink {} was written last by another state folder than this one: by {}. If that process is still \
         running, stop one of the two, or give one of them another `name` under [pipeline]",
        seen.sink,
        by(seen.owner.as_ref())
    )
}

fn by(owner: Option<&OwnerName>) -> String {
    owner.map_or_else(|| "an unknown process".to_owned(), OwnerName::to_string)
}

fn marks(kept: &Kept, is_known: impl Fn(&KeptPosition) -> bool) -> Vec<MarkSeen> {
    let mut marks = Vec::new();
    for (sink, kept) in kept {
        marks.extend(kept.iter().filter_map(|own| {
            Some(MarkSeen {
                sink: sink.name().clone(),
                mark: own.mark.clone()?,
                owner: own.owner.clone(),
                is_of_known_shard: is_known(own),
            })
        }));
    }
    marks
}

/// Asks every sink once; sinks that keep no positions are left out.
async fn ask(
    sinks: &[Arc<dyn Sink>],
    pipeline: &PipelineName,
    keys: &[ShardKey],
) -> Result<Kept, LaneError> {
    let each = sinks.iter().map(async |sink| {
        let kept = sink.kept_positions(pipeline, keys).await?;
        Ok(kept.map(|kept| (sink.clone(), kept)))
    });
    let answers: Result<Vec<_>, LaneError> = futures::future::try_join_all(each).await;
    Ok(answers?.into_iter().flatten().collect())
}

/// Asks until all have answered. The caller drops this future at the end of the run.
async fn ask_patiently(shared: &Shared, pipeline: &PipelineName, keys: &[ShardKey]) -> Kept {
    let mut retries = RETRY.at_most(shared.config.timing.retry_pause_max).start();
    loop {
        match ask(&shared.sinks, pipeline, keys).await {
            Ok(kept) => {
                keys.iter().for_each(|key| shared.statuses.unblock(&key.shard, PART));
                return kept;
            }
            Err(error) => {
                let cause = error.to_string();
                keys.iter().for_each(|key| shared.statuses.block(&key.shard, PART, &cause));
            }
        }
        tokio::time::sleep(retries.next_pause()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_31_a_stream_is_compared_under_the_name_that_a_start_has_for_it() {
        let stream = |name: &str, arn: &str| StreamIdentity {
            name: name.into(),
            arn: arn.into(),
            created_ms: 7,
        };
        let file = stream("in.ndjson", "file:/data/in.ndjson#12");
        let replaced = stream("in.ndjson", "file:/data/in.ndjson#13");
        let dead_letters = stream("dead-letters", "dead-letters:cars");
        let kinesis = stream("cars", "arn:aws:kinesis:eu-west-1:000000000000:stream/cars");
        let other = stream("bikes", "arn:aws:kinesis:eu-west-1:000000000000:stream/bikes");
        let keys: Vec<String> =
            [&file, &dead_letters, &kinesis, &other].map(StreamIdentity::key).into();
        let all = |own, name| compared(keys.clone(), own, name);
        assert_eq!(all(Some(&file), "in.ndjson"), std::slice::from_ref(&file));
        assert_eq!(all(Some(&dead_letters), "dead-letters"), std::slice::from_ref(&dead_letters));
        // Another file in its place is another stream, with nothing to compare.
        assert!(all(Some(&replaced), "in.ndjson").is_empty());
        assert_eq!(all(None, "cars"), [kinesis]);
        assert!(all(None, "trucks").is_empty());
    }
}
