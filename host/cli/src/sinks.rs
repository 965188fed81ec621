//! Construction of sinks from their configuration, and access to the settings of the types that some commands
//! need.

use std::sync::Arc;

use shardmill_config::{PipelineConfig, SharedParts, SinkConfig, SinkContext};
use shardmill_core::sink::Sink;
use shardmill_engine::masked::masked;
use shardmill_sink_objects::ObjectsTarget;
use shardmill_sink_postgres::PostgresTarget;

/// Makes the sinks in the order of the configuration. Connects to none of them.
pub(crate) fn build(config: &PipelineConfig) -> anyhow::Result<Vec<Arc<dyn Sink>>> {
    let mut shared = SharedParts::default();
    let sinks = config.sinks.iter().map(|sink| {
        let context = SinkContext {
            name: &sink.name.value,
            pipeline: config,
            output: super::output::for_rows(),
        };
        match sink.settings.build(&context, &mut shared) {
            Ok(sink) => Ok(masked(sink, &config.values)),
            Err(error) => {
                // The error may contain values of variables.
                let error = format!("{:#}", anyhow::Error::from_boxed(error));
                Err(anyhow::Error::msg(config.values.hide(error)))
            }
        }
    });
    sinks.collect()
}

/// Returns the table of a PostgreSQL sink, for `replay` and for redrives that resolve a replay.
pub(crate) fn postgres(sink: &SinkConfig) -> Option<&PostgresTarget> {
    sink.settings.of_type()
}

/// Returns the target of an objects sink, for the `objects` commands.
pub(crate) fn objects(sink: &SinkConfig) -> Option<&ObjectsTarget> {
    sink.settings.of_type()
}
