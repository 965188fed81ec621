//! `[[stage]]`: a plugin, its configuration, its limits, and the sinks of its routes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::bindings::Names;
use super::check::Check;
use super::grant_http::http_hosts;
use super::limits::CONFIGURE_MS_MAX;
use super::raw::{DurationText, Maybe, RawGrant, RawLimits, RawStage, Text};
use super::shape::shaped;
use super::{
    BoundSinks, CompileLimits, ConfigFile, Grants, HttpHostConfig, Located, StageConfig,
    StageLimits, StageText, json,
};
use crate::Capability;
use shardmill_core::record::{LookupName, RouteName, SinkName};

const BATCH_TIMES: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(600);
const RETRY_TIMES: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(3600);
/// Hardly a component starts with less than 1 MiB, and a 32-bit memory cannot have more than 4 GiB.
const MEMORY_BYTES: RangeInclusive<usize> = (1 << 20)..=(4 << 30);
const TABLE_ELEMENTS: RangeInclusive<u64> = 1..=10_000_000;
/// The result of a call is copied into the host's memory; no sensible batch has more than 1 GiB.
const OUTPUT_BYTES: RangeInclusive<usize> = (1 << 10)..=(1 << 30);
/// A batch has 1,024 records by default. With more outputs, their descriptors alone would fill the memory.
const OUTPUTS_PER_RECORD: RangeInclusive<u64> = 1..=1_000_000;
/// 0: the plugin's lines are dropped. More than 10,000 lines per second would hide all others.
const LOG_LINES: RangeInclusive<u64> = 0..=10_000;
const COMPILE_TIMES: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(600);
/// A compiler needs about 64 MiB to load any component.
const COMPILE_MEMORY_BYTES: RangeInclusive<usize> = (64 << 20)..=(64 << 30);
/// Components made from Python have 18 MiB.
const COMPONENT_BYTES: RangeInclusive<usize> = (1 << 10)..=(256 << 20);

/// Returns the configuration of each `[[stage]]` before any variable is replaced, in the order of the file.
pub(super) fn written(root: &DeTable<'_>, file: &Arc<ConfigFile>) -> Vec<Value> {
    let stages = root.get("stage").and_then(|stages| stages.get_ref().as_array());
    let config = |stage: &Spanned<DeValue>| -> Value {
        let config = stage.get_ref().as_table().and_then(|stage| stage.get("config"));
        let config = config.and_then(|config| config.get_ref().as_table());
        // Its problems are noted when it is read.
        config.map(|config| json::from_table(config, &mut Check::new(file))).unwrap_or_default()
    };
    stages.map(|stages| stages.iter().map(config).collect()).unwrap_or_default()
}

/// Reads one `[[stage]]`. `written` is its configuration as in the file.
pub(super) fn read(
    table: Spanned<DeValue<'_>>,
    written: &Value,
    base: &Path,
    names: &Names,
    check: &mut Check,
) -> Option<StageConfig> {
    let span = table.span();
    let config_json = config(table.get_ref(), check);
    let raw: RawStage = shaped(table, check)?;
    let name = check.name(&raw.name, "stage");
    let plugin = check.filled(&raw.plugin, "plugin file");
    let sha256 = sha256(&raw.sha256, check);
    let grants = grants(raw.grant.unwrap_or_default(), names, check);
    let raw_limits = raw.limits.unwrap_or_default();
    let limits = limits(&raw_limits, check);
    let compile_limits = compile_limits(&raw_limits, check);
    let routes = routes(raw.routes.unwrap_or_default(), names, check);
    let (grants, http_hosts) = grants?;
    Some(StageConfig {
        name: name?,
        plugin: Located { value: base.join(plugin?), span: raw.plugin.span() },
        sha256: sha256?,
        config_text: StageText::of_file(written, config_json.as_deref()?),
        config_json: config_json?,
        grants,
        http_hosts,
        limits: limits?,
        compile_limits: compile_limits?,
        routes: routes?,
        span,
    })
}

/// Returns `[stage.config]` as JSON text; an empty object if there is none.
fn config(stage: &DeValue, check: &mut Check) -> Option<String> {
    let Some(config) = stage.as_table().and_then(|stage| stage.get("config")) else {
        return Some("{}".to_owned());
    };
    let Some(table) = config.get_ref().as_table() else {
        let help = "write a table: [stage.config] below the stage, and the plugin's keys below it";
        check.problem(config.span(), "expected a table as the plugin's configuration", help);
        return None;
    };
    Some(json::from_table(table, check).to_string())
}

fn sha256(raw: &Maybe<Text>, check: &mut Check) -> Option<Option<Located<String>>> {
    let Some(raw) = raw else { return Some(None) };
    let digest = raw.get_ref().0.to_ascii_lowercase();
    let digits = digest.chars().filter(char::is_ascii_hexdigit).count();
    if digest.len() == 64 && digits == 64 {
        return Some(Some(Located { value: digest, span: raw.span() }));
    }
    let message = match digest.chars().find(|c| !c.is_ascii_hexdigit()) {
        Some(stranger) => {
            format!("invalid SHA-256 digest: expected hex digits, found {stranger:?}")
        }
        None => format!("invalid SHA-256 digest: expected 64 hex digits, found {digits}"),
    };
    let help = "copy it from `sha256sum FILE`, or remove the key: the file is then not checked";
    check.problem(raw.span(), message, help);
    None
}

fn grants(
    raw: RawGrant,
    names: &Names,
    check: &mut Check,
) -> Option<(Grants, Vec<HttpHostConfig>)> {
    let RawGrant { log, metrics, clock, random, lookup, http } = raw;
    let granted = [
        (log, Capability::Log),
        (metrics, Capability::Metrics),
        (clock, Capability::Clock),
        (random, Capability::Random),
        (!lookup.is_empty(), Capability::Lookup),
        (!http.is_empty(), Capability::Http),
    ];
    let granted = granted.into_iter().filter(|(granted, _)| *granted);
    let mut lookups = BTreeSet::new();
    let mut sound = true;
    for name in lookup {
        sound &= names.check_lookup(&name.get_ref().0, name.span(), check);
        lookups.insert(LookupName::new(name.into_inner().0));
    }
    let http = http_hosts(http, check)?;
    let capabilities = granted.map(|(_, capability)| capability).collect();
    sound.then_some((Grants { capabilities, lookups }, http))
}

fn limits(raw: &RawLimits, check: &mut Check) -> Option<StageLimits> {
    let default = StageLimits::default();
    let batch_time =
        check.duration(&raw.batch_time, Duration::from_millis(default.batch_ms_max), BATCH_TIMES);
    // A single record may not take longer than a whole batch.
    let record_most = batch_time.unwrap_or(*BATCH_TIMES.end());
    let record_default = Duration::from_millis(default.record_ms_max).min(record_most);
    let record_times = *BATCH_TIMES.start()..=record_most;
    let record_time = check.duration(&raw.record_time, record_default, record_times);
    let host_time = optional_ms(&raw.host_time, BATCH_TIMES, check);
    // The default is not stored, so that the id of a revision does not depend on whether it is written out.
    let configure_time = optional_ms(&raw.configure_time, BATCH_TIMES, check)
        .map(|time| time.filter(|ms| *ms != CONFIGURE_MS_MAX));
    let memory = check.size(&raw.memory, default.memory_bytes_max, MEMORY_BYTES);
    let tables = check.count(&raw.tables, default.table_elements_max, TABLE_ELEMENTS);
    let retry =
        check.duration(&raw.retry, Duration::from_millis(default.retry_ms_max), RETRY_TIMES);
    let output = check.size(&raw.output, default.output_bytes_max, OUTPUT_BYTES);
    let outputs = check.count(&raw.outputs, default.outputs_per_record_max, OUTPUTS_PER_RECORD);
    let log_lines = check.count(&raw.log_lines, default.log_lines_per_s_max, LOG_LINES);
    Some(StageLimits {
        batch_ms_max: batch_time?.as_millis().try_into().ok()?,
        record_ms_max: record_time?.as_millis().try_into().ok()?,
        host_ms_max: host_time?,
        configure_ms_max: configure_time?,
        memory_bytes_max: memory?,
        table_elements_max: tables?,
        output_bytes_max: output?,
        retry_ms_max: retry?.as_millis().try_into().ok()?,
        outputs_per_record_max: outputs?,
        log_lines_per_s_max: log_lines?,
    })
}

/// Reads an optional time in milliseconds.
fn optional_ms(
    raw: &Maybe<DurationText>,
    allowed: RangeInclusive<Duration>,
    check: &mut Check,
) -> Option<Option<u64>> {
    if raw.is_none() {
        return Some(None);
    }
    let time = check.duration(raw, Duration::ZERO, allowed)?;
    time.as_millis().try_into().ok().map(Some)
}

fn compile_limits(raw: &RawLimits, check: &mut Check) -> Option<CompileLimits> {
    let default = CompileLimits::default();
    let time = check.duration(&raw.compile_time, default.time_max, COMPILE_TIMES);
    let memory = check.size(&raw.compile_memory, default.memory_bytes_max, COMPILE_MEMORY_BYTES);
    let component = check.size(&raw.component, default.component_bytes_max, COMPONENT_BYTES);
    Some(CompileLimits {
        time_max: time?,
        memory_bytes_max: memory?,
        component_bytes_max: component?,
    })
}

fn routes(
    raw: BTreeMap<Spanned<String>, Vec<Spanned<Text>>>,
    names: &Names,
    check: &mut Check,
) -> Option<BTreeMap<RouteName, BoundSinks>> {
    let mut routes = BTreeMap::new();
    let mut sound = true;
    for (route, bound) in raw {
        let mut sinks: Vec<Located<SinkName>> = Vec::with_capacity(bound.len());
        for sink in bound {
            let name = sink.get_ref().0.as_str();
            if sinks.iter().any(|earlier| earlier.value.as_str() == name) {
                let message =
                    format!("route `{}` is bound to sink `{name}` twice", route.get_ref());
                check.problem(sink.span(), message, "delete one: a sink gets each row once");
                sound = false;
            }
            sound &= names.check_sink(name, sink.span(), check);
            sinks.push(Located { value: SinkName::from(name), span: sink.span() });
        }
        let key_span = route.span();
        routes.insert(RouteName::new(route.into_inner()), BoundSinks { key_span, sinks });
    }
    sound.then_some(routes)
}
