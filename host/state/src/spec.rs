//! A revision as it is stored: everything that decides what a record becomes, and nothing else.
//!
//! Components are named by their digests. The id of a revision is the digest of its JSON, so equal specifications
//! are one revision.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::damaged;
use shardmill_config::{Grants, StageLimits, StageText};
use shardmill_core::record::Column;
use shardmill_core::record::Digest;
use shardmill_core::record::{RouteName, SinkName, StageName};

/// One stage as it is stored; its component is named by its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageSpec {
    /// The stage's name.
    pub name: StageName,
    /// The SHA-256 of the component's bytes, in hex.
    #[serde(deserialize_with = "damaged::digest")]
    pub digest: String,
    /// The stage's configuration as JSON text; see [`StageText`].
    pub config_json: String,
    /// Whether `${NAME}` in it stands for an environment variable: values are never stored.
    #[serde(default, skip_serializing_if = "is_false")]
    pub has_variables: bool,
    /// Its limits.
    pub limits: StageLimits,
    /// The capabilities that its plugin may use.
    #[serde(default, skip_serializing_if = "Grants::is_empty")]
    pub grants: Grants,
    /// Sinks that each route is bound to.
    pub routes: BTreeMap<RouteName, Vec<SinkName>>,
    /// A second component that gets a share of the partition keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanarySpec>,
}

/// A component that gets a share of a stage's partition keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanarySpec {
    /// The SHA-256 of the component's bytes, in hex.
    #[serde(deserialize_with = "damaged::digest")]
    pub digest: String,
    /// Its share, in percent of the partition keys: 1 to 99.
    pub percent: u8,
}

impl CanarySpec {
    /// Whether it gets the records of a partition key. Decided by a checksum of the key: it does not depend on the
    /// shard, and a key always gets the same component, so its records stay in order.
    pub fn takes(&self, partition_key: &[u8]) -> bool {
        crc32fast::hash(partition_key) % 100 < u32::from(self.percent)
    }
}

fn is_false(flag: &bool) -> bool {
    !*flag
}

impl StageSpec {
    /// Returns the stage's configuration as the file has it.
    pub fn text(&self) -> StageText {
        StageText { json: self.config_json.clone(), has_variables: self.has_variables }
    }

    /// Lists what differs from another stage of the same name, in words.
    pub fn changes_to(&self, other: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        let short = |digest: &str| digest[..12.min(digest.len())].to_owned();
        if self.digest != other.digest {
            changes.push(format!("plugin {} → {}", short(&self.digest), short(&other.digest)));
        }
        if self.canary != other.canary {
            changes.push("canary".into());
        }
        if self.text() != other.text() {
            changes.push("config".into());
        }
        if self.limits != other.limits {
            changes.push("limits".into());
        }
        if self.grants != other.grants {
            changes.push("grant".into());
        }
        if self.routes != other.routes {
            changes.push("routes".into());
        }
        changes
    }
}

/// A revision as it is stored. Equal specifications are one revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevisionSpec {
    /// The media type of the stream's payloads, where declared.
    pub source_format: Option<String>,
    /// The stages, in order.
    pub stages: Vec<StageSpec>,
    /// Sinks of the source's records, if there is no stage.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_sinks: Vec<SinkName>,
    /// Columns of these records, if known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_columns: Vec<Column>,
}

impl RevisionSpec {
    /// Returns the specification as JSON, always in the same form: the id depends on it.
    pub fn to_json(&self) -> String {
        // Maps are ordered and every key is text: serialising cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Returns the revision's id: the first 16 hex digits of its digest.
    pub fn id(&self) -> Arc<str> {
        Digest::of(self.to_json().as_bytes()).as_str()[..16].into()
    }

    /// Returns a stage by its name.
    pub fn stage(&self, name: &StageName) -> Option<&StageSpec> {
        self.stages.iter().find(|stage| stage.name == *name)
    }

    /// Replaces the name of a sink that was renamed. Returns false if the revision does not use it.
    pub fn rename_sink(&mut self, old: &SinkName, new: &SinkName) -> bool {
        let bound = self.stages.iter_mut().flat_map(|stage| stage.routes.values_mut());
        let names = bound.flatten().chain(&mut self.source_sinks);
        let mut renamed = false;
        for name in names.filter(|name| *name == old) {
            *name = new.clone();
            renamed = true;
        }
        renamed
    }

    /// Lists the digests of all its components.
    pub fn digests(&self) -> impl Iterator<Item = &str> {
        self.stages.iter().flat_map(|stage| {
            let canary = stage.canary.as_ref().map(|canary| canary.digest.as_str());
            [stage.digest.as_str()].into_iter().chain(canary)
        })
    }

    /// Lists the sinks that its routes are bound to.
    pub fn sinks(&self) -> impl Iterator<Item = &SinkName> {
        let bound = self.stages.iter().flat_map(|stage| stage.routes.values().flatten());
        bound.chain(&self.source_sinks)
    }
}
