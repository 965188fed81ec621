//! Limits on dead letters and on commits, and stored settings.

mod bounds;
mod copies;
mod objects;
mod remade;
mod variables;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::support::pipeline::PipelineToml;
use crate::support::{Process, output, shardmill, sqlite};
use crate::walls::memory::{assert_peak_below, output_and_peak};

/// Lines of `[pipeline]` that allow every record to fail.
const ALL_MAY_FAIL: &str = "rejected_of_last_1000 = 1000\nrejected_in_a_row = 100000";

/// A line of `[pipeline]` that limits the memory of sinks, for tests that bound the memory of the process.
const BUFFER: &str = "buffer = \"8 MiB\"";

/// Folder of a pipeline.
struct Folder(tempfile::TempDir);

impl Folder {
    /// Makes a folder with the lines that its pipeline reads.
    fn of_lines(lines: &[String]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("rows.txt"), lines.join("\n") + "\n").expect("written");
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Makes a pipeline called `cars` that reads the lines.
    fn pipeline(&self) -> PipelineToml {
        PipelineToml::new(self.path(), "cars")
            .pipeline(ALL_MAY_FAIL)
            .file(&self.path().join("rows.txt"), "")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = shardmill(arguments);
        command.current_dir(self.path());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        output(&mut self.command(arguments))
    }

    /// Runs a command that must succeed; returns standard output and standard error.
    fn ok(&self, arguments: &[&str]) -> (String, String) {
        let done = self.run(arguments);
        let (out, log) = texts(&done);
        assert!(done.status.success(), "{arguments:?}: {log}");
        (out, log)
    }

    /// Runs a command that must succeed, with its memory below a bound in bytes.
    fn ok_below(&self, arguments: &[&str], bound: u64) {
        let (done, peak) = output_and_peak(&mut self.command(arguments));
        let (_, log) = texts(&done);
        assert!(done.status.success(), "{arguments:?}: {log}");
        assert_peak_below(peak, bound, &format!("{arguments:?}"));
    }

    /// Starts a command whose standard error goes to `log.txt`.
    fn start(&self, arguments: &[&str]) -> Process {
        let log = fs::File::create(self.path().join("log.txt")).expect("a log");
        let mut command = self.command(arguments);
        Process(command.stdout(Stdio::null()).stderr(log).spawn().expect("it starts"))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path().join("log.txt")).unwrap_or_default()
    }

    fn state(&self) -> rusqlite::Connection {
        sqlite(&self.path().join("state/cars/state.db"))
    }

    fn number(&self, sql: &str) -> i64 {
        self.state().query_row(sql, [], |row| row.get(0)).expect(sql)
    }

    fn dead_letters(&self) -> i64 {
        self.number("SELECT count(*) FROM dead_letter WHERE held = 0")
    }

    /// Returns all files below a folder in it.
    fn files(&self, folder: &str) -> Vec<std::path::PathBuf> {
        let (mut files, mut folders) = (Vec::new(), vec![self.path().join(folder)]);
        while let Some(folder) = folders.pop() {
            let Ok(entries) = fs::read_dir(folder) else { continue };
            for entry in entries {
                let path = entry.expect("an entry").path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => files.push(path),
                }
            }
        }
        files
    }
}

fn texts(done: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&done.stdout), text(&done.stderr))
}
