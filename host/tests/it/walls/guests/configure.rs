//! Host calls in `configure`, the threads that it runs on, and swaps that a start would refuse.

use std::net::TcpListener;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use shardmill_cli::registry::SINK_TYPES;
use shardmill_config::parse;
use shardmill_engine::stage::Revision;
use shardmill_plugin::{Backends, CompileCache, PluginEngine, PluginHost};

use super::asking::{
    Asking, GET, LOG, NOW, OBSERVE, Place, RANDOM, REFUSE_IF_FAILED, REGISTER, SEND,
};
use crate::support::pipeline::PipelineToml;
use crate::support::world::{Pipeline, STREAM, World};
use crate::support::{run, wait_for};

/// Opens a port that nobody may connect to; returns its address.
fn silent() -> (TcpListener, String) {
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    server.set_nonblocking(true).expect("set");
    let address = server.local_addr().expect("an address").to_string();
    (server, address)
}

fn assert_nobody_connected(server: &TcpListener) {
    let connected = server.accept().expect_err("nobody connects");
    assert_eq!(connected.kind(), std::io::ErrorKind::WouldBlock);
}

/// Returns a call that sends a request; the URL lies after the method.
fn send(url: &str) -> String {
    format!(
        "(call $send (i32.const 1024) (i32.const 3) (i32.const 1027) (i32.const {})
          (i32.const 4) (i32.const 0) (i32.const 4) (i32.const 0) (i32.const 8192))
        {REFUSE_IF_FAILED}",
        url.len()
    )
}

/// Returns a call that looks up the key `k` in the lookup `t`.
fn look_up() -> String {
    format!(
        "(i32.store (i32.const 1100) (i32.const 1)) (i32.store (i32.const 1104) (i32.const 1))
        (call $get (i32.const 1024) (i32.const 1) (i32.const 1024) (i32.const 2)
          (i32.const 1100) (i32.const 2) (i32.const 8192))
        {REFUSE_IF_FAILED}"
    )
}

fn said(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&both).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// In `configure`, the capabilities that the host itself answers work.
#[test]
fn wall_07_configure_may_log_announce_metrics_and_ask_for_time_and_chance() {
    let configure = "(call $log (i32.const 3) (i32.const 1024) (i32.const 9))
        (call $register (i32.const 1) (i32.const 1033) (i32.const 5) (i32.const 0) (i32.const 0)
          (i32.const 8192))
        (if (i32.load8_u (i32.const 8192)) (then unreachable))
        (call $observe (i32.load (i32.const 8196)) (f64.const 3))
        (if (i64.lt_u (call $now) (i64.const 1600000000000)) (then unreachable))
        (if (i64.eq (call $random) (call $random)) (then unreachable))";
    let imports = [LOG, REGISTER, OBSERVE, NOW, RANDOM];
    let data = b"configuregauge";
    let asking = Asking { imports: &imports, data, configure, ..Asking::default() };
    let stage = "grant = { log = true, metrics = true, clock = true, random = true }";
    let place = Place::new(&asking, 2, stage, "");
    let checked = run(&["check", &place.pipeline()]);
    assert!(checked.status.success(), "{}", said(&checked));
    let ran = place.run();
    assert_eq!((ran.code, place.dead_letters()), (Some(0), Vec::new()), "{}", ran.log);
    assert!(ran.log.contains("WARN configure stage=ask"), "{}", ran.log);
}

/// Capabilities that wait for a server return an error text, whoever configures the plugin.
#[test]
fn wall_07_configure_asks_no_server_and_no_command_panics() {
    let (server, address) = silent();
    let url = format!("http://{address}/");
    let request = [b"GET", url.as_bytes()].concat();
    let (send, look_up) = (send(&url), look_up());
    let http = format!("grant = {{ http = [{{ host = \"{address}\", private = true }}] }}");
    // A real PostgreSQL lookup would connect. Nothing connects here: the server above would never answer.
    let table = format!(
        "[[lookup]]\nname = \"t\"\nurl = \"postgres://nobody@{address}/x\"\n\
         query = \"SELECT id, id AS n FROM t WHERE id = ANY($1)\""
    );
    let lookup = "grant = { lookup = [\"t\"] }".to_owned();
    for (capability, imports, data, configure, grant, table) in [
        ("http", [SEND], &request[..], &send, &http, ""),
        ("lookup", [GET], &b"tk"[..], &look_up, &lookup, table.as_str()),
    ] {
        let asking = Asking { imports: &imports, data, configure, ..Asking::default() };
        let place = Place::new(&asking, 1, grant, table);
        std::fs::create_dir(place.folder.path().join("tests")).expect("a folder");
        let component = place.folder.path().join("asking.wasm").display().to_string();
        std::fs::copy(place.component(), &component).expect("copied");
        let case = "[[case]]\nname = \"any\"\n[[case.input]]\ntext = \"x\"\n[[case.output]]\n\
            route = \"out\"\n";
        std::fs::write(place.folder.path().join("tests/cases.toml"), case).expect("written");
        let pipeline = place.pipeline();
        let expected = format!("{capability} is not available in configure");
        let mut commands = vec![
            vec!["check", "--offline", &pipeline],
            vec!["plugin", "inspect", &component],
            vec!["plugin", "conformance", &component],
            vec!["plugin", "bench", &component],
            vec!["test", &component],
        ];
        if capability == "http" {
            // A start connects to the lookups' servers before it configures any plugin.
            commands.push(vec!["run", "--until-caught-up", &pipeline]);
            commands.push(vec!["check", &pipeline]);
        }
        for command in commands {
            let output = run(&command);
            let said = said(&output);
            // Outside a pipeline, only the capabilities that the host itself answers are granted.
            let is_alone = ["plugin", "test"].contains(&command[0]);
            let expected = if is_alone { "is not granted" } else { &expected };
            assert!(said.contains(expected), "{command:?}: {said}");
            assert!(!said.contains("panicked") && !said.contains("runtime"), "{said}");
            assert_ne!(output.status.code(), Some(101), "{command:?}: {said}");
        }
        assert_nobody_connected(&server);
    }
}

/// A candidate that a start would refuse is refused as a swap, and the pipeline can still be restarted.
#[test]
fn wall_07_a_swap_that_no_start_would_take_is_refused() {
    let (server, address) = silent();
    let url = format!("http://{address}/");
    let data = [b"GET", url.as_bytes()].concat();
    let configure = send(&url);
    let asking = Asking {
        route: "all",
        format: "application/json",
        imports: &[SEND],
        data: &data,
        configure: &configure,
        ..Asking::default()
    };
    let candidate = asking.build();
    let world = World::new(1);
    world.put(0..10, 3);
    let pipeline = Pipeline {
        stage: Some(format!(
            "plugin = \"{}\"\nconfig = {{ default = \"all\", rules = [] }}\n\
             grant = {{ http = [{{ host = \"{address}\", private = true }}] }}",
            crate::support::plugin("route-json")
        )),
        ..Pipeline::default()
    };
    let started = world.start(&pipeline);
    world.wait_rows(10);
    let path = world.folder.path().join("pipeline.toml").display().to_string();
    let file = candidate.path().display().to_string();
    let swapped = run(&["plugin", "swap", "route", &file, "--pipeline", &path]);
    let said = said(&swapped);
    assert_eq!(swapped.status.code(), Some(1), "{said}");
    assert!(said.contains("refused at step check"), "{said}");
    assert!(said.contains("http is not available in configure"), "{said}");
    assert!(said.contains("runs on"), "{said}");
    assert_eq!(started.terminate(), Some(0));
    world.put(10..20, 3);
    world.catch_up(&pipeline);
    world.assert_each_once_in_order(20);
    assert_nobody_connected(&server);
}

/// The only thread of a runtime goes on while a plugin is compiled and configured.
#[tokio::test]
async fn wall_07_configure_does_not_run_on_async_threads() {
    let configure = "(loop $long
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if $long (i32.lt_u (local.get $i) (i32.const 300000000))))";
    let component = Asking { configure, ..Asking::default() }.build();
    let plugin = component.path().display().to_string();
    // Nothing is written, so the folder needs no name.
    let text = PipelineToml::new(Path::new(""), "busy")
        .timing("")
        .table(&format!("[source]\ntype = \"kinesis\"\nstream = \"{STREAM}\""))
        .stage("ask", &plugin, "routes = { out = [\"console\"] }")
        .plain_sink("console", "type = \"stdout\"")
        .text();
    let config =
        parse(Path::new("test.toml"), &text, &SINK_TYPES, &|_| None).expect("a valid pipeline");
    let engine = PluginEngine::new().expect("an engine");
    let host = PluginHost { engine, cache: CompileCache::none(), backends: Backends::default() };
    let (turns, counted) = tokio::sync::watch::channel(0_u32);
    let ticking = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(1)).await;
            turns.send_modify(|turns| *turns += 1);
        }
    });
    // The only thread must poll this call and the ticking in turn. If the call ran on that thread, it would end at
    // its first poll.
    Revision::load(&config, &host, |_| None).await.expect("loaded");
    let turns = *counted.borrow();
    ticking.abort();
    assert!(turns > 0, "nothing else ran meanwhile");
}

/// Swaps a pipeline's plugin for one that must be refused, while there are no records: no trial could find out what
/// is wrong with it. Returns the output.
fn refused_swap(world: &World, pipeline: &Pipeline, component: &Path) -> String {
    let started = world.start(pipeline);
    wait_for("the lane", || world.logged("reading"));
    let path = world.folder.path().join("pipeline.toml").display().to_string();
    let file = component.display().to_string();
    let swapped = run(&["plugin", "swap", "route", &file, "--pipeline", &path]);
    let said = said(&swapped);
    assert_eq!(swapped.status.code(), Some(1), "{said}");
    assert_eq!(started.terminate(), Some(0));
    said
}

/// A lane's own instance must declare the same as the instance with which the stage was loaded: otherwise each start
/// would fail in that lane.
#[test]
fn wall_07_a_swap_is_refused_that_does_not_start_in_a_shard() {
    // Outside a shard (its name is empty), the plugin declares the route that the pipeline binds.
    let component = Asking {
        route: "all",
        format: "application/json",
        configure: "(if (local.get 3) (then (i32.store (i32.const 100) (i32.const 2))))",
        ..Asking::default()
    }
    .build();
    let world = World::new(1);
    let pipeline = Pipeline::default();
    let said = refused_swap(&world, &pipeline, component.path());
    assert!(said.contains("declares other routes than when"), "{said}");
    world.put(0..10, 3);
    world.catch_up(&pipeline);
    world.assert_each_once_in_order(10);
}

/// A candidate that starts slowly in each shard would delay the swap by the sum over all shards.
#[test]
fn wall_08_a_swap_is_refused_whose_starts_in_all_shards_take_too_long() {
    let component = Asking {
        route: "all",
        format: "application/json",
        configure: "(if (local.get 3) (then (loop $long
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $long (i32.lt_u (local.get $i) (i32.const 600000000))))))",
        ..Asking::default()
    }
    .build();
    let world = World::new(2);
    let pipeline = Pipeline { timing: "trial = \"50 ms\"".into(), ..Pipeline::default() };
    let said = refused_swap(&world, &pipeline, component.path());
    assert!(said.contains("refused at step promote"), "{said}");
    assert!(said.contains("expected the stages to start in all"), "{said}");
}
