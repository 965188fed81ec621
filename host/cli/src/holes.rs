//! How holes are shown, and what fills them.

use std::path::PathBuf;

use super::Console;
use shardmill_config::{PipelineConfig, ReplaySupport};
use shardmill_core::record::SinkName;
use shardmill_state::{Holes, RecordedHole, StateStore};

/// Where the pipeline's state lies.
pub(crate) fn folder(config: &PipelineConfig) -> PathBuf {
    config.state_dir.join(config.name.as_str())
}

/// Where the state of the pipeline lies that copies dead letters.
pub(crate) fn folder_of_copies(config: &PipelineConfig) -> PathBuf {
    folder(config).join("letters").join(config.name.as_str())
}

/// The state that a sink's holes are kept in.
pub(crate) fn state_of(config: &PipelineConfig, sink: &SinkName) -> anyhow::Result<StateStore> {
    let copies = config.dead_letter_sinks.iter().any(|own| own.name.value == *sink);
    let folder = if copies { folder_of_copies(config) } else { folder(config) };
    anyhow::ensure!(
        folder.join("state.db").exists(),
        "pipeline {} has no holes: it never ran with its state in {}",
        config.name,
        folder.display()
    );
    Ok(StateStore::open(&folder)?)
}

/// The holes of a pipeline that has run; none where it has not.
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

/// The hole in words, with the command that fills it or why none does.
pub(crate) fn line(config: &PipelineConfig, hole: &RecordedHole) -> String {
    format!("{hole}; {}", filled_by(config, hole))
}

/// Prints holes, one a line.
pub(crate) fn say(config: &PipelineConfig, holes: &[RecordedHole], console: &Console) {
    for hole in holes {
        console.say(line(config, hole));
    }
}

fn filled_by(config: &PipelineConfig, hole: &RecordedHole) -> String {
    let file = config.file.path.display();
    let number = hole.number;
    let Some(name) = &hole.sink else {
        return "these records are gone from the stream: nothing fills it".into();
    };
    let sink = config.sinks.iter().find(|sink| sink.name.value == *name);
    match sink.map(|sink| sink.settings.replay()) {
        Some(ReplaySupport::Supported) => {
            format!(
                "`shardmill replay {file} --sink {name} --hole {number} --swap` fills it while the stream \
                 holds the records"
            )
        }
        Some(ReplaySupport::Needs(setting)) => format!(
            "`shardmill replay {file} --sink {name} --hole {number}` writes the records to a table beside \
             it once the sink has {setting}"
        ),
        Some(ReplaySupport::Unsupported) => format!(
            "`replay` fills PostgreSQL tables only: to fill it, run a pipeline of another name with this \
             sink alone that starts at this position, then say `shardmill replay {file} --sink {name} \
             --hole {number} --filled`"
        ),
        None => format!(
            "its sink is not in the configuration: put it back to fill the hole, or say `shardmill replay {file} \
             --sink {name} --hole {number} --filled` if nobody wants these rows any more"
        ),
    }
}
