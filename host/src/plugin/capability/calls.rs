//! The host's answers to a plugin's calls, for one instance.

use std::sync::Arc;
use std::time::SystemTime;

use super::log::{Author, LineBudget};
use super::lookup::words;
use super::metric::Metrics;
use super::{Capability, Services};
use crate::config::StageLimits;
use crate::http::Request;
use crate::plugin::bindings::shardmill::plugin as wit;
use crate::plugin::clock::CallClock;

/// One instance, as far as it may ask the host for anything.
pub(in crate::plugin) struct Caller {
    services: Arc<Services>,
    author: Author,
    /// Whether `configure` is under way: only then metrics are announced.
    configuring: bool,
    /// The time of the call under way.
    pub(in crate::plugin) clock: CallClock,
    lines: LineBudget,
    metrics: Metrics,
    /// What one answer of a lookup may hold, in bytes.
    answer_bytes_max: usize,
}

impl Caller {
    /// An instance that is about to be configured.
    pub fn new(services: Arc<Services>, shard: &str, limits: &StageLimits) -> Self {
        let stage = services.stage.clone();
        Self {
            services,
            author: Author { stage, version: String::new(), shard: shard.to_owned() },
            configuring: true,
            clock: CallClock::new(),
            lines: LineBudget::new(limits.log_lines_per_s_max),
            metrics: Metrics::default(),
            answer_bytes_max: limits.output_bytes_max,
        }
    }

    /// `configure` is over; the plugin has said its version.
    pub fn configured(&mut self, version: &str) {
        self.configuring = false;
        self.author.version = version.to_owned();
    }

    /// A component that imports what is not granted is refused at load. This is the second lock.
    fn granted(&self, capability: Capability) -> wasmtime::Result<()> {
        match self.services.granted.contains(&capability) {
            true => Ok(()),
            false => Err(wasmtime::format_err!("capability `{capability}` is not granted")),
        }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.lines.tell_dropped(&self.author);
    }
}

impl wit::log::Host for Caller {
    fn write(&mut self, level: wit::log::Level, message: String) -> wasmtime::Result<()> {
        self.granted(Capability::Log)?;
        self.lines.write(&self.author, level, &message);
        Ok(())
    }
}

impl wit::metrics::Host for Caller {
    fn register(
        &mut self,
        kind: wit::metrics::Kind,
        name: String,
        help: String,
    ) -> wasmtime::Result<Result<u32, String>> {
        self.granted(Capability::Metrics)?;
        if !self.configuring {
            return Ok(Err(format!("metric {name} is announced outside of configure")));
        }
        Ok(self.metrics.register(&self.services.stage, kind, &name, &help))
    }

    fn observe(&mut self, metric: u32, value: f64) -> wasmtime::Result<()> {
        self.granted(Capability::Metrics)?;
        self.metrics
            .observe(metric, value)
            .ok_or_else(|| wasmtime::format_err!("metric {metric} was not registered"))
    }
}

impl wit::clock::Host for Caller {
    fn now_ms(&mut self) -> wasmtime::Result<u64> {
        self.granted(Capability::Clock)?;
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Ok(since_1970.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl wit::random::Host for Caller {
    fn next_u64(&mut self) -> wasmtime::Result<u64> {
        self.granted(Capability::Random)?;
        getrandom::u64().map_err(|error| wasmtime::format_err!("no random numbers: {error}"))
    }
}

impl wit::lookup::Host for Caller {
    fn get(
        &mut self,
        name: String,
        arena: Vec<u8>,
        keys: Vec<u32>,
    ) -> wasmtime::Result<Result<wit::lookup::Found, wit::lookup::Failure>> {
        self.granted(Capability::Lookup)?;
        let keys = words::keys(&arena, &keys)
            .map_err(|error| wasmtime::format_err!("lookup.get: {error}"))?;
        let failed = |retryable, message| Ok(Err(wit::lookup::Failure { retryable, message }));
        let Some(lookup) = self.services.lookups.get(&*name) else {
            return failed(false, format!("lookup {name:?} is not granted to this stage"));
        };
        let call = self.clock.host_begins("lookup.get");
        let rows = lookup.get(&keys, call.deadline);
        self.clock.host_ended(call);
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => return failed(error.retryable, error.message),
        };
        match words::found(&rows, self.answer_bytes_max) {
            Ok((arena, rows)) => Ok(Ok(wit::lookup::Found { arena, rows })),
            Err(error) => failed(false, format!("lookup {name}: {error}")),
        }
    }
}

impl wit::http::Host for Caller {
    fn send(
        &mut self,
        request: wit::http::Request,
    ) -> wasmtime::Result<Result<wit::http::Response, wit::http::Failure>> {
        self.granted(Capability::Http)?;
        let wit::http::Request { method, url, headers, body } = request;
        let failed = |retryable, message| Ok(Err(wit::http::Failure { retryable, message }));
        let Some(grant) = &self.services.http else {
            return failed(false, "no host is granted to this stage".to_owned());
        };
        let call = self.clock.host_begins("http.send");
        let sent = grant.send(Request { method, url, headers, body }, call.deadline);
        self.clock.host_ended(call);
        match sent {
            Ok(response) => Ok(Ok(wit::http::Response {
                status: response.status,
                headers: response.headers,
                body: response.body,
            })),
            Err(failure) => failed(failure.retryable, failure.message),
        }
    }
}
