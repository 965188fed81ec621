//! Values of variables: used, but never stored.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::process::Stdio;

use super::{Folder, texts};
use crate::support::pipeline::PipelineToml;
use crate::support::{Process, output, wait_for};

const SECRET: &str = "hunter2-secret";
const OTHER: &str = "hunter3-secret";

/// Writes a pipeline whose stage has this marker in its configuration.
fn pipeline(folder: &Folder, marker: &str) {
    let lines = format!(
        "config = {{ trap_on = \"{marker}\", format = \"application/json\" }}\n\
         routes = {{ out = [\"mart\"] }}"
    );
    folder.pipeline().stage("check", "hostile", &lines).sqlite("mart", "rows").write();
    crate::support::sqlite(&folder.path().join("mart.db"))
        .execute_batch("CREATE TABLE IF NOT EXISTS rows (id integer)")
        .expect("a table");
}

/// Runs a command with this value of the variable; returns whether it succeeded, and standard error.
fn run_with(folder: &Folder, arguments: &[&str], value: Option<&str>) -> (bool, String) {
    let mut command = folder.command(arguments);
    match value {
        Some(value) => command.env("MARKER", value),
        None => command.env_remove("MARKER"),
    };
    let done = output(&mut command);
    let (out, log) = texts(&done);
    (done.status.success(), format!("{out}{log}"))
}

fn run_ok_with(folder: &Folder, value: &str) -> String {
    let (ran, log) = run_with(folder, &["run", "--until-caught-up", "-v"], Some(value));
    assert!(ran, "{log}");
    log
}

/// Returns the files of the state that contain a text.
fn files_with(folder: &Folder, text: &str) -> Vec<String> {
    let contains = |path: &std::path::PathBuf| {
        let bytes = fs::read(path).expect("read");
        bytes.windows(text.len()).any(|part| part == text.as_bytes())
    };
    let files = folder.files("state").into_iter().filter(contains);
    files.map(|path| path.display().to_string()).collect()
}

#[test]
fn wall_17_the_text_of_a_configuration_is_stored_and_the_value_of_its_variable_is_not() {
    let folder = Folder::of_lines(&["{\"id\":1}".into()]);
    pipeline(&folder, "${MARKER}");
    let log = run_ok_with(&folder, SECRET);
    assert_eq!(files_with(&folder, SECRET), Vec::<String>::new());
    assert!(!log.contains(SECRET), "{log}");
    let stored = "SELECT spec FROM generation";
    let stored: String = folder.state().query_row(stored, [], |row| row.get(0)).expect("stored");
    assert!(stored.contains("${MARKER}"), "{stored}");
    assert!(!log.contains("had other values"), "{log}");

    // A second run with the same value reports no change, and adds no revision.
    let log = run_ok_with(&folder, SECRET);
    assert!(!log.contains("had other values"), "{log}");
    assert_eq!(folder.number("SELECT count(*) FROM generation"), 1);

    // Another value is used and reported.
    let log = run_ok_with(&folder, OTHER);
    assert!(log.contains("had other values") && log.contains("MARKER"), "{log}");
    assert!(!log.contains(SECRET) && !log.contains(OTHER), "{log}");
    assert_eq!(folder.number("SELECT count(*) FROM generation"), 1);
    assert_eq!(files_with(&folder, OTHER), Vec::<String>::new());
}

#[test]
fn wall_17_a_redrive_uses_the_value_of_today_and_says_that_it_was_another() {
    let folder = Folder::of_lines(&["{\"id\":1}".into(), "{\"id\":2}".into()]);
    pipeline(&folder, "${MARKER}");
    run_ok_with(&folder, "\"id\":2");
    assert_eq!(folder.dead_letters(), 1);
    let (done, log) = run_with(&folder, &["dlq", "redrive", "--all"], Some("\"id\":3"));
    assert!(done, "{log}");
    assert!(log.contains("had other values") && log.contains("MARKER"), "{log}");
    assert_eq!(folder.dead_letters(), 0);
    // The redrive does not change what the state notes about the value; only the pipeline does.
    let log = run_ok_with(&folder, "\"id\":2");
    assert!(!log.contains("had other values"), "{log}");
}

#[test]
fn wall_17_values_that_an_earlier_version_stored_are_gone_after_a_start() {
    let folder = Folder::of_lines(&["{\"id\":1}".into()]);
    // Stores the value itself, as an earlier version did.
    pipeline(&folder, SECRET);
    folder.ok(&["run", "--until-caught-up"]);
    assert_ne!(files_with(&folder, SECRET), Vec::<String>::new());
    pipeline(&folder, "${MARKER}");
    run_ok_with(&folder, SECRET);
    assert_eq!(files_with(&folder, SECRET), Vec::<String>::new());
    assert_eq!(folder.number("SELECT count(*) FROM generation"), 1);
    let revisions = "SELECT count(*) FROM ledger WHERE generation IN (SELECT id FROM generation)";
    let all = folder.number("SELECT count(*) FROM ledger");
    assert_eq!(folder.number(revisions), all);
}

#[test]
fn wall_17_errors_show_the_name_of_a_variable_where_they_would_show_its_value() {
    let folder = Folder::of_lines(&["{\"id\":1}".into()]);
    // The plugin repeats its configuration.
    let refuse = "config = { refuse = \"no ${MARKER} here\" }\nroutes = { out = [\"mart\"] }";
    folder.pipeline().stage("check", "hostile", refuse).sqlite("mart", "rows").write();
    for command in ["check", "run"] {
        let (done, log) = run_with(&folder, &[command], Some(SECRET));
        assert!(!done && log.contains("no ${MARKER} here"), "{command}: {log}");
        assert!(!log.contains(SECRET), "{command}: {log}");
    }
    assert_eq!(files_with(&folder, SECRET), Vec::<String>::new());
    // Values that are invalid where they are used.
    for table in [
        "[admin]\nlisten = \"${MARKER}\"",
        "[timing]\ndrain = \"${MARKER}\"",
        "[[sink]]\nname = \"${MARKER}\"\ntype = \"${MARKER}\"",
        "[[sink]]\nname = \"two\"\ntype = \"objects\"\nurl = \"${MARKER}://x\"",
        "[[lookup]]\nname = \"l\"\nurl = \"${MARKER}\"\nquery = \"SELECT 1\"",
        "[dead_letters]\nbytes = \"${MARKER}\"",
    ] {
        let text = folder.pipeline().timing("").text();
        let text = match table.starts_with("[timing]") {
            true => text.replace("[timing]\n", table),
            false => format!("{text}\n{table}\n"),
        };
        fs::write(folder.path().join("pipeline.toml"), text).expect("written");
        let (done, log) = run_with(&folder, &["check"], Some(&format!("{SECRET} ")));
        assert!(!done, "{table}");
        assert!(!log.contains(SECRET), "{table}: {log}");
    }
}

#[test]
fn wall_17_a_variable_that_is_not_set_any_more_is_named_with_the_way_out() {
    let folder = Folder::of_lines(&["{\"id\":1}".into()]);
    pipeline(&folder, "${MARKER}");
    run_ok_with(&folder, SECRET);
    let (done, log) = run_with(&folder, &["run", "--until-caught-up"], None);
    assert!(!done && log.contains("MARKER is not set"), "{log}");
    let (done, log) = run_with(&folder, &["dlq", "list"], Some(OTHER));
    assert!(done, "{log}");
}

/// Starts a server that answers each request with this status, and repeats the request's first line and
/// authorization.
fn repeating_server(status: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for mut connection in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(connection.try_clone().expect("cloned"));
            let (mut said, mut length) = (String::new(), 0);
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
                    break;
                }
                let lower = line.to_ascii_lowercase();
                if let Some(value) = lower.strip_prefix("content-length:") {
                    length = value.trim().parse().expect("a length");
                }
                if lower.starts_with("post ") || lower.starts_with("authorization:") {
                    said += &line;
                }
            }
            let _ = reader.read_exact(&mut vec![0; length]);
            let bytes = said.len();
            let answer = format!(
                "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {bytes}\r\n\r\n{said}"
            );
            let _ = connection.write_all(answer.as_bytes());
        }
    });
    port
}

#[test]
fn wall_17_a_server_that_repeats_its_request_shows_no_value() {
    for status in [422, 500] {
        let folder = Folder::of_lines(&["{\"id\":1}".into()]);
        let port = repeating_server(status);
        let lines = format!(
            "type = \"http\"\nprivate = true\nurl = \"http://127.0.0.1:{port}/x?k=${{IN_URL}}\"\n\
             headers = {{ authorization = \"Bearer ${{IN_HEADER}}\" }}"
        );
        folder.pipeline().route_all_to(&["hook"]).sink("hook", &lines).write();
        let command = |arguments: &[&str]| {
            let mut command = folder.command(arguments);
            // The first value is percent-encoded in the URL.
            command.env("IN_URL", format!("{SECRET} ü")).env("IN_HEADER", OTHER);
            command
        };
        let log = fs::File::create(folder.path().join("log.txt")).expect("a log");
        // A blocked sink never catches up.
        let mut run = command(&["run", "--until-caught-up"]);
        let run = run.stdout(Stdio::null()).stderr(log).spawn();
        let mut run = Process(run.expect("it starts"));
        wait_for("the answer", || match status {
            422 => run.0.try_wait().expect("a status").is_some(),
            _ => folder.log().contains("answered 500"),
        });
        drop(run);

        let exported = output(&mut command(&["dlq", "export"]));
        let (exported, error) = texts(&exported);
        let shown = format!("{}{exported}{error}", folder.log());
        assert!(shown.contains(&format!("answered {status}")), "{shown}");
        assert!(
            shown.contains("/x?k=${IN_URL}") && shown.contains("Bearer ${IN_HEADER}"),
            "{shown}"
        );
        for secret in [SECRET, OTHER] {
            assert!(!shown.contains(secret), "{shown}");
            assert_eq!(files_with(&folder, secret), Vec::<String>::new());
        }
    }
}

/// Values are masked even in texts that were not masked when they were made: standard error masks everything.
#[test]
fn wall_17_sources_and_commands_show_the_name_of_a_variable() {
    let port = repeating_server(400);
    let file = "type = \"file\"\npath = \"/nonexistent/${MARKER}\"".to_owned();
    let stream = format!(
        "type = \"kinesis\"\nstream = \"${{MARKER}}\"\nendpoint = \"http://127.0.0.1:{port}/${{MARKER}}\""
    );
    for (source, arguments) in [
        (file, &["run", "--until-caught-up"][..]),
        (stream, &["stream", "describe", "--pipeline", "pipeline.toml", "-vvv"]),
    ] {
        let folder = Folder::of_lines(&["{}".into()]);
        PipelineToml::new(folder.path(), "cars")
            .table(&format!("[source]\n{source}"))
            .route_all_to(&["mart"])
            .sqlite("mart", "rows")
            .write();
        let (done, log) = run_with(&folder, arguments, Some(SECRET));
        assert!(!done && log.contains("${MARKER}"), "{arguments:?}: {log}");
        assert!(!log.contains(SECRET), "{arguments:?}: {log}");
    }
}
