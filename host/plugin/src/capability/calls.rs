//! Answers the calls of one plugin instance to the host.
//!
//! Texts that are shown later (log lines, help texts, errors of servers) pass `Values::hide`, so that a secret of the
//! configuration does not reach a log or an error. An argument of the wrong shape (a key that lies outside of its
//! arena) is a trap; too many or too large arguments are an error that the plugin can handle.

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

/// The identity and limits of one instance that calls the host.
pub(crate) struct HostCaller {
    services: Arc<Services>,
    author: Author,
    /// Whether `configure` is running: metrics can be announced only then, and servers cannot be asked then.
    configuring: bool,
    /// The clock of the running call.
    pub(crate) clock: CallClock,
    metrics: Metrics,
    log_lines_per_s_max: u32,
    /// Maximum size of an answer of a lookup, in bytes.
    answer_bytes_max: usize,
}

impl HostCaller {
    /// Creates the caller for an instance that is about to be configured.
    pub fn new(services: Arc<Services>, shard: &str, limits: &StageLimits) -> Self {
        let stage = services.stage.clone();
        Self {
            services,
            author: Author { stage, version: String::new(), shard: shard.to_owned() },
            configuring: true,
            clock: CallClock::new(),
            metrics: Metrics::default(),
            log_lines_per_s_max: limits.log_lines_per_s_max,
            // An answer that does not fit into the plugin's memory is of no use.
            answer_bytes_max: limits.answer_bytes_max(),
        }
    }

    /// Notes that `configure` is over, and the plugin's version.
    pub fn configured(&mut self, version: &str) {
        self.configuring = false;
        self.author.version = version.to_owned();
    }

    /// Checks a grant again. A component that imports what is not granted was already refused when it was loaded.
    pub(super) fn granted(&self, capability: Capability) -> wasmtime::Result<()> {
        match self.services.granted.contains(&capability) {
            true => Ok(()),
            false => Err(wasmtime::format_err!("capability `{capability}` is not granted")),
        }
    }

    /// Returns why a capability is not available now; `None` if it is. `configure` runs at each check, swap, trial
    /// and renewal, once per shard. Servers that it asked would be asked as often, and one that is down would keep
    /// a pipeline from starting before it is needed.
    pub(super) fn unavailable(&self, capability: Capability) -> Option<String> {
        let is_refused = self.configuring && !capability.is_for_configure();
        is_refused.then(|| {
            format!(
                "{capability} is not available in configure: ask in process, and keep the answer there"
            )
        })
    }

    /// Whether a log line may be written now; if not, it is counted.
    pub(super) fn takes_line(&self) -> bool {
        self.services.used.lines.take(&self.author, self.log_lines_per_s_max)
    }

    /// Writes a log line.
    pub(super) fn write(&self, level: wit::log::Level, message: &str) {
        let line = log::line(message, |copied| self.services.values.hide(copied));
        log::emit(&self.author, level, &line);
    }

    /// Announces a metric, or returns the number of one that is announced already.
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

    /// Looks up rows until `deadline`. `arena` and `keys` lie in the plugin's memory.
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
        // Checked before the answer is used: a wait that the stop ended looks like a failed lookup.
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

    /// Sends a request and waits for the response.
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

/// Ends the plugin's call if the process is stopping. The plugin would otherwise answer without what it asked for,
/// or ask again. The lane has stopped already, so no record is blamed.
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
