//! Tests of the profiles in `Cargo.toml`.

use std::collections::BTreeMap;
use std::fs;

use serde::Deserialize;

use crate::process::project_root;

#[derive(Deserialize)]
struct Manifest {
    profile: BTreeMap<String, Profile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Profile {
    opt_level: Option<u8>,
    package: BTreeMap<String, Package>,
}

/// The manifest of the benches.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Benches {
    dev_dependencies: toml::Table,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Package {
    opt_level: Option<u8>,
}

fn profiles() -> BTreeMap<String, Profile> {
    let text = fs::read_to_string(project_root().join("Cargo.toml")).expect("a manifest");
    toml::from_str::<Manifest>(&text).expect("profiles").profile
}

fn is_full(package: &Package) -> bool {
    package.opt_level.is_none_or(|level| level == 3)
}

/// `dist` inherits the entries of `release`, including those that trade speed for a shorter build.
#[test]
fn all_of_a_release_is_optimised() {
    let profile = profiles();
    let (release, dist) = (&profile["release"].package, &profile["dist"].package);
    let slow: Vec<&String> = release
        .iter()
        .filter(|(name, package)| !is_full(dist.get(*name).unwrap_or(package)))
        .map(|(name, _)| name)
        .collect();
    assert!(release.values().any(|package| !is_full(package)), "nothing is compared");
    assert!(slow.is_empty(), "expected `opt-level = 3` in [profile.dist.package] for {slow:?}");
}

/// A baseline that is compiled without optimisations makes every ratio of a bench look good.
#[test]
fn baselines_of_benches_are_optimised() {
    let profile = profiles();
    let (release, bench) = (&profile["release"].package, &profile["bench"]);
    assert_eq!(bench.opt_level, Some(3), "expected `opt-level = 3` in [profile.bench]");
    let text = fs::read_to_string(project_root().join("benches/Cargo.toml")).expect("a manifest");
    let benches: Benches = toml::from_str(&text).expect("dependencies");
    let slow: Vec<&String> = (benches.dev_dependencies.keys())
        .filter(|name| {
            let package = bench.package.get(*name).or_else(|| release.get(*name));
            package.is_some_and(|package| !is_full(package))
        })
        .collect();
    assert!(slow.is_empty(), "expected `opt-level = 3` in [profile.bench.package] for {slow:?}");
}
