//! `plugins/hostile`: each kind of misbehaviour affects only the culprits.

use std::sync::Arc;

use metrics_exporter_prometheus::PrometheusBuilder;
use shardmill_config::RejectedMax;
use shardmill_engine::stage::Blocked;
use shardmill_state::DeadLetteredItems;

use super::lane::{LIMITS, Lane, RECORDS, batch, fine, of_kind, payloads, position, sum};

/// Asserts that the three culprits alone are dead-lettered, and that all other records are delivered in order.
fn assert_culprits_alone(fault: &str, reason: &str) {
    Lane::hostile(fault).assert_culprits_alone(&[0, 499, 999], reason);
}

/// Like `assert_culprits_alone`, for plugins that make many rows of a record.
fn after_work(fault: &str, reason: &str) {
    Lane::patient(fault).assert_culprits_alone(&[0, 499, 999], reason);
}

#[test]
fn a_trap_costs_the_culprit_alone() {
    assert_culprits_alone(r#"trap_on = "bad""#, "trapped");
}

#[test]
fn an_endless_loop_is_ended_and_costs_the_culprit_alone() {
    assert_culprits_alone(r#"loop_on = "bad""#, "took longer than its limit of 100 ms");
}

#[test]
fn an_endless_loop_of_copies_is_ended() {
    assert_culprits_alone(r#"copy_on = "bad""#, "took longer than its limit of 100 ms");
}

#[test]
fn endless_recursion_costs_the_culprit_alone() {
    assert_culprits_alone(r#"recurse_on = "bad""#, "stack");
}

#[test]
fn memory_over_the_limit_costs_the_culprit_alone() {
    assert_culprits_alone(r#"grow_on = "bad""#, "over its limit of 16777216");
}

#[test]
fn memory_that_was_refused_and_not_needed_is_nobodys_fault() {
    let mut lane = Lane::hostile("strain_on = \"bad\"\ntrap_on = \"bad to the bone\"");
    assert_eq!(lane.run(&payloads(&[5])).expect("it succeeds").routed.len(), RECORDS);
    let outcome = lane.run(&["bad".into(), "bad to the bone".into()]).expect("one culprit");
    let reasons: Vec<_> =
        outcome.dead_letters.iter().map(|dead_letter| dead_letter.reason.as_str()).collect();
    assert!(matches!(reasons[..], [reason] if reason.contains("trapped")), "{reasons:?}");
}

/// The leak causes a fresh instance now and then, and costs no record.
#[test]
fn an_instance_that_leaks_is_renewed_before_it_fails() {
    let mut lane = Lane::hostile(r#"leak_on = "bad""#);
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || {
        // All calls together leak more than twice the limit.
        (0..40).for_each(|_| {
            let outcome = lane.run(&payloads(&[5])).expect("nothing is wrong");
            assert_eq!((outcome.routed.len(), outcome.dead_letters.len()), (RECORDS, 0));
        });
    });
    assert_eq!(sum(&recorder, "shardmill_stage_calls_total"), 40.0, "no call was repeated");
    assert_eq!(sum(&recorder, "shardmill_stage_traps_total"), 0.0);
    let renewals = sum(&recorder, "shardmill_stage_renewals_total");
    assert!((2.0..=8.0).contains(&renewals), "{renewals} renewals");
}

#[test]
fn a_lasting_failure_costs_the_culprit_alone() {
    assert_culprits_alone(r#"fail_on = "bad""#, "as configured");
    assert_culprits_alone(r#"blame_on = "bad""#, "as configured");
    assert_culprits_alone(r#"bad_blame_on = "bad""#, "as configured");
}

#[test]
fn a_broken_contract_is_a_trap() {
    for fault in [
        "bad_span_on",
        "overflow_span_on",
        "bad_route_on",
        "bad_input_on",
        "both_on",
        "bad_key_on",
        "double_reject_on",
        "bad_reject_on",
        "cut_short_on",
    ] {
        assert_culprits_alone(&format!(r#"{fault} = "bad""#), "broke its contract");
    }
}

#[test]
fn outputs_out_of_order_cost_a_search_and_no_record() {
    let outcome = Lane::hostile(r#"unordered_on = "bad""#).run(&payloads(&[7, 8])).expect("done");
    // Two neighbours of which the later one is bad are still out of order; a record alone never is. So the search
    // finds no culprit.
    assert_eq!(outcome.dead_letters.len(), 0, "{:?}", outcome.dead_letters);
    assert_eq!(outcome.routed.len(), RECORDS);
}

#[test]
fn too_much_output_costs_the_culprit_alone() {
    after_work("flood_on = \"bad\"\nflood_bytes = 8388608", "returned more than allowed");
}

#[test]
fn too_many_outputs_cost_the_culprit_alone() {
    let expected = "too many outputs: expected at most 10 for each of 1 records, found 20000";
    after_work("many_on = \"bad\"\nmany = 20000", expected);
    // A million outputs do not even fit into the memory.
    after_work(r#"many_on = "bad""#, "over its limit of 16777216");
}

#[test]
fn rows_that_share_their_bytes_count_in_full() {
    for fault in ["share_payload_on", "share_key_on"] {
        let expected = "outputs of more than 4194304 bytes in total";
        after_work(&format!("{fault} = \"bad\"\nmany = 8"), expected);
    }
}

#[test]
fn spans_may_overlap() {
    let outcome = Lane::hostile(r#"overlap_on = "bad""#).run(&payloads(&[3])).expect("allowed");
    let shown: Vec<_> = outcome.routed[3..5].iter().map(|it| it.row.payload.clone()).collect();
    assert_eq!(shown, ["bad 3", "ad 3"]);
    assert_eq!((outcome.routed.len(), outcome.dead_letters.len()), (RECORDS + 1, 0));
}

#[test]
fn a_message_that_is_no_utf8_is_a_trap() {
    assert_culprits_alone(r#"bad_message_on = "bad""#, "utf-8");
}

#[test]
fn a_reason_that_is_no_utf8_is_shown_as_far_as_it_is() {
    assert_culprits_alone(r#"bad_reason_on = "bad""#, "bad: \u{fffd}\u{fffd}");
}

#[test]
fn a_long_reason_is_cut() {
    let mut lane = Lane::hostile(r#"long_reason_on = "bad""#);
    let outcome = lane.run(&payloads(&[1, 2])).expect("two culprits");
    for dead_letter in &outcome.dead_letters {
        assert!(dead_letter.reason.len() < 9_000, "{} bytes", dead_letter.reason.len());
        assert!(dead_letter.reason.ends_with("(1048576 bytes in all)"), "{}", dead_letter.reason);
    }
}

/// A damaged instance may fail later calls too. Running those records on a fresh instance shows that they are fine.
#[test]
fn an_instance_that_destroys_its_allocator_harms_no_neighbour() {
    let mut lane = Lane::hostile(r#"corrupt_on = "bad""#);
    for bad in [&[0, 499, 999][..], &[], &[998, 999], &[]] {
        let payloads = payloads(bad);
        let outcome = lane.run(&payloads).expect("it goes on");
        for dead_letter in &outcome.dead_letters {
            assert!(dead_letter.original.starts_with(b"bad"), "{}", dead_letter.reason);
        }
        assert_eq!(fine(&outcome), of_kind(&payloads, "fine"));
        let bad_rows = outcome.routed.len() - fine(&outcome).len();
        assert_eq!(bad_rows + outcome.dead_letters.len(), bad.len(), "each has one outcome");
    }
}

#[test]
fn a_plugin_that_fails_in_configure_is_refused_with_its_stage() {
    let refused = |config: &str| {
        let plugin = crate::support::plugin("hostile");
        match Lane::of(&plugin, LIMITS, config, RejectedMax::default()) {
            Ok(_) => panic!("not refused: {config}"),
            Err(why) => why.split_whitespace().collect::<Vec<_>>().join(" "),
        }
    };
    for (config, expected) in [
        (r#"configure = "trap""#, "configure trapped"),
        (r#"configure = "loop""#, "configure took longer than its limit of 10000 ms"),
        (r#"configure = "bad_name""#, "utf-8"),
        (r#"configure = "many_routes""#, "configure"),
        (r#"refuse = "not like this""#, "configure refused: not like this"),
        (r#"routes = ["no such name!"]"#, "invalid route name"),
    ] {
        let why = refused(config);
        assert!(why.contains(expected) && why.contains("stage misbehave"), "{config}: {why}");
    }
}

#[test]
fn a_failure_that_passes_is_retried() {
    let mut lane = Lane::hostile("retry_on = \"bad\"\nretry_calls = 1");
    let outcome = lane.run(&payloads(&[5])).expect("it succeeds");
    assert_eq!(outcome.routed.len(), RECORDS);
    assert!(outcome.dead_letters.is_empty());
}

#[test]
fn a_failure_that_does_not_pass_is_searched_once() {
    assert_culprits_alone(r#"retry_on = "bad""#, "as configured");
}

#[test]
fn when_all_fail_for_now_the_lane_blocks() {
    let blocked = Lane::hostile(r#"retry_on = """#).run(&["one".to_owned(), "two".to_owned()]);
    assert!(matches!(blocked, Err(Blocked::Retry(_))), "{blocked:?}");
}

#[test]
fn a_broken_plugin_drains_no_stream_into_the_dead_letters() {
    let limits = RejectedMax { of_last_1000: 20, in_a_row: 10 };
    for fault in ["trap_on", "reject_on"] {
        let mut lane = Lane::within(LIMITS, &format!(r#"{fault} = """#), limits);
        match lane.run(&payloads(&[])) {
            Err(Blocked::Broken(cause)) => {
                assert!(cause.contains("stage misbehave (plugin hostile 0.1.0, "), "{cause}");
                assert!(cause.contains("the last reason: "), "{cause}");
            }
            other => panic!("{fault}: {other:?}"),
        }
    }
}

#[test]
fn a_dead_lettered_record_is_not_rerun() {
    let mut lane = Lane::hostile(r#"trap_on = "bad""#);
    let payloads = payloads(&[7]);
    let first = lane.run(&payloads).expect("one culprit");
    assert_eq!(first.dead_letters[0].key.position, position(7));
    let dead_lettered: DeadLetteredItems =
        first.dead_letters.iter().map(|dead_letter| dead_letter.key.clone()).collect();
    let again = lane.chain().run(&Arc::new(batch(&payloads)), &dead_lettered).expect("none left");
    assert!(again.dead_letters.is_empty());
    assert_eq!(again.routed.len(), RECORDS - 1);
}
