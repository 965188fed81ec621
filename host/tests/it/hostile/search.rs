//! Cost of the search for culprits, and which lanes it delays.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use metrics_exporter_prometheus::PrometheusBuilder;
use shardmill_config::RejectedMax;

use super::lane::{Lane, RECORDS, payloads, sum};

/// Maximum number of calls for a batch of 1,000 with 3 culprits, as the documentation promises.
const CALLS_MAX: f64 = 34.0;

#[test]
fn three_culprits_in_a_thousand_cost_at_most_34_calls() {
    for fault in ["trap_on", "fail_on", "blame_on", "bad_span_on", "many_on"] {
        // A million outputs would exceed the memory limit first; this many exceed the limit on outputs.
        let config = format!("{fault} = \"bad\"\nmany = 20000");
        let mut lane = Lane::hostile(&config);
        for seed in 0..20 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut bad = random.choose_multiple(0..RECORDS, 3);
            bad.sort_unstable();
            let recorder = PrometheusBuilder::new().build_recorder();
            metrics::with_local_recorder(&recorder, || lane.assert_culprits_alone(&bad, ""));
            let calls = sum(&recorder, "shardmill_stage_calls_total");
            assert!(calls > 3.0 && calls <= CALLS_MAX, "{fault}, seed {seed}: {calls} calls");
        }
    }
}

/// The worst positions: the ends, and neighbours on both sides of each cut.
#[test]
fn culprits_at_the_cuts_cost_no_more() {
    let mut lane = Lane::hostile(r#"trap_on = "bad""#);
    for bad in [[0, 1, 2], [997, 998, 999], [0, 499, 999], [499, 500, 501], [249, 250, 750]] {
        let recorder = PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || lane.assert_culprits_alone(&bad, "trapped"));
        let calls = sum(&recorder, "shardmill_stage_calls_total");
        assert!(calls <= CALLS_MAX, "{bad:?}: {calls} calls");
    }
}

/// All batches of another lane are done before an endless loop has reached its deadline once.
#[test]
fn an_endless_loop_delays_its_own_lane_alone() {
    let limits = "batch_time = \"5 s\"\nrecord_time = \"5 s\"";
    let mut looping = Lane::within(limits, r#"loop_on = "bad""#, RejectedMax::default());
    let mut other = Lane::hostile(r#"trap_on = "bad""#);
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let outcome = looping.run(&["bad".to_owned()]).expect("a culprit");
            ended.store(true, Ordering::SeqCst);
            assert!(outcome.dead_letters[0].reason.contains("its limit of 5000 ms"));
        });
        for _ in 0..5 {
            other.assert_culprits_alone(&[3, 500], "trapped");
        }
        assert!(!ended.load(Ordering::SeqCst), "the other lane was delayed");
    });
}

#[test]
fn memory_is_flat_over_many_calls() {
    let mut lane = Lane::hostile(r#"report_on = "bad""#);
    let payloads = payloads(&[1, 10, 100]);
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || {
        let mut run = || {
            lane.run(&payloads).expect("nothing is wrong");
            sum(&recorder, "shardmill_stage_memory_bytes")
        };
        let warm = (0..10).map(|_| run()).fold(0.0, f64::max);
        assert!(warm > 0.0);
        (0..1_000).for_each(|call| assert_eq!(run(), warm, "after call {call}"));
    });
    assert_eq!(sum(&recorder, "shardmill_stage_calls_total"), 1_010.0);
}
