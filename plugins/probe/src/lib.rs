//! A plugin that uses the capabilities `log`, `metrics`, `clock` and `random`, for the host's tests of
//! capabilities.
//!
//! Records pass unchanged to the route `out`, except those whose payload is a command, such as `log-flood`. The
//! plugin uses neither lookups nor requests: a component imports everything that it might use, and a stage must
//! grant all of it.

use shardmill_sdk::log::{self, Level};
use shardmill_sdk::metrics::{Counter, Gauge, Histogram};
use shardmill_sdk::{
    Context, Descriptor, Emitter, Error, NoConfig, Plugin, Record, Route, clock, random,
};

/// Number of lines of `log-flood`.
const FLOOD_LINES: u32 = 1_000_000;
/// Bytes of the single line of `log-huge`.
const HUGE_LINE_BYTES: usize = 100 << 20;
/// Number of metrics that the plugin registers in `configure`: more than a plugin may have.
const METRICS: u32 = 100;

/// The plugin.
pub struct Probe {
    seen: Counter,
    longest: Gauge,
    sizes: Histogram,
    longest_bytes: f64,
    /// Answers of the host to metrics that it should refuse.
    refusals: Vec<String>,
}

impl Plugin for Probe {
    type Config = NoConfig;

    fn configure(_: NoConfig, _: &Context) -> Result<(Self, Descriptor), Error> {
        let probe = Self {
            seen: Counter::register("probe_seen", "records that probe has seen")?,
            longest: Gauge::register("probe_longest", "bytes of the longest record")?,
            sizes: Histogram::register("probe_sizes", "bytes of records")?,
            longest_bytes: 0.0,
            refusals: refusals(),
        };
        log::write(Level::Info, "probe is configured");
        let descriptor = Descriptor::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        Ok((probe, descriptor.route(Route::new("out", "text/plain"))))
    }

    fn record(&mut self, record: &Record<'_>, out: &mut Emitter<'_>) -> Result<(), Error> {
        let bytes = record.payload().len() as f64;
        self.seen.add(1.0);
        self.sizes.observe(bytes);
        self.longest_bytes = self.longest_bytes.max(bytes);
        self.longest.set(self.longest_bytes);
        match record.payload() {
            b"log-levels" => {
                for level in [Level::Error, Level::Warn, Level::Info, Level::Debug, Level::Trace] {
                    log::write(level, &format!("probe says {level:?}"));
                }
                log::write(Level::Warn, "probe\nhas two lines\u{1b}[2J");
            }
            b"log-flood" => {
                for line in 0..FLOOD_LINES {
                    log::write(Level::Warn, &format!("probe floods {line}"));
                }
            }
            b"log-huge" => log::write(Level::Warn, &"x".repeat(HUGE_LINE_BYTES)),
            b"log-no-utf8" => log::write(Level::Warn, &no_utf8()),
            b"metric-late" => {
                let late = Counter::register("probe_late", "announced in process").err();
                out.emit_json(0, &late.map(|error| format!("{error:?}")))?;
                return Ok(());
            }
            b"metric-unknown" => unknown_metric(),
            b"metric-odd-values" => {
                for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0] {
                    self.seen.add(odd);
                }
            }
            b"metric-refusals" => {
                out.emit_json(0, &self.refusals)?;
                return Ok(());
            }
            b"clock" => {
                out.emit_json(0, &[clock::now_ms(), record.arrived_ms()])?;
                return Ok(());
            }
            b"random" => {
                let given = [random::next_u64(), random::next_u64(), record.rng().u64(..)];
                out.emit_json(0, &given)?;
                return Ok(());
            }
            _ => {}
        }
        out.pass(0);
        Ok(())
    }
}

shardmill_sdk::export!(Probe);

/// Registers metrics that no plugin may have, and returns the host's answers.
fn refusals() -> Vec<String> {
    let wrong = ["", "Upper", "1st", "with-dash", "with space", &"x".repeat(65)];
    let many: Vec<String> = (0..METRICS).map(|number| format!("probe_{number}")).collect();
    let asked = wrong.iter().copied().chain(many.iter().map(String::as_str));
    let refused = asked.filter_map(|name| Counter::register(name, "").err());
    let kind = Gauge::register("probe_seen", "a counter already").err();
    refused.chain(kind).map(|error| format!("{error:?}")).collect()
}

/// Sets a metric by a number that the host never returned.
fn unknown_metric() {
    #[cfg(target_arch = "wasm32")]
    shardmill_sdk::bindings::shardmill::plugin::metrics::observe(4_000_000_000, 1.0);
}

/// Returns a string with bytes that are not UTF-8.
fn no_utf8() -> String {
    // SAFETY: unsound on purpose. Nothing here reads the string: it goes to the host, whose check is tested.
    unsafe { String::from_utf8_unchecked(b"\xff\xfe".to_vec()) }
}
