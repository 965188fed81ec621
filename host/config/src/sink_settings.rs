//! Settings of a sink: the contract between a sink type and the rest of the program.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt::Debug;
use std::io::Write;
use std::sync::{Arc, Mutex};

use super::{PipelineConfig, StreamServer};
use shardmill_core::record::SinkName;
use shardmill_core::sink::Sink;

/// The valid settings of one sink, in the form that its type gives them.
///
/// The commands and the engine ask by these methods, each of which has an answer that fits most types, and never by
/// the name of a type.
pub trait SinkSettings: Any + Debug + Send + Sync + SameSettings {
    /// Where the rows end up, as a text that two sinks share exactly when their rows do; `None`: nowhere that lasts.
    ///
    /// It is kept in the state, so it holds no secret: no user, no password, and of an endpoint's path, which may be
    /// a secret, only a digest. [`SinkConfig::destination`](super::SinkConfig::destination) gives its one spelling.
    fn destination(&self) -> Option<String>;

    /// Whether the sink keeps its own position with its rows: each row is there exactly once.
    fn is_exact(&self) -> bool;

    /// Whether the sink says of rows that they will come before it has them. Such a sink cannot give up.
    fn promises_rows(&self) -> bool {
        false
    }

    /// Whether the sink creates its table where it is missing.
    fn creates_table(&self) -> bool {
        false
    }

    /// Whether rows are encoded as they arrive, which takes memory beside the sinks' buffers.
    fn encodes_early(&self) -> bool {
        false
    }

    /// Whether rows are printed to standard output.
    fn prints_rows(&self) -> bool {
        false
    }

    /// The Kinesis server that the sink asks, if it asks one.
    fn stream_server(&self) -> Option<&StreamServer> {
        None
    }

    /// Whether a window of time can be replayed into the sink.
    fn replay(&self) -> ReplaySupport {
        ReplaySupport::Unsupported
    }

    /// The settings of a sink that takes rows once more which `sink` got before, by change `number` that is rolled
    /// back; `None`: the sink cannot take rows a second time.
    fn rerun(&self, sink: &SinkName, number: i64) -> Option<Rerun> {
        let _ = (sink, number);
        None
    }

    /// Makes the sink. Connects to nothing yet. Errors may show values of variables.
    ///
    /// # Errors
    /// The settings name something that the machine or the environment does not have.
    fn build(
        &self,
        context: &SinkContext<'_>,
        shared: &mut SharedParts,
    ) -> Result<Arc<dyn Sink>, SinkBuildError>;
}

/// The comparison of settings whose type is not known. All settings that can be compared have it.
pub trait SameSettings {
    /// Whether the others are of the same type, and equal.
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
    /// The settings, if they are of this type. For a sink that looks for its like, and for commands that are about
    /// one type.
    pub fn of_type<T: SinkSettings>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }
}

/// Whether a window of time can be replayed into a sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplaySupport {
    /// It can.
    Supported,
    /// It can once the sink has this setting, such as `lineage = true`.
    Needs(&'static str),
    /// It cannot.
    Unsupported,
}

/// Where rows go that are run once more.
#[derive(Debug)]
pub struct Rerun {
    /// The settings of the sink that takes them.
    pub settings: Arc<dyn SinkSettings>,
    /// Where that is, in words.
    pub place: String,
}

/// Why a sink could not be made.
pub type SinkBuildError = Box<dyn std::error::Error + Send + Sync>;

/// An output that several sinks share; a commit's lines are written under one lock.
pub type SharedOutput = Arc<Mutex<dyn Write + Send>>;

/// Inputs that a sink is made with.
pub struct SinkContext<'c> {
    /// The sink's name.
    pub name: &'c SinkName,
    /// The pipeline that it belongs to.
    pub pipeline: &'c PipelineConfig,
    /// Standard output, as this process leaves it to rows.
    pub output: SharedOutput,
}

/// Parts that sinks of one pipeline share, such as the connections to a server: the first sink that asks makes them.
#[derive(Default)]
pub struct SharedParts(HashMap<(TypeId, String), Arc<dyn Any + Send + Sync>>);

impl SharedParts {
    /// Gives the part of this type with this key, and makes it where it is missing.
    ///
    /// # Errors
    /// That of `make`.
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
