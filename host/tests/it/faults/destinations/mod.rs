//! Objects, SQLite and HTTP sinks: unusual rows and answers, and files that are cut short.

mod http;
mod objects;
mod sqlite;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::pipeline::PipelineToml;
use crate::support::{output, run, run_ok, shardmill};

/// Pipeline that reads the lines of a file into one sink.
struct Lines {
    folder: tempfile::TempDir,
    file: PipelineToml,
}

impl Lines {
    /// Writes rows as JSON lines, with a sink called `out`.
    fn new(rows: &[String], sink: impl Fn(&Path) -> String) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let lines = folder.path().join("rows.ndjson");
        std::fs::write(&lines, rows.join("\n") + "\n").expect("written");
        let file = PipelineToml::new(folder.path(), "lines")
            .file(&lines, "")
            .route_all_to(&["out"])
            .sink("out", &sink(folder.path()));
        Self { folder, file }
    }

    fn path(&self) -> String {
        self.file.write()
    }

    /// Returns a path in the folder.
    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs to the end of the file, which must succeed; returns the log.
    fn run(&self) -> String {
        let output = run(&["run", &self.path()]);
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{log}");
        log
    }

    /// Returns the reasons of all dead letters.
    fn reasons(&self) -> Vec<String> {
        let listed = run_ok(&["dlq", "list", "--pipeline", &self.path(), "--json"]);
        let reason = |line: &str| -> String {
            let dead_letter: serde_json::Value = serde_json::from_str(line).expect("JSON");
            dead_letter["reason"].as_str().expect("a reason").to_owned()
        };
        listed.lines().map(reason).collect()
    }

    /// Runs `check`; returns whether it succeeded, and its output.
    fn check(&self, options: &[&str]) -> (bool, String) {
        said(&run(&[&["check", &self.path()], options].concat()))
    }

    /// Runs `check` as a user without rights.
    fn check_as_nobody(&self) -> (bool, String) {
        let path = self.path();
        // `check` itself needs to read the file and to store compiled plugins.
        let state = self.at("state");
        std::fs::create_dir_all(&state).expect("a folder");
        for (place, mode) in [(self.folder.path(), 0o755), (&*state, 0o1777)] {
            std::fs::set_permissions(place, std::fs::Permissions::from_mode(mode)).expect("set");
        }
        said(&output(&mut as_nobody(shardmill(&["check", &path]))))
    }
}

fn said(output: &Output) -> (bool, String) {
    let text = [&output.stdout[..], &output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Drops the rights of root from a command: root ignores file modes.
fn as_nobody(command: Command) -> Command {
    let is_root = std::fs::metadata("/proc/self").expect("a process").uid() == 0;
    if !is_root {
        return command;
    }
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    nobody.arg(command.get_program()).args(command.get_args()).stdin(std::process::Stdio::null());
    nobody
}

/// Returns `{"id":0}` and so on.
fn ids(count: u64) -> Vec<String> {
    (0..count).map(|id| format!("{{\"id\":{id}}}")).collect()
}

/// Returns every file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.path().is_dir() {
                true => folders.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    found.sort();
    found
}
