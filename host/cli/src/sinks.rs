//! From a configuration's sinks to sinks: the one place where a type's name meets its code.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Context as _;

use shardmill_config::{PipelineConfig, PostgresTarget, SinkConfig, SinkKind};
use shardmill_core::sink::Sink;
use shardmill_engine::masked::masked;
use shardmill_kinesis::sink::KinesisSink;
use shardmill_pg::{PoolSpec, PostgresServer, ServerPool};
use shardmill_sink_http::HttpSink;
use shardmill_sink_objects::ObjectsSink;
use shardmill_sink_postgres::PostgresSink;
use shardmill_sink_redshift::RedshiftSink;
use shardmill_sink_sqlite::SqliteSink;
use shardmill_sink_stdout::StdoutSink;
use shardmill_sinks_common::discard::DiscardSink;

/// The sinks, in the configuration's order. Talks to none of them.
pub(crate) fn build(config: &PipelineConfig) -> anyhow::Result<Vec<Arc<dyn Sink>>> {
    let pools = pools(config)?;
    let sinks = config.sinks.iter().map(|sink| match make(config, sink, &pools) {
        Ok(sink) => Ok(masked(sink, &config.values)),
        Err(error) => Err(anyhow::Error::msg(config.values.hide(format!("{error:#}")))),
    });
    sinks.collect()
}

/// One sink. Errors may show values of variables.
fn make(
    config: &PipelineConfig,
    sink: &SinkConfig,
    pools: &HashMap<&str, Arc<ServerPool>>,
) -> anyhow::Result<Arc<dyn Sink>> {
    let name = sink.name.value.clone();
    let made: Arc<dyn Sink> = match &sink.kind {
        SinkKind::Discard => Arc::new(DiscardSink::new(name)),
        SinkKind::Stdout { template } => {
            Arc::new(StdoutSink::to(name, template.as_deref(), super::output::for_rows())?)
        }
        SinkKind::Sqlite { path, table, create, mode } => {
            Arc::new(SqliteSink::new(name, path, table, *create, mode.clone())?)
        }
        SinkKind::Postgres(target) => {
            let pool = pools.get(target.url.as_str()).context("each server has a pool")?;
            Arc::new(PostgresSink::with_share(name, target, pool.share())?)
        }
        SinkKind::Objects { url, options, layout } => {
            Arc::new(ObjectsSink::new(name, url, options, layout.clone())?)
        }
        SinkKind::Redshift(target) => Arc::new(
            RedshiftSink::new(name, target)?.with_silence_max(config.timing.redshift_silence_max),
        ),
        SinkKind::Kinesis(target) => {
            let sink = KinesisSink::new(name, target.clone(), config.state_dir.to_path_buf());
            Arc::new(sink.with_timing(config.timing))
        }
        SinkKind::Http(target) => {
            Arc::new(HttpSink::new(name, target.clone(), config.values.clone())?)
        }
    };
    Ok(made)
}

/// A pool for each PostgreSQL server that sinks name, by its URL. It has as many connections as the sink
/// that asks for most.
fn pools(config: &PipelineConfig) -> anyhow::Result<HashMap<&str, Arc<ServerPool>>> {
    let mut targets: HashMap<&str, Vec<&PostgresTarget>> = HashMap::new();
    for sink in &config.sinks {
        if let SinkKind::Postgres(target) = &sink.kind {
            targets.entry(target.url.as_str()).or_default().push(target);
        }
    }
    let silence_max = config.timing.postgres_silence_max;
    let pool = |(url, targets): (_, Vec<&PostgresTarget>)| {
        let server = PostgresServer::parse(url).map_err(anyhow::Error::msg)?;
        let connections_max = targets.iter().map(|target| target.connections_max).max();
        let connections_max = connections_max.unwrap_or(1);
        let spec = PoolSpec { connections_max, sinks: targets.len(), silence_max };
        Ok((url, Arc::new(ServerPool::new(server, spec))))
    };
    targets.into_iter().map(pool).collect()
}
