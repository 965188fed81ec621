//! What a plugin may ask of the host, if its stage grants it: `wit/0.1.0/capabilities.wit`.

pub mod http;
pub mod lookup;

use std::fmt;

use serde::{Deserialize, Serialize};

/// A capability, by the name of its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Capability {
    /// Lines in the host's log.
    Log,
    /// Metrics of the plugin's own.
    Metrics,
    /// Rows of reference tables.
    Lookup,
    /// The time of day.
    Clock,
    /// Unpredictable numbers.
    Random,
    /// Requests to granted hosts.
    Http,
}

impl Capability {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Log, Self::Metrics, Self::Lookup, Self::Clock, Self::Random, Self::Http];

    /// The name, as in `[stage.grant]` and in `plugin.toml`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Metrics => "metrics",
            Self::Lookup => "lookup",
            Self::Clock => "clock",
            Self::Random => "random",
            Self::Http => "http",
        }
    }

    /// The interface's name in a component, with its version.
    pub fn interface(self) -> String {
        format!("shardmill:plugin/{}@{}", self.name(), super::WIT_VERSION)
    }

    /// Whether what it answers may differ at a replay and so change what a record becomes.
    pub fn is_deterministic(self) -> bool {
        matches!(self, Self::Log | Self::Metrics)
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
