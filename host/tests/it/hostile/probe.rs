//! `plugins/probe` in the real binary: whatever a plugin asks of the host is granted, bounded, and shown under the
//! plugin's name.

use std::fs::File;
use std::process::{Output, Stdio};
use std::time::SystemTime;

use serde_json::Value;

use crate::support::pipeline::PipelineToml;
use crate::support::{Process, free_port, http_get, serve_stream, shardmill, wait_for};

/// Number of lines that one call of `log-flood` writes.
const FLOOD_LINES: u64 = 1_000_000;

/// Pipeline whose stage `ask` is the probe plugin, and a file of requests to the host.
struct Asked {
    folder: tempfile::TempDir,
}

impl Asked {
    fn new(wishes: &[&str], limits: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let wishes: String = wishes.iter().map(|wish| format!("{wish}\n")).collect();
        std::fs::write(folder.path().join("wishes.txt"), wishes).expect("written");
        let asked = Self { folder };
        asked.write("type = \"file\"\npath = \"wishes.txt\"", limits, "");
        asked
    }

    fn write(&self, source: &str, limits: &str, more: &str) {
        let stage = format!(
            "routes = {{ out = [\"console\"] }}\n\
             grant = {{ log = true, metrics = true, clock = true, random = true }}\n\
             [stage.limits]\n{limits}"
        );
        PipelineToml::new(self.folder.path(), "probe")
            .table(&format!("[source]\n{source}"))
            .stage("ask", "probe", &stage)
            .plain_sink("console", "type = \"stdout\"")
            .table(more)
            .write();
    }

    /// Runs to the end, which must succeed; returns the rows and the log.
    fn run(&self) -> (Vec<String>, String) {
        let mut command = shardmill(&["run", "--until-caught-up"]);
        let ran: Output = crate::support::output(command.current_dir(self.folder.path()));
        let log = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(ran.status.success(), "{log}");
        let printed = String::from_utf8_lossy(&ran.stdout);
        let lines = printed.lines().filter(|line| !line.starts_with("running;"));
        let rows = lines.filter(|line| !line.starts_with("stopped:")).map(str::to_owned);
        (rows.collect(), log)
    }

    /// Returns the reasons of the dead letters, in order.
    fn dead_letters(&self) -> Vec<String> {
        let state = crate::support::sqlite(&self.folder.path().join("state/probe/state.db"));
        let sql = "SELECT reason FROM dead_letter ORDER BY sequence";
        let mut query = state.prepare(sql).expect("the dead letters");
        let reasons = query.query_map((), |row| row.get(0)).expect("rows");
        reasons.map(|reason| reason.expect("a reason")).collect()
    }
}

#[test]
fn lines_are_tagged_and_escaped_and_go_by_their_level() {
    let asked = Asked::new(&["log-levels"], "");
    let (rows, log) = asked.run();
    assert_eq!(rows, ["log-levels"]);
    let tags = r#"stage=ask version="0.1.0" shard="file-000000000000""#;
    for line in [
        "ERROR probe says Level::Error",
        " WARN probe says Level::Warn",
        " INFO probe says Level::Info",
    ] {
        assert!(log.contains(&format!("{line} {tags}")), "{line}: {log}");
    }
    assert!(
        !log.contains("probe says Level::Debug") && !log.contains("probe says Level::Trace"),
        "{log}"
    );
    assert!(log.contains("probe\\nhas two lines\\u{1b}[2J"), "{log}");
}

#[test]
fn a_flood_of_lines_is_cut_to_its_limit_and_counted() {
    let asked = Asked::new(
        &["before", "log-flood", "after"],
        "log_lines = 5\nbatch_time = \"60 s\"\nrecord_time = \"30 s\"",
    );
    let (rows, log) = asked.run();
    assert_eq!(rows, ["before", "log-flood", "after"]);
    let shown = log.lines().filter(|line| line.contains("probe floods")).count() as u64;
    assert!(shown >= 4, "{log}");
    let dropped = log.lines().filter_map(|line| {
        let (before, _) = line.split_once(" lines dropped: more than 5 a second")?;
        before.rsplit(' ').next()?.parse::<u64>().ok()
    });
    assert_eq!(shown + dropped.sum::<u64>(), FLOOD_LINES, "{log}");
}

#[test]
fn lines_that_cannot_be_read_cost_the_culprit_alone() {
    let limits = "memory = \"512 MiB\"\nbatch_time = \"60 s\"\nrecord_time = \"30 s\"";
    let asked = Asked::new(&["before", "log-huge", "between", "log-no-utf8", "after"], limits);
    let (rows, log) = asked.run();
    assert_eq!(rows, ["before", "between", "after"], "{log}");
    let dead_letters = asked.dead_letters();
    let [huge, no_utf8] = &dead_letters[..] else { panic!("{dead_letters:?}") };
    assert!(huge.contains("returned more than allowed"), "{huge}");
    assert!(no_utf8.contains("utf-8"), "{no_utf8}");
    assert!(log.len() < 100_000, "{} bytes", log.len());
}

#[test]
fn metrics_are_shown_by_stage_and_odd_ones_are_refused() {
    let wishes = ["metric-late", "metric-refusals", "metric-odd-values", "longest of them all"];
    let asked = Asked::new(&wishes, "");
    let port = free_port();
    // A run over a file ends with the file. This run is queried while it runs, so it reads a stream.
    let source = "type = \"kinesis\"\nstream = \"wishes\"\nendpoint = \"embedded\"";
    asked.write(source, "", &crate::support::admin(port));
    let _stream = serve_stream(&asked.folder.path().join("state"));
    for command in [&["stream", "create", "--shards", "1"][..], &["stream", "put", "wishes.txt"]] {
        let ran = crate::support::output(shardmill(command).current_dir(asked.folder.path()));
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    }
    let path = |name: &str| asked.folder.path().join(name);
    let printed = File::create(path("printed")).expect("a file");
    let mut command = shardmill(&["run"]);
    let command = command.current_dir(asked.folder.path()).stdout(printed).stderr(Stdio::null());
    let run = Process(command.spawn().expect("it starts"));
    let rows = || -> Vec<String> {
        let printed = std::fs::read_to_string(path("printed")).unwrap_or_default();
        let said = |line: &&str| line.starts_with("admin ") || line.starts_with("running;");
        printed.lines().filter(|line| !said(line)).map(str::to_owned).collect()
    };
    wait_for("the rows", || rows().len() == wishes.len());
    let metrics = http_get(port, "/metrics");
    assert_eq!(run.terminate(), Some(0));

    for expected in [
        r#"shardmill_plugin_probe_seen{stage="ask"} 4"#,
        r#"shardmill_plugin_probe_longest{stage="ask"} 19"#,
        r#"shardmill_plugin_probe_sizes_count{stage="ask"} 4"#,
        r#"shardmill_plugin_probe_sizes_sum{stage="ask"} 62"#,
        "# HELP shardmill_plugin_probe_seen records that probe has seen",
    ] {
        assert!(metrics.contains(expected), "{expected}: {metrics}");
    }
    assert!(!metrics.contains("probe_late"), "{metrics}");
    let rows = rows();
    assert!(rows[0].contains("configure"), "{}", rows[0]);
    // Refused: six invalid names; 71 of 100 valid ones, because 3 of the 32 places are taken; and one name under a
    // second kind.
    let refusals: Vec<String> = serde_json::from_str(&rows[1]).expect("a list");
    assert_eq!(refusals.len(), 6 + 71 + 1, "{refusals:?}");
    assert!(refusals.iter().any(|why| why.contains("another kind")), "{refusals:?}");
}

#[test]
fn a_metric_that_nobody_announced_costs_the_culprit_alone() {
    let asked = Asked::new(&["before", "metric-unknown", "after"], "");
    assert_eq!(asked.run().0, ["before", "after"]);
    let dead_letters = asked.dead_letters();
    assert!(matches!(&dead_letters[..], [why] if why.contains("4000000000")), "{dead_letters:?}");
}

#[test]
fn the_time_and_chance_are_real_and_a_records_own_are_not() {
    let asked = Asked::new(&["clock", "random"], "");
    let numbers = || {
        let rows = asked.run().0;
        std::fs::remove_dir_all(asked.folder.path().join("state")).expect("removed");
        rows.iter().map(|row| serde_json::from_str(row).expect("JSON")).collect::<Vec<Value>>()
    };
    let now_ms = || {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.expect("after 1970").as_millis() as u64
    };
    let before_ms = now_ms();
    let first = numbers();
    let clock_ms = first[0][0].as_u64().expect("a time");
    assert!((before_ms..=now_ms()).contains(&clock_ms), "{first:?}");
    let second = numbers();
    assert_ne!(first[1][0], first[1][1]);
    assert_ne!(first[1][0], second[1][0]);
    assert_eq!(first[1][2], second[1][2], "the record's own number repeats");
}
