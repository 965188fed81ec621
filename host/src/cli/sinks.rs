//! From a configuration's sinks to sinks: the one place where a type's name meets its code.

use std::sync::Arc;

use crate::config::{PipelineConfig, SinkKind};
use crate::sink::Sink;
use crate::sink::discard::DiscardSink;
use crate::sink::http::HttpSink;
use crate::sink::kinesis::KinesisSink;
use crate::sink::objects::ObjectsSink;
use crate::sink::postgres::PostgresSink;
use crate::sink::redshift::RedshiftSink;
use crate::sink::sqlite::SqliteSink;
use crate::sink::stdout::StdoutSink;

/// The sinks, in the configuration's order. Talks to none of them.
pub(crate) fn build(config: &PipelineConfig) -> anyhow::Result<Vec<Arc<dyn Sink>>> {
    let mut sinks: Vec<Arc<dyn Sink>> = Vec::new();
    for sink in &config.sinks {
        let name = sink.name.value.clone();
        sinks.push(match &sink.kind {
            SinkKind::Discard => Arc::new(DiscardSink::new(name)),
            SinkKind::Stdout { template } => {
                Arc::new(StdoutSink::to(name, template.as_deref(), super::output::for_rows())?)
            }
            SinkKind::Sqlite { path, table, create, mode } => {
                Arc::new(SqliteSink::new(name, path, table, *create, mode.clone())?)
            }
            SinkKind::Postgres(target) => Arc::new(PostgresSink::new(name, target)?),
            SinkKind::Objects { url, options, layout } => {
                Arc::new(ObjectsSink::new(name, url, options, layout.clone())?)
            }
            SinkKind::Redshift(target) => Arc::new(RedshiftSink::new(name, target)?),
            SinkKind::Kinesis(target) => {
                let sink = KinesisSink::new(name, target.clone(), config.state_dir.clone());
                Arc::new(sink.with_timing(config.timing))
            }
            SinkKind::Http(target) => Arc::new(HttpSink::new(name, target.clone())?),
        });
    }
    Ok(sinks)
}
