//! The objects sink: names that are too long, claim logs that cannot continue, and files that killed writers left.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use shardmill_core::sink::Sink as _;
use shardmill_sink_objects::{Compression, ObjectLayout, ObjectsSink};

use super::{Lines, files, ids, said};
use crate::sink_objects::support::{Refusals, commit, number, shard};
use crate::support::world::World;
use crate::support::{kill_until_it_ends, run, shardmill, wait_for};

/// Makes a pipeline into the folder `logs`.
fn lines(rows: &[String], sink: &str) -> Lines {
    Lines::new(rows, |folder| {
        let url = folder.join("logs");
        format!("type = \"objects\"\nurl = \"{}\"\ncompression = \"none\"\n{sink}", url.display())
    })
}

/// Returns all rows in data files, sorted.
fn rows(folder: &Path) -> Vec<String> {
    let data =
        files(folder).into_iter().filter(|file| !file.display().to_string().contains("_shardmill"));
    let mut rows: Vec<String> = data
        .flat_map(|file| {
            let text = std::fs::read_to_string(&file).expect("text");
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    rows.sort();
    rows
}

fn sorted(mut rows: Vec<String>) -> Vec<String> {
    rows.sort();
    rows
}

fn objects(lines: &Lines, command: &str, options: &[&str]) -> (bool, String) {
    said(&run(&[&["objects", command, &lines.path()], options].concat()))
}

#[test]
fn fault_08_a_row_whose_folder_is_too_long_is_a_dead_letter() {
    let row = |id: u64, city: &str| format!("{{\"id\":{id},\"city\":\"{city}\"}}");
    let sound = [row(0, "Köln"), row(1, &"ж".repeat(41)), row(2, &"x".repeat(200))];
    let long = [row(3, &"ж".repeat(48)), row(4, &"/".repeat(100)), row(5, &"x".repeat(201))];
    let all: Vec<String> = sound.iter().chain(&long).cloned().collect();
    let lines = lines(&all, "folder = \"city={row.city}\"");
    lines.run();
    assert_eq!(rows(&lines.at("logs")), sorted(sound.to_vec()));
    let reasons = lines.reasons();
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    let (sound, said) = objects(&lines, "verify", &["--content"]);
    assert!(sound, "{said}");
}

#[tokio::test]
async fn fault_08_a_row_whose_folder_is_too_long_is_a_dead_letter_on_s3() {
    let server = crate::sink_objects::s3::start().await;
    let layout = ObjectLayout {
        folder: "{route}/{row.city}".to_owned().try_into().expect("a template"),
        ..Compression::None.into()
    };
    let url = crate::sink_objects::s3::url();
    let sink = ObjectsSink::new("logs".into(), &url, &server.options, layout).expect("a sink");
    let mut owner = sink.acquire(&shard()).await.expect("acquired");
    let city = |record: u64| match record {
        1 => "ж".repeat(48),
        3 => "/".repeat(100),
        _ => "Köln".to_owned(),
    };
    let commit = crate::sink_objects::support::commit_of(0, 9, |record| {
        format!("{{\"id\":{record},\"city\":\"{}\"}}", city(record)).into()
    });
    let done = owner.writer.commit(&commit, &Refusals::default()).await.expect("committed");
    assert_eq!((done.rows_written, done.rows_refused), (4, 2));
}

#[tokio::test]
async fn fault_08_a_claim_log_under_a_long_path_is_refused_before_the_first_row() {
    let folder = tempfile::tempdir().expect("a folder");
    let deep = (0..20).fold(folder.path().to_owned(), |path, _| path.join("y".repeat(200)));
    let local = url::Url::from_directory_path(deep).expect("a URL");
    let s3 = format!("s3://bucket/{}", "zzz/".repeat(250)).parse().expect("a URL");
    for (url, limit) in [(local, "4094"), (s3, "1024")] {
        let options = BTreeMap::from([
            ("aws_endpoint".to_owned(), "http://127.0.0.1:9".to_owned()),
            ("aws_region".to_owned(), "x".to_owned()),
        ]);
        let options = if limit == "4094" { BTreeMap::new() } else { options };
        let sink = ObjectsSink::new("logs".into(), &url, &options, Compression::None);
        let sink = sink.expect("a sink");
        for cause in [
            sink.check(&[]).await.err(),
            sink.prepare(&[]).await.err(),
            sink.acquire(&shard()).await.err(),
            sink.reach(&shard()).await.err(),
        ] {
            let cause = cause.expect("refused").to_string();
            assert!(cause.contains(limit) && cause.contains("shorter path"), "{cause}");
        }
    }
}

/// A claim of an earlier version, which did not limit lengths.
#[tokio::test]
async fn fault_08_a_claim_that_can_never_be_kept_has_a_way_out() {
    let folder = tempfile::tempdir().expect("a folder");
    let url = url::Url::from_directory_path(folder.path()).expect("a URL");
    let sink = || {
        let options = BTreeMap::new();
        ObjectsSink::new("logs".into(), &url, &options, Compression::None).expect("a sink")
    };
    let refusals = Refusals::default();
    let mut owner = sink().acquire(&shard()).await.expect("acquired");
    owner.writer.commit(&commit(0, 9), &refusals).await.expect("committed");
    owner.writer.commit(&commit(9, 18), &refusals).await.expect("committed");
    let link = files(folder.path())
        .into_iter()
        .find(|file| file.ends_with("000000000003.json"))
        .expect("the second claim");
    let mut claim: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&link).expect("read")).expect("JSON");
    claim["version"] = 2.into();
    claim["claim"].as_object_mut().expect("an object").remove("limits");
    let written = claim["claim"]["data"][0]["key"].as_str().expect("a key");
    std::fs::remove_file(folder.path().join(written)).expect("removed");
    let key = format!("even/{}/x.ndjson", "%D0%B6".repeat(48));
    claim["claim"]["data"][0]["key"] = key.into();
    std::fs::write(&link, serde_json::to_vec(&claim).expect("JSON")).expect("written");
    // Such a claim blocks its shard, and the cause names the way out.
    let blocked = match sink().acquire(&shard()).await {
        Err(error) => error,
        Ok(mut owner) => owner.writer.commit(&commit(9, 18), &refusals).await.expect_err("blocked"),
    };
    assert!(blocked.to_string().contains("objects give-up"), "{blocked}");
    let done = sink().give_up(&shard(), None).await.expect("given up");
    assert_eq!((number(done.to.as_ref()), done.objects_removed.len()), (9, 1));
    // A second call, as after a crash between the two steps, finds nothing to remove.
    assert_eq!(sink().give_up(&shard(), None).await.expect("again").objects_removed.len(), 0);
    let mut owner = sink().acquire(&shard()).await.expect("acquired");
    assert_eq!((number(owner.position.as_ref()), owner.must_cut_at), (9, None));
    owner.writer.commit(&commit(9, 27), &refusals).await.expect("committed");
    let audit = sink().verify(true).await.expect("verified");
    assert!(audit.problems.is_empty(), "{:?}", audit.problems);
    assert_eq!(audit.rows, 18);
    let nothing = sink().give_up(&shard(), None).await.expect_err("nothing to give up").to_string();
    assert!(nothing.contains("nothing is given up"), "{nothing}");
}

#[test]
fn fault_12_a_log_is_not_fenced_again_while_another_sink_is_out_of_reach() {
    let (world, port) = (World::new(1), crate::support::free_port());
    let logs = world.folder.path().join("logs");
    let file = crate::support::pipeline::PipelineToml::new(world.folder.path(), "reading")
        .stream(crate::support::world::STREAM, "embedded", "")
        .route_all_to(&["logs", "mart"])
        .sink("logs", &format!("type = \"objects\"\nurl = \"{}\"", logs.display()))
        .sqlite("mart", "rows")
        .table(&crate::support::admin(port));
    let log = std::fs::File::create(world.log()).expect("a log");
    let mut command = shardmill(&["run", &file.write(), "-v"]);
    let run = command.stdout(std::process::Stdio::null()).stderr(log).spawn();
    let run = crate::support::Process(run.expect("the binary starts"));
    world.put(0..10, 3);
    world.wait_rows(10);
    let links =
        || files(&logs).iter().filter(|file| file.extension().is_some_and(|e| e == "json")).count();
    // Another owner acquires the shard in the table of the SQLite sink, and the pipeline cannot acquire it again.
    world
        .mart()
        .execute_batch(
            "BEGIN IMMEDIATE; UPDATE shardmill_position SET epoch = epoch + 1;
             CREATE TRIGGER held BEFORE UPDATE OF epoch ON shardmill_position
             BEGIN SELECT RAISE(ABORT, 'held'); END; COMMIT",
        )
        .expect("held");
    world.put(10..20, 3);
    wait_for("the shard to be lost", || world.logged("held"));
    let before = links();
    let tries = || -> u64 {
        let metrics = crate::support::http_get(port, "/metrics");
        let restarts =
            metrics.lines().find_map(|line| line.strip_prefix("shardmill_lane_restarts_total "));
        restarts.map_or(0, |count| count.trim().parse().expect("a number"))
    };
    let tried = tries();
    wait_for("a few more retries", || tries() > tried + 3);
    assert_eq!(links(), before, "links while the table is out of reach");
    world.mart().execute_batch("DROP TRIGGER held").expect("dropped");
    world.wait_rows(20);
    assert_eq!(run.terminate(), Some(0));
    world.assert_each_once_in_order(20);
}

#[test]
fn fault_29_a_folder_that_is_moved_away_is_noticed_and_goes_on_when_it_is_back() {
    let world = World::new(1);
    let (logs, away) = (world.folder.path().join("logs"), world.folder.path().join("away"));
    let file = crate::support::pipeline::PipelineToml::new(world.folder.path(), "reading")
        .stream(crate::support::world::STREAM, "embedded", "")
        .route_all_to(&["logs"])
        .sink(
            "logs",
            &format!("type = \"objects\"\nurl = \"{}\"\ncompression = \"none\"", logs.display()),
        );
    let log = std::fs::File::create(world.log()).expect("a log");
    let mut command = shardmill(&["run", &file.write(), "-v"]);
    let run = command.stdout(std::process::Stdio::null()).stderr(log).spawn();
    let run = crate::support::Process(run.expect("the binary starts"));
    world.put(0..10, 3);
    wait_for("the first rows", || rows(&logs).len() == 10);
    std::fs::rename(&logs, &away).expect("moved");
    world.put(10..20, 3);
    wait_for("the move to be noticed", || world.logged("was moved, deleted or replaced"));
    assert!(!logs.exists(), "no other folder is created in its place");
    std::fs::rename(&away, &logs).expect("moved back");
    wait_for("all rows", || rows(&logs).len() == 20);
    assert_eq!(run.terminate(), Some(0));
    let found = sorted(rows(&logs));
    assert!(found.windows(2).all(|pair| pair[0] != pair[1]), "{found:?}");
}

#[test]
fn fault_22_a_log_that_lost_its_last_object_goes_on_at_the_checkpoint() {
    let lines = lines(&ids(10), "");
    // Two claims, so that the log's position lies within the shard when the last object is deleted.
    let file = lines.file.text().replace("linger = \"50 ms\"", "linger = \"50 ms\"\nrows = 5");
    let file = file.replacen("[[stage]]", "[source.batch]\nrecords = 5\n[[stage]]", 1);
    let path = lines.at("pipeline.toml");
    std::fs::write(&path, file).expect("written");
    let path = path.display().to_string();
    crate::support::run_ok(&["run", &path]);
    let data = || {
        let is_data = |file: &PathBuf| file.extension().is_some_and(|ending| ending == "ndjson");
        files(&lines.at("logs")).into_iter().filter(is_data).collect::<Vec<_>>()
    };
    assert_eq!(data().len(), 2);
    data().iter().for_each(|file| std::fs::remove_file(file).expect("removed"));
    let (ran, text) = said(&run(&["run", &path]));
    assert!(!ran, "{text}");
    let shard = shard_of(&lines);
    let log = ["--sink", "out", "--shard", &shard, "--why", "90 days"];
    let (done, text) = said(&run(&[&["objects", "skip", &path], &log[..]].concat()));
    assert!(done, "{text}");
    crate::support::run_ok(&["run", &path]);
    assert!(data().is_empty(), "nothing is written twice");
    let (_, text) = said(&run(&["objects", "verify", &path]));
    assert!(text.contains("hole") && text.contains("90 days"), "{text}");
    let (done, text) = said(&run(&[&["objects", "skip", &path], &log[..]].concat()));
    assert!(!done && text.contains("nothing is skipped"), "{text}");
}

#[test]
fn fault_22_a_log_that_is_gone_goes_on_at_the_checkpoint() {
    for kept in [false, true] {
        let lines = lines(&ids(10), "");
        lines.run();
        let shard = shard_of(&lines);
        // Deletes everything but the fences, or everything.
        lines.run();
        for file in files(&lines.at("logs")) {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            if !(kept && text.contains("\"claim\": null")) {
                std::fs::remove_file(&file).expect("removed");
            }
        }
        let log = ["--sink", "out", "--shard", &shard];
        let (done, text) = objects(&lines, "skip", &log);
        assert!(done, "{text}");
        lines.run();
        assert!(rows(&lines.at("logs")).is_empty(), "nothing is written twice");
    }
}

/// Returns the only shard of a pipeline's log.
fn shard_of(lines: &Lines) -> String {
    let log = files(&lines.at("logs")).into_iter().find(|file| file.ends_with("000000000001.json"));
    let folder = log.expect("a link").parent().expect("a folder").to_owned();
    let name = folder.file_name().expect("a name").to_str().expect("text");
    name.to_owned()
}

#[test]
fn fault_31_check_writes_no_object_unless_asked() {
    let lines = lines(&ids(1), "");
    let (sound, said) = lines.check(&[]);
    assert!(sound && !lines.at("logs").exists(), "{said}");
    let (sound, said) = lines.check(&["--write"]);
    assert!(sound && lines.at("logs/_shardmill").exists(), "{said}");
    let (sound, said) = self::lines(&ids(1), "").check_as_nobody();
    assert!(!sound && said.contains("cannot write files in"), "{said}");
}

#[tokio::test]
async fn fault_31_check_writes_nothing_on_s3() {
    let server = crate::sink_objects::s3::start().await;
    let url = crate::sink_objects::s3::url();
    let sink =
        ObjectsSink::new("logs".into(), &url, &server.options, Compression::None).expect("a sink");
    let warnings = sink.check(&[]).await.expect("reached");
    assert!(warnings[0].contains("--write"), "{warnings:?}");
    let place = crate::sink_objects::support::Place::in_bucket(&server);
    assert_eq!((place.keys(true).await, place.keys(false).await), (Vec::new(), Vec::new()));
    *server.refusal.lock().expect("a lock") = Some(("AccessDenied", 403));
    assert!(sink.check(&[]).await.is_err());
}

/// Returns files that are not objects: those with a `#` in the name, and those in `_shardmill/.tmp/`.
fn odd(folder: &Path) -> Vec<PathBuf> {
    let is_odd = |file: &PathBuf| {
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let (text, own) = (file.display().to_string(), name.contains('#'));
        own || text.contains("/_shardmill/.tmp/")
    };
    files(folder).into_iter().filter(is_odd).collect()
}

#[test]
fn fault_42_leftovers_are_named_and_removed() {
    let lines = lines(&ids(100), "");
    lines.run();
    let logs = lines.at("logs");
    let all = files(&logs);
    let plant = |name: &str| {
        let file = all.iter().find(|file| file.display().to_string().ends_with(name)).expect(name);
        let left = PathBuf::from(format!("{}#1", file.display()));
        std::fs::copy(file, &left).expect("copied");
    };
    plant(".ndjson");
    plant("000000000001.json");
    std::fs::create_dir_all(logs.join("_shardmill/.tmp")).expect("a folder");
    std::fs::write(logs.join("_shardmill/.tmp/0123456789abcdef"), "half").expect("written");
    let foreign = logs.join("notes#1");
    std::fs::write(&foreign, "not ours").expect("written");
    let (sound, text) = objects(&lines, "verify", &[]);
    assert!(!sound && text.matches("leftover: ").count() == 3, "{text}");
    assert!(text.contains("notes#1") && text.contains("1 temporary files"), "{text}");
    lines.run();
    wait_for("leftovers to be removed", || odd(&logs) == [foreign.clone()]);
}

#[test]
fn fault_42_nothing_is_left_where_readers_look_by_writers_that_are_killed() {
    let rows_expected: Vec<String> =
        (0..20_000).map(|id| format!("{{\"id\":{id},\"n\":{}}}", id % 40)).collect();
    let lines = lines(&rows_expected, "folder = \"n={row.n}\"");
    let (path, logs) = (lines.path(), lines.at("logs"));
    let beside = || {
        odd(&logs).into_iter().filter(|file| !file.display().to_string().contains("/.tmp/")).count()
    };
    kill_until_it_ends(42, || {
        assert_eq!(beside(), 0, "files beside the data");
        shardmill(&["run", &path])
    });
    wait_for("leftovers to be removed", || odd(&logs).is_empty());
    assert_eq!(rows(&logs), sorted(rows_expected));
    let (sound, text) = objects(&lines, "verify", &["--content"]);
    assert!(sound, "{text}");
}

/// A sink with a name or place that no start has seen has no log yet. The command would begin a second log beside the
/// real one.
#[test]
fn fault_22_no_log_is_begun_for_a_sink_that_a_start_has_not_resolved() {
    let all: Vec<String> = (0..20).map(|id| format!("{{\"id\":{id}}}")).collect();
    let lines = lines(&all, "");
    lines.run();
    let before = files(&lines.at("logs")).len();
    let path = lines.path();
    let text = std::fs::read_to_string(&path).expect("read");
    let named = text.replace("name = \"out\"", "name = \"new\"\nrenamed_from = \"out\"");
    let named = named.replace("[\"out\"]", "[\"new\"]");
    let url = lines.at("logs").display().to_string();
    let moved = text.replace(&url, &lines.at("moved").display().to_string());
    assert!(named != text && moved != text, "{text}");
    for (changed, sink, cause) in
        [(&named, "new", "start it once"), (&moved, "out", "start the pipeline once")]
    {
        std::fs::write(&path, changed).expect("written");
        for command in ["skip", "give-up"] {
            let log = ["--sink", sink, "--shard", "file-000000000000"];
            let (done, printed) = said(&run(&[&["objects", command, &path], &log[..]].concat()));
            assert!(!done && printed.contains(cause), "{command} {sink}: {printed}");
        }
    }
    assert_eq!(files(&lines.at("logs")).len(), before);
    assert!(!lines.at("moved").exists());
    std::fs::write(&path, &named).expect("written");
    let (done, printed) = said(&run(&["run", &path]));
    assert!(done, "{printed}");
    assert_eq!(rows(&lines.at("logs")), sorted(all));
}

/// The claims of a file's lines lie in a folder named after the file's path. Regression: `check` used only the key of
/// the sink's positions, and looked in another folder.
#[test]
fn fault_31_check_finds_the_claims_of_a_file() {
    let mut some = ids(10);
    some.push("no object".into());
    let Lines { folder, file } = lines(&some, "");
    let dead_letters = folder.path().join("letters");
    let copies = format!("type = \"objects\"\nurl = \"{}\"", dead_letters.display());
    let file = file.table("[dead_letters]\nsinks = [\"copies\"]").sink("copies", &copies);
    let lines = Lines { folder, file };
    lines.run();
    assert_eq!(lines.reasons().len(), 1);
    wait_for("the copied dead letter", || files(&dead_letters).len() > 1);
    let (sound, said) = lines.check(&[]);
    assert!(sound && !said.contains("an earlier position"), "{said}");
    // The commands that write to the log of the copies find it too; positions of copies are in a state of their own.
    let log = ["--sink", "copies", "--shard", "letters-000000000000"];
    let (_, said) = objects(&lines, "skip", &log);
    assert!(!said.contains("has no checkpoint"), "{said}");
    // `check` looks in the right folder: it reports when the claims there are deleted.
    for (folder, sink) in [(lines.at("logs"), "out"), (dead_letters, "copies")] {
        let claims = folder.join("_shardmill");
        std::fs::remove_dir_all(&claims).expect("removed");
        let (_, said) = lines.check(&[]);
        assert!(said.contains(&format!("sink {sink} has an earlier position")), "{said}");
    }
}
