//! Features of WebAssembly that plugins may use, and the number of parts that a component may have.

use std::path::Path;

use shardmill_config::RejectedMax;
use shardmill_plugin::{CompileCache, PARTS_MAX, Parts, Plugin, PluginEngine};
use wasm_encoder::{
    ComponentExportKind, ComponentInstanceSection, ComponentSection as _, InstanceSection, Module,
    ModuleArg, ModuleSection, RawSection,
};
use wasmparser::{Parser, Payload};
use wit_component::StringEncoding;

use crate::hostile::lane::{LIMITS, Lane};
use crate::hostile::wat::{Guest, encoded};
use crate::support::pipeline::PipelineToml;
use crate::support::{output, plugin, shardmill};

/// Returns why a guest with these items is refused at load.
fn refusal(items: &str) -> String {
    let file = Guest { items, ..Guest::default() }.build("plugin");
    let path = file.path().display().to_string();
    match Lane::of(&path, LIMITS, "", RejectedMax::default()) {
        Ok(_) => panic!("not refused: {items}"),
        Err(why) => why,
    }
}

#[test]
fn wall_11_features_that_plugins_do_not_need_are_refused_by_their_names() {
    for (items, name) in [
        ("(memory i64 1)", "memory64"),
        ("(memory 1 1 shared)", "threads"),
        (
            "(func (param v128 v128 v128) (result v128)
               (f32x4.relaxed_madd (local.get 0) (local.get 1) (local.get 2)))",
            "relaxed simd",
        ),
        ("(type (struct (field i32)))", "gc"),
        ("(type $f (func)) (func (param (ref $f)))", "function references"),
        ("(tag)", "exceptions"),
        ("(func $again (return_call $again))", "tail call"),
        ("(table i64 1 funcref)", "memory64"),
    ] {
        let why = refusal(items);
        let expected = format!("it uses the feature \"{name}\" of WebAssembly");
        assert!(why.contains(&expected) && why.contains("build it without"), "{name}: {why}");
    }
}

/// The host would have to transcode a text completely before it could check its length.
#[test]
fn wall_06_a_component_whose_texts_are_not_utf8_is_refused_with_the_way_out() {
    for (encoding, name) in
        [(StringEncoding::UTF16, "utf16"), (StringEncoding::CompactUTF16, "latin1+utf16")]
    {
        let file = encoded(&Guest::default().text(), "plugin", encoding);
        let path = file.path().display().to_string();
        let Err(why) = Lane::of(&path, LIMITS, "", RejectedMax::default()) else {
            panic!("not refused: {name}")
        };
        let expected = format!("expected texts in the encoding utf8, found {name}: build it again");
        assert!(why.contains(&expected) && why.contains("--string-encoding"), "{why}");
    }
}

#[test]
fn wall_11_a_component_of_too_many_parts_is_refused_with_what_it_may_have() {
    let Parts { memories, tables, .. } = PARTS_MAX;
    for (items, count) in [
        ("(memory 0)".repeat(memories), format!("memory count too high at {}", memories + 1)),
        ("(table 0 funcref)".repeat(tables), format!("table count too high at {}", tables + 1)),
    ] {
        let why = refusal(&items);
        assert!(why.contains(&count), "{why}");
        assert!(why.contains(&format!("may have {memories} memories, {tables} tables")), "{why}");
        assert!(why.contains("fewer"), "{why}");
    }
    let items =
        format!("{}{}", "(memory 0)".repeat(memories - 1), "(table 0 funcref)".repeat(tables - 1));
    let file = Guest { items: &items, ..Guest::default() }.build("plugin");
    let path = file.path().display().to_string();
    let mut lane = Lane::of(&path, LIMITS, "", RejectedMax::default()).expect("as many as it may");
    lane.assert_culprits_alone(&[], "");
}

/// Each memory reserves address space, which is checked before lanes begin.
#[test]
fn wall_11_all_memories_of_a_plugin_are_counted() {
    let engine = PluginEngine::new().expect("an engine");
    for more in [0, 1, PARTS_MAX.memories - 1] {
        let items = "(memory 0)".repeat(more);
        let file = Guest { items: &items, ..Guest::default() }.build("plugin");
        let loaded = Plugin::load_file(&engine, &CompileCache::none(), file.path());
        let (plugin, _) = loaded.unwrap_or_else(|why| panic!("{why}"));
        assert_eq!(plugin.memories, 1 + more);
    }
}

/// Instances of modules cost memory that no limit counts, and each one holds what its module declares.
#[test]
fn wall_11_a_component_of_too_many_instances_is_refused() {
    let file = Guest::default().build("plugin");
    let sound = std::fs::read(file.path()).expect("a component");
    let load = |component: &[u8]| {
        std::fs::write(file.path(), component).expect("written");
        let path = file.path().display().to_string();
        Lane::of(&path, LIMITS, "", RejectedMax::default()).map(|_| ())
    };
    load(&with_instances(&sound, 10)).unwrap_or_else(|why| panic!("{why}"));
    let why = load(&with_instances(&sound, PARTS_MAX.instances)).expect_err("one too many");
    assert!(why.contains("instance count too high"), "{why}");
    // Instances of components use state of the host too, even without any module.
    let resource = "(type $r (resource (rep i32))) (core func (canon resource.new $r))";
    for item in ["", resource] {
        load(&with_component(&sound, &doubled(item, 3))).unwrap_or_else(|why| panic!("{why}"));
        for depth in [10, 22, 80] {
            let why = load(&with_component(&sound, &doubled(item, depth))).expect_err("too many");
            let expected = format!("at most {} instances of components", PARTS_MAX.links);
            assert!(why.contains(&expected) && why.contains("build it of fewer"), "{why}");
        }
    }
}

/// Makes nested components, each of which instantiates its inner one twice.
fn doubled(innermost: &str, depth: usize) -> Vec<u8> {
    let text = (1..=depth).fold(format!("(component $c0 {innermost})"), |inner, level| {
        let one = format!("(instance (instantiate $c{}))", level - 1);
        format!("(component $c{level} {inner} {one} {one})")
    });
    wat::parse_str(text).expect("valid WAT")
}

/// Adds an inner component and one instance of it.
fn with_component(component: &[u8], inner: &[u8]) -> Vec<u8> {
    const NESTED_SECTION: u8 = 4;
    let payloads = Parser::new(0).parse_all(component).map(|payload| payload.expect("valid"));
    let is_nested = |payload: &Payload<'_>| matches!(payload, Payload::ComponentSection { .. });
    let index = payloads.filter(is_nested).count() as u32;
    let mut instances = ComponentInstanceSection::new();
    instances.instantiate(index, std::iter::empty::<(&str, ComponentExportKind, u32)>());
    let mut longer = component.to_vec();
    RawSection { id: NESTED_SECTION, data: inner }.append_to_component(&mut longer);
    instances.append_to_component(&mut longer);
    longer
}

/// Adds this many instances of an empty module.
fn with_instances(component: &[u8], count: usize) -> Vec<u8> {
    let payloads = Parser::new(0).parse_all(component).map(|payload| payload.expect("valid"));
    let is_module = |payload: &Payload<'_>| matches!(payload, Payload::ModuleSection { .. });
    let module = payloads.filter(is_module).count() as u32;
    let mut instances = InstanceSection::new();
    for _ in 0..count {
        instances.instantiate(module, std::iter::empty::<(&str, ModuleArg)>());
    }
    let mut longer = component.to_vec();
    ModuleSection(&Module::new()).append_to_component(&mut longer);
    instances.append_to_component(&mut longer);
    longer
}

/// The real binary compiles in another process: its error arrives, with the plugin's name.
#[test]
fn wall_11_a_component_that_ran_before_is_named_at_the_start_with_the_way_out() {
    let folder = tempfile::tempdir().expect("a folder");
    let rows = folder.path().join("rows.txt");
    std::fs::write(&rows, "fine\n").expect("written");
    for (items, expected) in [
        ("(func $again (return_call $again))".to_owned(), "the feature \"tail call\""),
        ("(memory 0)".repeat(PARTS_MAX.memories), "memory count too high"),
    ] {
        let plugin = Guest { items: &items, ..Guest::default() }.build("plugin");
        let path = plugin.path().display().to_string();
        let file = PipelineToml::new(folder.path(), "older")
            .file(&rows, "")
            .stage("old", &path, "routes = { out = [\"nowhere\"] }")
            .sink("nowhere", "type = \"discard\"")
            .write();
        let ran = output(&mut shardmill(&["run", &file, "--until-caught-up"]));
        // Long lines are wrapped when they are printed.
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        let words = said.replace('│', " ").split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(ran.status.code(), Some(2), "{said}");
        assert!(words.contains(expected), "{said}");
        assert!(words.contains("build it"), "{said}");
    }
}

#[test]
fn wall_11_the_bundled_plugins_are_made_of_few_parts() {
    for name in ["car-decode", "car-transform", "csv-decode", "hostile", "probe", "route-json"] {
        super::assert_parts_fit(Path::new(&plugin(name)));
    }
}

/// Returns the parts of a component as written in it, including those of nested components.
pub fn parts(component: &[u8]) -> Parts {
    let mut parts = Parts { memories: 0, tables: 0, instances: 0, links: 0 };
    for payload in Parser::new(0).parse_all(component) {
        match payload.expect("a valid component") {
            Payload::MemorySection(section) => parts.memories += section.count() as usize,
            Payload::TableSection(section) => parts.tables += section.count() as usize,
            Payload::InstanceSection(section) => {
                let instances = section.into_iter().flatten();
                let count = instances
                    .filter(|one| matches!(one, wasmparser::Instance::Instantiate { .. }))
                    .count();
                parts.instances += count;
                parts.links += count;
            }
            // No tool instantiates a component twice.
            Payload::ComponentInstanceSection(section) => parts.links += section.count() as usize,
            Payload::ComponentCanonicalSection(section) => parts.links += section.count() as usize,
            Payload::ComponentTypeSection(section) => {
                let types = section.into_iter().flatten();
                parts.links += types
                    .filter(|one| matches!(one, wasmparser::ComponentType::Resource { .. }))
                    .count();
            }
            _ => {}
        }
    }
    parts
}
