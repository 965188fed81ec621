//! A revision as it is stored: what decides what a record becomes, and nothing else.
//!
//! Components are named by their digests. Equal specifications are one revision: its id is the digest
//! of their JSON.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::damaged;
use shardmill_config::{Grants, StageLimits, StageText};
use shardmill_core::record::Column;
use shardmill_core::record::Digest;
use shardmill_core::record::{RouteName, SinkName, StageName};

/// One stage, as it is stored: the component is named by its digest.
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
    /// What its plugin may ask of the host.
    #[serde(default, skip_serializing_if = "Grants::is_empty")]
    pub grants: Grants,
    /// Its bindings.
    pub routes: BTreeMap<RouteName, Vec<SinkName>>,
    /// Another component that some of the partition keys go to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanarySpec>,
}

/// A component that has a share of a stage's partition keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanarySpec {
    /// The SHA-256 of the component's bytes, in hex.
    #[serde(deserialize_with = "damaged::digest")]
    pub digest: String,
    /// Of 100 partition keys, how many it gets: 1 to 99.
    pub percent: u8,
}

impl CanarySpec {
    /// Whether the records of a partition key are its: by a checksum of the key, which says nothing of
    /// the shard that it is in. A key is always of one side, so its records stay in order.
    pub fn takes(&self, partition_key: &[u8]) -> bool {
        crc32fast::hash(partition_key) % 100 < u32::from(self.percent)
    }
}

fn is_false(flag: &bool) -> bool {
    !*flag
}

impl StageSpec {
    /// The stage's configuration, as the file had it.
    pub fn text(&self) -> StageText {
        StageText { json: self.config_json.clone(), has_variables: self.has_variables }
    }

    /// What is other in a stage of the same name, in words.
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

/// A revision, as it is stored. Equal specifications are one revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevisionSpec {
    /// The media type of the stream's payloads, where declared.
    pub source_format: Option<String>,
    /// The stages, in order.
    pub stages: Vec<StageSpec>,
    /// Where records go as they came, when there is no stage.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_sinks: Vec<SinkName>,
    /// What columns they have then, where that is known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_columns: Vec<Column>,
}

impl RevisionSpec {
    /// The specification as JSON, always in the same form.
    pub fn to_json(&self) -> String {
        // Maps are ordered and every key is text: this cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The revision's id: the first 16 hex digits of its digest.
    pub fn id(&self) -> Arc<str> {
        Digest::of(self.to_json().as_bytes()).as_str()[..16].into()
    }

    /// A stage by its name.
    pub fn stage(&self, name: &StageName) -> Option<&StageSpec> {
        self.stages.iter().find(|stage| stage.name == *name)
    }

    /// Lets it name a sink that was renamed; false: it does not name that sink.
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

    /// The digests of all its components.
    pub fn digests(&self) -> impl Iterator<Item = &str> {
        self.stages.iter().flat_map(|stage| {
            let canary = stage.canary.as_ref().map(|canary| canary.digest.as_str());
            [stage.digest.as_str()].into_iter().chain(canary)
        })
    }

    /// Every sink that a route of it is bound to.
    pub fn sinks(&self) -> impl Iterator<Item = &SinkName> {
        let bound = self.stages.iter().flat_map(|stage| stage.routes.values().flatten());
        bound.chain(&self.source_sinks)
    }
}
