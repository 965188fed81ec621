//! PostgreSQL and Redshift: pooled sessions, unusual rows, poolers, and what `check` must notice.

mod pooler;
mod redshift;
mod rights;
mod rows;
mod sessions;
mod silence;

use shardmill_config::WriteMode;
use shardmill_pg::{PoolShare, PostgresServer};
use shardmill_sink_postgres::{PostgresSink, PostgresTarget};

use crate::sink_postgres::{address, target, url};
use crate::sql_sinks::proxy::Proxy;

/// Returns the URL of the throw-away server through a proxy on this port.
fn url_through(port: u16) -> String {
    url().replace(&address(), &format!("127.0.0.1:{port}"))
}

/// Creates a role for the test that may log in but has no other right; returns the URL with it.
async fn role(client: &tokio_postgres::Client, name: &str) -> String {
    let create = format!(
        "DO $$ BEGIN IF EXISTS (SELECT FROM pg_roles WHERE rolname = '{name}') THEN \
             EXECUTE 'DROP OWNED BY {name}'; EXECUTE 'DROP ROLE {name}'; END IF; END $$; \
         CREATE ROLE {name} LOGIN"
    );
    client.batch_execute(&create).await.expect("a role");
    let mut as_role = url::Url::parse(&url()).expect("a URL");
    as_role.set_username(name).expect("a user");
    as_role.into()
}

/// Makes a sink with at most one connection, which counts as lost after this silence.
fn sink_at(url: &str, table: &str, mode: WriteMode, silence_ms: u64) -> PostgresSink {
    let target: PostgresTarget = target(url, table, false, mode, 1);
    let server = PostgresServer::parse(url).expect("a URL");
    let silence = std::time::Duration::from_millis(silence_ms);
    let share = PoolShare::alone(server, 1, silence);
    PostgresSink::with_share("mart".into(), &target, share).expect("a sink")
}

/// Starts a proxy in front of the throw-away server, with its runtime, for tests that are not async.
fn proxy() -> (Proxy, tokio::runtime::Runtime) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let proxy = runtime.block_on(Proxy::start(address()));
    (proxy, runtime)
}
