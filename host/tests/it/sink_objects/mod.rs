//! The objects sink through the contract of all sinks, on a folder and on an S3 server in this process.

mod faults;
pub mod s3;
mod suite;
pub mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use faults::{Faulty, Plan};
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{RouteName, SinkName};
use shardmill_core::sink::Sink;
use shardmill_sink_objects::{Compression, ObjectsSink};
use support::{Place, Refusals, commit, commit_of, expected, line_of, shard};

/// Runs each test of the suite on both stores.
macro_rules! on_both {
    ($($test:ident),* $(,)?) => {$(
        mod $test {
            #[tokio::test]
            async fn in_a_folder() {
                super::suite::$test(super::Place::folder()).await;
            }

            #[tokio::test]
            async fn on_s3() {
                super::suite::$test(super::Place::in_bucket(&super::s3::start().await)).await;
            }
        }
    )*};
}

on_both! {
    each_row_is_written_once,
    a_commit_without_rows_moves_the_position,
    a_zombie_is_fenced,
    an_unfinished_claim_is_produced_again,
    fault_25_a_renamed_sink_keeps_the_promises_of_its_old_name,
    a_writer_goes_on_after_an_error,
    other_content_is_not_mixed_in,
    a_log_without_its_first_links_is_read,
    a_large_object_goes_up_in_parts,
    folders_are_named_by_rows,
    verify_finds_what_is_wrong,
}

#[tokio::test]
async fn crashes_in_a_folder() {
    for seed in 0..200 {
        suite::a_crash_between_any_two_steps_loses_nothing(Place::folder(), seed).await;
    }
}

#[tokio::test]
async fn crashes_on_s3() {
    for seed in 1000..1010 {
        let server = s3::start().await;
        suite::a_crash_between_any_two_steps_loses_nothing(Place::in_bucket(&server), seed).await;
    }
}

/// Only on a folder: this S3 server checks and then writes, so two concurrent creations of one object both succeed.
#[tokio::test(flavor = "multi_thread")]
async fn of_many_owners_one_commits() {
    for _ in 0..20 {
        suite::of_many_owners_one_commits(Place::folder()).await;
    }
}

fn route(name: &str, format: &str) -> BoundRoute {
    BoundRoute { name: RouteName::from(name), format: format.into(), columns: Vec::new() }
}

#[tokio::test]
async fn a_url_and_options_lead_to_a_bucket() {
    let server = s3::start().await;
    let name = SinkName::from("logs");
    let sink = ObjectsSink::new(name.clone(), &s3::url(), &server.options, Compression::Zstd)
        .expect("a sink");
    sink.prepare(&[route("even", "application/json")]).await.expect("prepared");
    sink.prepare(&[route("odd", "application/json; charset=utf-8")]).await.expect("prepared");
    let mut owner = sink.acquire(&shard()).await.expect("acquired");
    owner.writer.commit(&commit(0, 9), &Refusals::default()).await.expect("a commit");
    assert_eq!(Place::in_bucket(&server).lines().await, expected(9));

    let mut options = server.options;
    options.insert("aws_endpiont".into(), "x".into());
    let error = ObjectsSink::new(name, &s3::url(), &options, Compression::Zstd).err();
    assert!(error.expect("refused").to_string().contains("unknown option \"aws_endpiont\""));
}

/// With a wrong clock or expired credentials, the lane waits and reports the server's error.
#[tokio::test]
async fn a_server_that_refuses_us_is_waited_for_and_quoted() {
    let server = s3::start().await;
    let sink = Place::in_bucket(&server).sink(Compression::Gzip);
    let refuse = |refusal| *server.refusal.lock().expect("a lock") = refusal;
    let mut owner = sink.acquire(&shard()).await.expect("acquired");
    let mut from = 0;
    for (code, status) in [("RequestTimeTooSkewed", 403), ("ExpiredToken", 400), ("SlowDown", 503)]
    {
        refuse(Some((code, status)));
        let commit = commit(from, from + 9);
        let refused = owner.writer.commit(&commit, &Refusals::default()).await;
        let error = refused.expect_err(code).to_string();
        assert!(error.contains(code) && error.starts_with("sink logs: cannot"), "{error}");
        assert!(sink.acquire(&shard()).await.is_err(), "{code}");
        refuse(None);
        owner.writer.commit(&commit, &Refusals::default()).await.expect("a commit");
        from += 9;
    }
    assert_eq!(Place::in_bucket(&server).lines().await, expected(from));
}

#[tokio::test]
async fn a_file_url_is_a_folder_that_need_not_exist() {
    let folder = tempfile::tempdir().expect("a folder");
    let url = url::Url::from_directory_path(folder.path().join("new ä")).expect("a URL");
    let options = BTreeMap::new();
    let sink = ObjectsSink::new("logs".into(), &url, &options, Compression::None).expect("a sink");
    sink.prepare(&[route("even", "application/json")]).await.expect("prepared");
    let mut owner = sink.acquire(&shard()).await.expect("acquired");
    owner.writer.commit(&commit(0, 3), &Refusals::default()).await.expect("a commit");
    let data = folder.path().join("new ä/even/test/shardId-000000000003");
    let mut files = std::fs::read_dir(data).expect("the route's folder");
    let file = files.next().expect("an object").expect("an object").path();
    assert_eq!(std::fs::read_to_string(file).expect("text"), line_of(3) + "\n");
}

#[tokio::test]
async fn routes_that_are_no_lines_are_refused() {
    let sink = Place::folder().sink(Compression::None);
    let error = sink.prepare(&[route("cars", "application/x-bincode")]).await;
    let text = error.expect_err("refused").to_string();
    assert!(text.contains("route cars carries application/x-bincode"), "{text}");
    assert!(text.contains("application/json"), "{text}");
    let error = sink.prepare(&[route("_shardmill", "application/json")]).await;
    assert!(error.expect_err("refused").to_string().contains("claim log"));
}

#[tokio::test]
async fn a_store_that_overwrites_is_refused() {
    let place = Place::folder();
    let store = Faulty::over(Arc::clone(&place.store), Plan::Overwrites, 0);
    let error = place.sink_on(store, Compression::None).prepare(&[]).await;
    assert!(error.expect_err("refused").to_string().contains("exactly-once is impossible"));
}

#[tokio::test]
async fn refused_rows_are_recorded_before_anything_is_claimed() {
    let place = Place::folder();
    let sink = place.sink(Compression::None);
    sink.prepare(&[route("even", "application/json"), route("odd", "text/plain")])
        .await
        .expect("prepared");
    let mut owner = sink.acquire(&shard()).await.expect("acquired");
    let bad = commit_of(0, 9, |record| match record {
        3 => "no json".into(),
        4 => "two\nlines".into(),
        6 => "{\n\"id\": 6\n}".into(),
        _ => line_of(record).into(),
    });
    let unreachable = Refusals { out_of_reach: true, ..Refusals::default() };
    owner.writer.commit(&bad, &unreachable).await.expect_err("held first");
    assert_eq!(place.links().await.len(), 1, "only the fence");
    let refusals = Refusals::default();
    let done = owner.writer.commit(&bad, &refusals).await.expect("a commit");
    assert_eq!((done.rows_written, done.rows_refused), (4, 2));
    let recorded = refusals.recorded.into_inner().expect("a lock");
    assert!(
        recorded[0].contains("not valid JSON") && recorded[1].contains("newline"),
        "{recorded:?}"
    );
    let lines = place.lines().await;
    assert_eq!(lines["even"], ["{\"id\": 6}", "{\"id\":9}"]);
    assert_eq!(lines["odd"], [line_of(1), line_of(7)]);
}

#[tokio::test]
async fn a_fence_whose_reply_was_lost_stops_nobody() {
    let place = Place::folder();
    let lossy = Faulty::over(Arc::clone(&place.store), Plan::RepliesLost, 0);
    let broken = place.sink_on(lossy, Compression::Gzip);
    assert!(broken.acquire(&shard()).await.is_err());
    let sink = place.sink(Compression::Gzip);
    let owner = sink.acquire(&shard()).await.expect("acquired");
    assert_eq!((owner.position, owner.must_cut_at), (None, None));
}
