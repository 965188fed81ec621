//! The WebAssembly features that plugins may use: those that the compilers of the five languages need, and no
//! others.
//!
//! The list says what is on, so a feature that a later wasmtime enables by default stays off here. Each feature is
//! runtime code that a component could attack. Some use memory that no limit counts (shared memories), some give
//! different results on different processors (relaxed SIMD).
//!
//! This module also checks before compilation what wasmtime does not: the state of instances outside of their
//! memories, and the encoding of texts.

use std::collections::HashSet;

use wasmparser::{
    CanonicalFunction, CanonicalOption, ComponentAlias, ComponentExternalKind, ComponentInstance,
    ComponentOuterAliasKind, ComponentTypeRef, Encoding, Instance, Parser, Payload, Validator,
    WasmFeatures,
};
use wasmtime::Config;

use super::links;

/// The features that are on. wasmtime itself uses several memories in one module where two components of a plugin
/// call each other, as in JavaScript's.
const NEEDED: WasmFeatures = WasmFeatures::MUTABLE_GLOBAL
    .union(WasmFeatures::SATURATING_FLOAT_TO_INT)
    .union(WasmFeatures::SIGN_EXTENSION)
    .union(WasmFeatures::REFERENCE_TYPES)
    .union(WasmFeatures::MULTI_VALUE)
    .union(WasmFeatures::BULK_MEMORY)
    .union(WasmFeatures::SIMD)
    .union(WasmFeatures::FLOATS)
    .union(WasmFeatures::EXTENDED_CONST)
    .union(WasmFeatures::MULTI_MEMORY)
    .union(WasmFeatures::COMPONENT_MODEL);

/// Maximum numbers of memories, tables and instances in the components of one plugin. Their sizes have limits of
/// their own; these numbers bound the other costs of each, such as mappings, of which a process has 65,530.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Linear memories. JavaScript's engine and the component that answers its WASI have 3, others 1.
    pub memories: usize,
    /// Tables. JavaScript has 4, the others 2 or fewer.
    pub tables: usize,
    /// Instances of core modules. Python has 38, and one more for each native extension.
    pub instances: usize,
    /// Instances of components and modules, functions that cross between them, and resource types. JavaScript
    /// has about 200: its engine is linked to the component that answers its WASI.
    pub links: usize,
}

/// Limits on the parts of a plugin: more than twice what any of the five languages needs.
pub const PARTS_MAX: Parts = Parts { memories: 8, tables: 16, instances: 128, links: 512 };

/// Limit on the globals, imports and function references of all module instances together, in bytes: six times what
/// Python's take. They lie outside of the memories, so no other limit counts them.
const STATE_BYTES_MAX: usize = 4 << 20;
/// Size of one of each, from the layout of an instance in wasmtime 48 (`VMOffsets`).
const GLOBAL_BYTES: usize = 16;
const IMPORT_BYTES: usize = 40;
const FUNCTION_BYTES: usize = 32;

/// Version of the checks in this module. It is part of the names of cached code, so that code from before a new
/// check is not used. Increase it with each check that refuses more.
pub(super) const CHECKS_VERSION: u32 = 4;

/// Checks what the compiler does not.
///
/// # Errors
/// The error says what was expected and what was found.
pub(super) fn check(component: &[u8]) -> Result<(), String> {
    links::check(component, PARTS_MAX.links)?;
    check_state(component)?;
    check_texts(component)
}

/// Checks that texts cross the boundary as UTF-8. The host converts other encodings as a whole before it can bound
/// them: a name or a log line could then cost as much as `limits.output` allows. The tools of the five languages
/// use UTF-8.
fn check_texts(component: &[u8]) -> Result<(), String> {
    for payload in Parser::new(0).parse_all(component) {
        // The compiler refuses what cannot be read.
        let Ok(payload) = payload else { return Ok(()) };
        let Payload::ComponentCanonicalSection(section) = payload else { continue };
        for function in section.into_iter().flatten() {
            let (CanonicalFunction::Lift { options, .. }
            | CanonicalFunction::Lower { options, .. }) = function
            else {
                continue;
            };
            let other = options.iter().find_map(|option| match option {
                CanonicalOption::UTF16 => Some("utf16"),
                CanonicalOption::CompactUTF16 => Some("latin1+utf16"),
                _ => None,
            });
            if let Some(encoding) = other {
                return Err(format!(
                    "expected texts in the encoding utf8, found {encoding}: build it again with utf8, as \
                     `shardmill plugin build` does; look for the option `--string-encoding` of wit-bindgen and \
                     `--encoding` of `wasm-tools component embed`"
                ));
            }
        }
    }
    Ok(())
}

/// Checks that the instances of a component's modules do not take too much outside of their memories.
fn check_state(component: &[u8]) -> Result<(), String> {
    let bytes = state_bytes(component);
    if bytes <= STATE_BYTES_MAX {
        return Ok(());
    }
    Err(format!(
        "expected at most {} MiB of globals, imports and function references in its modules, found up to {} \
         MiB: build it of smaller modules, or of fewer instances of them",
        STATE_BYTES_MAX >> 20,
        bytes >> 20
    ))
}

/// Returns an upper bound on what its instances take: each module as often as it is instantiated. What cannot be
/// read counts as nothing: the compiler refuses it.
fn state_bytes(component: &[u8]) -> usize {
    let mut found = State::default();
    for payload in Parser::new(0).parse_all(component) {
        let Ok(payload) = payload else { return 0 };
        found.see(&payload);
    }
    // A component that is instantiated again instantiates its modules again.
    match found.is_repeated {
        true => found.largest.saturating_mul(PARTS_MAX.instances),
        false => {
            found.elsewhere.saturating_mul(found.largest).saturating_add(found.instances_bytes)
        }
    }
}

/// Sizes and counts of the modules of a component and their instances.
#[derive(Default)]
struct State {
    /// The components and modules that are being read, innermost last.
    open: Vec<OpenPart>,
    /// Size of an instance of the largest module.
    largest: usize,
    /// Size of all instances of known modules together.
    instances_bytes: usize,
    /// Number of instances of modules that come from another component. Each counts as the largest module.
    elsewhere: usize,
    /// Whether a component may be instantiated more than once, by its index or by another name of it.
    is_repeated: bool,
}

/// A component or module that is being read.
#[derive(Default)]
struct OpenPart {
    is_module: bool,
    /// Size of an instance, if it is a module.
    own: usize,
    /// Size of an instance of each of its modules, by index; `None`: unknown.
    modules: Vec<Option<usize>>,
    /// Indexes of the components that it instantiates.
    instantiated: HashSet<u32>,
}

impl State {
    fn see(&mut self, payload: &Payload<'_>) {
        if let Payload::Version { encoding, .. } = payload {
            let is_module = *encoding == Encoding::Module;
            return self.open.push(OpenPart { is_module, ..OpenPart::default() });
        }
        if let Payload::End(_) = payload {
            let Some(ended) = self.open.pop().filter(|ended| ended.is_module) else { return };
            self.largest = self.largest.max(ended.own);
            if let Some(around) = self.open.last_mut() {
                around.modules.push(Some(ended.own));
            }
            return;
        }
        let Some(open) = self.open.last_mut() else { return };
        match payload {
            Payload::ImportSection(section) => open.add(section.count() as usize * IMPORT_BYTES),
            Payload::GlobalSection(section) => open.add(section.count() as usize * GLOBAL_BYTES),
            Payload::ExportSection(section) => open.add(section.count() as usize * FUNCTION_BYTES),
            // Each function takes at least one byte in the section.
            Payload::ElementSection(section) => {
                open.add(section.range().len().saturating_mul(FUNCTION_BYTES));
            }
            Payload::InstanceSection(section) => {
                for one in section.clone().into_iter().flatten() {
                    let Instance::Instantiate { module_index, .. } = one else { continue };
                    match open.modules.get(module_index as usize).copied().flatten() {
                        Some(bytes) => {
                            self.instances_bytes = self.instances_bytes.saturating_add(bytes);
                        }
                        None => self.elsewhere += 1,
                    }
                }
            }
            Payload::ComponentInstanceSection(section) => {
                for one in section.clone().into_iter().flatten() {
                    let ComponentInstance::Instantiate { component_index, .. } = one else {
                        continue;
                    };
                    self.is_repeated |= !open.instantiated.insert(component_index);
                }
            }
            Payload::ComponentAliasSection(section) => {
                for alias in section.clone().into_iter().flatten() {
                    let (is_component, is_module) = match alias {
                        ComponentAlias::InstanceExport { kind, .. } => (
                            kind == ComponentExternalKind::Component,
                            kind == ComponentExternalKind::Module,
                        ),
                        ComponentAlias::Outer { kind, .. } => (
                            kind == ComponentOuterAliasKind::Component,
                            kind == ComponentOuterAliasKind::CoreModule,
                        ),
                        ComponentAlias::CoreInstanceExport { .. } => (false, false),
                    };
                    self.is_repeated |= is_component;
                    open.modules.extend(is_module.then_some(None));
                }
            }
            Payload::ComponentImportSection(section) => {
                for one in section.clone().into_iter().flatten() {
                    self.is_repeated |= matches!(one.ty, ComponentTypeRef::Component(_));
                    let is_module = matches!(one.ty, ComponentTypeRef::Module(_));
                    open.modules.extend(is_module.then_some(None));
                }
            }
            Payload::ComponentExportSection(section) => {
                // An export gives a component or module a second index.
                for one in section.clone().into_iter().flatten() {
                    self.is_repeated |= one.kind == ComponentExternalKind::Component;
                    let is_module = one.kind == ComponentExternalKind::Module;
                    open.modules.extend(is_module.then_some(None));
                }
            }
            _ => {}
        }
    }
}

impl OpenPart {
    fn add(&mut self, bytes: usize) {
        self.own = self.own.saturating_add(bytes);
    }
}

/// Turns off everything in an engine that plugins do not need.
pub(super) fn restrict(config: &mut Config) {
    config.wasm_features(NEEDED.complement(), false);
}

/// Explains why a component was refused. If it is valid except for a feature that is off, the author needs to know
/// which one, and how to build without it.
pub(super) fn explain(component: &[u8], refusal: &wasmtime::Error) -> String {
    let refusal = format!("{refusal:#}");
    let Some(feature) = missing(component) else { return refusal };
    format!(
        "it uses {feature} of WebAssembly, which is unsupported in plugins ({refusal}); build it without: \
         `shardmill plugin build` does not turn it on; in Rust look at `target-feature` in RUSTFLAGS \
         and in .cargo/config.toml, in C and Go at the compiler's options"
    )
}

/// Returns the disabled feature that a component needs. `None`: it is invalid for another reason.
fn missing(component: &[u8]) -> Option<String> {
    let error = Validator::new_with_features(NEEDED).validate_all(component).err()?;
    Validator::new_with_features(WasmFeatures::all()).validate_all(component).ok()?;
    let named = error.missing_wasm_feature().map(|missing| {
        let names = missing.iter_names().map(|(name, _)| name.to_lowercase().replace('_', " "));
        names.collect::<Vec<_>>().join(" and ")
    });
    Some(match named {
        Some(name) if !name.is_empty() => format!("the feature \"{name}\""),
        _ => "a feature".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a component that instantiates a module with some globals.
    fn component(globals: usize, instances: usize) -> Vec<u8> {
        use wasm_encoder::{
            ComponentSection as _, ConstExpr, GlobalSection, GlobalType, InstanceSection, Module,
            ModuleArg, ModuleSection, ValType,
        };
        let ty = GlobalType { val_type: ValType::I32, mutable: true, shared: false };
        let mut section = GlobalSection::new();
        for _ in 0..globals {
            section.global(ty, &ConstExpr::i32_const(7));
        }
        let mut module = Module::new();
        module.section(&section);
        let mut of_module = InstanceSection::new();
        for _ in 0..instances {
            of_module.instantiate(0, std::iter::empty::<(&str, ModuleArg)>());
        }
        let mut component = wasm_encoder::Component::HEADER.to_vec();
        ModuleSection(&module).append_to_component(&mut component);
        of_module.append_to_component(&mut component);
        component
    }

    #[test]
    fn wall_06_texts_in_other_encodings_than_utf8_are_refused() {
        use wasm_encoder::{
            CanonicalFunctionSection, CanonicalOption as Canonical, ComponentSection as _,
        };
        for (options, refused) in [
            (vec![], None),
            (vec![Canonical::Memory(0), Canonical::UTF8], None),
            (vec![Canonical::Memory(0), Canonical::UTF16], Some("found utf16:")),
            (vec![Canonical::CompactUTF16, Canonical::Realloc(0)], Some("found latin1+utf16:")),
        ] {
            for is_lift in [true, false] {
                let mut functions = CanonicalFunctionSection::new();
                functions.lower(0, [Canonical::UTF8]);
                match is_lift {
                    true => functions.lift(0, 0, options.clone()),
                    false => functions.lower(0, options.clone()),
                };
                let mut component = wasm_encoder::Component::HEADER.to_vec();
                functions.append_to_component(&mut component);
                for component in [composed(&[&component], &[]), component] {
                    let found = check(&component).err();
                    assert_eq!(found.is_some(), refused.is_some(), "{options:?}: {found:?}");
                    let words = refused.unwrap_or_default();
                    assert!(found.unwrap_or_default().contains(words), "{options:?}");
                }
            }
        }
    }

    #[test]
    fn wall_11_what_instances_occupy_beside_their_memories_is_bounded() {
        // All instances of Python take 0.6 MiB.
        for (globals, instances, is_fine) in
            [(10, 1, true), (1_000, 39, true), (60_000, 4, true), (60_000, 5, false)]
        {
            let checked = check_state(&component(globals, instances));
            assert_eq!(checked.is_ok(), is_fine, "{globals} in {instances}: {checked:?}");
        }
        let why = check_state(&component(200_000, 128)).expect_err("too much");
        assert!(why.contains("expected at most 4 MiB") && why.contains("up to 390 MiB"), "{why}");
    }

    #[test]
    fn wall_11_a_component_that_is_instantiated_again_counts_as_often_as_it_may() {
        let (large, small) = (component(200_000, 1), component(1, 1));
        for (nested, instantiated, is_fine) in [
            (vec![&large], vec![0], true),
            (vec![&large, &small], vec![0, 1], true),
            (vec![&small], vec![0, 0], true),
            (vec![&large], vec![0, 0], false),
            // Other components that are never instantiated do not lower the count.
            (vec![&large, &small, &small], vec![0, 0], false),
        ] {
            let checked = check_state(&composed(&nested, &instantiated));
            assert_eq!(checked.is_ok(), is_fine, "{} of {instantiated:?}", nested.len());
        }
    }

    /// Makes a component with nested ones, which instantiates those with these indexes.
    fn composed(nested: &[&Vec<u8>], instantiated: &[u32]) -> Vec<u8> {
        use wasm_encoder::{
            ComponentInstanceSection, ComponentSection as _, NestedComponentSection,
        };
        let mut outer = wasm_encoder::Component::HEADER.to_vec();
        for inner in nested {
            // A nested component: section number, length, bytes.
            outer.push(NestedComponentSection(&wasm_encoder::Component::new()).id());
            leb128(inner.len(), &mut outer);
            outer.extend(*inner);
        }
        let mut instances = ComponentInstanceSection::new();
        for index in instantiated {
            let none = std::iter::empty::<(&str, wasm_encoder::ComponentExportKind, u32)>();
            instances.instantiate(*index, none);
        }
        instances.append_to_component(&mut outer);
        outer
    }

    fn leb128(mut number: usize, bytes: &mut Vec<u8>) {
        while number >= 0x80 {
            bytes.push(0x80 | (number & 0x7f) as u8);
            number >>= 7;
        }
        bytes.push(number as u8);
    }
}
