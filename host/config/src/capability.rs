//! Capabilities that a stage may grant its plugin, by name.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Version of the plugin interface, as in `wit/`.
pub const WIT_VERSION: &str = "0.1.0";

/// Capability, named after its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Capability {
    /// Lines in the log of the host.
    Log,
    /// Own metrics of the plugin.
    Metrics,
    /// Rows of reference tables.
    Lookup,
    /// The time of day.
    Clock,
    /// Random numbers.
    Random,
    /// HTTP requests to granted hosts.
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
        format!("shardmill:plugin/{}@{}", self.name(), WIT_VERSION)
    }

    /// Key under `[stage.grant]` that grants it.
    pub fn grant_example(self) -> &'static str {
        match self {
            Self::Log => "log = true",
            Self::Metrics => "metrics = true",
            Self::Lookup => "lookup = [\"NAME\"], and a [[lookup]] of that name",
            Self::Clock => "clock = true",
            Self::Random => "random = true",
            Self::Http => "http = [{ host = \"api.example.com\" }]",
        }
    }

    /// Whether `configure` may ask for it: the host itself answers, and waits for nobody.
    pub fn is_for_configure(self) -> bool {
        !matches!(self, Self::Lookup | Self::Http)
    }

    /// Whether its answers cannot change what a record becomes. Those of the others may differ at a replay.
    pub fn is_deterministic(self) -> bool {
        matches!(self, Self::Log | Self::Metrics)
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
