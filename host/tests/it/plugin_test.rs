//! `shardmill test`, `plugin conformance` and `plugin bench`, through the real binary with bundled plugins.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::pipeline::PipelineToml;
use crate::support::{output, plugin, run, run_ok, shardmill};

/// A component in a folder of its own, with test cases beside it.
struct Tested {
    folder: tempfile::TempDir,
    component: PathBuf,
}

impl Tested {
    fn new(name: &str, cases: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let component = folder.path().join(format!("{name}.wasm"));
        fs::copy(plugin(name), &component).expect("a component");
        fs::create_dir(folder.path().join("tests")).expect("a folder");
        let tested = Self { folder, component };
        tested.write("tests/cases.toml", cases);
        tested
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.folder.path().join(name), text).expect("written");
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join(name)).expect(name)
    }

    /// Runs `shardmill test` on it; returns the exit code and standard output.
    fn test(&self, options: &[&str]) -> (i32, String) {
        let mut command = shardmill(&["test"]);
        command.arg(&self.component).args(options);
        let done = output(&mut command);
        let text = String::from_utf8_lossy(&done.stdout).into_owned()
            + &String::from_utf8_lossy(&done.stderr);
        (done.status.code().expect("a code"), text)
    }
}

const CSV: &str = r#"# Lines as the shop writes them.
config = { columns = [{ name = "id", type = "integer", nullable = false }, { name = "make", type = "text" }] }

[[case]]
name = "typed" # the id is a number
[[case.input]]
text = "7,honda"
[[case.output]]
route = "rows"
json = { id = 7, make = "honda" }

[[case]]
name = "no number"
[[case.input]]
text = "x,honda"
[[case.input]]
text = "8,audi"
[[case.output]]
route = "rows"
input = 1
json = { make = "audi", id = 8 }
[[case.reject]]
input = 0
reason = "x"
[[case.variant]]
name = "no columns"
config = { columns = [] }
fails = "column"
"#;

#[test]
fn cases_that_hold_pass() {
    let tested = Tested::new("csv-decode", CSV);
    let line = r#"{"name":"as a line","config":{"columns":[{"name":"a","type":"text"}]},"input":[{"text":"z"}],"output":[{"route":"rows","text":"{\"a\":\"z\"}"}]}"#;
    tested.write("tests/more.ndjson", line);
    let junit = tested.folder.path().join("junit.xml").display().to_string();
    let (code, text) = tested.test(&["--junit", &junit]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("4 passed, 0 failed"), "{text}");
    let xml = tested.read("junit.xml");
    assert!(xml.contains("tests=\"4\"") && xml.contains("failures=\"0\""), "{xml}");
    let (code, text) = tested.test(&["--filter", "typed"]);
    assert!(code == 0 && text.contains("1 passed, 0 failed"), "{text}");
}

#[test]
fn a_case_that_does_not_hold_fails_with_a_difference() {
    let tested = Tested::new("csv-decode", &CSV.replace("make = \"honda\"", "make = \"audi\""));
    let junit = tested.folder.path().join("junit.xml").display().to_string();
    let (code, text) = tested.test(&["--junit", &junit]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("FAILED  typed"), "{text}");
    assert!(text.contains("-       \"make\": \"audi\""), "{text}");
    assert!(text.contains("+       \"make\": \"honda\""), "{text}");
    assert!(text.contains("2 passed, 1 failed"), "{text}");
    let xml = tested.read("junit.xml");
    assert!(xml.contains("failures=\"1\"") && xml.contains("name=\"typed\""), "{xml}");
}

#[test]
fn update_accepts_what_the_plugin_does_and_keeps_the_rest() {
    let wrong = CSV
        .replace("make = \"honda\"", "make = \"audi\"")
        .replace("fails = \"column\"", "[[case.variant.output]]\nroute = \"rows\"\n");
    let tested = Tested::new("csv-decode", &wrong);
    let (code, text) = tested.test(&["--update"]);
    assert!(code == 0 && text.contains("1 passed, 2 updated"), "{text}");
    let updated = tested.read("tests/cases.toml");
    assert!(updated.starts_with("# Lines as the shop writes them."), "{updated}");
    assert!(updated.contains("name = \"typed\" # the id is a number"), "{updated}");
    let (code, text) = tested.test(&[]);
    assert!(code == 0 && text.contains("3 passed, 0 failed"), "{text}\n{updated}");
}

#[test]
fn wrong_cases_are_named_with_their_place() {
    let tested = Tested::new("csv-decode", "[[case]]\nname = \"x\"\ninputs = []\n");
    let (code, text) = tested.test(&[]);
    assert_eq!(code, 1);
    assert!(text.contains("cases.toml:3:1: unknown field `inputs`"), "{text}");
    let empty = tempfile::tempdir().expect("a folder");
    let done = run(&["test", &empty.path().display().to_string()]);
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && text.contains("neither a plugin.toml nor"), "{text}");
}

#[test]
fn bundled_plugins_conform() {
    for (name, config) in [
        ("csv-decode", r#"{"columns":[{"name":"a","type":"text"}]}"#),
        ("car-decode", "{}"),
        ("car-transform", r#"{"first_word":{"b":"a"}}"#),
        ("route-json", r#"{"default":"reject","rules":[{"route":"x","field":"a","equals":"b"}]}"#),
    ] {
        let shown = run_ok(&["plugin", "conformance", &plugin(name), "--config", config]);
        assert_eq!(shown.matches("ok      ").count(), 11, "{name}: {shown}");
    }
}

/// Returns the checks that fail for the hostile plugin with a configuration.
fn failing(config: &str) -> Vec<String> {
    let done = run(&["plugin", "conformance", &plugin("hostile"), "--config", config, "--json"]);
    let lines = String::from_utf8(done.stdout).expect("UTF-8");
    let checks = lines.lines().map(|line| serde_json::from_str(line).expect("JSON"));
    let failed: Vec<String> = checks
        .filter(|check: &serde_json::Value| !check["failure"].is_null())
        .map(|check| check["check"].as_str().expect("a name").to_owned())
        .collect();
    assert_eq!(done.status.success(), failed.is_empty(), "{lines}");
    failed
}

#[test]
fn what_does_not_conform_is_found() {
    assert_eq!(failing("{}"), Vec::<String>::new());
    let all = failing(r#"{"trap_on":""}"#);
    assert!(all.contains(&"one record".into()) && all.len() >= 8, "{all:?}");
    // One record alone cannot show the wrong order, and neither can a search for the culprit.
    let order = failing(r#"{"unordered_on":""}"#);
    assert!(order.contains(&"10,000 records".into()), "{order:?}");
    assert!(!order.contains(&"one record".into()), "{order:?}");
    let refused = failing(r#"{"refuse":"no"}"#);
    assert_eq!(refused, ["it accepts its configuration and describes itself"]);
    let format = failing(r#"{"format":"json"}"#);
    assert_eq!(format, ["it accepts its configuration and describes itself"]);
}

#[test]
fn a_plugin_is_measured() {
    let tested = Tested::new("csv-decode", CSV);
    let file = tested.component.display().to_string();
    let shown = run_ok(&["plugin", "bench", &file, "--seconds", "1", "--batch", "100", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&shown).expect("one line of JSON");
    let measured = &report["measured"];
    assert!(measured["ns_per_record"].as_f64().expect("a time") > 0.0, "{shown}");
    assert_eq!(measured["batch_records"], 100);
    let shown = run_ok(&["plugin", "bench", &file, "--seconds", "1"]);
    assert!(shown.contains("ns per record") || shown.contains("per record"), "{shown}");
    assert!(shown.contains('█'), "{shown}");
}

fn pipeline(folder: &Path) -> String {
    let stage = "[stage.config]\ndefault = \"reject\"\n\
                 rules = [{ route = \"cars\", field = \"kind\", equals = \"car\" }]\n\
                 [stage.routes]\ncars = [\"console\"]";
    let file = PipelineToml::new(folder, "shop")
        .file(Path::new("input.ndjson"), "")
        .stage("route", "route-json", stage)
        .plain_sink("console", "type = \"stdout\"")
        .write();
    let input = "{\"kind\":\"car\",\"user\":{\"email\":\"a@b.example\"}}\nno json\n\
                 {\"kind\":\"boat\",\"user\":{\"email\":\"c@d.example\"}}\n";
    fs::write(folder.join("input.ndjson"), input).expect("written");
    file
}

#[test]
fn dead_letters_become_cases_without_what_is_redacted() {
    let tested = Tested::new("route-json", "");
    let pipeline = pipeline(tested.folder.path());
    run_ok(&["run", &pipeline]);
    let options = ["--from-dlq", "--pipeline", &pipeline, "--redact", "/user/email"];
    let (code, text) = tested.test(&options);
    assert!(code == 0 && text.contains("1 cases in"), "{text}");
    assert!(text.contains("1 records left out: they are not valid JSON"), "{text}");
    let captured = tested.read("tests/captured.ndjson");
    assert!(captured.contains("x@x.xxxxxxx") && !captured.contains("c@d.example"), "{captured}");
    assert!(captured.contains("\"reject\"") && captured.contains("boat"), "{captured}");
    // The captured case passes, and would fail if the plugin did something else.
    let (code, text) = tested.test(&["--filter", "captured"]);
    assert!(code == 0 && text.contains("1 passed, 0 failed"), "{text}");
}

#[test]
fn a_streams_records_become_cases() {
    let tested = Tested::new("route-json", "");
    let pipeline = pipeline(tested.folder.path());
    let listed = run_ok(&["run", &pipeline]);
    assert!(listed.contains("a@b.example"), "{listed}");
    // A file's sequence numbers are positions in the file: the range covers the whole file.
    let range = format!("file-000000000000:0..{}", u64::MAX);
    let options = ["--from-stream", &range, "--pipeline", &pipeline];
    let (code, text) = tested.test(&options);
    assert!(code == 0 && text.contains("3 cases in"), "{text}");
    let (code, text) = tested.test(&["--filter", "captured"]);
    assert!(code == 0 && text.contains("3 passed, 0 failed"), "{text}");
    let (code, text) = tested.test(&["--from-stream", "x:2..1", "--pipeline", &pipeline]);
    assert!(code == 2 && text.contains("SHARD:SEQUENCE"), "{text}");
}
