//! The profiles of `Cargo.toml`.

use std::collections::BTreeMap;
use std::fs;

use serde::Deserialize;

use crate::process::project_root;

#[derive(Deserialize)]
struct Manifest {
    profile: BTreeMap<String, Profile>,
}

#[derive(Deserialize)]
struct Profile {
    package: BTreeMap<String, Package>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Package {
    opt_level: Option<u8>,
}

/// `dist` inherits the entries of `release`, those that trade speed for a shorter build too.
#[test]
fn all_of_a_release_is_optimised() {
    let text = fs::read_to_string(project_root().join("Cargo.toml")).expect("a manifest");
    let Manifest { profile } = toml::from_str(&text).expect("profiles");
    let (release, dist) = (&profile["release"].package, &profile["dist"].package);
    let is_full = |package: &Package| package.opt_level.is_none_or(|level| level == 3);
    let slow: Vec<&String> = release
        .iter()
        .filter(|(name, package)| !is_full(dist.get(*name).unwrap_or(package)))
        .map(|(name, _)| name)
        .collect();
    assert!(release.values().any(|package| !is_full(package)), "nothing is compared");
    assert!(slow.is_empty(), "expected `opt-level = 3` in [profile.dist.package] for {slow:?}");
}
