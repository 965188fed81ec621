//! Stages whose start fails in one lane, for a while, or everywhere.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::hostile::wat::Guest;
use crate::support::pipeline::PipelineToml;
use crate::support::world::{STREAM, World};
use crate::support::{Process, admin, free_port, http_get, shardmill, wait_for};

/// Traps for the shard whose id ends with `0`.
const IN_SHARD_0: &str = "(if (local.get 3) (then
  (if (i32.eq (i32.const 0x30)
        (i32.load8_u (i32.sub (i32.add (local.get 2) (local.get 3)) (i32.const 1))))
    (then unreachable))))";
/// Traps for every shard, but not while the pipeline is loaded.
const IN_EVERY_SHARD: &str = "(if (local.get 3) (then unreachable))";

/// Makes the guest's route carry JSON.
const JSON: &str = r#"(data (i32.const 48) "application/json")
  (data (i32.const 96)
    "\20\00\00\00\03\00\00\00\30\00\00\00\10\00\00\00\04\00\00\00\00\00\00\00")"#;

/// World of two shards with one row for each of 20 keys, and a pipeline whose stage is the guest.
struct Fixture {
    world: World,
    _plugin: tempfile::NamedTempFile,
    file: String,
    port: u16,
}

impl Fixture {
    fn new(guest: &Guest<'_>, world_name: &str, grant: &str) -> Self {
        let world = World::new(2);
        world.put(0..20, 20);
        let plugin = Guest { items: JSON, ..*guest }.build(world_name);
        let port = free_port();
        let lines = format!("{grant}\nroutes = {{ out = [\"mart\"] }}");
        let file = PipelineToml::new(world.folder.path(), "starts")
            .stream(STREAM, "embedded", "format = \"application/json\"")
            .stage("start", &plugin.path().display().to_string(), &lines)
            .sqlite("mart", "rows")
            .table(&admin(port))
            .write();
        Self { world, _plugin: plugin, file, port }
    }

    fn start(&self) -> Process {
        let log = std::fs::File::create(self.world.log()).expect("a log");
        let mut command = shardmill(&["run", &self.file, "-v"]);
        let command = command.stdout(std::process::Stdio::null()).stderr(log);
        Process(command.spawn().expect("the binary starts"))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.world.log()).unwrap_or_default()
    }
}

#[test]
fn wall_08_one_lane_whose_stages_do_not_start_is_blocked_and_the_others_go_on() {
    let fixture = Fixture::new(&Guest { configure: IN_SHARD_0, ..Guest::default() }, "plugin", "");
    let mut run = fixture.start();
    wait_for("the lane to be blocked", || {
        let (log, ready) = (fixture.log(), http_get(fixture.port, "/health/ready"));
        let is_named = log.contains("stage start (plugin hostile 1, ");
        ready.contains("503") && is_named && log.contains("blocked")
    });
    wait_for("the other lane's rows", || fixture.world.rows() > 0);
    let before = fixture.world.rows();
    assert!(before < 20, "both shards have rows");
    // The lane goes on with new records, and ends when asked.
    fixture.world.put(20..60, 40);
    fixture.world.wait_rows(before + 1);
    assert!(run.0.try_wait().expect("a state").is_none(), "{}", fixture.log());
    assert_eq!(run.terminate(), Some(0), "{}", fixture.log());
}

#[test]
fn wall_08_a_revision_that_starts_nowhere_is_refused_at_the_first_start() {
    let fixture =
        Fixture::new(&Guest { configure: IN_EVERY_SHARD, ..Guest::default() }, "plugin", "");
    let mut run = fixture.start();
    assert_eq!(run.wait().code(), Some(1), "{}", fixture.log());
    let log = fixture.log();
    for expected in ["stage start (plugin hostile 1, ", "does not start: configure trapped"] {
        assert!(log.contains(expected), "{expected}: {log}");
    }
    assert_eq!(fixture.world.rows(), 0);
}

/// `configure` fails for some seconds by the clock, because it may not call a server.
#[test]
fn wall_08_a_start_that_fails_for_a_while_is_retried() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let from_ms = now.as_millis() as u64 + 4_000;
    let is_early = "(i64.lt_u (call $now) (i64.const FROM))".replace("FROM", &from_ms.to_string());
    // It fails in one shard only: if it failed in all of them, the run would end.
    let configure =
        IN_SHARD_0.replace("unreachable", &format!("(if {is_early} (then unreachable))"));
    let guest = Guest {
        imports: r#"(import "shardmill:plugin/clock@0.1.0" "now-ms" (func $now (result i64)))"#,
        configure: &configure,
        ..Guest::default()
    };
    let fixture = Fixture::new(&guest, "plugin-with-capabilities", "grant = { clock = true }");
    let run = fixture.start();
    wait_for("the lane to be tried again", || fixture.log().contains("the stages do not start"));
    fixture.world.wait_rows(20);
    fixture.world.assert_each_once_in_order(20);
    wait_for("the lane to recover", || http_get(fixture.port, "/health/ready").contains("200 OK"));
    assert_eq!(run.terminate(), Some(0), "{}", fixture.log());
}
