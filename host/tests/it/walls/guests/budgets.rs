//! Limits that belong to a stage and its revision: a renewed instance does not reset them.

use metrics_exporter_prometheus::PrometheusBuilder;
use shardmill_config::RejectedMax;

use super::asking::{Asking, LOG, OBSERVE, Place, RANDOM, REGISTER};
use crate::hostile::lane::{LIMITS, Lane};
use crate::support::free_port;
use crate::walls::memory;

/// Lines that each call writes.
const LINES: u64 = 20;
/// Number of records. Each of them traps, so the next one gets a fresh instance.
const RECORDS: usize = 60;

#[test]
fn wall_09_log_lines_are_counted_for_the_stage_and_not_for_each_instance() {
    let process = format!(
        "(loop $more
          (call $log (i32.const 3) (i32.const 16384) (i32.const 65536))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $more (i32.lt_u (local.get $i) (i32.const {LINES}))))
        unreachable"
    );
    let asking = Asking { imports: &[LOG], process: &process, ..Asking::default() };
    let stage = "grant = { log = true }\n[stage.limits]\nmemory = \"16 MiB\"\nlog_lines = 5";
    let place = Place::new(&asking, RECORDS, stage, "");
    let ran = place.run();
    assert_eq!(ran.code, Some(0), "{}", ran.log);
    assert_eq!(place.dead_letters().len(), RECORDS);
    let shown = ran.log.lines().filter(|line| line.contains("\\u{0}")).count() as u64;
    let seconds = ran.took.as_secs() + 2;
    assert!((1..=5 * seconds).contains(&shown), "{shown} lines in {seconds} s");
    let dropped = ran.log.lines().filter_map(|line| {
        let (before, _) = line.split_once(" lines dropped: more than 5 a second")?;
        before.rsplit(' ').next()?.parse::<u64>().ok()
    });
    let all = shown + dropped.sum::<u64>();
    assert!(all >= LINES * RECORDS as u64, "{all} lines are accounted for");
    // Without the limit, each line would have 64 KiB, and five times that where it is escaped.
    assert!(ran.log.len() < 10_000 * (shown as usize + RECORDS), "{} bytes", ran.log.len());
    ran.assert_memory("log lines");
}

/// Each instance registers 40 metrics with names of its own.
#[test]
fn wall_09_metrics_are_counted_for_the_stage_and_not_for_each_instance() {
    let configure = "(i32.store8 (i32.const 1024) (i32.const 109))
        (i32.store (i32.const 1100) (i32.const 0))
        (loop $metric
          (local.set $i (i32.const 1025))
          (loop $letter
            (i32.store8 (local.get $i)
              (i32.add (i32.const 97) (i32.and (i32.wrap_i64 (call $random)) (i32.const 15))))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $letter (i32.lt_u (local.get $i) (i32.const 1041))))
          (call $register (i32.const 1) (i32.const 1024) (i32.const 17) (i32.const 0) (i32.const 0)
            (i32.const 8192))
          (i32.store (i32.const 1100) (i32.add (i32.load (i32.const 1100)) (i32.const 1)))
          (br_if $metric (i32.lt_u (i32.load (i32.const 1100)) (i32.const 40))))";
    let imports = [RANDOM, REGISTER];
    let asking =
        Asking { imports: &imports, configure, process: "unreachable", ..Asking::default() };
    let component = asking.build();
    let limits = format!("{LIMITS}[stage.grant]\nmetrics = true\nrandom = true");
    let recorder = PrometheusBuilder::new().build_recorder();
    let shown = metrics::with_local_recorder(&recorder, || {
        let path = component.path().display().to_string();
        let lane = Lane::of(&path, &limits, "", RejectedMax::default());
        let mut lane = lane.unwrap_or_else(|why| panic!("{why}"));
        for _ in 0..40 {
            let outcome = lane.run(&["record".to_owned()]).expect("it goes on");
            assert_eq!(outcome.dead_letters.len(), 1);
        }
        recorder.handle().render()
    });
    let series = shown.lines().filter(|line| line.starts_with("shardmill_plugin_m")).count();
    assert_eq!(series, 32, "{shown}");

    // The same in another process, as a pipeline runs it.
    let stage = format!("grant = {{ metrics = true, random = true }}\n{}", memory::LIMITS);
    let admin = format!("[admin]\nlisten = \"127.0.0.1:{}\"", free_port());
    let place = Place::new(&asking, RECORDS, &stage, &admin);
    let ran = place.run();
    assert_eq!((ran.code, place.dead_letters().len()), (Some(0), RECORDS), "{}", ran.log);
    ran.assert_memory("metrics");
}

/// A histogram keeps its values one by one until they are aggregated.
#[test]
fn wall_09_values_of_a_histogram_do_not_pile_up() {
    const VALUES: usize = 20_000_000;
    let process = format!(
        "(loop $more
          (call $observe (i32.const 0) (f64.const 1.5))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $more (i32.lt_u (local.get $i) (i32.const {VALUES}))))"
    );
    let configure = "(call $register (i32.const 2) (i32.const 1024) (i32.const 1) (i32.const 0)
        (i32.const 0) (i32.const 8192))";
    let imports = [REGISTER, OBSERVE];
    let asking =
        Asking { imports: &imports, data: b"h", configure, process: &process, ..Asking::default() };
    let stage = "grant = { metrics = true }\n[stage.limits]\nmemory = \"16 MiB\"\n\
        batch_time = \"100 s\"\nrecord_time = \"100 s\"";
    let admin = format!("[admin]\nlisten = \"127.0.0.1:{}\"", free_port());
    let place = Place::new(&asking, 1, stage, &admin);
    let ran = place.run();
    assert_eq!((ran.code, place.dead_letters()), (Some(0), Vec::new()), "{}", ran.log);
    ran.assert_memory(&format!("{VALUES} values"));
}
