//! Records that run out of time, and plugins that ask for a retry.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shardmill_config::RejectedMax;
use shardmill_engine::stage::Blocked;
use shardmill_state::DeadLetteredItems;

use super::{Run, SLACK};
use crate::hostile::lane::{Lane, batch, payloads};
use crate::support::pipeline::PipelineToml;
use crate::support::{http_get, plugin, run_ok, sqlite, wait_for};

/// A batch may take 0.8 s, a record 0.2 s.
const LIMITS: &str = "batch_time = \"800 ms\"\nrecord_time = \"200 ms\"";

/// Returns the CPU time of this thread. The plugin runs on it, and its time limits count CPU time.
fn own_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to a structure that lives here.
    let read = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(read, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn endless() -> Lane {
    Lane::within(LIMITS, "loop_on = \"bad\"", RejectedMax::default())
}

/// If each piece had the time limit that its number of records allows, the three searches would take 20 s.
#[test]
fn fault_41_an_endless_record_costs_a_batchs_limit_once_and_a_few_pieces() {
    let mut lane = endless();
    let begun = own_cpu_time();
    lane.assert_culprits_alone(&[100, 500, 900], "took longer than its limit of 200 ms");
    let took = own_cpu_time() - begun;
    assert!(took < Duration::from_secs(7), "{took:?}");
}

#[test]
fn fault_41_a_record_that_ran_out_of_time_is_not_run_with_its_batch_again() {
    let mut lane = endless();
    let payloads = payloads(&[100, 500, 900]);
    lane.run(&payloads).expect("an outcome");
    let begun = own_cpu_time();
    let outcome = lane.run(&payloads).expect("an outcome");
    assert_eq!(outcome.dead_letters.len(), 3);
    // Three times a record's limit, plus pieces that succeed.
    let took = own_cpu_time() - begun;
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[test]
fn fault_41_a_search_hears_a_stop_and_keeps_what_it_has_found() {
    // With limits this short, some culprits are found before the stop even on a busy machine, and never all of them.
    let limits = "batch_time = \"200 ms\"\nrecord_time = \"50 ms\"";
    let mut lane = Lane::within(limits, "loop_on = \"bad\"", RejectedMax::default());
    let bad: Vec<usize> = (0..40).map(|n| n * 25).collect();
    let (stop, payloads) = (lane.stop(), payloads(&bad));
    let stopper = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(3));
        stop.cancel();
        Instant::now()
    });
    let outcome = lane.run(&payloads);
    let waited = stopper.join().expect("no panic").elapsed();
    assert!(waited < Duration::from_secs(1), "{waited:?}");
    let Err(Blocked::Stopped(found)) = outcome else { panic!("{outcome:?}") };
    assert!(!found.is_empty() && found.len() < 40, "{} found", found.len());
    assert!(found.iter().all(|dead_letter| dead_letter.reason.contains("took longer")));
}

/// The thread is free while the plugin waits. Regression: as many waiting lanes as threads stopped all other lanes.
#[test]
fn fault_09_a_plugin_that_asks_for_another_try_occupies_no_thread() {
    let limits = "retry = \"5 s\"";
    let mut lane =
        Lane::within(limits, "retry_on = \"bad\"\nretry_calls = 2", RejectedMax::default());
    let batch = Arc::new(batch(&payloads(&[3])));
    let mut tries = 0;
    let outcome = loop {
        let begun = Instant::now();
        let outcome = lane.chain().run(&batch, &DeadLetteredItems::default());
        assert!(begun.elapsed() < Duration::from_millis(80), "{:?}", begun.elapsed());
        match outcome {
            Err(Blocked::Later(cause, pause)) => {
                assert!(cause.contains("misbehave") && cause.contains("as configured"), "{cause}");
                assert!(pause >= Duration::from_millis(80), "{pause:?}");
                tries += 1;
                std::thread::sleep(pause);
            }
            outcome => break outcome.expect("it passes at the third try"),
        }
    };
    assert_eq!((tries, outcome.routed.len(), outcome.dead_letters.len()), (2, 1_000, 0));
}

/// Writes a pipeline over `rows` lines; the plugin loops forever on every 25th.
fn endless_pipeline(folder: &std::path::Path, port: u16) -> String {
    let rows = folder.join("rows.ndjson");
    let line = |id: u64| match id % 25 {
        0 => format!("{{\"id\":{id},\"text\":\"bad\"}}\n"),
        _ => format!("{{\"id\":{id},\"text\":\"fine\"}}\n"),
    };
    std::fs::write(&rows, (0..1_000).map(line).collect::<String>()).expect("written");
    let mart = folder.join("mart.db");
    sqlite(&mart)
        .execute_batch("CREATE TABLE rows (id INTEGER NOT NULL, text TEXT NOT NULL)")
        .expect("a table");
    let lines = format!(
        "config = {{ loop_on = \"bad\", format = \"application/json\" }}\n\
         routes = {{ out = [\"mart\"] }}\n[stage.limits]\n{LIMITS}"
    );
    PipelineToml::new(folder, "search")
        .file(&rows, "format = \"application/json\"")
        .stage("misbehave", &plugin("hostile"), &lines)
        .sqlite("mart", "rows")
        .table(&crate::support::admin(port))
        .write()
}

/// The same with the real binary.
#[test]
fn fault_41_a_search_is_shown_hears_sigterm_and_goes_on_where_it_was() {
    let folder = tempfile::tempdir().expect("a folder");
    let port = crate::support::free_port();
    let file = endless_pipeline(folder.path(), port);
    let dead_letters = || -> u64 {
        let state = sqlite(&folder.path().join("state/search/state.db"));
        state
            .query_row("SELECT count(*) FROM dead_letter", (), |row| row.get(0))
            .unwrap_or_default()
    };
    let mut run = Run::start(&file);
    wait_for("the search to be shown", || {
        let shown = http_get(port, "/health/ready");
        shown.contains("503")
            && shown.contains("stage misbehave: searching")
            && shown.contains("found")
            && !shown.contains(" 0 found")
    });
    assert_eq!(run.terminated_within(SLACK).code(), Some(0), "{}", run.text());
    let found = dead_letters();
    assert!((1..40).contains(&found), "{found} found");
    run_ok(&["run", &file, "--until-caught-up"]);
    assert_eq!(dead_letters(), 40);
    let mart = sqlite(&folder.path().join("mart.db"));
    let counts = "SELECT count(*), count(DISTINCT id) FROM rows";
    let counts = mart.query_row(counts, (), |row| Ok((row.get(0)?, row.get(1)?)));
    assert_eq!(counts, Ok((960_u64, 960_u64)));
}

/// The batch's time limits are far longer than a person would wait without a sign of life.
#[test]
fn fault_41_a_batch_that_stays_in_a_plugin_is_shown() {
    let folder = tempfile::tempdir().expect("a folder");
    let port = crate::support::free_port();
    let rows = folder.path().join("rows.ndjson");
    std::fs::write(&rows, "{\"id\":1,\"text\":\"bad\"}\n").expect("written");
    let lines = "config = { loop_on = \"bad\", format = \"application/json\" }
routes = { out = [\"mart\"] }
[stage.limits]
batch_time = \"2 min\"
record_time = \"1 min\"";
    let file = PipelineToml::new(folder.path(), "search")
        .timing("drain = \"1 s\"\ncall_blocked = \"200 ms\"")
        .file(&rows, "format = \"application/json\"")
        .stage("misbehave", &plugin("hostile"), lines)
        .sink("mart", "type = \"discard\"")
        .table(&crate::support::admin(port))
        .write();
    let mut run = Run::start(&file);
    wait_for("the call to be shown", || {
        let shown = http_get(port, "/health/ready");
        shown.contains("503") && shown.contains("plugin call: a batch has been in the plugins")
    });
    run.terminated_within(SLACK + Duration::from_secs(6));
    assert!(!run.logged("sink mart: a commit did not finish"), "{}", run.text());
}
