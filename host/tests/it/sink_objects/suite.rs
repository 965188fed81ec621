//! Tests that every store must pass: run once on a folder, once on S3.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use object_store::ObjectStoreExt;
use shardmill_core::record::SinkName;
use shardmill_core::sink::{Acquired, Sink, SinkError};
use shardmill_sink_objects::{
    Compression, FolderTemplate, ObjectFormat, ObjectLayout, ObjectsSink,
};

use super::faults::{Faulty, Plan, Random};
use super::support::{
    Place, Refusals, commit, commit_of, expected, number, position, route_of, shard,
};

const COMPRESSIONS: [Compression; 3] = [Compression::None, Compression::Gzip, Compression::Zstd];

async fn acquire(sink: &impl Sink) -> Acquired {
    sink.acquire(&shard()).await.expect("the shard is acquired")
}

fn cause<T>(result: Result<T, SinkError>) -> String {
    match result {
        Err(SinkError::Unavailable { cause, .. }) => cause,
        Err(other) => panic!("unexpected error: {other}"),
        Ok(_) => panic!("expected an error"),
    }
}

/// Commits one range after another; each new owner goes on at the position of the previous one.
pub async fn each_row_is_written_once(place: Place) {
    let refusals = Refusals::default();
    for (round, compression) in (0..).zip(COMPRESSIONS) {
        let sink = place.sink(compression);
        let mut shard = acquire(&sink).await;
        assert_eq!(number(shard.position.as_ref()), round * 20);
        assert!(shard.keeps_position && shard.must_cut_at.is_none());
        for from in [round * 20, round * 20 + 10] {
            let commit = commit(from, from + 10);
            let done = shard.writer.commit(&commit, &refusals).await.expect("a commit");
            assert_eq!(done.rows_written, commit.rows.len() as u64);
            let again = shard.writer.commit(&commit, &refusals).await.expect("already done");
            assert_eq!(again.rows_written, 0);
        }
        let stands = sink.position(&super::support::shard()).await.expect("a position");
        assert_eq!(number(stands.as_ref()), round * 20 + 20);
    }
    assert_eq!(place.lines().await, expected(60));
    let names = place.keys(false).await;
    for ending in [".ndjson", ".ndjson.gz", ".ndjson.zst"] {
        assert_eq!(names.iter().filter(|key| key.as_ref().ends_with(ending)).count(), 4);
    }
}

/// A commit whose records were all filtered moves the position.
pub async fn a_commit_without_rows_moves_the_position(place: Place) {
    let sink = place.sink(Compression::None);
    let mut first = acquire(&sink).await;
    let mut empty = commit(0, 7);
    empty.rows = Arc::default();
    first.writer.commit(&empty, &Refusals::default()).await.expect("a commit");
    assert!(place.keys(false).await.is_empty());
    assert_eq!(number(acquire(&sink).await.position.as_ref()), 7);
}

/// An owner that was replaced cannot commit, however often it tries.
pub async fn a_zombie_is_fenced(place: Place) {
    let sink = place.sink(Compression::Gzip);
    let refusals = Refusals::default();
    let mut zombie = acquire(&sink).await;
    zombie.writer.commit(&commit(0, 5), &refusals).await.expect("a commit");
    let mut owner = acquire(&sink).await;
    assert_eq!(owner.position, Some(position(5)));
    for _ in 0..2 {
        let fenced = zombie.writer.commit(&commit(5, 9), &refusals).await;
        assert!(matches!(fenced, Err(SinkError::Fenced { .. })), "{fenced:?}");
    }
    owner.writer.commit(&commit(5, 8), &refusals).await.expect("a commit");
    assert_eq!(place.lines().await, expected(8));
}

/// A claim whose data is missing is produced again, with the same content and keys, however many owners came and went
/// in between.
pub async fn an_unfinished_claim_is_produced_again(place: Place) {
    let refusals = Refusals::default();
    let sink = place.sink(Compression::Gzip);
    acquire(&sink).await.writer.commit(&commit(0, 4), &refusals).await.expect("a commit");
    let broken = place
        .sink_on(Faulty::over(place.store.clone(), Plan::DataNeverLands, 0), Compression::Gzip);
    let mut crashing = acquire(&broken).await;
    cause(crashing.writer.commit(&commit(4, 10), &refusals).await);
    // The next owners have other settings: the claim's keys and compression still apply.
    let sink = place.sink(Compression::None);
    for _ in 0..3 {
        let stands = sink.position(&shard()).await.expect("a position");
        assert_eq!(stands, Some(position(4)));
        let owner = acquire(&sink).await;
        assert_eq!((owner.position, owner.must_cut_at), (Some(position(4)), Some(position(10))));
    }
    let mut owner = acquire(&sink).await;
    let text = cause(owner.writer.commit(&commit(4, 9), &refusals).await);
    assert!(text.contains("ends at 9") && text.contains("up to 10"), "{text}");
    owner.writer.commit(&commit(4, 10), &refusals).await.expect("the promised commit");
    owner.writer.commit(&commit(10, 12), &refusals).await.expect("the next commit");
    assert_eq!(place.lines().await, expected(12));
    let promised: Vec<_> = place
        .links()
        .await
        .iter()
        .flat_map(|link| link["claim"]["data"].as_array().cloned().unwrap_or_default())
        .map(|data| format!("{}/{}", place.prefix, data["key"].as_str().unwrap_or_default()))
        .collect();
    let mut written: Vec<_> = place.keys(false).await.iter().map(ToString::to_string).collect();
    let mut promised = promised;
    promised.sort();
    written.sort();
    assert_eq!(written, promised);
    // The crashed owner was only paused. Its store still fails, and no row is written twice.
    assert!(crashing.writer.commit(&commit(4, 10), &refusals).await.is_err());
    assert_eq!(place.lines().await, expected(12));
}

/// A renamed sink goes on with the claim log of its old name, at the same position and with the same claims. Nobody
/// can append to the old log any more.
pub async fn fault_25_a_renamed_sink_keeps_the_promises_of_its_old_name(place: Place) {
    let refusals = Refusals::default();
    let old = place.sink(Compression::Gzip);
    let new = |name: &str| {
        let (store, prefix) = (Arc::clone(&place.store), place.prefix.clone());
        ObjectsSink::with_store(SinkName::from(name), store, prefix, Compression::Gzip)
    };
    let (logs, second, third) = (SinkName::from("logs"), new("second"), new("third"));
    second.adopt(&logs, &shard()).await.expect("nothing to move");
    assert_eq!(second.position(&shard()).await.expect("a position"), None);
    acquire(&old).await.writer.commit(&commit(0, 4), &refusals).await.expect("a commit");
    let broken = place
        .sink_on(Faulty::over(place.store.clone(), Plan::DataNeverLands, 0), Compression::Gzip);
    let mut crashing = acquire(&broken).await;
    cause(crashing.writer.commit(&commit(4, 10), &refusals).await);
    for _ in 0..2 {
        second.adopt(&logs, &shard()).await.expect("moved");
        assert_eq!(second.position(&shard()).await.expect("a position"), Some(position(4)));
    }
    let mut owner = acquire(&second).await;
    assert_eq!((owner.position, owner.must_cut_at), (Some(position(4)), Some(position(10))));
    owner.writer.commit(&commit(4, 10), &refusals).await.expect("the promised commit");
    owner.writer.commit(&commit(10, 12), &refusals).await.expect("the next commit");
    assert!(crashing.writer.commit(&commit(4, 10), &refusals).await.is_err());
    // A second rename, when the data of all claims exists.
    third.adopt(&"second".into(), &shard()).await.expect("moved");
    let mut owner = acquire(&third).await;
    assert_eq!((owner.position, owner.must_cut_at), (Some(position(12)), None));
    owner.writer.commit(&commit(12, 15), &refusals).await.expect("a commit");
    assert_eq!(place.lines().await, expected(15));
    let audit = third.verify(true).await.expect("verified");
    assert!(audit.problems.is_empty(), "{audit:?}");
    // Both logs have claims: the sink does not guess which log counts.
    let text = cause(third.adopt(&logs, &shard()).await);
    assert!(text.contains("are both claim logs with claims"), "{text}");
}

/// The same writer repeats the same commit: existing objects are kept, missing ones are written.
pub async fn a_writer_goes_on_after_an_error(place: Place) {
    let refusals = Refusals::default();
    let lossy =
        place.sink_on(Faulty::over(place.store.clone(), Plan::Percent(50), 7), Compression::None);
    let mut owner = loop {
        if let Ok(owner) = lossy.acquire(&shard()).await {
            break owner;
        }
    };
    let mut errors = 0;
    for from in (0..40).step_by(4) {
        while owner.writer.commit(&commit(from, from + 4), &refusals).await.is_err() {
            errors += 1;
        }
    }
    assert!(errors > 5, "the plan failed only {errors} times");
    assert_eq!(place.lines().await, expected(40));
}

/// Objects of an earlier owner are never mixed with other content of a later run.
pub async fn other_content_is_not_mixed_in(place: Place) {
    let refusals = Refusals::default();
    let half = Faulty::over(place.store.clone(), Plan::OnlyRoute("even"), 0);
    let mut crashing = acquire(&place.sink_on(half, Compression::None)).await;
    cause(crashing.writer.commit(&commit(0, 6), &refusals).await);
    let sink = place.sink(Compression::None);
    let mut owner = acquire(&sink).await;
    assert_eq!(owner.must_cut_at, Some(position(6)));
    let other = commit_of(0, 6, |record| format!("{{\"other\":{record}}}").into());
    let text = cause(owner.writer.commit(&other, &refusals).await);
    assert!(text.contains("generation-1") && text.contains("even"), "{text}");
    let mut fewer = commit(0, 6);
    let even = fewer.rows.iter().filter(|row| row.route.name().as_str() == "even");
    fewer.rows = Arc::new(even.cloned().collect());
    let text = cause(owner.writer.commit(&fewer, &refusals).await);
    assert!(text.contains("[\"even\", \"odd\"]"), "{text}");
    owner.writer.commit(&commit(0, 6), &refusals).await.expect("the promised content");
    assert_eq!(place.lines().await, expected(6));
}

/// A bucket may delete old objects: links at the front of the log disappear first.
pub async fn a_log_without_its_first_links_is_read(place: Place) {
    let sink = place.sink(Compression::None);
    let refusals = Refusals::default();
    let mut owner = acquire(&sink).await;
    for from in 0..33 {
        owner.writer.commit(&commit(from, from + 1), &refusals).await.expect("a commit");
    }
    for gone in [1, 20] {
        let links = place.keys(true).await;
        for link in &links[..gone] {
            place.store.delete(link).await.expect("deleted");
        }
        let stands = sink.position(&shard()).await.expect("a position");
        assert_eq!(number(stands.as_ref()), 33);
        assert_eq!(number(acquire(&sink).await.position.as_ref()), 33);
    }
    // More links are missing than those at the front: the newest link still counts.
    let links = place.keys(true).await;
    place.store.delete(&links[3]).await.expect("deleted");
    assert_eq!(number(acquire(&sink).await.position.as_ref()), 33);
}

/// Owners come, crash after any step and resume: at the end each row is there once.
pub async fn a_crash_between_any_two_steps_loses_nothing(place: Place, seed: u64) {
    const LAST: u64 = 40;
    let mut random = Random::new(seed);
    let mut zombies: Vec<(Acquired, u64, u64)> = Vec::new();
    let refusals = Refusals::default();
    let sink = place.sink_on(
        Faulty::over(place.store.clone(), Plan::Percent(15), seed),
        COMPRESSIONS[(seed % 3) as usize],
    );
    loop {
        let Ok(mut owner) = sink.acquire(&shard()).await else { continue };
        let mut stands = number(owner.position.as_ref());
        let mut must_cut_at = owner.must_cut_at.take();
        while stands < LAST {
            let cut = (stands + 1 + random.below(8)).min(LAST);
            let to = must_cut_at.as_ref().map_or(cut, |cut| number(Some(cut)));
            if owner.writer.commit(&commit(stands, to), &refusals).await.is_ok() {
                (stands, must_cut_at) = (to, None);
                if random.percent(15) {
                    zombies.push((owner, stands, (to + 3).min(LAST)));
                    break;
                }
            } else if random.percent(50) {
                zombies.push((owner, stands, to));
                break;
            } else {
                // The same commit is repeated: the next random end must not change it.
                must_cut_at = Some(position(to));
            }
        }
        if random.percent(30) {
            wake(&mut zombies, &mut random).await;
        }
        if stands == LAST {
            break;
        }
    }
    for _ in 0..3 {
        wake(&mut zombies, &mut random).await;
    }
    let stands = place.sink(Compression::None).position(&shard()).await.expect("a position");
    assert_eq!(number(stands.as_ref()), LAST, "seed {seed}");
    assert_eq!(place.lines().await, expected(LAST), "seed {seed}");
}

/// Lets a zombie repeat its commit. It may succeed only in what it had claimed; the content of the store at the end
/// decides.
async fn wake(zombies: &mut [(Acquired, u64, u64)], random: &mut Random) {
    let refusals = Refusals::default();
    for (zombie, from, to) in zombies.iter_mut() {
        if random.percent(60) {
            drop(zombie.writer.commit(&commit(*from, *to), &refusals).await);
        }
    }
}

/// Many owners acquire the shard at the same time, and only one can commit.
pub async fn of_many_owners_one_commits(place: Place) {
    let sink = place.sink(Compression::None);
    let owners = futures::future::join_all((0..8).map(|_| acquire(&sink))).await;
    let results: Vec<_> =
        futures::stream::iter(owners)
            .map(|mut owner| async move {
                owner.writer.commit(&commit(0, 9), &Refusals::default()).await
            })
            .buffer_unordered(8)
            .collect()
            .await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    let fenced = |result: &&Result<_, _>| matches!(result, Err(SinkError::Fenced { .. }));
    assert_eq!(results.iter().filter(fenced).count(), 7);
    assert_eq!(place.lines().await, expected(9));
}

/// An object that is too large for one request.
pub async fn a_large_object_goes_up_in_parts(place: Place) {
    let layout = ObjectLayout {
        format: ObjectFormat::Raw,
        compression: Compression::None,
        folder: FolderTemplate::default(),
    };
    let sink =
        ObjectsSink::with_store("logs".into(), place.store.clone(), place.prefix.clone(), layout);
    let mut owner = acquire(&sink).await;
    let piece = |record: u64| Bytes::from(vec![u8::try_from(record).expect("few"); 9 << 20]);
    let large = commit_of(0, 12, piece);
    owner.writer.commit(&large, &Refusals::default()).await.expect("a commit");
    owner.writer.commit(&large, &Refusals::default()).await.expect("already done");
    for key in place.keys(false).await {
        let is_even = key.as_ref().contains("/even/");
        let expected: Vec<u8> = (1..=12)
            .filter(|record| route_of(*record) == Some(if is_even { "even" } else { "odd" }))
            .flat_map(|record| piece(record).to_vec())
            .collect();
        assert!(key.as_ref().ends_with(".bin"), "{key}");
        assert!(place.get(&key).await == expected, "{key} differs");
    }
    assert_eq!(place.keys(false).await.len(), 2);
    assert!(sink.verify(true).await.expect("verified").problems.is_empty());
}

/// Rows go to the folders that a template names. A claim is completed with the template that it was made with.
pub async fn folders_are_named_by_rows(place: Place) {
    let layout = |folder: &str| ObjectLayout {
        format: ObjectFormat::Ndjson,
        compression: Compression::Gzip,
        folder: FolderTemplate::try_from(folder.to_owned()).expect("a template"),
    };
    let sink_at = |store, folder: &str| {
        ObjectsSink::with_store("logs".into(), store, place.prefix.clone(), layout(folder))
    };
    let (refusals, by_id) = (Refusals::default(), "dt={date}/id={row.id}");
    let broken = Faulty::over(place.store.clone(), Plan::DataNeverLands, 0);
    let mut crashing = acquire(&sink_at(broken, by_id)).await;
    cause(crashing.writer.commit(&commit(0, 4), &refusals).await);
    let sink = sink_at(place.store.clone(), "{route}");
    let mut owner = acquire(&sink).await;
    owner.writer.commit(&commit(0, 4), &refusals).await.expect("the promised commit");
    owner.writer.commit(&commit(4, 7), &refusals).await.expect("the next commit");
    let keys: Vec<String> = place.keys(false).await.iter().map(ToString::to_string).collect();
    let folders: Vec<&str> = keys
        .iter()
        .map(|key| {
            let below = key.strip_prefix(place.prefix.as_ref()).expect("below the prefix");
            below.trim_start_matches('/').rsplit_once('/').expect("a folder").0
        })
        .collect();
    let day = "dt=1970-01-01";
    let expected = [format!("{day}/id=1"), format!("{day}/id=3"), format!("{day}/id=4")];
    let expected: Vec<&str> = expected.iter().map(String::as_str).chain(["even", "odd"]).collect();
    assert_eq!(folders, expected);
    // If the folder does not contain the route's name, the file's name does: two routes never share an object.
    assert!(
        keys[1].ends_with("-even.ndjson.gz") && keys[0].ends_with("-odd.ndjson.gz"),
        "{keys:?}"
    );
    let audit = sink.verify(true).await.expect("verified");
    assert_eq!((audit.objects, audit.rows, audit.problems.len()), (5, 5, 0), "{audit:?}");
}

/// `verify` finds what is wrong in a bucket, and nothing else.
pub async fn verify_finds_what_is_wrong(place: Place) {
    let refusals = Refusals::default();
    let sink = place.sink(Compression::Zstd);
    let found = || async {
        let audit = sink.verify(true).await.expect("verified");
        let mut kinds: Vec<String> =
            audit.problems.iter().map(|problem| problem.kind.to_string()).collect();
        kinds.sort();
        (kinds.join(" "), audit)
    };
    for from in [0, 6, 12] {
        // A new owner for each commit puts fences between the claims.
        acquire(&sink).await.writer.commit(&commit(from, from + 6), &refusals).await.expect("done");
    }
    let (kinds, audit) = found().await;
    assert_eq!((kinds.as_str(), audit.logs, audit.links, audit.objects), ("", 1, 6, 6));
    assert_eq!(audit.rows, 12);

    let last = place.keys(false).await.into_iter().next_back().expect("an object");
    let bytes = place.get(&last).await;
    place.store.delete(&last).await.expect("deleted");
    let (kinds, audit) = found().await;
    assert_eq!((kinds.as_str(), audit.unfinished), ("", 1), "a run would write it again");
    place.store.put(&last, bytes.clone().into()).await.expect("put back");

    let stray = place.prefix.clone().join("even").join("stray.ndjson");
    place.store.put(&stray, "{}\n".into()).await.expect("put");
    assert_eq!(found().await.0, "orphan");
    place.store.delete(&stray).await.expect("deleted");

    let first = place.keys(false).await.remove(0);
    let original = place.get(&first).await;
    place.store.delete(&first).await.expect("deleted");
    let (kinds, audit) = found().await;
    assert_eq!(kinds, "gap");
    assert!(audit.problems[0].detail.contains("which is missing"), "{audit:?}");
    place.store.put(&first, bytes.into()).await.expect("put");
    assert_eq!(found().await.0, "damaged");
    place.store.put(&first, original.into()).await.expect("put back");
    assert_eq!(found().await.0, "");

    // A log that covers the second range twice: once as it is, once from the start of the first range.
    let links = place.keys(true).await;
    let link = links.iter().rfind(|link| link.extension() == Some("json")).expect("a link");
    let text = String::from_utf8(place.get(link).await.to_vec()).expect("text");
    let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    json["from"] = serde_json::Value::Null;
    place.store.put(link, json.to_string().into()).await.expect("put");
    assert_eq!(found().await.0, "overlap");
    place.store.put(link, text.into()).await.expect("put back");
    place.store.delete(&links[3]).await.expect("deleted");
    let kinds = found().await.0;
    assert!(kinds.contains("gap") && kinds.contains("orphan"), "{kinds}");
}
