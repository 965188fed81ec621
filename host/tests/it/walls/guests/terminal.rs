//! Names and texts of plugins, and arguments, cannot control a terminal, in any command.

use std::process::Output;

use super::asking::{Asking, LOG, Place};
use crate::support::world::{Pipeline, STREAM, World};
use crate::support::{run, shardmill};

/// Clears the screen, changes the direction of what follows, colours it, hides a character, and forges a line.
const BAD: &str = "\x1b[2J\u{202e}\u{9b}31m\u{200b}\u{2066}x\r\nok      forged\u{2028}";

/// Whether a character controls a terminal: a list of the test's own.
fn controls_terminal(c: char) -> bool {
    let formats = ['\u{ad}', '\u{61c}', '\u{feff}'];
    (c.is_control() && c != '\n' && c != '\t')
        || ('\u{200b}'..='\u{200f}').contains(&c)
        || ('\u{2028}'..='\u{202e}').contains(&c)
        || ('\u{2060}'..='\u{206f}').contains(&c)
        || formats.contains(&c)
}

/// Returns the output of a command; asserts that it does not control a terminal, and that none of its lines is the
/// plugin's.
fn said(command: &[&str], output: &Output) -> String {
    let both = [&output.stdout[..], b"\n", &output.stderr].concat();
    let said = String::from_utf8(both).expect("text");
    assert!(!said.contains(controls_terminal), "{command:?}: {said:?}");
    assert!(!said.lines().any(|line| line.starts_with("ok      forged")), "{command:?}: {said}");
    said
}

/// Returns code for `configure` that refuses with [`BAD`].
fn refusing() -> String {
    format!("(return (call $refusal (i32.const 1024) (i32.const {})))", BAD.len())
}

#[test]
fn wall_12_a_descriptor_that_would_steer_a_terminal_is_refused() {
    let bad = format!("geo{BAD}");
    let named = Asking { name: &bad, ..Asking::default() };
    let route = Asking { route: "o\u{202e}ut", ..Asking::default() };
    let format = Asking { format: "text/\u{9b}plain", ..Asking::default() };
    for (what, asking) in [("name", named), ("route", route), ("format", format)] {
        let place = Place::new(&Asking { route: "out", ..asking_of(&asking) }, 1, "", "");
        let component = asking.build().into_temp_path();
        std::fs::copy(&component, place.component()).expect("copied");
        let (pipeline, component) = (place.pipeline(), place.component());
        for command in [
            &["check", "--offline", &pipeline][..],
            &["run", "--until-caught-up", &pipeline],
            &["plugin", "inspect", &component],
            &["plugin", "inspect", "--json", &component],
            &["plugin", "conformance", &component],
        ] {
            let output = run(command);
            let said = said(command, &output);
            assert!(
                said.contains("descriptor's") || said.contains("invalid route name"),
                "{what}: {said}"
            );
        }
    }
}

/// Returns the same plugin with a route that a file can name.
fn asking_of<'a>(asking: &Asking<'a>) -> Asking<'a> {
    Asking { name: asking.name, format: asking.format, ..Asking::default() }
}

#[test]
fn wall_12_a_refusal_of_the_configuration_is_shown_escaped() {
    let refusing = refusing();
    let asking = Asking { data: BAD.as_bytes(), configure: &refusing, ..Asking::default() };
    let place = Place::new(&asking, 1, "", "");
    let (pipeline, component) = (place.pipeline(), place.component());
    for command in [
        &["check", "--offline", &pipeline][..],
        &["check", "--offline", "--json", &pipeline],
        &["run", "--until-caught-up", &pipeline],
        &["plugin", "inspect", &component],
        &["plugin", "inspect", "--json", &component],
        &["plugin", "conformance", &component],
        &["plugin", "bench", &component],
    ] {
        let output = run(command);
        let said = said(command, &output);
        assert!(said.contains("u{202e}") || said.contains("u202e"), "{command:?}: {said}");
    }
}

#[test]
fn wall_12_lines_reasons_and_stacks_are_shown_escaped() {
    // Each record fails with `BAD`, and each line of the log is `BAD`.
    let length = BAD.len();
    let process = format!(
        "(call $log (i32.const 3) (i32.const 1024) (i32.const {length}))
        (return (call $failure (i32.const 1024) (i32.const {length})))"
    );
    let asking =
        Asking { imports: &[LOG], data: BAD.as_bytes(), process: &process, ..Asking::default() };
    let place = Place::new(&asking, 3, "grant = { log = true }", "");
    std::fs::create_dir(place.folder.path().join("tests")).expect("a folder");
    let component = place.folder.path().join("asking.wasm").display().to_string();
    std::fs::copy(place.component(), &component).expect("copied");
    let case = "[[case]]\nname = \"any\"\n[[case.input]]\ntext = \"x\"\n[[case.output]]\n\
        route = \"out\"\n";
    std::fs::write(place.folder.path().join("tests/cases.toml"), case).expect("written");
    let pipeline = place.pipeline();
    let ran = place.run();
    assert_eq!(ran.code, Some(0), "{}", ran.log);
    assert!(!ran.log.contains(controls_terminal), "{:?}", ran.log);
    let lines = ran.log.lines().filter(|line| line.contains("stage=ask"));
    assert!(lines.count() > 0 && !ran.log.contains("\nok      forged"), "{}", ran.log);
    let dead_letters = place.dead_letters();
    assert!(
        dead_letters.len() == 3 && dead_letters[0].contains(BAD),
        "stored unchanged: {dead_letters:?}"
    );
    for command in [
        &["dlq", "list", "--pipeline", &pipeline][..],
        &["dlq", "list", "--json", "--pipeline", &pipeline],
        &["dlq", "show", "1", "--pipeline", &pipeline],
        &["dlq", "show", "1", "--json", "--pipeline", &pipeline],
        &["dlq", "export", "--pipeline", &pipeline],
        &["test", &component],
        &["test", "--json", &component],
        &["plugin", "conformance", &component],
        &["plugin", "conformance", "--json", &component],
    ] {
        let output = run(command);
        let said = said(command, &output);
        assert!(said.contains("u{202e}") || said.contains("u202e"), "{command:?}: {said}");
    }
    // The exported JSON contains the original value.
    let exported = run(&["dlq", "export", "--pipeline", &pipeline]).stdout;
    let line = exported.split(|byte| *byte == b'\n').next().expect("a dead letter");
    let dead_letter: serde_json::Value = serde_json::from_slice(line).expect("JSON");
    assert!(
        dead_letter["reason"].as_str().is_some_and(|reason| reason.contains(BAD)),
        "{dead_letter}"
    );
}

#[test]
fn wall_12_tail_swap_and_health_show_what_a_plugin_says_escaped() {
    let length = BAD.len();
    let process = format!("(return (call $failure (i32.const 1024) (i32.const {length})))");
    let failing = Asking {
        route: "all",
        format: "application/json",
        data: BAD.as_bytes(),
        process: &process,
        ..Asking::default()
    }
    .build();
    let refusing = refusing();
    let refusing = Asking {
        route: "all",
        format: "application/json",
        data: BAD.as_bytes(),
        configure: &refusing,
        ..Asking::default()
    }
    .build();
    let world = World::new(1);
    world.put(0..10, 3);
    let state_dir = world.folder.path().join("state").display().to_string();
    let (failing, refusing) =
        (failing.path().display().to_string(), refusing.path().display().to_string());
    let stream = ["--stream", STREAM, "--endpoint", "embedded", "--state-dir", &state_dir];
    for file in [&failing, &refusing] {
        for json in [&[][..], &["--json"]] {
            let command =
                [&["stream", "tail", "--no-follow", "--decode", file][..], &stream, json].concat();
            let output = crate::support::output(&mut shardmill(&command));
            assert!(said(&command, &output).contains("u{202e}"), "{command:?}");
        }
    }
    let started = world.start(&Pipeline::default());
    world.wait_rows(10);
    let path = world.folder.path().join("pipeline.toml").display().to_string();
    for file in [&failing, &refusing] {
        let command = ["plugin", "swap", "route", file, "--max-rejected", "0", "--pipeline", &path];
        let output = run(&command);
        assert!(said(&command, &output).contains("u{202e}"), "{command:?}");
        assert_eq!(output.status.code(), Some(1));
    }
    let history = ["plugin", "history", "--pipeline", &path];
    assert!(said(&history, &run(&history)).contains("u{202e}"));
    assert_eq!(started.terminate(), Some(0));
    let log = std::fs::read_to_string(world.log()).expect("a log");
    assert!(!log.contains(controls_terminal), "{log:?}");
}

#[test]
fn wall_12_errors_of_the_argument_parser_show_arguments_escaped() {
    let number = format!("1{BAD}");
    let option = format!("--{BAD}");
    for command in [
        &["dlq", "show", BAD][..],
        &["dlq", "show", &number],
        &["dlq", "list", &option],
        &["run", "pipeline.toml", BAD],
        &["completions", BAD],
        &["plugin", BAD],
        &[BAD],
    ] {
        let output = run(command);
        assert_eq!(output.status.code(), Some(2), "{command:?}");
        assert!(output.stdout.is_empty(), "{command:?}");
        let said = said(command, &output);
        assert!(said.contains("\\u{202e}"), "{command:?}: {said}");
        assert!(said.contains("\n\nFor more information, try '--help'."), "{command:?}: {said}");
    }
    // The output of `--help` is unchanged.
    let help = run(&["dlq", "show", "--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(help.stderr.is_empty() && said(&["--help"], &help).contains("Usage: "));
}
