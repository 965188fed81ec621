//! `kill -9` at random moments: each record is there exactly once in SQLite, in PostgreSQL, and across all objects.
//! Half of the restarts also change a route.
//!
//! The moments are drawn from `SHARDMILL_SEED` (printed), so a failure can be reproduced.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::flights::{from_csv, in_objects, in_postgres, in_sqlite, same_multiset};
use crate::support::pipeline::PipelineToml;
use crate::support::{Process, postgres_url, run_ok, serve_stream, shardmill, some_flights_csv};

/// Number of times that the run is killed.
const KILLS: usize = 10;

/// Writes a pipeline of the flights into three kinds of sinks. Their commit policies differ, so at any moment each
/// sink has rows that the others do not have yet. `laguardia` is the route of that airport.
fn pipeline(folder: &Path, schema: &str, laguardia: &str) -> String {
    let example =
        std::fs::read_to_string(crate::support::root().join("examples/flights/pipeline.toml"));
    let example = example.expect("the example");
    let begin = example.find("[stage.config]").expect("its first configuration");
    let end = begin + example[begin..].find("[[stage]]").expect("its second stage");
    let decode = &example[begin..end];
    let postgres = postgres_url();
    let data = folder.display();
    let route = format!(
        r#"
[stage.config]
default = "laguardia"
rules = [
    {{ route = "newark", field = "origin", equals = "EWR" }},
    {{ route = "kennedy", field = "origin", equals = "JFK" }},
    {{ route = "{laguardia}", field = "origin", equals = "LGA" }},
]
[stage.routes]
newark = ["newark", "pg_newark", "logs"]
kennedy = ["kennedy", "pg_kennedy", "logs"]
laguardia = ["laguardia", "pg_laguardia", "logs"]
"#
    );
    let logs = format!(
        "type = \"objects\"\nurl = \"{data}/logs\"\ncompression = \"zstd\"\n\
         [sink.commit]\nlinger = \"400 ms\""
    );
    let mut file = PipelineToml::new(folder, "flights")
        .timing("")
        .stream("flights", "embedded", "format = \"text/csv\"\nrecords_per_call = 3000")
        .stage("decode", "csv-decode", decode)
        .stage("route", "route-json", &route)
        .plain_sink("logs", &logs);
    for table in ["newark", "kennedy", "laguardia"] {
        let to_sqlite = format!(
            "type = \"sqlite\"\npath = \"{data}/flights.db\"\ntable = \"{table}\"\n\
             create = true\n[sink.commit]\nlinger = \"100 ms\""
        );
        let to_postgres = format!(
            "type = \"postgres\"\nurl = \"{postgres}\"\ntable = \"{schema}.{table}\"\n\
             create = true\n[sink.commit]\nlinger = \"200 ms\""
        );
        file = file.plain_sink(table, &to_sqlite).plain_sink(&format!("pg_{table}"), &to_postgres);
    }
    file.text()
}

/// Run of the binary whose log is read while it is written.
struct Run {
    process: Process,
    replayed: Arc<AtomicU64>,
}

fn start(config: &Path) -> Run {
    let config = config.display().to_string();
    let mut command = shardmill(&["run", &config, "--until-caught-up", "-v"]);
    let mut child =
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    let log = child.stderr.take().expect("piped");
    let replayed = Arc::new(AtomicU64::new(0));
    let sum = replayed.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(log).lines().map_while(Result::ok) {
            if line.contains("replayed records that only some sinks had") {
                let records = line.split("records=").nth(1).expect("a count");
                let digits: String = records.chars().take_while(char::is_ascii_digit).collect();
                sum.fetch_add(digits.parse().expect("a count"), Ordering::Relaxed);
            } else if line.contains("ERROR") || line.starts_with("error") {
                println!("  {line}");
            }
        }
    });
    Run { process: Process(child), replayed }
}

/// Whether the fastest sink has committed. Its table may not exist yet.
fn has_rows(database: &Path) -> bool {
    let count = rusqlite::Connection::open(database).and_then(|database| {
        database.query_row("SELECT count(*) FROM newark", [], |row| row.get::<_, u64>(0))
    });
    count.is_ok_and(|count| count > 0)
}

#[test]
fn a_killed_run_loses_nothing_and_doubles_nothing() {
    let seed = std::env::var("SHARDMILL_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or(2014);
    println!("SHARDMILL_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let folder = tempfile::tempdir().expect("a folder");
    let schema = format!("crash_{}", std::process::id());
    let configs = ["laguardia", "kennedy"].map(|laguardia| {
        let path = folder.path().join(format!("{laguardia}.toml"));
        std::fs::write(&path, pipeline(folder.path(), &schema, laguardia)).expect("written");
        path
    });
    let state = folder.path().join("state");
    let _stream = serve_stream(&state);
    crate::support::postgres(&format!("CREATE SCHEMA {schema}"));
    let pipeline = configs[0].display().to_string();
    run_ok(&["stream", "create", "--shards", "5", "--pipeline", &pipeline]);
    let flights = some_flights_csv(folder.path());
    let csv = flights.display().to_string();
    run_ok(&["stream", "put", "--pipeline", &pipeline, "--skip", "1", &csv]);

    for kill in 0..KILLS {
        // Every second start uses another configuration.
        let config = &configs[(kill / 2) % 2];
        let mut run = start(config);
        let must_kill = |run: &Run| match kill {
            // One sink has committed rows that others have not: the next start must replay them.
            0 => has_rows(&folder.path().join("flights.db")),
            _ => run.replayed.load(Ordering::Relaxed) > 0,
        };
        let begun = Instant::now();
        while !must_kill(&run) {
            assert!(begun.elapsed() < Duration::from_secs(60), "kill {kill}: nothing was replayed");
            assert!(run.process.0.try_wait().expect("a state").is_none(), "kill {kill}: run ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        let more = Duration::from_millis(random.u64(50..250));
        std::thread::sleep(more);
        assert!(run.process.0.try_wait().expect("a state").is_none(), "kill {kill}: run ended");
        let replayed = run.replayed.load(Ordering::Relaxed);
        drop(run);
        println!("kill {kill}: after {more:?} more, {replayed} records had been replayed");
    }
    let mut run = start(&configs[1]);
    let ended = run.process.wait();
    assert!(ended.success(), "{ended}");
    println!("last start: {} records replayed", run.replayed.load(Ordering::Relaxed));
    assert!(run.replayed.load(Ordering::Relaxed) > 0);

    let expected = from_csv(&flights);
    same_multiset("SQLite", &expected, &in_sqlite(&folder.path().join("flights.db")));
    same_multiset("PostgreSQL", &expected, &in_postgres(&schema));
    same_multiset("objects", &expected, &in_objects(&folder.path().join("logs")));
    crate::support::postgres(&format!("DROP SCHEMA {schema} CASCADE"));
}
