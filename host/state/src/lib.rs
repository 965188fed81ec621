//! The state of one pipeline: checkpoints, the ledger of revisions, dead letters, changes and holes.
//!
//! All of it lies in one SQLite database in the state directory ([`StateStore`]). A sink that keeps its own
//! position is the truth about its rows. The state holds the minimum over the sinks (the checkpoint), the positions
//! of sinks that keep none, which revision ran from which position on, and every record that a stage rejected or a
//! sink refused.
//!
//! This crate decides as little as possible: the engine says what is written. Two decisions are here, as functions
//! without I/O, because they are about what is stored: whether sinks and state agree ([`agreement`]), and how much
//! of a dead letter is kept. It runs no plugin and asks no sink. It uses `config` and `core`; its one heavy
//! dependency is rusqlite.
//!
//! ```
//! use std::sync::Arc;
//!
//! use shardmill_core::record::{
//!     PipelineName, Position, SequenceNumber, ShardId, ShardKey, ShardStart, SinkName, StreamIdentity,
//! };
//! use shardmill_state::{Checkpoints, Look, SinkMark, StateStore};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = tempfile::tempdir()?;
//! let checkpoints = Checkpoints::new(StateStore::open(folder.path())?);
//! let arn = "arn:aws:kinesis:eu-central-1:123456789012:stream/cars";
//! let stream =
//!     Arc::new(StreamIdentity { name: "cars".into(), arn: arn.into(), created_ms: 0 });
//! let id = ShardId::new("shardId-000000000000");
//! let shard = ShardKey {
//!     pipeline: PipelineName::new("fleet"),
//!     stream: Arc::clone(&stream),
//!     shard: id.clone(),
//! };
//!
//! // A shard's start is durable before its first record.
//! let look = Look { begun: vec![(id, ShardStart::Horizon, None)], ..Look::default() };
//! checkpoints.record_look(&stream, look).await?;
//!
//! let position = Position { sequence: SequenceNumber::parse("42")?, sub_sequence: 0 };
//! let mark =
//!     SinkMark { sink: SinkName::new("mart"), position: position.clone(), arrived_ms: None };
//! checkpoints.advance(&shard, vec![mark], Some(position.clone()), false).await?;
//! assert_eq!(checkpoints.checkpoint(&shard).await?, Some(position));
//! # Ok(())
//! # }
//! ```

pub mod agreement;
mod assets;
mod checkpoint;
mod damaged;
mod dead_letter_log;
mod dead_letter_store;
mod dead_lettered;
mod dead_letters;
mod group_commit;
mod holes;
mod ledger;
mod migrations;
mod pending;
mod redrive;
mod redrive_key;
mod rejections;
mod replays;
mod revisions;
mod roster;
mod spec;
mod store;
mod swaps;
mod variables;

pub use agreement::ShardState;
pub use checkpoint::{AllGivenUp, Checkpoints, KnownShards, Look, Remembered, SinkMark};
pub use dead_letter_log::LoggedDeadLetter;
pub use dead_letter_store::{DeadLetter, DeadLetterKey, MadeBy, StagesRun, entered_digest};
pub use dead_lettered::DeadLetteredItems;
pub use dead_letters::{DeadLetterFilter, DeadLetters, PayloadDigest, StoredDeadLetter};
pub use holes::{Hole, Holes, RecordedHole};
pub use ledger::{Components, Ledger, LedgerEntry, Ran, Segment};
pub use pending::AcquiredShard;
pub use redrive::{
    LostPayload, REDRIVE_STREAM, RedriveId, RedriveRecord, Redriven, Redrives, UnfinishedRedrive,
    is_redrive,
};
pub use rejections::RejectionWindow;
pub use replays::{FailedInReplay, PendingReplay, Replays};
pub use roster::{KnownSinks, Removed, Roster, RosterChange};
pub use spec::{CanarySpec, RevisionSpec, StageSpec};
pub use store::{StateError, StateStore, needed_components};
pub use swaps::{Change, ChangeKind, ChangeOutcome, Changes, NewChange, Running};
pub use variables::{ChangedVariables, Variables};

/// Serialises a position as text, for reports.
fn as_text<S: serde::Serializer>(
    position: &Option<shardmill_core::record::Position>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match position {
        Some(position) => to.collect_str(position),
        None => to.serialize_none(),
    }
}
