//! Memory is counted by what is kept alive, and rows keep at most twice their own bytes.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Stdio;

use tempfile::NamedTempFile;

use super::{key_of, metric, one_key, put_on, start};
use crate::assets;
use crate::hostile::wat::component;
use crate::support::pipeline::PipelineToml;
use crate::support::world::{STREAM, World};
use crate::support::{Process, admin, free_port, postgres, run_ok, shardmill, wait_for};
use crate::walls::memory::{
    LIMITS, MIB, assert_below, assert_peak_below, bound, follow, output_and_peak,
};

/// Adds a sink that nobody answers, so that its rows stay in memory, and `[admin]` on this port.
fn blocked(file: PipelineToml, port: u16) -> PipelineToml {
    let nobody = free_port();
    file.table(&format!(
        "[[sink]]\nname = \"hook\"\ntype = \"http\"\nurl = \"http://127.0.0.1:{nobody}/\"\n\
         private = true\nformat = \"ndjson\"\ncommit = {{ linger = \"20 ms\" }}\n{}",
        admin(port)
    ))
}

/// Makes a plugin whose every answer has an arena of 12 MiB, of which each output is one byte: `1`.
fn large_answers() -> NamedTempFile {
    let edits = [
        ("(memory (export \"memory\") 64)", "(memory (export \"memory\") 224)"),
        (
            "(i32.store (i32.const 4100) (i32.const 4352))",
            "(i32.store (i32.const 4100) (i32.const 16))
             (i32.store (i32.const 4104) (i32.const 12582912))",
        ),
        (
            "(i32.store offset=16 (local.get $output) (i32.const -1))",
            "(i32.store offset=16 (local.get $output) (i32.const 0))",
        ),
        (
            "(i32.store offset=20 (local.get $output) (i32.const 0))",
            "(i32.store offset=20 (local.get $output) (i32.const 1))",
        ),
        ("application/octet-stream", "application/json"),
        ("\\30\\00\\00\\00\\18\\00\\00\\00", "\\30\\00\\00\\00\\10\\00\\00\\00"),
    ];
    by_hand(&edits)
}

/// Makes a plugin that rejects everything, each time with the same 8 KiB as the reason.
fn long_reasons() -> NamedTempFile {
    let edits = [
        ("(memory (export \"memory\") 64)", "(memory (export \"memory\") 224)"),
        (
            "(i32.store (i32.const 4100) (i32.const 4352))",
            "(i32.store (i32.const 4100) (i32.const 10485760))
             (i32.store (i32.const 4104) (i32.const 8192))
             (memory.fill (i32.const 10485760) (i32.const 120) (i32.const 8192))",
        ),
        // Moves the rejects to 8 MiB: there are more of them than fit below the memory that the host allocates.
        (
            "(i32.store (i32.const 4116) (i32.const 4352))",
            "(i32.store (i32.const 4116) (i32.const 8388608))",
        ),
        (
            "(i32.store (i32.const 4112) (i32.mul (i32.div_u (local.get $words) (i32.const 10)) (i32.const 6)))",
            "(i32.store (i32.const 4120) (i32.mul (i32.div_u (local.get $words) (i32.const 10)) (i32.const 3)))",
        ),
        ("(local.set $output (i32.const 4352))", "(local.set $output (i32.const 8388608))"),
        (
            "(i32.store offset=8 (local.get $output) (i32.const -1))",
            "(i32.store offset=8 (local.get $output) (i32.const 8192))",
        ),
        (
            "(local.set $output (i32.add (local.get $output) (i32.const 24)))",
            "(local.set $output (i32.add (local.get $output) (i32.const 12)))",
        ),
    ];
    by_hand(&edits)
}

/// Makes a component from the skeleton of handwritten plugins with these edits; returns its file.
fn by_hand(edits: &[(&str, &str)]) -> NamedTempFile {
    let mut text = assets::SKELETON_WAT.to_owned();
    for (from, to) in edits {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    component(&text, "plugin")
}

/// Forty rows of one byte, each from an answer of 12 MiB, wait for a sink.
#[test]
fn wall_02_a_row_of_one_byte_does_not_keep_the_answer_that_it_came_in() {
    const RECORDS: usize = 40;
    let world = World::new(1);
    put_on(&world, &world.open_shards()[0], std::iter::repeat_n(b"{}".to_vec(), RECORDS));
    let port = free_port();
    let plugin = large_answers();
    let lines = "format = \"application/json\"\nbatch = { records = 1 }";
    let file = PipelineToml::new(world.folder.path(), "reading").pipeline("buffer = \"8 MiB\"");
    let file = file.stream(STREAM, "embedded", lines);
    let path = plugin.path().display().to_string();
    let file = file.stage("large", &path, &format!("{LIMITS}\nroutes = {{ out = [\"hook\"] }}"));
    let run = start(&world, &blocked(file, port).write());
    wait_for("the records", || metric(port, "shardmill_source_records_total") as usize == RECORDS);
    assert_below(&run, bound(8, 8, 1, 1));
    let occupied = metric(port, "shardmill_buffer_bytes");
    assert!(occupied < 100_000.0, "{occupied} bytes are in use for {RECORDS} rows of a byte");
}

/// If a filter passes one record of a batch, that record stays in memory, not the batch.
#[test]
fn wall_02_rows_of_a_strict_filter_are_charged_for_themselves() {
    const BATCHES: usize = 60;
    const RECORDS: usize = 100;
    let world = World::new(1);
    // Each aggregate fills a batch, and one of its records passes.
    let filler = "x".repeat(2_000);
    let batch = || {
        let event = |index: usize| {
            let keep = if index == RECORDS / 2 { "yes" } else { "no" };
            format!("{{\"id\":{index},\"keep\":\"{keep}\",\"filler\":\"{filler}\"}}").into_bytes()
        };
        one_key("key", (0..RECORDS).map(event))
    };
    put_on(&world, &world.open_shards()[0], std::iter::repeat_with(batch).take(BATCHES));
    let port = free_port();
    let file = PipelineToml::new(world.folder.path(), "reading").pipeline("buffer = \"4 MiB\"");
    let file = file.stream(STREAM, "embedded", "format = \"application/json\"");
    let file = file.stage(
        "route",
        "route-json",
        &format!(
            "config = {{ default = \"filter\", rules = [{{ field = \"keep\", equals = \"yes\", route = \"all\" }}] }}\n\
             {LIMITS}\nroutes = {{ all = [\"hook\"] }}"
        ),
    );
    let run = start(&world, &blocked(file, port).write());
    // Before the fault was fixed, the budget had room for only about sixteen batches.
    wait_for("the records", || {
        metric(port, "shardmill_source_records_total") as usize == BATCHES * RECORDS
    });
    let occupied = metric(port, "shardmill_buffer_bytes");
    let each = occupied / BATCHES as f64;
    assert!((2_000.0..8_000.0).contains(&each), "{each} bytes are in use for each row");
    assert_below(&run, bound(4, 8, 1, 1));
}

/// Aggregates of a mebibyte, each with 131,000 events of two bytes, wait for a sink: ten on each of four shards.
#[test]
fn wall_02_aggregates_that_wait_occupy_their_bytes() {
    let world = World::new(4);
    for shard in world.open_shards() {
        let large = one_key(&key_of(&shard), std::iter::repeat_n(b"{}".to_vec(), 131_000));
        assert!(large.len() > 1_000_000);
        put_on(&world, &shard, std::iter::repeat_n(large, 10));
    }
    let port = free_port();
    let file = PipelineToml::new(world.folder.path(), "reading").pipeline("buffer = \"32 MiB\"");
    let file = file.timing("retry_pause = \"50 ms\"\nmemory_blocked = \"200 ms\"\n");
    let file = file.stream(STREAM, "embedded", "format = \"application/json\"");
    let run = start(&world, &blocked(file, port).write());
    // Split into records, the waiting aggregates would take fifteen times as much.
    wait_for("all lanes to be blocked, with aggregates that were read ahead", || {
        metric(port, "shardmill_blocked") == 4.0
            && metric(port, "shardmill_read_ahead_bytes") > 6.0 * MIB as f64
    });
    assert_below(&run, bound(32, 0, 0, 0));
}

/// Small events, of which samples are kept for trials, and answers in progress.
#[test]
fn wall_02_samples_for_trials_occupy_what_is_counted() {
    let world = World::new(1);
    let events = std::iter::repeat_n(b"{}".to_vec(), 130_000);
    let large = one_key("key", events);
    put_on(&world, &world.open_shards()[0], std::iter::repeat_n(large, 2));
    let port = free_port();
    let file = PipelineToml::new(world.folder.path(), "reading").pipeline("buffer = \"8 MiB\"");
    let file = file.stream(STREAM, "embedded", "format = \"application/json\"");
    let lines = "config = { default = \"all\", rules = [] }";
    let file = file.stage("one", "route-json", &format!("{lines}\n{LIMITS}"));
    let routes = "routes = { all = [\"out\"] }";
    let file = file.stage("two", "route-json", &format!("{lines}\n{LIMITS}\n{routes}"));
    let file = file.table("[[sink]]\nname = \"out\"\ntype = \"discard\"");
    let path = file.table(&admin(port)).write();
    let run = start(&world, &path);
    wait_for("the records", || metric(port, "shardmill_source_records_total") == 260_000.0);
    assert_below(&run, bound(8, 8, 2, 2));
}

/// Five records of two bytes become 50,000 items, and each item becomes a dead letter with the same long reason.
#[test]
fn wall_04_dead_letters_of_many_items_occupy_what_they_are_bounded_by() {
    const RECORDS: usize = 5;
    const ITEMS: usize = 10_000;
    let world = World::new(1);
    put_on(&world, &world.open_shards()[0], std::iter::repeat_n(b"{}".to_vec(), RECORDS));
    let port = free_port();
    let plugin = long_reasons();
    let file = PipelineToml::new(world.folder.path(), "reading").pipeline("buffer = \"8 MiB\"");
    let file = file.stream(STREAM, "embedded", "format = \"application/octet-stream\"");
    let many = format!("config = {{ many_on = \"\", many = {ITEMS} }}\n{LIMITS}");
    let file = file.stage("burst", "hostile", &many);
    let routes = format!("{LIMITS}\nroutes = {{ out = [\"out\"] }}");
    let file = file.stage("reject", &plugin.path().display().to_string(), &routes);
    let file = file.table("[[sink]]\nname = \"out\"\ntype = \"discard\"");
    let path = file.table(&admin(port)).write();
    let run = start(&world, &path);
    wait_for("the dead letters", || {
        metric(port, "shardmill_dead_letters_total") as usize == RECORDS * ITEMS
    });
    assert_below(&run, bound(8, 8, 2, 2));
}

/// Each record passes alone, but together they are too much: a search must not keep all their outputs in memory.
#[test]
fn wall_02_a_search_occupies_no_more_than_one_answer_may() {
    const RECORDS: usize = 240;
    for (fault, lines) in [
        ("a row of a mebibyte each", "share_payload_on = \"a\", many = 1"),
        ("an answer of 2 MB each", "flood_on = \"a\", flood_bytes = 2000000"),
        ("10,000 rows each", "many_on = \"a\", many = 10000"),
        ("a reason of a mebibyte each", "long_reason_on = \"a\""),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let input = folder.path().join("in");
        std::fs::write(&input, "a\n".repeat(RECORDS)).expect("written");
        let file = PipelineToml::new(folder.path(), "parts").pipeline(
            "buffer = \"8 MiB\"\nrejected_in_a_row = 1000000\nrejected_of_last_1000 = 1000",
        );
        let file = file.file(&input, "format = \"text/plain\"");
        let config = format!("config = {{ {lines} }}\n{LIMITS}\nroutes = {{ out = [\"out\"] }}");
        let file = file.stage("stage", "hostile", &config);
        let path = file.table("[[sink]]\nname = \"out\"\ntype = \"discard\"").write();
        let mut command = shardmill(&["run", &path, "--until-caught-up"]);
        let (output, peak) = output_and_peak(&mut command);
        assert!(output.status.success(), "{fault}: {}", String::from_utf8_lossy(&output.stderr));
        assert_peak_below(peak, bound(8, 8, 1, 1), fault);
    }
}

/// A template uses a field of 9.9 MB sixty times: neither the line nor a parsed payload is in memory as a whole.
#[test]
fn wall_02_a_template_that_repeats_a_field_occupies_no_more_than_a_piece_of_its_line() {
    const LINES: usize = 3;
    let text = format!("\"{}\"", "x".repeat(9_900_000));
    let numbers = format!("[{}1]", "1,".repeat(4_900_000));
    for (what, value, template) in [
        ("a text, ten times", &text, "{a}".repeat(10)),
        ("a text, sixty times", &text, "{a}".repeat(60)),
        ("an item of many", &numbers, "{a.7} {id}".to_owned()),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let input = folder.path().join("in");
        let line = format!("{{\"id\":1,\"a\":{value}}}\n");
        std::fs::write(&input, line.repeat(LINES)).expect("written");
        let file = PipelineToml::new(folder.path(), "lines").pipeline("buffer = \"8 MiB\"");
        let file = file.file(&input, "format = \"application/json\"");
        let sink =
            format!("[[sink]]\nname = \"out\"\ntype = \"stdout\"\ntemplate = \"{template}\"");
        let path = file.table(&sink).write();
        let mut command = shardmill(&["run", &path, "--until-caught-up"]);
        let errors = std::fs::File::create(folder.path().join("errors")).expect("a file");
        let run = command.stdout(Stdio::null()).stderr(errors).spawn().expect("it starts");
        let peak = follow(run.id());
        let mut run = Process(run);
        let status = run.0.wait().expect("it ends");
        let errors = std::fs::read_to_string(folder.path().join("errors")).expect("text");
        assert!(status.success(), "{what}: {errors}");
        assert_peak_below(peak.join().expect("a peak"), bound(8, 0, 0, 0), what);
    }
}

/// An array of 4.9 million digits in one row: its elements are written as they are parsed, not collected first.
#[test]
fn wall_02_a_long_array_of_one_row_occupies_what_is_sent_of_it() {
    const ITEMS: usize = 4_900_000;
    let table = format!("wall_02_array_{}", std::process::id());
    postgres(&format!("CREATE TABLE {table} (id int, a int[])"));
    let folder = tempfile::tempdir().expect("a folder");
    let input = folder.path().join("in");
    let line = format!("{{\"id\":1,\"a\":[{}1]}}\n", "1,".repeat(ITEMS - 1));
    std::fs::write(&input, line).expect("written");
    let path = PipelineToml::new(folder.path(), "arrays")
        .pipeline("buffer = \"24 MiB\"")
        .file(&input, "format = \"application/json\"")
        .postgres("mart", &table)
        .write();
    let (output, peak) = output_and_peak(&mut shardmill(&["run", &path]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_peak_below(peak, bound(24, 0, 0, 0), "an array");
    assert_eq!(postgres(&format!("SELECT cardinality(a) FROM {table}")), [ITEMS.to_string()]);
}

/// Records that fit only in parts of a batch are written once, in order.
#[test]
fn wall_02_what_is_run_in_parts_is_there_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let (input, logs) = (folder.path().join("in"), folder.path().join("logs"));
    let lines: Vec<String> = (0..60)
        .map(|number| match number % 3 {
            0 => format!("large {number}"),
            1 => format!("bad {number}"),
            _ => format!("plain {number}"),
        })
        .collect();
    std::fs::write(&input, lines.join("\n")).expect("written");
    let file = PipelineToml::new(folder.path(), "parts")
        .pipeline("rejected_in_a_row = 1000000\nrejected_of_last_1000 = 1000");
    let file = file.file(&input, "format = \"text/plain\"");
    let config = "config = { share_payload_on = \"large\", many = 1, trap_on = \"bad\" }\n\
                  limits = { output = \"4 MiB\" }\nroutes = { out = [\"logs\"] }";
    let file = file.stage("stage", "hostile", config);
    let path = file
        .table(&format!(
            "[[sink]]\nname = \"logs\"\ntype = \"objects\"\nurl = \"{}\"\ncompression = \"none\"\n\
             format = \"raw\"",
            logs.display()
        ))
        .write();
    let said = run_ok(&["run", &path, "--until-caught-up", "--json"]);
    assert!(said.contains("\"dead_letters\":20"), "{said}");
    let written: u64 = sizes_below(&logs).into_iter().sum();
    let plain: usize = lines.iter().filter(|line| line.starts_with("plain")).map(String::len).sum();
    assert_eq!(written, 20 * MIB + plain as u64, "{said}");
}

/// By default, an object is as large as `commit.bytes` says: the overhead of rows beside their payload does not make
/// it smaller.
#[test]
fn wall_02_objects_keep_their_size_by_default() {
    const LINE: usize = 900;
    let folder = tempfile::tempdir().expect("a folder");
    let (input, logs) = (folder.path().join("in"), folder.path().join("logs"));
    let line = format!("{}\n", "x".repeat(LINE - 1));
    std::fs::write(&input, line.repeat(72 * MIB as usize / LINE)).expect("written");
    let file = PipelineToml::new(folder.path(), "sizes");
    let file = file.file(&input, "format = \"text/plain\"");
    let path = file
        .table(&format!(
            "[[sink]]\nname = \"logs\"\ntype = \"objects\"\nurl = \"{}\"\ncompression = \"none\"\n\
             format = \"raw\"\ncommit = {{ linger = \"1 h\" }}",
            logs.display()
        ))
        .write();
    run_ok(&["run", &path, "--until-caught-up"]);
    let mut sizes = sizes_below(&logs);
    sizes.sort_unstable();
    let largest = *sizes.last().expect("an object");
    // The tolerance covers the last row, and the bytes counted for line ends.
    let commit = 64 * MIB;
    assert!((commit - MIB..commit + MIB).contains(&largest), "{sizes:?}");
}

/// Each record of a request keeps a copy of the key from the request's header, and each copy counts.
#[test]
fn wall_02_the_intake_counts_the_key_of_each_record() {
    let world = World::new(1);
    let port = free_port();
    let file = PipelineToml::new(world.folder.path(), "reading");
    let file = file.stream(STREAM, "embedded", "format = \"application/json\"");
    let file = file.table("[[sink]]\nname = \"out\"\ntype = \"discard\"");
    let lines = format!("[intake]\nlisten = \"127.0.0.1:{port}\"\nin_flight = \"1 MiB\"");
    let _run = start(&world, &file.table(&lines).write());
    wait_for("the intake", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    let post = |key: &str| {
        let body = "1\n".repeat(5_000);
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connected");
        let head = format!(
            "POST /events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/x-ndjson\r\nX-Partition-Key: {key}\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        answer
    };
    let taken = post("k");
    assert!(taken.starts_with("HTTP/1.1 200"), "{taken}");
    let refused = post(&"k".repeat(256));
    assert!(refused.starts_with("HTTP/1.1 413") && refused.contains("lines"), "{refused}");
}

/// Returns the sizes of the data below a folder.
fn sizes_below(folder: &Path) -> Vec<u64> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let sizes = paths.flat_map(|path| match path.is_dir() {
        true if path.ends_with("_shardmill") => Vec::new(),
        true => sizes_below(&path),
        false => vec![path.metadata().map_or(0, |about| about.len())],
    });
    sizes.collect()
}
