//! Commands, the intake, files and guests, used as strangers use them.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::pipeline::PipelineToml;
use crate::support::world::{Pipeline, World};
use crate::support::{
    Process, free_port, http_get, output, root, run, run_ok, shardmill, sqlite, wait_for,
    with_tools,
};

// 19: a value that a guest's function returns is refused or becomes a dead letter. It never disappears in silence.

/// Builds a plugin's folder with this source.
fn built(place: &Path, language: &str, file: &str, source: &str) -> PathBuf {
    let folder = place.join("plugin");
    std::fs::create_dir_all(&folder).expect("created");
    let manifest =
        format!("[plugin]\nname = \"p\"\nlanguage = \"{language}\"\ncapabilities = []\n");
    std::fs::write(folder.join("plugin.toml"), manifest).expect("written");
    std::fs::write(folder.join(file), source).expect("written");
    let component = place.join("p.wasm");
    let mut build = shardmill(&["plugin", "build", "--out"]);
    let done = output(with_tools(build.arg(&component).arg(&folder)));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    component
}

/// Runs the lines of a file through a plugin. Returns whether the run succeeded, its standard error, and the reasons
/// of the dead letters by their record.
fn ran(place: &Path, component: &Path, lines: &str) -> (bool, String, Vec<(String, String)>) {
    std::fs::write(place.join("lines.txt"), lines).expect("written");
    let file = PipelineToml::new(place, "guest")
        .file(&place.join("lines.txt"), "")
        .stage("p", &component.display().to_string(), "routes = { out = [\"void\"] }")
        .sink("void", "type = \"discard\"")
        .write();
    let done = run(&["run", &file, "--until-caught-up"]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    if !done.status.success() {
        return (false, said, Vec::new());
    }
    let state = sqlite(&place.join("state/guest/state.db"));
    let mut query = state.prepare("SELECT original, reason FROM dead_letter").expect("sql");
    let dead_letters = query.query_map((), |row| {
        Ok((String::from_utf8(row.get(0)?).expect("text"), row.get::<_, String>(1)?))
    });
    (
        true,
        said,
        dead_letters
            .expect("rows")
            .map(|dead_letter| dead_letter.expect("a dead letter"))
            .collect(),
    )
}

#[test]
fn fault_19_asynchronous_javascript_is_refused_at_configure() {
    for (function, cure) in [
        ("async record(record, out) { out.emit(\"out\", \"x\"); }", "without async and await"),
        ("*record(record, out) { yield record.text(); }", "a plain function that calls out.emit"),
        ("async configure() { return {}; }, record() {}", "without async and await"),
        ("record: 5", "must be a function, not a number"),
    ] {
        let place = tempfile::tempdir().expect("a folder");
        let source = format!(
            "import {{ plugin }} from \"shardmill\";\nexport const stage = plugin({{ name: \"p\", \
             version: \"0.1.0\", routes: {{ out: \"text/plain\" }}, {function} }});\n"
        );
        let component = built(place.path(), "js", "plugin.js", &source);
        let (succeeded, said, _) = ran(place.path(), &component, "a\n");
        assert!(!succeeded && said.contains(cure), "{function}: {said}");
        let judged = run(&["plugin", "conformance", &component.display().to_string()]);
        assert_eq!(judged.status.code(), Some(1), "{function} conforms");
    }
}

#[test]
fn fault_19_what_javascript_returns_is_a_dead_letter_that_names_the_cure() {
    let place = tempfile::tempdir().expect("a folder");
    let source = r#"
import { plugin } from "shardmill";
const other = async () => 1;
const ways = {
  promise: (record, out) => Promise.resolve().then(() => out.emit("out", "late")),
  value: () => ({ a: 1 }),
  text: () => "row",
  generated: () => (function* () { yield 1; })(),
  emitted: (record, out) => out.emit("out", Promise.resolve(1)),
  nested: (record, out) => out.emit("out", { a: Promise.resolve(1) }),
  map: (record, out) => out.emit("out", new Map([["a", 1]])),
  key: (record, out) => out.emit("out", "x", 5),
  short: (record, out) => record.text() === "never" && out.emit("out", "x"),
  helper: (record, out) => { (async () => { await other(); out.emit("out", "late"); })(); },
  then: (record, out) => { Promise.resolve().then(() => out.emit("out", "late")); },
  nothing: () => null,
  fine: (record, out) => { out.emit("out", { a: [1] }); return 7; },
};
export const stage = plugin({ name: "p", version: "0.1.0", routes: { out: "text/plain" },
  record: (record, out) => ways[record.text()](record, out) });
"#;
    let component = built(place.path(), "js", "plugin.js", source);
    let ways = "promise value text generated emitted nested map key helper then short nothing fine";
    let (succeeded, said, dead_letters) = ran(place.path(), &component, &ways.replace(' ', "\n"));
    assert!(succeeded, "{said}");
    assert_reasons(
        &dead_letters,
        &[
            ("promise", "without async and await"),
            ("value", "call out.emit"),
            ("text", "call out.emit"),
            ("generated", "calls out.emit"),
            ("emitted", "emit its value"),
            ("nested", "member \"a\" is a promise"),
            ("map", "make an array or a plain object"),
            ("key", "a partition key must be a text or bytes"),
            ("helper", "started something asynchronous"),
            ("then", "started something asynchronous"),
        ],
    );
}

#[test]
fn fault_19_asynchronous_python_is_refused_at_configure() {
    let place = tempfile::tempdir().expect("a folder");
    let source = r#"
from shardmill import plugin

@plugin(name="p", version="0.1.0", routes={"out": "text/plain"})
async def p(record, out):
    out.emit("out", "x")
"#;
    let component = built(place.path(), "python", "plugin.py", source);
    let (succeeded, said, _) = ran(place.path(), &component, "a\n");
    assert!(!succeeded && said.contains("without async and await"), "{said}");
}

/// Tests the check that `configure` makes of functions in the library alone: building a Python component takes a
/// minute.
#[test]
fn fault_19_each_kind_of_function_in_python_is_recognized() {
    let table = r#"
import functools
from shardmill import _check_function

async def coroutine(record, out): pass
def generator(record, out): yield record
async def stream(record, out): yield record
def plain(record, out): pass
class Called:
    async def __call__(self, record, out): pass
class Method:
    def record(self, record, out): yield record

for kind in (coroutine, generator, stream, Called(), Method().record, functools.partial(coroutine, 1),
             lambda record, out: (yield), plain, Method().record.__class__, len, None):
    try:
        _check_function("record", kind)
        print("plain")
    except TypeError as error:
        print("asynchronous" if "asynchronous" in str(error) else "generator" if "generator" in str(error) else error)
"#;
    let mut python = Command::new("python3");
    python.arg("-c").arg(table).env("PYTHONPATH", root().join("plugins/sdk-python"));
    let printed = output(with_tools(python.env("PYTHONDONTWRITEBYTECODE", "1")));
    let said = String::from_utf8_lossy(&printed.stderr);
    assert!(printed.status.success(), "{said}");
    let kinds = "asynchronous generator asynchronous asynchronous generator asynchronous generator";
    let expected: Vec<_> = kinds.split(' ').chain(["plain"; 4]).collect();
    assert_eq!(
        String::from_utf8_lossy(&printed.stdout).lines().collect::<Vec<_>>(),
        expected,
        "{said}"
    );
}

#[test]
fn fault_19_what_python_returns_is_a_dead_letter_that_names_the_cure() {
    let place = tempfile::tempdir().expect("a folder");
    let source = r#"
from shardmill import plugin

async def late(out):
    out.emit("out", "late")

def generated():
    yield 1

WAYS = {
    "promise": lambda record, out: late(out),
    "value": lambda record, out: {"a": 1},
    "generated": lambda record, out: generated(),
    "short": lambda record, out: record.text() == "never" and out.emit("out", "x"),
    "nothing": lambda record, out: None,
    "fine": lambda record, out: (out.emit("out", "x"), 7),
}

@plugin(name="p", version="0.1.0", routes={"out": "text/plain"})
def p(record, out):
    return WAYS[record.text()](record, out)
"#;
    let component = built(place.path(), "python", "plugin.py", source);
    let ways = "promise value generated short nothing fine".replace(' ', "\n");
    let (succeeded, said, dead_letters) = ran(place.path(), &component, &ways);
    assert!(succeeded, "{said}");
    assert_reasons(
        &dead_letters,
        &[
            ("promise", "without async and await"),
            ("value", "call out.emit"),
            ("generated", "calls out.emit"),
        ],
    );
}

fn assert_reasons(dead_letters: &[(String, String)], expected: &[(&str, &str)]) {
    assert_eq!(dead_letters.len(), expected.len(), "{dead_letters:?}");
    for (record, cure) in expected {
        let found = dead_letters.iter().find(|(original, _)| original == record);
        let (_, reason) = found.unwrap_or_else(|| panic!("{record} is not a dead letter"));
        assert!(reason.contains(cure), "{record}: {reason}");
    }
}

// 32: the intake's requests.

struct Intake {
    world: World,
    run: Process,
    port: u16,
}

fn intake() -> Intake {
    let world = World::new(1);
    let port = free_port();
    let sink = format!("[intake]\nlisten = \"127.0.0.1:{port}\"");
    let run = world.start(&Pipeline { sink, ..Pipeline::default() });
    wait_for("the intake", || http_get(port, "/health").contains("200 OK"));
    Intake { world, run, port }
}

fn post(port: u16, headers: &str, body: &[u8]) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connected");
    let length = body.len();
    let head = format!(
        "POST /events HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(head.as_bytes()).expect("sent");
    stream.write_all(body).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn fault_32_compressed_bodies_are_refused_and_never_stored() {
    let intake = intake();
    for encoding in ["gzip", "GZIP", "br", "identity, gzip", "deflate", "zstd"] {
        let headers = format!("Content-Type: application/json\r\nContent-Encoding: {encoding}\r\n");
        let answer = post(intake.port, &headers, b"{\"id\":0,\"key\":\"key-0\",\"n\":0}");
        assert!(answer.starts_with("HTTP/1.1 415"), "{encoding}: {answer}");
        assert!(answer.contains("send the body uncompressed"), "{answer}");
    }
    // Two headers of one name count as one list.
    let twice = "Content-Encoding: identity\r\nContent-Encoding: gzip\r\n";
    assert!(post(intake.port, twice, b"x").starts_with("HTTP/1.1 415"));
    let plain = "Content-Type: application/json\r\nContent-Encoding: identity\r\n";
    let answer = post(intake.port, plain, b"{\"id\":0,\"key\":\"key-0\",\"n\":0}");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    intake.world.wait_rows(1);
}

/// Sends an event in one chunk, with these `Transfer-Encoding` headers.
fn post_in_chunks(port: u16, codings: &[&str]) -> String {
    let body = "{\"id\":0,\"key\":\"key-0\",\"n\":0}";
    let codings: String =
        codings.iter().map(|coding| format!("Transfer-Encoding: {coding}\r\n")).collect();
    let request = format!(
        "POST /events HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         {codings}\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connected");
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn fault_32_transfer_codings_but_chunked_are_refused_and_never_stored() {
    let intake = intake();
    for codings in [
        &["gzip, chunked"][..],
        &["GZIP,Chunked"],
        &["gzip", "chunked"],
        &["deflate, gzip, chunked"],
        &["identity, chunked"],
        &["x-unknown, chunked"],
    ] {
        let answer = post_in_chunks(intake.port, codings);
        assert!(answer.starts_with("HTTP/1.1 501"), "{codings:?}: {answer}");
        assert!(answer.contains("unsupported Transfer-Encoding"), "{answer}");
    }
    for codings in [&["chunked"][..], &["Chunked"]] {
        let answer = post_in_chunks(intake.port, codings);
        assert!(answer.starts_with("HTTP/1.1 200"), "{codings:?}: {answer}");
    }
    intake.world.wait_rows(1);
}

#[test]
fn fault_32_half_a_request_head_is_closed_and_delays_no_end() {
    let intake = intake();
    let half = || {
        let mut stream = TcpStream::connect(("127.0.0.1", intake.port)).expect("connected");
        stream.write_all(b"POST /events HTTP/1.1\r\nHost: x\r\nContent-Le").expect("sent");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
        stream
    };
    // While the run goes on, the deadline of the request's head closes the connection.
    let mut left_open = half();
    let read = left_open.read(&mut [0; 1_024]);
    assert!(
        matches!(read, Ok(0))
            || read.is_err_and(|error| error.kind() != std::io::ErrorKind::WouldBlock)
    );
    // At its end, the run waits neither for a half-sent request nor for a connection without a request.
    let (_half, _idle) =
        (half(), TcpStream::connect(("127.0.0.1", intake.port)).expect("connected"));
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    assert_eq!(intake.run.terminate(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

// 33: files as spreadsheets write them.

#[test]
fn fault_33_a_byte_order_mark_and_quoted_line_breaks_of_files() {
    let text = "\u{feff}1,\"two\r\nlines\"\r\n2,\"a\nb,c\n\"\"d\"\"\"\n3,5\" pipe\n4,end";
    let expected = ["two\r\nlines", "a\nb,c\n\"d\"", "5\" pipe", "end"];
    let columns = "config = { columns = [{ name = \"id\", type = \"bigint\" }, { name = \"note\", type = \
                   \"text\" }] }\nroutes = { rows = [\"mart\"] }";
    for (name, extra) in [("in.csv", ""), ("in.txt", "format = \"text/csv\""), ("put.csv", "")] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        let mart = sqlite(&folder.path().join("mart.db"));
        mart.execute("CREATE TABLE rows (id INTEGER, note TEXT)", ()).expect("created");
        let pipeline = PipelineToml::new(folder.path(), "csv");
        let put = name.starts_with("put");
        let server = put.then(|| crate::support::serve_stream(&folder.path().join("state")));
        let pipeline = match put {
            false => pipeline.file(&path, extra),
            true => pipeline.stream("csv", "embedded", "create = { shards = 1 }"),
        };
        let file = pipeline.stage("decode", "csv-decode", columns).sqlite("mart", "rows").write();
        if put {
            run_ok(&["stream", "create", "--pipeline", &file]);
            run_ok(&["stream", "put", "--pipeline", &file, &path.display().to_string()]);
        }
        // Two runs: the second one continues after a record that contains line breaks.
        for _ in 0..2 {
            run_ok(&["run", &file, "--until-caught-up"]);
            let mut query = mart.prepare("SELECT note FROM rows ORDER BY id").expect("sql");
            let notes = query.query_map((), |row| row.get::<_, String>(0)).expect("rows");
            let notes: Vec<_> = notes.map(|note| note.expect("a note")).collect();
            assert_eq!(notes, expected, "{name}");
        }
        drop(server);
    }
}

/// A quote after a byte order mark opens a field, both in a record that is read and in one that is skipped.
#[test]
fn fault_33_a_quote_after_a_byte_order_mark_begins_a_field() {
    let text = "\u{feff}\"two\nlines\",1\n\"three\nmore\",2\n";
    let columns = "config = { columns = [{ name = \"note\", type = \"text\" }, { name = \"id\", type = \
                   \"bigint\" }] }\nroutes = { rows = [\"mart\"] }";
    for (skip, expected) in [(0, &["two\nlines", "three\nmore"][..]), (1, &["three\nmore"])] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("in.csv");
        std::fs::write(&path, text).expect("written");
        let mart = sqlite(&folder.path().join("mart.db"));
        mart.execute("CREATE TABLE rows (note TEXT, id INTEGER)", ()).expect("created");
        let file = PipelineToml::new(folder.path(), "csv")
            .file(&path, &format!("skip = {skip}"))
            .stage("decode", "csv-decode", columns)
            .sqlite("mart", "rows")
            .write();
        run_ok(&["run", &file, "--until-caught-up"]);
        let mut query = mart.prepare("SELECT note FROM rows ORDER BY id").expect("sql");
        let notes = query.query_map((), |row| row.get::<_, String>(0)).expect("rows");
        let notes: Vec<_> = notes.map(|note| note.expect("a note")).collect();
        assert_eq!(notes, expected, "{skip} left out");
    }
}

#[test]
fn fault_33_a_file_is_read_on_after_a_record_with_line_breaks() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("in.csv");
    let mart = sqlite(&folder.path().join("mart.db"));
    mart.execute("CREATE TABLE rows (id INTEGER, note TEXT)", ()).expect("created");
    let columns = "config = { columns = [{ name = \"id\", type = \"bigint\" }, { name = \"note\", type = \
                   \"text\" }] }\nroutes = { rows = [\"mart\"] }";
    let file = PipelineToml::new(folder.path(), "csv")
        .file(&path, "")
        .stage("decode", "csv-decode", columns)
        .sqlite("mart", "rows")
        .write();
    let mut text = String::from("\u{feff}0,first\n");
    std::fs::write(&path, &text).expect("written");
    for id in 1..4 {
        run_ok(&["run", &file, "--until-caught-up"]);
        text += &format!("{id},\"a\n\"\"{id}\"\"\nb\"\n");
        std::fs::write(&path, &text).expect("written");
    }
    run_ok(&["run", &file, "--until-caught-up"]);
    let count: u64 = mart
        .query_row(
            "SELECT count(DISTINCT id) FROM rows WHERE id = 0 OR note LIKE 'a%b'",
            (),
            |row| row.get(0),
        )
        .expect("a count");
    let all: u64 =
        mart.query_row("SELECT count(*) FROM rows", (), |row| row.get(0)).expect("a count");
    assert_eq!((count, all), (4, 4));
}

// 34: terminals, pipes, and commands whose messages or effects were wrong.

fn in_shell(folder: &Path, script: &str) -> std::process::Output {
    let mut command = Command::new("bash");
    command.current_dir(folder).env("SHARDMILL", env!("CARGO_BIN_EXE_shardmill"));
    output(command.args(["-c", script]).stdin(Stdio::null()))
}

#[test]
fn fault_34_a_closed_pipe_ends_what_only_prints_and_panics_nobody() {
    let world = World::new(1);
    world.put(0..2_000, 7);
    let folder = world.folder.path();
    let endpoint = format!("http://{}", world.address);
    let pipeline = PipelineToml::new(folder, "printed")
        .stream(crate::support::world::STREAM, &endpoint, "")
        .route_all_to(&["console"])
        .sink("console", "type = \"stdout\"")
        .write();
    let tail = format!("$SHARDMILL stream tail --stream test --endpoint {endpoint}");
    for command in [
        tail.clone(),
        format!("{tail} --json"),
        format!("$SHARDMILL run {pipeline}"),
        "$SHARDMILL completions bash".into(),
        "$SHARDMILL --help".into(),
        format!("$SHARDMILL stream describe --stream test --endpoint {endpoint}"),
    ] {
        let done = in_shell(folder, &format!("{command} | head -n 1"));
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(!said.contains("panicked"), "{command}: {said}");
        assert_eq!(String::from_utf8_lossy(&done.stdout).lines().count(), 1, "{command}");
        // Standard error may be closed too, for the commands that end by themselves.
        if !command.contains(" tail ") && !command.contains(" run ") {
            let done = in_shell(folder, &format!("{command} -vv 2>&1 >/dev/null | head -n 0"));
            assert!(done.status.success(), "{command}");
        }
    }
}

#[test]
fn fault_34_a_report_that_cannot_be_written_is_a_failure() {
    let world = World::new(1);
    let endpoint = format!("http://{}", world.address);
    for command in [
        "completions bash".to_owned(),
        format!("stream describe --stream test --endpoint {endpoint}"),
        format!("stream describe --stream test --endpoint {endpoint} --json"),
    ] {
        let done = in_shell(world.folder.path(), &format!("$SHARDMILL {command} > /dev/full"));
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{command}: {said}");
        assert!(said.contains("failed to write standard output: No space left"), "{said}");
    }
}

#[test]
fn fault_34_rows_and_reports_do_not_mix() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("in.ndjson"), "{\"a\":1}\n{\"a\":2}\n").expect("written");
    let pipeline = PipelineToml::new(folder.path(), "printed")
        .file(&folder.path().join("in.ndjson"), "")
        .route_all_to(&["console"])
        .sink("console", "type = \"stdout\"")
        .write();
    for json in [false, true] {
        let _ = std::fs::remove_dir_all(folder.path().join("state"));
        let mut command = shardmill(&["run", &pipeline, "--until-caught-up"]);
        let done = output(command.args(json.then_some("--json")));
        assert_eq!(String::from_utf8_lossy(&done.stdout), "{\"a\":1}\n{\"a\":2}\n");
        assert!(String::from_utf8_lossy(&done.stderr).contains("2"), "the report is not lost");
    }
    let data = folder.path().join("demo").display().to_string();
    let printed = run_ok(&["demo", "--json", "--cars", "20", "--data", &data]);
    for line in printed.lines() {
        serde_json::from_str::<serde_json::Value>(line).expect(line);
    }
}

#[test]
fn fault_34_no_color_and_dumb_terminals_are_obeyed() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("bad.toml"), "[pipeline]\nnam = 1\n").expect("written");
    // `script` runs the command in a terminal.
    let on_terminal = |settings: &str| {
        let command = format!("{settings} $SHARDMILL check bad.toml");
        let done = in_shell(folder.path(), &format!("script -qec '{command}' /dev/null"));
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    assert!(on_terminal("env -u NO_COLOR TERM=xterm").contains('\x1b'));
    for settings in ["NO_COLOR=1 TERM=xterm", "env -u NO_COLOR TERM=dumb"] {
        let shown = on_terminal(settings);
        assert!(shown.contains("nam") && !shown.contains('\x1b'), "{settings}: {shown}");
    }
}

#[test]
fn fault_34_no_part_of_a_password_is_printed() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("in.ndjson"), "{}\n").expect("written");
    for kind in [
        "type = \"postgres\"\nurl = \"postgres://u:se@cr@et@127.0.0.1:1/db\"\ntable = \"t\"",
        "type = \"postgres\"\nurl = \"postgresql://u:se/cr@et/x@127.0.0.1:1/db\"\ntable = \"t\"",
    ] {
        let pipeline = PipelineToml::new(folder.path(), "secret")
            .file(&folder.path().join("in.ndjson"), "")
            .route_all_to(&["mart"])
            .sink("mart", kind)
            .write();
        for command in ["check", "run"] {
            let done = run(&[command, &pipeline]);
            let said = String::from_utf8_lossy(&done.stderr);
            // A message may quote the line of the file as it was written, but must never name a part of the password
            // as the host.
            assert!(!said.contains("at cr") && !said.contains("at et"), "{said}");
            assert!(said.contains("%40") && !done.status.success(), "{said}");
        }
    }
}

#[test]
fn fault_34_a_second_run_names_the_owner_not_the_port() {
    let world = World::new(1);
    let port = free_port();
    let sink = crate::support::admin(port);
    let pipeline = Pipeline { sink, ..Pipeline::default() };
    let first = world.start(&pipeline);
    let second = run(&["run", &world.pipeline(&pipeline)]);
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(1));
    assert!(said.contains(&format!("already running, as process {}", first.0.id())), "{said}");
}

#[test]
fn fault_34_a_stream_is_deleted_by_name_or_with_yes() {
    let world = World::new(1);
    let pipeline = world.pipeline(&Pipeline::default());
    let folder = world.folder.path();
    let refused = in_shell(folder, "$SHARDMILL stream delete");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("--yes"), "{said}");
    assert_eq!(world.open_shards().len(), 1);
    run_ok(&["stream", "delete", "--pipeline", &pipeline, "--yes"]);
    world.create(1);
    run_ok(&["stream", "delete", "--pipeline", &pipeline, "--stream", "test"]);
}

// 37: the README's commands, exactly as written.

#[test]
fn fault_37_the_readmes_five_commands_give_rows() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("the README");
    let after = readme.split_once("## Run your own").expect("the section").1;
    let block = after.split_once("```sh\n").expect("a block").1;
    let block = block.split_once("\n```").expect("its end").0;
    assert_eq!(block.lines().count(), 5, "{block}");
    // Every command but the build: this test drives the binary that is already built.
    let build = "cargo build --release && export PATH=\"$PWD/target/release:$PATH\" && cd ";
    let folder = block.lines().next().and_then(|line| line.strip_prefix(build)).expect("the build");
    let place = tempfile::tempdir().expect("a folder");
    let copy = place.path().join(folder);
    std::fs::create_dir_all(&copy).expect("created");
    std::fs::copy(root().join(folder).join("pipeline.toml"), copy.join("pipeline.toml"))
        .expect("copied");
    std::fs::create_dir_all(place.path().join("plugins")).expect("created");
    let prebuilt = place.path().join("plugins/prebuilt");
    std::os::unix::fs::symlink(root().join("plugins/prebuilt"), prebuilt).expect("linked");
    let binaries = Path::new(env!("CARGO_BIN_EXE_shardmill"))
        .parent()
        .expect("a folder")
        .display()
        .to_string();
    let commands: Vec<&str> = block.lines().skip(1).collect();
    let script = format!(
        "export PATH=\"{binaries}:$PATH\"\ncd {folder}\n{}\nserved=$!\nset -e\ntrap 'kill $served' EXIT\n{}",
        commands[0],
        commands[1..].join("\n")
    );
    let done = in_shell(place.path(), &script);
    let (printed, said) =
        (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{printed}{said}");
    assert!(
        printed.contains("\"name\":\"Ada\"") && printed.contains("\"name\":\"Grace\""),
        "{printed}{said}"
    );
    let rows: u64 = sqlite(&copy.join("data/rows.db"))
        .query_row("SELECT count(*) FROM rows", (), |row| row.get(0))
        .expect("a count");
    assert_eq!(rows, 2);
}
