//! The file source, which reads the lines of a file, through the real binary.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use crate::support::pipeline::PipelineToml;
use crate::support::{Process, run, shardmill, wait_for};

/// Folder with a file, a pipeline that reads it, and the table that gets the rows.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(content: &[u8]) -> Self {
        let place = Self { folder: tempfile::tempdir().expect("a folder") };
        place.write(content);
        let sql = "CREATE TABLE rows (id INTEGER NOT NULL)";
        place.mart().execute(sql, ()).expect("created");
        place
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("rows.ndjson")
    }

    fn write(&self, content: &[u8]) {
        std::fs::write(self.file(), content).expect("written");
    }

    fn append(&self, content: &[u8]) {
        let file = std::fs::OpenOptions::new().append(true).open(self.file());
        file.expect("the file").write_all(content).expect("written");
    }

    fn mart(&self) -> rusqlite::Connection {
        crate::support::sqlite(&self.folder.path().join("mart.db"))
    }

    fn ids(&self) -> Vec<u64> {
        let mart = self.mart();
        let mut query = mart.prepare("SELECT id FROM rows ORDER BY rowid").expect("sql");
        let ids = query.query_map((), |row| row.get(0)).expect("rows");
        ids.map(|id| id.expect("an id")).collect()
    }

    /// Returns the payloads of the dead letters.
    fn dead_letters(&self) -> Vec<Vec<u8>> {
        let state = self.folder.path().join("state/file/state.db");
        let state = rusqlite::Connection::open(state).expect("the state");
        let mut query = state.prepare("SELECT original FROM dead_letter").expect("sql");
        let dead_letters = query.query_map((), |row| row.get(0)).expect("rows");
        dead_letters.map(|dead_letter| dead_letter.expect("a payload")).collect()
    }

    fn pipeline(&self, path: &str, extra: &str) -> String {
        let mart = self.folder.path().join("mart.db");
        PipelineToml::new(self.folder.path(), "file")
            .file(Path::new(path), extra)
            .route_all_to(&["mart"])
            .plain_sink(
                "mart",
                &format!(
                    "type = \"sqlite\"\npath = \"{}\"\ntable = \"rows\"\n\
                     [sink.commit]\nrows = 200\nlinger = \"20 ms\"",
                    mart.display()
                ),
            )
            .write()
    }

    fn run(&self, extra: &str) -> Output {
        let pipeline = self.pipeline("rows.ndjson", extra);
        crate::support::run(&["run", &pipeline])
    }

    /// Runs the pipeline, which must end by itself and succeed.
    fn run_ok(&self, extra: &str) {
        let output = self.run(extra);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

fn rows(ids: std::ops::Range<u64>) -> Vec<u8> {
    ids.map(|id| format!("{{\"id\":{id}}}\n")).collect::<String>().into_bytes()
}

#[test]
fn a_file_is_read_once_whatever_is_killed() {
    let place = Place::new(&rows(0..300_000));
    let pipeline = place.pipeline("rows.ndjson", "batch = { records = 100 }");
    for kill in 1..=5 {
        let mut command = shardmill(&["run", &pipeline]);
        let run = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut run = Process(run.expect("the binary starts"));
        let before = place.ids().len();
        wait_for("more rows", || place.ids().len() > before);
        assert!(run.0.try_wait().expect("a state").is_none(), "kill {kill} came too late");
        drop(run); // kill -9
    }
    place.run_ok("batch = { records = 100 }");
    assert!(place.ids().into_iter().eq(0..300_000));
}

#[test]
fn a_file_that_has_grown_is_read_on() {
    let place = Place::new(&rows(0..100));
    place.run_ok("");
    place.run_ok("");
    assert!(place.ids().into_iter().eq(0..100), "nothing new: nothing read");
    place.append(&rows(100..150));
    place.run_ok("");
    assert!(place.ids().into_iter().eq(0..150));
}

#[test]
fn a_file_in_anothers_place_is_read_from_its_beginning() {
    let place = Place::new(&rows(0..100));
    place.run_ok("");
    let new = place.folder.path().join("new");
    std::fs::write(&new, rows(100..300)).expect("written");
    std::fs::rename(new, place.file()).expect("renamed");
    place.run_ok("");
    assert!(place.ids().into_iter().eq(0..300));
}

#[test]
fn a_file_that_was_cut_is_refused() {
    let place = Place::new(&rows(0..100));
    place.run_ok("");
    let file = std::fs::OpenOptions::new().write(true).open(place.file()).expect("the file");
    file.set_len(50).expect("cut");
    let output = place.run("");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("rows.ndjson: cannot resume at byte 990"), "{error}");
    assert!(error.contains("cut or overwritten"), "{error}");
}

/// Inode, length and positions of line breaks are the same: only the content differs.
#[test]
fn a_file_that_was_written_over_is_refused() {
    let place = Place::new(&rows(100..200));
    place.run_ok("");
    place.write(&rows(300..500));
    let output = place.run("");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("cut or overwritten"), "{error}");
    assert!(place.ids().into_iter().eq(100..200));
}

#[test]
fn a_last_line_that_gets_its_end_later_is_read_once() {
    let place = Place::new(b"{\"id\":1}");
    place.run_ok("");
    place.append(b"\n{\"id\":2}");
    place.run_ok("");
    place.append(b"\r\n{\"id\":3}\n");
    place.run_ok("");
    assert_eq!(place.ids(), [1, 2, 3]);
    // The last line was read before it was complete, and cannot be taken back.
    place.append(b"{\"id\":4}");
    place.run_ok("");
    place.append(b"5}\n");
    assert_eq!(place.run("").status.code(), Some(1));
}

/// The first half of the line was delivered. The old file cannot be restored, and reading from another path would
/// deliver all lines again.
#[test]
fn fault_31_a_line_that_was_read_too_early_is_ended_where_it_was_read() {
    let first = b"{\"id\":1}\n{\"id\":2}";
    let place = Place::new(first);
    place.run_ok("");
    place.append(b"0}\n{\"id\":3}\n");
    let pipeline = place.pipeline("rows.ndjson", "");
    for command in ["check", "run"] {
        let output = crate::support::run(&[command, &pipeline]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{command}: {said}");
        let bytes = first.len();
        for part in [
            format!("rows.ndjson: cannot resume at byte {bytes}"),
            format!("keep its first {bytes} bytes, then a line break, then the lines after"),
        ] {
            assert!(said.contains(&part), "{command}: {part:?} is missing in {said}");
        }
    }
    // Follows the advice in the message, with the same file.
    place.write(&[&first[..], b"\n{\"id\":3}\n"].concat());
    let checked = crate::support::run(&["check", &pipeline]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    place.run_ok("");
    assert_eq!(place.ids(), [1, 2, 3]);
}

#[test]
fn a_run_that_waits_for_input_ends_at_a_signal() {
    let place = Place::new(b"");
    let pipeline = place.pipeline("-", "");
    let mut command = shardmill(&["run", &pipeline]);
    let run = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut run = Process(run.expect("the binary starts"));
    let mut input = run.0.stdin.take().expect("piped");
    input.write_all(&rows(0..10)).expect("written");
    input.flush().expect("written");
    wait_for("the rows", || place.ids().len() == 10);
    assert_eq!(run.terminate(), Some(0));
    drop(input);
}

#[test]
fn what_is_no_file_is_refused() {
    let place = Place::new(b"");
    let pipeline = place.pipeline(&place.folder.path().display().to_string(), "");
    let output = crate::support::run(&["run", &pipeline]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("not a regular file"), "{error}");
}

#[test]
fn lines_end_as_they_end() {
    let place = Place::new(b"header\r\n{\"id\":1}\r\n{\"id\":2}\n\n{\"id\":3}\r\n{\"id\":4}");
    place.run_ok("skip = 1");
    assert_eq!(place.ids(), [1, 2, 3, 4]);
    assert_eq!(place.dead_letters(), [b""], "an empty line is an empty record");
}

#[test]
fn an_empty_file_is_nothing() {
    let place = Place::new(b"");
    place.run_ok("");
    assert!(place.ids().is_empty());
    place.append(&rows(0..10));
    place.run_ok("");
    assert!(place.ids().into_iter().eq(0..10));
}

#[test]
fn without_a_stage_every_record_goes_to_every_sink_as_it_came() {
    let place = Place::new(&rows(0..1_000));
    let pipeline = place.pipeline("rows.ndjson", "format = \"application/json\"");
    let text = std::fs::read_to_string(&pipeline).expect("the pipeline");
    let (before, stage) = text.split_once("[[stage]]").expect("a stage");
    let (_, sink) = stage.split_once("[[sink]]").expect("a sink");
    let nowhere = "[[sink]]\nname = \"nowhere\"\ntype = \"discard\"\n";
    std::fs::write(&pipeline, format!("{before}{nowhere}[[sink]]{sink}")).expect("written");
    let output = crate::support::run(&["run", &pipeline, "--json"]);
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(printed.contains("\"records\":1000"), "{printed}");
    assert!(place.ids().into_iter().eq(0..1_000));
}

#[test]
fn standard_input_is_a_file_each_time() {
    let place = Place::new(b"");
    let pipeline = place.pipeline("-", "");
    for ids in [0..3_000, 3_000..5_000] {
        let mut command = shardmill(&["run", &pipeline]);
        let run = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("started");
        let mut run = Process(run);
        let mut input = run.0.stdin.take().expect("piped");
        input.write_all(&rows(ids)).expect("written");
        drop(input);
        assert!(run.wait().success());
    }
    assert!(place.ids().into_iter().eq(0..5_000));
}

#[test]
fn a_missing_file_and_a_line_without_end_are_named() {
    let place = Place::new(b"");
    std::fs::remove_file(place.file()).expect("removed");
    let output = place.run("");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("rows.ndjson: failed to read at byte 0: No such file"), "{error}");

    place.write(&[&rows(0..10)[..], &vec![b'x'; 11 << 20]].concat());
    let output = place.run("");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("failed to read a line at byte 90"), "{error}");
    assert!(place.ids().into_iter().eq(0..10), "what precedes it is delivered");
}

/// `check` is as strict as a start.
#[test]
fn fault_31_check_refuses_a_file_that_cannot_be_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipe = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo");
    assert!(made.success());
    let there = folder.path().join("there.ndjson");
    std::fs::write(&there, "{\"id\":1}\n").expect("written");
    for (path, cause) in [
        (folder.path().join("missing"), "No such file"),
        (folder.path().to_owned(), "not a regular file"),
        (pipe, "not a regular file"),
        (there, ""),
    ] {
        let pipeline = PipelineToml::new(folder.path(), "checked")
            .file(&path, "")
            .route_all_to(&["nowhere"])
            .sink("nowhere", "type = \"discard\"")
            .write();
        let checked = run(&["check", &pipeline]);
        let said = String::from_utf8_lossy(&checked.stderr);
        assert_eq!(checked.status.success(), cause.is_empty(), "{said}");
        assert!(said.contains(cause), "{said}");
        assert!(run(&["check", "--offline", &pipeline]).status.success());
    }
}

#[test]
fn fault_33_a_file_of_a_byte_order_mark_alone_has_no_line_yet() {
    let place = Place::new(b"\xef\xbb\xbf");
    place.run_ok("");
    assert_eq!(place.ids(), Vec::<u64>::new());
    place.append(b"{\"id\":1}\n");
    place.run_ok("");
    assert_eq!(place.ids(), vec![1]);
}
