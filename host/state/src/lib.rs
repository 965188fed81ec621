//! What is settled: checkpoints, the generation ledger and the dead letters of one pipeline.
//!
//! All of it lies in one SQLite database in the state directory ([`StateStore`]). A sink that keeps
//! its own position is the truth about itself; what is kept here is the minimum over the sinks (the
//! checkpoint), the positions of sinks that keep none, which generation ran from which sequence on,
//! and every record that a stage or a table did not take.

pub mod agreement;
mod checkpoint;
mod hidden;
mod holes;
mod ledger;
mod letter_log;
mod letter_store;
mod letters;
mod migrations;
mod redrive;
mod redrive_key;
mod rejections;
mod replays;
mod revisions;
mod roster;
mod settled;
mod spec;
mod store;
mod swaps;
mod together;
mod variables;

pub use agreement::ShardState;
pub use checkpoint::{AllGivenUp, Checkpoints, KnownShards, Look, Remembered, SinkMark};
pub use hidden::TakenOver;
pub use holes::{Hole, Holes, RecordedHole};
pub use ledger::{Components, Ledger, LedgerEntry, Ran, Segment};
pub use letter_log::LoggedLetter;
pub use letter_store::{DeadLetter, LetterKey, MadeBy, Step, entered_digest};
pub use letters::{DeadLetters, LetterFilter, PayloadDigest, StoredLetter};
pub use redrive::{
    LETTERS_STREAM, LostPayload, RedriveId, Redriven, RedrivenLetter, Redrives, Unfinished,
    is_redrive,
};
pub use rejections::RejectionWindow;
pub use replays::{FailedAgain, PendingReplay, Replays};
pub use roster::{KnownSinks, Removed, Roster, RosterChange};
pub use settled::SettledItems;
pub use spec::{CanarySpec, GenerationSpec, StageSpec};
pub use store::{StateError, StateStore, needed_components};
pub use swaps::{Change, ChangeKind, ChangeOutcome, Changes, NewChange, Running};
pub use variables::{SetOtherwise, Variables};

/// A position in reports: as text.
fn as_text<S: serde::Serializer>(
    position: &Option<shardmill_core::record::Position>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match position {
        Some(position) => to.collect_str(position),
        None => to.serialize_none(),
    }
}
