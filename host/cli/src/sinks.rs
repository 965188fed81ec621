//! From a configuration's sinks to sinks, and the settings that commands about one type need.

use std::sync::Arc;

use shardmill_config::{PipelineConfig, SharedParts, SinkConfig, SinkContext};
use shardmill_core::sink::Sink;
use shardmill_engine::masked::masked;
use shardmill_sink_objects::ObjectsTarget;
use shardmill_sink_postgres::PostgresTarget;

/// The sinks, in the configuration's order. Talks to none of them.
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
                // It may show values of variables.
                let error = format!("{:#}", anyhow::Error::from_boxed(error));
                Err(anyhow::Error::msg(config.values.hide(error)))
            }
        }
    });
    sinks.collect()
}

/// The table of a sink in PostgreSQL: `replay` is about these, and a redrive that finds one out.
pub(crate) fn postgres(sink: &SinkConfig) -> Option<&PostgresTarget> {
    sink.settings.of_type()
}

/// The place of a sink of objects: `objects` is about these.
pub(crate) fn objects(sink: &SinkConfig) -> Option<&ObjectsTarget> {
    sink.settings.of_type()
}
