//! How holes are shown, and what fills them.

use super::Console;
use crate::config::{PipelineConfig, SinkKind};
use crate::position::{Holes, RecordedHole, StateStore};
use crate::record::SinkName;

/// The holes of a pipeline that has run; none where it has not.
pub(crate) async fn of(
    config: &PipelineConfig,
    sink: Option<&SinkName>,
) -> anyhow::Result<Vec<RecordedHole>> {
    let own = config.state_dir.join(config.name.as_str());
    let mut holes = Vec::new();
    // Copies of dead letters have a state of their own.
    for folder in [own.join("letters"), own] {
        if let Some(state) = StateStore::open_as_it_is(&folder)? {
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
    match sink.map(|sink| &sink.kind) {
        Some(SinkKind::Postgres(target)) if target.lineage => {
            format!(
                "`shardmill replay {file} --sink {name} --hole {number} --swap` fills it while the stream \
                 holds the records"
            )
        }
        Some(SinkKind::Postgres(_)) => format!(
            "`shardmill replay {file} --sink {name} --hole {number}` writes the records to a table beside \
             it once the sink has lineage = true"
        ),
        Some(_) => format!(
            "`replay` fills PostgreSQL tables only: to fill it, run a pipeline of another name with this \
             sink alone that starts at this position, then say `shardmill replay {file} --sink {name} \
             --hole {number} --filled`"
        ),
        None => "its sink is not in the configuration".into(),
    }
}
