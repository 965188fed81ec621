//! Reading: calls without an answer, starts, lineage, and who reads.

mod calls;
mod fan_out;
mod lost;
mod starts;

use crate::support::world::{Pipeline, World};
use crate::support::{Process, free_port, http_get, wait_for};

/// The first shard of a new stream.
const FIRST: &str = "shardId-000000000000";

/// Returns a free port and `[admin]` on it.
fn admin() -> (u16, String) {
    let port = free_port();
    (port, crate::support::admin(port))
}

/// Waits until health reports that something is blocked, with these words.
fn wait_blocked(port: u16, words: &[&str]) {
    wait_for(&format!("health to say {words:?}"), || {
        let health = http_get(port, "/health/ready");
        health.contains(" 503 ") && words.iter().all(|word| health.contains(word))
    });
}

fn wait_ready(port: u16) {
    wait_for("health to be ready", || http_get(port, "/health/ready").contains("ready\n"));
}

/// Starts a pipeline without waiting until it reads.
fn start(world: &World, pipeline: &Pipeline) -> Process {
    let path = world.pipeline(pipeline);
    let log = std::fs::File::create(world.log()).expect("a log");
    let mut command = crate::support::shardmill(&["run", &path, "-v"]);
    let run = command.stdout(std::process::Stdio::null()).stderr(log).spawn();
    Process(run.expect("the binary starts"))
}

/// Runs a pipeline until it has caught up or fails; returns the exit code and the output.
fn run(world: &World, pipeline: &Pipeline) -> (Option<i32>, String) {
    let path = world.pipeline(pipeline);
    let output = crate::support::run(&["run", &path, "--until-caught-up", "-v"]);
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Makes the state refuse to start these shards.
fn refuse_to_begin(world: &World, shards: &str) {
    let trigger = format!(
        "CREATE TRIGGER refuse BEFORE INSERT ON shard WHEN NEW.shard IN ({shards})
         BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
    );
    let state = world.state();
    state.busy_timeout(std::time::Duration::from_secs(20)).expect("set");
    state.execute_batch(&trigger).expect("a trigger");
}

fn let_begin(world: &World) {
    let state = world.state();
    state.busy_timeout(std::time::Duration::from_secs(20)).expect("set");
    state.execute_batch("DROP TRIGGER refuse").expect("dropped");
}
