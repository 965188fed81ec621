//! The host's answers to a plugin's calls, for one instance.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::Services;
use super::log::{self, Author};
use super::lookup::words;
use super::metric::Metrics;
use crate::bindings::shardmill::plugin as wit;
use crate::clock::CallClock;
use shardmill_config::Capability;
use shardmill_config::StageLimits;
use shardmill_core::off_thread;
use shardmill_net::HttpRequest;

/// One instance, as far as it may ask the host for anything.
pub(crate) struct HostCaller {
    services: Arc<Services>,
    author: Author,
    /// Whether `configure` is under way: only then metrics are announced, and no server is asked.
    configuring: bool,
    /// The time of the call under way.
    pub(crate) clock: CallClock,
    metrics: Metrics,
    log_lines_per_s_max: u32,
    /// What one answer of a lookup may hold, in bytes.
    answer_bytes_max: usize,
}

impl HostCaller {
    /// An instance that is about to be configured.
    pub fn new(services: Arc<Services>, shard: &str, limits: &StageLimits) -> Self {
        let stage = services.stage.clone();
        Self {
            services,
            author: Author { stage, version: String::new(), shard: shard.to_owned() },
            configuring: true,
            clock: CallClock::new(),
            metrics: Metrics::default(),
            log_lines_per_s_max: limits.log_lines_per_s_max,
            // A plugin cannot take an answer that does not fit into its memory.
            answer_bytes_max: limits.answer_bytes_max(),
        }
    }

    /// `configure` is over; the plugin has said its version.
    pub fn configured(&mut self, version: &str) {
        self.configuring = false;
        self.author.version = version.to_owned();
    }

    /// A component that imports what is not granted is refused at load. This is the second lock.
    pub(super) fn granted(&self, capability: Capability) -> wasmtime::Result<()> {
        match self.services.granted.contains(&capability) {
            true => Ok(()),
            false => Err(wasmtime::format_err!("capability `{capability}` is not granted")),
        }
    }

    /// Why a capability is not answered now, if it is not. `configure` runs at each check, swap, trial and
    /// renewal, once per shard: a server that it asks would be asked as often, and one that is down would
    /// keep a pipeline from starting that it is not needed for yet.
    pub(super) fn unavailable(&self, capability: Capability) -> Option<String> {
        let is_refused = self.configuring && !capability.is_for_configure();
        is_refused.then(|| {
            format!(
                "{capability} is not available in configure: ask in process, and keep the answer there"
            )
        })
    }

    /// Whether a line of the log may be written now; if not, it is counted.
    pub(super) fn takes_line(&self) -> bool {
        self.services.used.lines.take(&self.author, self.log_lines_per_s_max)
    }

    /// Writes a line.
    pub(super) fn write(&self, level: wit::log::Level, message: &str) {
        let line = log::line(message, |copied| self.services.values.hide(copied));
        log::emit(&self.author, level, &line);
    }

    /// Announces a metric.
    pub(super) fn register(
        &mut self,
        kind: wit::metrics::Kind,
        name: &str,
        help: &str,
    ) -> Result<u32, String> {
        if !self.configuring {
            let name: String = name.chars().take(64).collect();
            return Err(format!("metric {name:?} is announced outside of configure"));
        }
        let Services { stage, used, values, .. } = &*self.services;
        let help = values.hide(help.to_owned());
        self.metrics.register(&used.metrics, stage, kind, name, &help)
    }

    /// Gives a metric a value.
    pub(super) fn observe(&mut self, metric: u32, value: f64) -> wasmtime::Result<()> {
        self.metrics
            .observe(metric, value)
            .ok_or_else(|| wasmtime::format_err!("metric {metric} was not registered"))
    }

    /// Looks up rows until `deadline`; `arena` and `keys` lie in the plugin's memory.
    pub(super) fn look_up(
        &self,
        name: &str,
        (arena, keys): (&[u8], &[u32]),
        deadline: Instant,
    ) -> wasmtime::Result<Result<wit::lookup::Found, wit::lookup::Failure>> {
        let failed = |retryable, message| Ok(Err(wit::lookup::Failure { retryable, message }));
        if let Some(why) = self.unavailable(Capability::Lookup) {
            return failed(false, why);
        }
        let Some(lookup) = self.services.lookups.get(name) else {
            let name: String = name.chars().take(64).collect();
            return failed(false, format!("lookup {name:?} is not granted to this stage"));
        };
        let keys = match words::keys(arena, keys) {
            Ok(keys) => keys,
            Err(error) if error.is_excess() => {
                return failed(false, format!("lookup {name}: {error}"));
            }
            Err(error) => return Err(wasmtime::format_err!("lookup.get: {error}")),
        };
        let rows = lookup.get_within(&keys, deadline, self.answer_bytes_max);
        going_on()?;
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => {
                return failed(error.retryable, self.services.values.hide(error.message));
            }
        };
        match words::found(&rows, self.answer_bytes_max) {
            Ok((arena, rows)) => Ok(Ok(wit::lookup::Found { arena, rows })),
            Err(error) => failed(false, format!("lookup {name}: {error}")),
        }
    }

    /// Sends a request and waits for the answer.
    pub(super) fn send(
        &mut self,
        request: HttpRequest,
    ) -> wasmtime::Result<Result<wit::http::Response, wit::http::Failure>> {
        let failed = |retryable, message| Ok(Err(wit::http::Failure { retryable, message }));
        let Some(grant) = &self.services.http else {
            return failed(false, "no host is granted to this stage".to_owned());
        };
        let call = self.clock.host_begins("http.send");
        let sent = grant.send(request, call.deadline);
        self.clock.host_ended(call);
        going_on()?;
        match sent {
            Ok(response) => Ok(Ok(wit::http::Response {
                status: response.status,
                headers: response.headers,
                body: response.body,
            })),
            Err(failure) => failed(failure.retryable, self.services.values.hide(failure.message)),
        }
    }
}

/// Ends the plugin's call where the process ends: it would answer for its records without what it asked for, or
/// ask again. The lane has stopped, so no record is to blame.
fn going_on() -> wasmtime::Result<()> {
    match off_thread::waits_ended() {
        true => Err(wasmtime::format_err!("the pipeline stops")),
        false => Ok(()),
    }
}

impl wit::clock::Host for HostCaller {
    fn now_ms(&mut self) -> wasmtime::Result<u64> {
        self.granted(Capability::Clock)?;
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Ok(since_1970.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl wit::random::Host for HostCaller {
    fn next_u64(&mut self) -> wasmtime::Result<u64> {
        self.granted(Capability::Random)?;
        getrandom::u64().map_err(|error| wasmtime::format_err!("no random numbers: {error}"))
    }
}
