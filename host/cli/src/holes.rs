//! Display of holes, with the command that fills each of them.

use std::path::PathBuf;

use super::Console;
use shardmill_config::{PipelineConfig, ReplaySupport};
use shardmill_core::record::SinkName;
use shardmill_state::{Holes, RecordedHole, StateStore};

/// Returns the state folder of the pipeline.
pub(crate) fn folder(config: &PipelineConfig) -> PathBuf {
    config.state_dir.join(config.name.as_str())
}

/// Returns the state folder of the pipeline that copies dead letters.
pub(crate) fn folder_of_copies(config: &PipelineConfig) -> PathBuf {
    folder(config).join("letters").join(config.name.as_str())
}

/// Opens the state in which a sink's holes are recorded.
pub(crate) fn state_of(config: &PipelineConfig, sink: &SinkName) -> anyhow::Result<StateStore> {
    let copies = config.dead_letter_sinks.iter().any(|own| own.name.value == *sink);
    let folder = if copies { folder_of_copies(config) } else { folder(config) };
    anyhow::ensure!(
        folder.join("state.db").exists(),
        "pipeline {} has no holes: no state found in {}; it has never run with this state_dir",
        config.name,
        folder.display()
    );
    Ok(StateStore::open(&folder)?)
}

/// Returns the holes of a pipeline; none if it has never run.
pub(crate) async fn of(
    config: &PipelineConfig,
    sink: Option<&SinkName>,
) -> anyhow::Result<Vec<RecordedHole>> {
    let mut holes = Vec::new();
    for folder in [folder(config), folder_of_copies(config)] {
        if let Some(state) = StateStore::open_if_current(&folder)? {
            holes.extend(Holes::new(state).list(sink.cloned()).await?);
        }
    }
    Ok(holes)
}

/// Formats a hole as a line, with the command that fills it or the reason why none does.
pub(crate) fn line(config: &PipelineConfig, hole: &RecordedHole) -> String {
    format!("{hole}; {}", filled_by(config, hole))
}

/// Prints holes, one per line.
pub(crate) fn say(config: &PipelineConfig, holes: &[RecordedHole], console: &Console) {
    for hole in holes {
        console.say(line(config, hole));
    }
}

fn filled_by(config: &PipelineConfig, hole: &RecordedHole) -> String {
    let file = config.file.path.display();
    let number = hole.number;
    let Some(name) = &hole.sink else {
        return "these records are gone from the stream: the hole cannot be filled".into();
    };
    let sink = config.sinks.iter().find(|sink| sink.name.value == *name);
    match sink.map(|sink| sink.settings.replay()) {
        Some(ReplaySupport::Supported) => {
            format!(
                "`shardmill replay {file} --sink {name} --hole {number} --swap` fills it as long as the stream \
                 has the records"
            )
        }
        Some(ReplaySupport::Needs(setting)) => format!(
            "`shardmill replay {file} --sink {name} --hole {number}` writes the records to a new table beside \
             the live one after the sink has {setting}"
        ),
        Some(ReplaySupport::Unsupported) => format!(
            "`replay` supports PostgreSQL tables only: to fill the hole, run a pipeline with another name and only \
             this sink that starts at this position, then run `shardmill replay {file} --sink {name} \
             --hole {number} --filled`"
        ),
        None => format!(
            "the sink is not in the configuration: put it back to fill the hole, or run `shardmill replay {file} \
             --sink {name} --hole {number} --filled` if the rows are not needed any more"
        ),
    }
}
