//! Settings of a sink: the contract between a sink type and the rest of the program.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt::Debug;
use std::io::Write;
use std::sync::{Arc, Mutex};

use super::{PipelineConfig, StreamServer};
use shardmill_core::record::SinkName;
use shardmill_core::sink::Sink;

/// Validated settings of one sink, in the form of its type.
///
/// Commands and the engine use these methods and never the name of a type. The default of each method fits most types.
pub trait SinkSettings: Any + Debug + Send + Sync + SameSettings {
    /// Returns where the rows are stored, as a text that two sinks share exactly if their rows go to the same place;
    /// `None`: the rows are not stored.
    ///
    /// The text is kept in the state, so it must not contain a secret: no user and no password, and only a digest of an
    /// endpoint's path, which may be a secret. [`SinkConfig::destination`](super::SinkConfig::destination) normalizes
    /// it.
    fn destination(&self) -> Option<String>;

    /// Whether the sink stores its own position together with its rows, so that each row arrives exactly once.
    fn is_exact(&self) -> bool;

    /// Whether the sink announces rows before it stores them. Such a sink must not turn them into dead letters later.
    fn promises_rows(&self) -> bool {
        false
    }

    /// Whether the sink creates a missing table.
    fn creates_table(&self) -> bool {
        false
    }

    /// Whether rows are encoded on arrival, which takes memory besides the sinks' buffers.
    fn encodes_early(&self) -> bool {
        false
    }

    /// Whether rows are printed to standard output.
    fn prints_rows(&self) -> bool {
        false
    }

    /// Returns the Kinesis server that the sink uses, if any.
    fn stream_server(&self) -> Option<&StreamServer> {
        None
    }

    /// Whether a time window can be replayed into the sink.
    fn replay(&self) -> ReplaySupport {
        ReplaySupport::Unsupported
    }

    /// Returns the settings of a sink for a rerun: it takes rows again that `sink` received before, after the rollback
    /// of change `number`. `None`: the sink cannot take rows a second time.
    fn rerun(&self, sink: &SinkName, number: i64) -> Option<Rerun> {
        let _ = (sink, number);
        None
    }

    /// Makes the sink, without any connection yet. Errors may contain values of variables.
    ///
    /// # Errors
    /// The settings need something that the machine or the environment does not have.
    fn build(
        &self,
        context: &SinkContext<'_>,
        shared: &mut SharedParts,
    ) -> Result<Arc<dyn Sink>, SinkBuildError>;
}

/// Comparison of settings of unknown types. All settings that implement `PartialEq` have it.
pub trait SameSettings {
    /// Whether the other settings have the same type and are equal.
    fn is_same(&self, other: &dyn Any) -> bool;
}

impl<T: Any + PartialEq> SameSettings for T {
    fn is_same(&self, other: &dyn Any) -> bool {
        other.downcast_ref::<T>().is_some_and(|other| self == other)
    }
}

impl PartialEq for dyn SinkSettings {
    fn eq(&self, other: &Self) -> bool {
        self.is_same(other as &dyn Any)
    }
}

impl dyn SinkSettings {
    /// Returns the settings if they are of this type: for a sink that compares itself with others of its type, and for
    /// commands that only work with one type.
    pub fn of_type<T: SinkSettings>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }
}

/// Whether a time window can be replayed into a sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplaySupport {
    /// Yes.
    Supported,
    /// Only with this setting, such as `lineage = true`.
    Needs(&'static str),
    /// No.
    Unsupported,
}

/// Target of a rerun.
#[derive(Debug)]
pub struct Rerun {
    /// Settings of the sink that takes the rows.
    pub settings: Arc<dyn SinkSettings>,
    /// Place of the rows, in words.
    pub place: String,
}

/// Reason why a sink could not be made.
pub type SinkBuildError = Box<dyn std::error::Error + Send + Sync>;

/// Output that several sinks share. The lines of one commit are written under one lock.
pub type SharedOutput = Arc<Mutex<dyn Write + Send>>;

/// Inputs for making a sink.
pub struct SinkContext<'c> {
    /// Name of the sink.
    pub name: &'c SinkName,
    /// Pipeline of the sink.
    pub pipeline: &'c PipelineConfig,
    /// Output for rows of sinks that print them.
    pub output: SharedOutput,
}

/// Parts that the sinks of a pipeline share, such as connections to a server. The first sink that needs a part makes
/// it.
#[derive(Default)]
pub struct SharedParts(HashMap<(TypeId, String), Arc<dyn Any + Send + Sync>>);

impl SharedParts {
    /// Returns the part of this type and key, and makes it if it does not exist.
    ///
    /// # Errors
    /// Error of `make`.
    pub fn get_or_make<T: Any + Send + Sync, E>(
        &mut self,
        key: &str,
        make: impl FnOnce() -> Result<T, E>,
    ) -> Result<Arc<T>, E> {
        let key = (TypeId::of::<T>(), key.to_owned());
        if let Some(part) = self.0.get(&key).cloned()
            && let Ok(part) = part.downcast()
        {
            return Ok(part);
        }
        let part = Arc::new(make()?);
        self.0.insert(key, part.clone());
        Ok(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_part_is_made_once_per_type_and_key() {
        let mut shared = SharedParts::default();
        let mut part = |key: &str, number: u32| {
            *shared.get_or_make(key, || Ok::<_, ()>(number)).expect("a part")
        };
        assert_eq!([part("a", 1), part("b", 2), part("a", 3)], [1, 2, 1]);
        let other = shared.get_or_make("a", || Ok::<_, ()>("text"));
        assert_eq!(other.as_deref(), Ok(&"text"), "of another type");
        assert_eq!(shared.get_or_make("c", || Err::<u32, _>("refused")), Err("refused"));
        assert_eq!(shared.get_or_make("c", || Ok::<_, ()>(4_u32)).as_deref(), Ok(&4));
    }
}
