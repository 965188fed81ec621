//! Misbehaviour that no compiler produces: handwritten plugins with one thing wrong.

use std::io::Write as _;

use crate::assets;
use shardmill_config::RejectedMax;
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

use super::lane::{LIMITS, Lane};

/// Texts that replace the placeholders of the skeleton.
#[derive(Default)]
pub struct Guest<'a> {
    /// Core imports.
    pub imports: &'a str,
    /// Code in `configure`. Its parameters 2 and 3 are the address and the length of the shard's id, which is empty
    /// while the pipeline is loaded.
    pub configure: &'a str,
    /// Code in `cabi_realloc` while the current batch contains a culprit; `$at` is the address that it returns.
    pub realloc: &'a str,
    /// Code in `process`, for each culprit, before its output is written.
    pub process: &'a str,
    /// Code that runs after a call with a culprit.
    pub post: &'a str,
    /// Further items of the module.
    pub items: &'a str,
}

impl Guest<'_> {
    /// Builds the component; returns its file.
    pub fn build(&self, world: &str) -> tempfile::NamedTempFile {
        component(&self.text(), world)
    }

    /// Returns the text of its module.
    pub fn text(&self) -> String {
        assets::SKELETON_WAT
            .replace(";;@imports", self.imports)
            .replace(";;@configure", self.configure)
            .replace(";;@realloc", self.realloc)
            .replace(";;@process", self.process)
            .replace(";;@post", self.post)
            .replace(";;@items", self.items)
    }

    fn lane(&self, world: &str) -> Result<Lane, String> {
        let file = self.build(world);
        let granted = format!("{LIMITS}[stage.grant]\nclock = true");
        let limits = if world == "plugin" { LIMITS } else { &granted };
        Lane::of(&file.path().display().to_string(), limits, "", RejectedMax::default())
    }

    /// Asserts that three culprits alone are dead-lettered.
    fn assert_culprits_alone(&self, reason: &str) {
        let mut lane = self.lane("plugin").unwrap_or_else(|why| panic!("{why}"));
        lane.assert_culprits_alone(&[0, 499, 999], reason);
        // The next batch runs on a sound instance.
        lane.assert_culprits_alone(&[], reason);
    }
}

/// Makes a component of our world from a module's text; returns its file.
pub fn component(text: &str, world: &str) -> tempfile::NamedTempFile {
    encoded(text, world, StringEncoding::UTF8)
}

/// Like `component`, with this encoding of strings.
pub fn encoded(text: &str, world: &str, encoding: StringEncoding) -> tempfile::NamedTempFile {
    let mut module = wat::parse_str(text).expect("valid WAT");
    let mut wit = Resolve::default();
    let (package, _) = wit.push_path(crate::support::root().join("wit/0.1.0")).expect("our WIT");
    let world = wit.select_world(&[package], Some(world)).expect("a world");
    embed_component_metadata(&mut module, &wit, world, encoding).expect("embedded");
    let encoder = ComponentEncoder::default().validate(true).module(&module);
    let component = encoder.and_then(|mut it| it.encode()).expect("a component");
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(&component).expect("written");
    file
}

#[test]
fn the_skeleton_does_nothing_wrong() {
    let mut lane = Guest::default().lane("plugin").unwrap_or_else(|why| panic!("{why}"));
    (0..100).for_each(|_| lane.assert_culprits_alone(&[], ""));
}

#[test]
fn a_table_over_its_limit_costs_the_culprit_alone() {
    let grow = "(if (i32.eq (table.grow $table (ref.null func) (i32.const 2000)) (i32.const -1))
                  (then unreachable))";
    let expected = "asked for 2001 table elements, over its limit of 1000";
    Guest { process: grow, ..Guest::default() }.assert_culprits_alone(expected);
}

#[test]
fn room_outside_of_the_memory_costs_the_culprit_alone() {
    for at in ["0x7ffffff8", "0xfffffff8", "4194296"] {
        let realloc = format!("(local.set $at (i32.const {at}))");
        Guest { realloc: &realloc, ..Guest::default() }.assert_culprits_alone("realloc");
    }
}

#[test]
fn room_that_is_not_aligned_costs_the_culprit_alone() {
    let realloc = "(local.set $at (i32.add (local.get $at) (i32.const 1)))";
    Guest { realloc, ..Guest::default() }.assert_culprits_alone("align");
}

#[test]
fn a_trap_while_the_host_asks_for_room_costs_the_culprit_alone() {
    Guest { realloc: "unreachable", ..Guest::default() }.assert_culprits_alone("trapped");
}

#[test]
fn an_endless_loop_while_the_host_asks_for_room_is_ended() {
    let expected = "took longer than its limit of 100 ms";
    Guest { realloc: "(loop $ever (br $ever))", ..Guest::default() }
        .assert_culprits_alone(expected);
}

#[test]
fn an_endless_loop_after_the_answer_is_ended() {
    let expected = "took longer than its limit of 100 ms";
    Guest { post: "(loop $ever (br $ever))", ..Guest::default() }.assert_culprits_alone(expected);
}

#[test]
fn a_trap_after_the_answer_costs_the_culprit_alone() {
    Guest { post: "unreachable", ..Guest::default() }.assert_culprits_alone("trapped");
}

#[test]
fn an_answer_that_does_not_lie_in_the_memory_costs_the_culprit_alone() {
    for at in ["0x7ffffffc", "0xfffffffc", "4194300"] {
        let process = format!("(global.set $answer (i32.const {at}))");
        Guest { process: &process, ..Guest::default() }.assert_culprits_alone("");
    }
    let unaligned = "(global.set $answer (i32.const 4097))";
    Guest { process: unaligned, ..Guest::default() }.assert_culprits_alone("align");
}

#[test]
fn a_length_that_is_a_lie_costs_the_culprit_alone() {
    // The lengths of the arena, the outputs and the rejects, each beyond the memory and beyond 4 GiB.
    for (field, length) in
        [(4104, "0x7fffffff"), (4112, "0x3fffffff"), (4112, "0xffffffff"), (4120, "0x40000001")]
    {
        let process = format!("(i32.store (i32.const {field}) (i32.const {length}))");
        Guest { process: &process, ..Guest::default() }.assert_culprits_alone("");
    }
}

#[test]
fn an_answer_of_no_known_case_costs_the_culprit_alone() {
    let process = "(i32.store8 (i32.const 4096) (i32.const 7))";
    Guest { process, ..Guest::default() }.assert_culprits_alone("discriminant");
}

#[test]
fn to_call_the_host_while_it_asks_for_room_costs_the_culprit_alone() {
    let guest = Guest {
        imports: r#"(import "shardmill:plugin/clock@0.1.0" "now-ms" (func $now (result i64)))"#,
        realloc: "(drop (call $now))",
        ..Guest::default()
    };
    let mut lane = guest.lane("plugin-with-capabilities").unwrap_or_else(|why| panic!("{why}"));
    lane.assert_culprits_alone(&[0, 499, 999], "cannot leave");
}

#[test]
fn an_endless_loop_that_calls_the_host_is_ended() {
    let guest = Guest {
        imports: r#"(import "shardmill:plugin/clock@0.1.0" "now-ms" (func $now (result i64)))"#,
        process: "(loop $ever (drop (call $now)) (br $ever))",
        ..Guest::default()
    };
    let mut lane = guest.lane("plugin-with-capabilities").unwrap_or_else(|why| panic!("{why}"));
    lane.assert_culprits_alone(&[0, 499, 999], "took longer than its limit of 100 ms");
}

#[test]
fn a_component_of_many_functions_is_a_plugin_like_another() {
    let items: String = (0..100_000).map(|_| "(func)").collect();
    let mut lane = Guest { items: &items, ..Guest::default() }
        .lane("plugin")
        .unwrap_or_else(|why| panic!("{why}"));
    lane.assert_culprits_alone(&[], "");
}

#[test]
fn a_memory_that_begins_over_its_limit_is_refused_at_load() {
    let items = "(memory $second 300)";
    let refused = Guest { items, ..Guest::default() }.lane("plugin");
    let Err(why) = refused else { panic!("not refused") };
    assert!(why.contains("of memory, over its limit of 16777216"), "{why}");
}

#[test]
fn an_import_that_nobody_has_is_refused_by_its_name() {
    let text = r#"(component
        (import "wasi:sockets/tcp@0.2.0" (instance (export "connect" (func))))
        (import "launch-missiles" (func))
        (core module $code (func (export "configure")))
        (core instance $core (instantiate $code))
        (func $configure (canon lift (core func $core "configure")))
        (instance $stage (export "configure" (func $configure)))
        (export "shardmill:plugin/stage@0.1.0" (instance $stage)))"#;
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(&wat::parse_str(text).expect("valid WAT")).expect("written");
    let path = file.path().display().to_string();
    let Err(why) = Lane::of(&path, LIMITS, "", RejectedMax::default()) else {
        panic!("not refused")
    };
    for expected in ["wasi:sockets/tcp@0.2.0", "launch-missiles", "unsupported imports"] {
        assert!(why.contains(expected), "{expected}: {why}");
    }
}
