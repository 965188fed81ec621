//! Validation of `--drop-sink`: each named sink must have run before, and must be gone from the configuration.

use std::collections::BTreeSet;

use anyhow::bail;

use super::{Console, holes};
use shardmill_config::{PipelineConfig, SinkConfig, suggest};
use shardmill_core::record::SinkName;
use shardmill_state::{Roster, StateStore};

/// Refuses names that would drop nothing, before anything is changed. Otherwise a typing error would be noticed
/// only by the records that a sink lacks. A name whose removal is already recorded is accepted, so that a
/// service with the option in its command line can be restarted.
///
/// # Errors
/// The name is unknown, the sink is still configured, or the state cannot be read.
pub(crate) async fn validate(
    names: &[SinkName],
    config: &PipelineConfig,
    console: &Console,
) -> anyhow::Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let sinks = config.sinks.iter().chain(&config.dead_letter_sinks);
    let configured: BTreeSet<&SinkName> = sinks.clone().map(|sink| &sink.name.value).collect();
    let former = sinks.filter_map(|sink: &SinkConfig| Some(&sink.renamed_from.as_ref()?.value));
    let past = Past::read(config).await?;
    let gone: Vec<&str> = (past.present.iter())
        .filter(|name| !configured.contains(name))
        .chain(former)
        .map(SinkName::as_str)
        .collect();
    for name in names {
        if configured.contains(name) {
            bail!(
                "--drop-sink {name}: sink {name} is still configured; remove it from {} first, then start with \
                 `--drop-sink {name}`",
                config.file.path.display()
            );
        }
        if gone.contains(&name.as_str()) {
            continue;
        }
        if past.removed.contains(name) {
            console
                .say(format!("sink {name} was dropped before: `--drop-sink {name}` has no effect"));
            continue;
        }
        bail!(
            "--drop-sink {name}: unknown sink; {}",
            suggest(name.as_str(), "sinks that are gone from the configuration", &gone)
        );
    }
    Ok(())
}

/// Sinks that the pipeline, and the pipeline that copies its dead letters, have had.
#[derive(Default)]
struct Past {
    /// Sinks of the last run.
    present: BTreeSet<SinkName>,
    /// Sinks whose removal is recorded.
    removed: BTreeSet<SinkName>,
}

impl Past {
    async fn read(config: &PipelineConfig) -> anyhow::Result<Self> {
        let mut past = Self::default();
        for folder in [holes::folder(config), holes::folder_of_copies(config)] {
            if !folder.join("state.db").exists() {
                continue;
            }
            let roster = Roster::new(StateStore::open(&folder)?);
            for stream in roster.streams().await? {
                let known = roster.known_in(stream).await?;
                for name in known.names() {
                    let is_removed =
                        known.removed.contains_key(name) && !known.positions.contains_key(name);
                    let names = if is_removed { &mut past.removed } else { &mut past.present };
                    names.insert(name.clone());
                }
            }
        }
        Ok(past)
    }
}
