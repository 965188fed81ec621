//! Checks that the example does what its README says, with the real program, in a temporary folder.
#![expect(clippy::expect_used, reason = "tests fail by panicking")]

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Readings of each station.
const READINGS: u64 = 1_000;
/// Longest time for anything: the first run compiles a plugin, on a machine that may be busy.
const PATIENCE: Duration = Duration::from_secs(300);

fn example(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_embed"));
    command.arg(folder);
    command
}

/// Waits for the end of the program, and returns its output.
fn said(mut child: Child) -> String {
    let begun = Instant::now();
    while child.try_wait().expect("a child").is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill().expect("a child");
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().expect("its output");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{}: {text}", output.status);
    text
}

fn started(mut command: Command) -> Child {
    command.stdout(Stdio::piped()).spawn().expect("the program")
}

/// Returns every line of the sink's files except the positions, sorted.
fn rows(folder: &Path) -> Vec<String> {
    let mut rows = Vec::new();
    for file in std::fs::read_dir(folder.join("rows")).into_iter().flatten() {
        let bytes = std::fs::read(file.expect("a file").path()).expect("its bytes");
        let text = String::from_utf8_lossy(&bytes);
        rows.extend(text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned));
    }
    rows.sort();
    rows
}

/// Returns the expected rows of all readings, sorted.
fn expected() -> Vec<String> {
    let row = |station: &str, number: u64| {
        let celsius = number as f64 / 2.0;
        format!(r#"{{"station":"{station}","number":{number},"celsius":{celsius:.1}}}"#)
    };
    let mut rows: Vec<String> = ["north", "south"]
        .iter()
        .flat_map(|station| (1..=READINGS).map(|number| row(station, number)))
        .collect();
    rows.sort();
    rows
}

#[test]
fn the_example_shows_each_row_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = said(started(example(folder.path())));
    assert!(text.contains("2000 are there once, 0 more often"), "{text}");
    assert_eq!(rows(folder.path()), expected());
}

/// The first run is asked to end halfway, the second is killed, and the third ends by itself.
#[test]
fn a_run_goes_on_where_the_one_before_was_stopped_or_killed() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = || {
        let mut command = example(folder.path());
        command.arg("run");
        started(command)
    };
    let mut done = 0;
    for (part, signal) in [(3, "-INT"), (3, "-KILL")] {
        let mut child = run();
        let begun = Instant::now();
        let enough = done + expected().len() / part;
        while rows(folder.path()).len() < enough {
            assert!(child.try_wait().expect("a child").is_none(), "it ended too early");
            assert!(begun.elapsed() < PATIENCE, "too few rows");
            std::thread::sleep(Duration::from_millis(5));
        }
        // A shell has its own `kill`, where no program of that name is installed.
        let kill = format!("kill {signal} {}", child.id());
        let sent = Command::new("sh").args(["-c", &kill]).status();
        assert!(sent.expect("kill").success());
        let ended = child.wait().expect("its end");
        assert_eq!(ended.success(), signal == "-INT", "{signal}: {ended}");
        done = rows(folder.path()).len();
        assert!((enough..expected().len()).contains(&done), "{signal}: {done} rows");
        // A crash can interrupt a commit anywhere: here in the middle of a character.
        for file in std::fs::read_dir(folder.path().join("rows")).expect("the folder") {
            let mut file = OpenOptions::new().append(true).open(file.expect("a file").path());
            file.as_mut().expect("the file").write_all(b"{\"station\":\"Z\xc3").expect("written");
        }
    }
    let text = said(run());
    assert!(text.contains("this run read"), "{text}");
    assert_eq!(rows(folder.path()), expected());
}
