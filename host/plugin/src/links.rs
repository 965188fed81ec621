//! Counts the instances that a component links together, before it is compiled.
//!
//! Components nest, and each may instantiate the one inside of it twice: a file of 4 KB can describe millions of
//! instances. wasmtime keeps state for each of them in every instance of the plugin, on the host's heap, where no
//! limit on memories counts it; and the compiler unrolls all of them. So the file is read once, without being
//! compiled, and the instances are multiplied out.

use wasmparser::{
    ComponentAlias, ComponentExternalKind, ComponentInstance, ComponentOuterAliasKind,
    ComponentType, ComponentTypeRef, Encoding, Instance, Parser, Payload,
};

/// Links of a component whose content is unknown before linking: an imported one, or an export of an instance. No
/// tool of the five languages uses one.
const UNKNOWN: usize = usize::MAX;

/// A component or module that is being read.
struct Open {
    is_component: bool,
    /// Number of links of one instance of it.
    links: usize,
    /// The same for each component that it can name, by index.
    components: Vec<usize>,
}

/// Checks that a component does not link more than `links_max`.
///
/// # Errors
/// The expected number and the one found, in words.
pub(super) fn check(component: &[u8], links_max: usize) -> Result<(), String> {
    let found = match count(component) {
        links if links <= links_max => return Ok(()),
        UNKNOWN => {
            "more than can be counted (a component that is imported, or that is an export of an \
                    instance, counts as that)"
                .into()
        }
        links => links.to_string(),
    };
    Err(format!(
        "expected at most {links_max} instances of components and modules, functions between them and resource types, \
         found {found}: what a component holds counts as often as it is instantiated; build it of fewer \
         components, or instantiate each of them once, as `shardmill plugin build` does"
    ))
}

/// Counts instances of components and modules, functions that cross between them, and resource types, with all
/// repetitions. A component that cannot be read counts as nothing: the compiler refuses it.
fn count(component: &[u8]) -> usize {
    let mut open: Vec<Open> = Vec::new();
    for payload in Parser::new(0).parse_all(component) {
        match payload {
            Err(_) => return 0,
            Ok(Payload::Version { encoding, .. }) => open.push(Open {
                is_component: encoding == Encoding::Component,
                // The instance itself.
                links: 1,
                components: Vec::new(),
            }),
            Ok(Payload::End(_)) => {
                let Some(ended) = open.pop() else { return 0 };
                match open.last_mut() {
                    None => return ended.links,
                    Some(outer) if ended.is_component => outer.components.push(ended.links),
                    Some(_) => {}
                }
            }
            Ok(section) => {
                let Some((own, outer)) = open.split_last_mut() else { return 0 };
                read(section, own, outer);
            }
        }
    }
    0
}

/// Adds a section to the component that contains it. `outer`: the components around that one, outermost first.
fn read(section: Payload<'_>, own: &mut Open, outer: &[Open]) {
    let more = match section {
        Payload::InstanceSection(section) => {
            let is_one = |one: &Instance<'_>| matches!(one, Instance::Instantiate { .. });
            section.into_iter().flatten().filter(is_one).count()
        }
        Payload::ComponentCanonicalSection(section) => section.count() as usize,
        Payload::ComponentTypeSection(section) => {
            let is_resource =
                |one: &ComponentType<'_>| matches!(one, ComponentType::Resource { .. });
            section.into_iter().flatten().filter(is_resource).count()
        }
        Payload::ComponentInstanceSection(section) => {
            let instantiated = section.into_iter().flatten().filter_map(|one| match one {
                ComponentInstance::Instantiate { component_index, .. } => Some(component_index),
                ComponentInstance::FromExports(_) => None,
            });
            instantiated.fold(0, |sum: usize, index| sum.saturating_add(own.component(index)))
        }
        Payload::ComponentAliasSection(section) => {
            for alias in section.into_iter().flatten() {
                own.name(match alias {
                    ComponentAlias::InstanceExport {
                        kind: ComponentExternalKind::Component,
                        ..
                    } => UNKNOWN,
                    ComponentAlias::Outer {
                        kind: ComponentOuterAliasKind::Component,
                        count,
                        index,
                    } => match count.checked_sub(1) {
                        None => own.component(index),
                        Some(further) => {
                            let around = outer.iter().rev().nth(further as usize);
                            around.map_or(UNKNOWN, |around| around.component(index))
                        }
                    },
                    _ => continue,
                });
            }
            0
        }
        Payload::ComponentImportSection(section) => {
            let imports = section.into_iter().flatten();
            imports
                .filter(|one| matches!(one.ty, ComponentTypeRef::Component(_)))
                .for_each(|_| own.name(UNKNOWN));
            0
        }
        Payload::ComponentExportSection(section) => {
            // An export gives a component a second index.
            let exports = section.into_iter().flatten();
            for one in exports.filter(|one| one.kind == ComponentExternalKind::Component) {
                own.name(own.component(one.index));
            }
            0
        }
        _ => 0,
    };
    own.links = own.links.saturating_add(more);
}

impl Open {
    /// Returns the number of links of an instance of the component with this index.
    fn component(&self, index: u32) -> usize {
        self.components.get(index as usize).copied().unwrap_or(UNKNOWN)
    }

    /// Gives the next index to a component with this number of links.
    fn name(&mut self, links: usize) {
        self.components.push(links);
    }
}

#[cfg(test)]
mod tests {
    use wasm_encoder::{
        Alias, ComponentAliasSection, ComponentExportKind, ComponentExportSection,
        ComponentImportSection, ComponentInstanceSection, ComponentOuterAliasKind as OuterKind,
        ComponentSection as _, ComponentTypeRef as TypeRef, ComponentTypeSection, RawSection,
    };

    use super::*;
    use crate::features::PARTS_MAX;

    const NESTED_SECTION: u8 = 4;

    fn empty() -> Vec<u8> {
        wasm_encoder::Component::HEADER.to_vec()
    }

    fn nest(inner: &[u8], outer: &mut Vec<u8>) {
        RawSection { id: NESTED_SECTION, data: inner }.append_to_component(outer);
    }

    fn instantiate(indexes: &[u32], outer: &mut Vec<u8>) {
        let mut instances = ComponentInstanceSection::new();
        for index in indexes {
            instances.instantiate(*index, std::iter::empty::<(&str, ComponentExportKind, u32)>());
        }
        instances.append_to_component(outer);
    }

    /// Components that each instantiate the one inside of them twice.
    fn doubled(innermost: &[u8], depth: usize) -> Vec<u8> {
        (0..depth).fold(innermost.to_vec(), |inner, _| {
            let mut outer = empty();
            nest(&inner, &mut outer);
            instantiate(&[0, 0], &mut outer);
            outer
        })
    }

    #[test]
    fn wall_11_a_component_counts_as_often_as_it_is_instantiated() {
        assert_eq!(count(&empty()), 1);
        assert_eq!(count(&doubled(&empty(), 3)), 1 + 2 + 4 + 8);
        assert_eq!(count(&doubled(&empty(), 22)), (1 << 23) - 1);
        assert_eq!(count(&doubled(&empty(), 80)), usize::MAX);
        let mut typed = empty();
        let mut types = ComponentTypeSection::new();
        types.resource(wasm_encoder::ValType::I32, None);
        types.append_to_component(&mut typed);
        assert_eq!(count(&doubled(&typed, 3)), 1 + 2 + 4 + 8 * 2);
        check(&doubled(&empty(), 7), PARTS_MAX.links).unwrap_or_else(|why| panic!("{why}"));
        let why = check(&doubled(&empty(), 22), PARTS_MAX.links).expect_err("too many");
        assert!(why.contains("expected at most 512 instances of components"), "{why}");
        assert!(why.contains("found 8388607: ") && why.contains("fewer components"), "{why}");
    }

    #[test]
    fn wall_11_a_component_is_found_by_each_of_its_names() {
        let large = doubled(&empty(), 10);
        // Named by an alias from inside of another component.
        let mut alias = ComponentAliasSection::new();
        alias.alias(Alias::Outer { kind: OuterKind::Component, count: 1, index: 0 });
        let mut user = empty();
        alias.append_to_component(&mut user);
        instantiate(&[0], &mut user);
        let mut component = empty();
        nest(&large, &mut component);
        nest(&user, &mut component);
        instantiate(&[1], &mut component);
        assert_eq!(count(&component), 1 + 1 + 2047);
        // Named by its export.
        let mut exports = ComponentExportSection::new();
        exports.export("again", ComponentExportKind::Component, 0, None);
        let mut component = empty();
        nest(&large, &mut component);
        exports.append_to_component(&mut component);
        instantiate(&[1], &mut component);
        assert_eq!(count(&component), 1 + 2047);
    }

    #[test]
    fn wall_11_a_component_that_is_not_known_is_not_instantiated() {
        let mut imports = ComponentImportSection::new();
        imports.import("any", TypeRef::Component(0));
        let mut component = empty();
        imports.append_to_component(&mut component);
        // It costs nothing until it is instantiated.
        assert_eq!(count(&component), 1);
        instantiate(&[0], &mut component);
        let why = check(&component, PARTS_MAX.links).expect_err("not known");
        assert!(why.contains("found more than can be counted"), "{why}");
        let mut alias = ComponentAliasSection::new();
        alias.alias(Alias::InstanceExport {
            instance: 0,
            kind: ComponentExportKind::Component,
            name: "any",
        });
        let mut component = empty();
        alias.append_to_component(&mut component);
        instantiate(&[0], &mut component);
        check(&component, PARTS_MAX.links).expect_err("not known");
    }
}
