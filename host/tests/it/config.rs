//! Configurations: the one at the root of the repository loads, and each invalid one in `config_errors/` is refused
//! with exactly the text in the file beside it.
//!
//! `SHARDMILL_UPDATE_GOLDEN=1 cargo test -p shardmill --test it config::` writes the expected texts; read the
//! difference before you commit it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shardmill_cli::registry::SINK_TYPES;
use shardmill_config::{
    BatchLimits, ConfigError, Endpoint, KinesisConfig, OnPositionMismatch, PipelineConfig,
    SinkSettings, StageLimits,
};
use shardmill_core::source::StartPosition;
use shardmill_sink_objects::{Compression, ObjectsTarget};
use shardmill_sink_postgres::PostgresTarget;
use shardmill_sink_sqlite::SqliteTarget;

use crate::support::root;

/// Environment variables of every test in this file.
fn lookup(name: &str) -> Option<String> {
    match name {
        "SET" => Some("value".into()),
        "SECRET" => Some("hunter2".into()),
        _ => None,
    }
}

fn parse(text: &str) -> Result<PipelineConfig, ConfigError> {
    shardmill_config::parse("conf/pipeline.toml", text, &SINK_TYPES, &lookup)
}

#[test]
fn each_bad_configuration_is_refused_as_its_golden_file_says() {
    let folder = root().join("host/tests/config_errors");
    let update = std::env::var_os("SHARDMILL_UPDATE_GOLDEN").is_some();
    let mut cases: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the folder of cases")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    cases.sort();
    assert!(!cases.is_empty(), "no cases in {}", folder.display());
    let mut failures = String::new();
    for case in cases {
        let text = std::fs::read_to_string(&case).expect("a case");
        let error = shardmill_config::parse("pipeline.toml", text, &SINK_TYPES, &lookup)
            .expect_err("a bad configuration");
        let found = error.render(false);
        let plain = !found.contains(['\x1b', '│', '×']);
        assert!(plain && !found.contains("hunter2"), "{}:\n{found}", case.display());
        for problem in error.problems() {
            assert!(problem.help().is_some_and(|help| !help.is_empty()), "no help: {problem}");
        }
        let golden = case.with_extension("err");
        if update {
            std::fs::write(&golden, &found).expect("a writable golden file");
        } else if std::fs::read_to_string(&golden).unwrap_or_default() != found {
            failures.push_str(&format!("{} is not what was found:\n{found}\n", golden.display()));
        }
    }
    assert!(failures.is_empty(), "{failures}");
}

#[test]
fn the_pipeline_at_the_root_loads() {
    let root = root();
    let config = shardmill_config::load(&root.join("pipeline.toml"), &SINK_TYPES, &|_| None);
    let config = config.unwrap_or_else(|error| panic!("{}", error.render(false)));
    assert_eq!(config.name.as_str(), "cars");
    assert_eq!(config.state_dir, root.join("state"));
    assert_eq!(kinesis(&config).server.endpoint, Endpoint::Embedded);
    assert_eq!(kinesis(&config).create.map(|create| create.shards), Some(5));
    let stages: Vec<&str> = config.stages.iter().map(|stage| stage.name.value.as_str()).collect();
    assert_eq!(stages, ["decode", "transform", "route"]);
    assert_eq!(config.stages[0].plugin.value, root.join("plugins/prebuilt/car-decode.wasm"));
    for (route, bound) in &config.stages[2].routes {
        let sinks: Vec<&str> = bound.sinks.iter().map(|sink| sink.value.as_str()).collect();
        assert_eq!(sinks, ["mart", "logs", "console"], "{route}");
    }
    let SqliteTarget { path, table, create, .. } = settings(&config, 0);
    assert_eq!((path, table.as_str(), create), (&root.join("data/cars.db"), "cars", &true));
    let ObjectsTarget { url, layout, .. } = settings(&config, 1);
    assert!(url.as_str().starts_with("file:///") && url.as_str().ends_with("/data/logs/"), "{url}");
    assert_eq!(*layout, Compression::Gzip.into());
}

/// Checks the defaults that comments of the root's `pipeline.toml` name, by parsing the commented-out lines.
#[test]
fn what_the_root_shows_as_default_is_the_default() {
    let text = std::fs::read_to_string(root().join("pipeline.toml")).expect("the root pipeline");
    let plain = parse(&text).expect("a valid configuration");
    // Uncomments every key and table that is not an example.
    let (cars, _) = text.split_once("# A PostgreSQL table").expect("the example of a table");
    let (_, admin) = text.split_once("# Health and metrics").expect("the admin table");
    let switched: Vec<&str> = cars
        .lines()
        .chain(admin.lines().skip(1))
        .map(|line| match line.strip_prefix("# ") {
            Some(key) if !key.contains("# example") && is_toml(key) => key,
            _ => line,
        })
        .collect();
    let full = parse(&switched.join("\n"));
    let full = full.unwrap_or_else(|error| panic!("{}", error.render(false)));
    assert!(switched.len() > 100 && switched.contains(&"[stage.limits]"));
    assert_eq!(full.buffer_bytes_max, plain.buffer_bytes_max);
    assert_eq!(full.rejected_max, plain.rejected_max);
    assert_eq!(full.on_position_mismatch, plain.on_position_mismatch);
    assert_eq!(kinesis(&full).start, kinesis(&plain).start);
    assert_eq!(kinesis(&full).on_lost_records, kinesis(&plain).on_lost_records);
    assert_eq!(kinesis(&full).reader, kinesis(&plain).reader);
    for key in ["start", "on_lost_records", "reader"] {
        assert!(switched.iter().any(|line| line.starts_with(&format!("{key} = "))), "{key}");
    }
    assert_eq!(full.source.batch, plain.source.batch);
    assert_eq!(kinesis(&full).poll_interval, kinesis(&plain).poll_interval);
    assert_eq!(kinesis(&full).records_per_call_max, kinesis(&plain).records_per_call_max);
    assert_eq!(full.stages[0].limits, plain.stages[0].limits);
    for (full, plain) in full.sinks.iter().zip(&plain.sinks) {
        assert_eq!(full.commit_policy, plain.commit_policy);
    }
    let [shown] = &full.lookups[..] else { panic!("one lookup is shown") };
    let bare = "[[lookup]]\nname = \"l\"\nurl = \"sqlite:l\"\nquery = \"q\"\n";
    let bare = parse(&format!("{text}\n{bare}"));
    let bare = &bare.unwrap_or_else(|error| panic!("{}", error.render(false))).lookups[0];
    assert_eq!((shown.timeout, shown.cache), (bare.timeout, bare.cache));
    let listens = |config: &PipelineConfig| config.admin.as_ref().map(|admin| admin.listen);
    assert_eq!((listens(&plain), listens(&full)), (None, "127.0.0.1:9901".parse().ok()));
    assert_eq!(full.reload, plain.reload);
    assert_eq!(full.timing, plain.timing);
    // An intake with all keys written out equals an intake with the address alone.
    let alone = parse(&format!("{text}\n[intake]\nlisten = \"127.0.0.1:8080\"\n"));
    let alone = alone.unwrap_or_else(|error| panic!("{}", error.render(false)));
    assert_eq!((plain.intake.is_none(), &full.intake), (true, &alone.intake));
    let alone = parse(&format!("{text}\n[admin]\n"));
    let alone = alone.unwrap_or_else(|error| panic!("{}", error.render(false)));
    assert!(full.admin == alone.admin, "[admin]: expected the defaults");
}

/// The book's page of the configuration has a row for every key, which begins with the key in backquotes.
#[test]
fn every_key_is_on_the_page_of_configuration() {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).expect("a file");
    let page = read("docs/src/configuration.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
    let shown: BTreeSet<&str> = rows.map(|(key, _)| key).collect();
    let raw = read("host/config/src/raw.rs");
    let fields = raw.lines().filter_map(|line| line.strip_prefix("    pub")?.split_once(':'));
    let fields = fields.filter_map(|(field, _)| field.split_whitespace().last());
    let of_sinks = SINK_TYPES.iter().flat_map(|own| own.keys()).map(|key| key.name);
    let keys: Vec<&str> = fields.filter(|key| !key.starts_with('_')).chain(of_sinks).collect();
    assert!(keys.len() > 100, "{} keys", keys.len());
    let missing: Vec<&&str> = keys.iter().filter(|key| !shown.contains(**key)).collect();
    assert!(missing.is_empty(), "expected all keys in configuration.md, missing: {missing:?}");
}

fn kinesis(config: &PipelineConfig) -> &KinesisConfig {
    config.source.kinesis().unwrap_or_else(|| panic!("{:?} is not a stream", config.source))
}

/// Returns the settings of a sink, which must be of this type.
fn settings<T: SinkSettings>(config: &PipelineConfig, sink: usize) -> &T {
    let sink = &config.sinks[sink];
    sink.settings.of_type().unwrap_or_else(|| panic!("{sink:?}"))
}

fn is_toml(line: &str) -> bool {
    let key = line.split(" = ").next().unwrap_or_default();
    line.starts_with('[') || (line.contains(" = ") && !key.contains(' '))
}

const FULL: &str = r#"
[pipeline]
name = "p"
buffer = "8 MiB"
rejected_of_last_1000 = 0
on_position_mismatch = "checkpoint"
[source]
type = "kinesis"
stream = "s"
endpoint = "http://127.0.0.1:4567"
start = "at-timestamp:2026-01-31T01:00:00+01:00"
poll_interval = "10 ms"
[source.batch]
records = 10
bytes = "1 KiB"
[[stage]]
name = "one"
plugin = "/opt/one.wasm"
sha256 = "ABCDEF0123456789abcdef0123456789abcdef0123456789abcdef0123456789"
[stage.config]
big = 9223372036854775807
at = 2026-01-31
text = "${SET} $${SET}"
[stage.limits]
batch_time = "100 ms"
[stage.routes]
early = ["pg"]
dropped = []
[[stage]]
name = "two"
plugin = "two.wasm"
routes = { default = ["objects"] }
[[sink]]
name = "pg"
type = "postgres"
url = "postgres://u:${SECRET}@h/db"
table = "mart.cars"
[[sink]]
name = "objects"
type = "objects"
url = "s3://bucket/${UNSET:-logs}"
compression = "zstd"
options = { aws_secret_access_key = "${SECRET}" }
[admin]
"#;

#[test]
fn every_value_arrives() {
    let config = parse(FULL).unwrap_or_else(|error| panic!("{}", error.render(false)));
    assert_eq!(config.state_dir, Path::new("conf/state"));
    assert_eq!(config.on_position_mismatch, OnPositionMismatch::Checkpoint);
    assert_eq!((config.rejected_max.of_last_1000, config.rejected_max.in_a_row), (0, 100));
    assert_eq!(kinesis(&config).start, StartPosition::AtTimestampMs(1_769_817_600_000));
    assert_eq!(kinesis(&config).poll_interval, Duration::from_millis(10));
    assert_eq!(config.source.batch, BatchLimits { records_max: 10, bytes_max: 1024 });
    let [one, two] = &config.stages[..] else { panic!("two stages") };
    assert_eq!(one.plugin.value, Path::new("/opt/one.wasm"));
    assert_eq!(two.plugin.value, Path::new("conf/two.wasm"));
    assert_eq!(&config.file.text[one.plugin.span.clone()], "\"/opt/one.wasm\"");
    assert_eq!(&config.file.text[one.span.clone()], "[[stage]]");
    let digest = one.sha256.as_ref().map(|digest| digest.value.to_lowercase());
    assert_eq!(digest, one.sha256.as_ref().map(|digest| digest.value.clone()));
    let expected = r#"{"at":"2026-01-31","big":9223372036854775807,"text":"value ${SET}"}"#;
    assert_eq!((one.config_json.as_str(), two.config_json.as_str()), (expected, "{}"));
    let limits = StageLimits { batch_ms_max: 100, record_ms_max: 100, ..StageLimits::default() };
    assert_eq!(one.limits, limits);
    assert!(one.routes["dropped"].sinks.is_empty());
    assert_eq!(&config.file.text[one.routes["early"].key_span.clone()], "early");
    assert_eq!(&config.file.text[one.routes["early"].sinks[0].span.clone()], "\"pg\"");
    assert_eq!(config.admin.map(|admin| admin.listen), "127.0.0.1:9901".parse().ok());
    // A small buffer overrides the default commit size of objects.
    assert_eq!(config.sinks[1].commit_policy.bytes_max, 8 << 20);
}

/// An editor can save any prefix of a file. Each prefix either parses or gives a readable error.
#[test]
fn a_file_cut_anywhere_is_a_readable_error_or_sound() {
    for (end, _) in FULL.char_indices() {
        if let Err(error) = parse(&FULL[..end]) {
            let report = error.render(false);
            assert!(report.contains("conf/pipeline.toml:"), "cut at {end}: {report}");
        }
    }
}

#[test]
fn a_secret_reaches_its_sink_and_no_fingerprint() {
    let config = parse(FULL).expect("a valid configuration");
    let PostgresTarget { url, .. } = settings(&config, 0);
    assert_eq!(url, "postgres://u:hunter2@h/db");
    let ObjectsTarget { options, url, .. } = settings(&config, 1);
    assert_eq!(options["aws_secret_access_key"], "hunter2");
    assert_eq!(url.as_str(), "s3://bucket/logs");
    for sink in &config.sinks {
        assert!(sink.fingerprint_json.contains("${SECRET}"), "{}", sink.fingerprint_json);
        assert!(!sink.fingerprint_json.contains("hunter2"), "{}", sink.fingerprint_json);
    }
}

#[test]
fn a_later_finding_points_into_the_file() {
    let config = parse(FULL).expect("a valid configuration");
    let stage = &config.stages[0];
    let error = config.file.problem(stage.plugin.span.clone(), "there is no such file", "build it");
    assert_eq!(error.to_string(), "conf/pipeline.toml:18:10: there is no such file");
    let all =
        ConfigError::join([config.file.problem(config.sinks[0].span.clone(), "second", ""), error]);
    let all = all.expect("two errors").to_string();
    assert!(all.ends_with(": second") && all.lines().count() == 2, "{all}");
    assert!(ConfigError::join([]).is_none());
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = shardmill_config::load(Path::new("no/such.toml"), &SINK_TYPES, &lookup)
        .expect_err("no such file");
    let report = error.render(false);
    assert!(report.contains("no/such.toml: failed to read the configuration: "), "{report}");
}
