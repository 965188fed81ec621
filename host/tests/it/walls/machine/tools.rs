//! Builds run no tool that another user of the machine could have put somewhere, and pass no secrets to tools.

use std::fs;
use std::os::unix::fs::{chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::{chmod, is_root, said};
use crate::support::{output, shardmill, with_tools};

/// Makes a plugin's folder with everything that is checked before a tool runs.
fn plugin_in(folder: &Path, language: &str) -> PathBuf {
    let sources: &[(&str, &str)] = match language {
        "rust" => &[("Cargo.toml", "[package]\nname = \"one\"\n")],
        "c" => &[("plugin.c", "")],
        "go" => &[("go.mod", "module one\n")],
        "js" => &[("plugin.js", "")],
        _ => &[("plugin.py", "")],
    };
    fs::create_dir_all(folder).expect("a folder");
    let manifest = format!("[plugin]\nname = \"one\"\nlanguage = \"{language}\"\n");
    fs::write(folder.join("plugin.toml"), manifest).expect("written");
    for (name, text) in sources {
        fs::write(folder.join(name), text).expect("written");
    }
    folder.to_owned()
}

/// Writes a tool that stores its environment in a file, and fails.
fn spy(tool: &Path, environment: &Path) {
    fs::create_dir_all(tool.parent().expect("a folder")).expect("created");
    let script = format!("#!/bin/sh\nenv > '{}'\nexit 3\n", environment.display());
    fs::write(tool, script).expect("written");
    chmod(tool, 0o755);
}

fn build(plugin: &Path, with: impl Fn(&mut Command)) -> Output {
    let mut command = shardmill(&["plugin", "build", &plugin.display().to_string()]);
    with(&mut command);
    output(&mut command)
}

#[test]
fn wall_16_build_tools_of_every_language_get_no_secrets() {
    let folder = tempfile::tempdir().expect("a folder");
    for (language, variable) in [
        ("rust", "RUSTC"),
        ("c", "ZIG"),
        ("go", "GO"),
        ("js", "SHARDMILL_COMPONENTIZE_QJS"),
        ("python", "SHARDMILL_COMPONENTIZE_PY"),
    ] {
        let plugin = plugin_in(&folder.path().join(language), language);
        let (tool, seen) = (plugin.join("tool"), plugin.join("seen"));
        spy(&tool, &seen);
        let built = |passed_on: &str| {
            let _ = fs::remove_file(&seen);
            let built = build(&plugin, |command| {
                command.env(variable, &tool).env("AWS_SECRET_ACCESS_KEY", "hunter2");
                command.env("PGPASSWORD", "hunter2").env("CARGO_REGISTRY_TOKEN", "hunter2");
                command.env("DATABASE_URL", "postgres://u:hunter2@h/d").env("LC_ALL", "C.UTF-8");
                command.env("SHARDMILL_BUILD_ENV", passed_on);
            });
            said(&built, false);
            fs::read_to_string(&seen).unwrap_or_else(|why| panic!("{language} ran no tool: {why}"))
        };
        let environment = built("");
        assert!(!environment.contains("hunter2"), "{language}: {environment}");
        for needed in ["PATH=/", "HOME=", "LC_ALL=C.UTF-8"] {
            assert!(environment.contains(needed), "{language} {needed}: {environment}");
        }
        let environment = built("OTHER, PGPASSWORD");
        assert_eq!(environment.matches("hunter2").count(), 1, "{language}: {environment}");
        assert!(environment.contains("PGPASSWORD=hunter2"), "{language}: {environment}");
    }
}

#[test]
fn wall_16_build_tools_get_proxies_without_users_and_passwords() {
    let folder = tempfile::tempdir().expect("a folder");
    let plugin = plugin_in(&folder.path().join("one"), "js");
    let (tool, seen) = (plugin.join("tool"), plugin.join("seen"));
    spy(&tool, &seen);
    let built = |passed_on: &str| {
        let printed = build(&plugin, |command| {
            command.env("SHARDMILL_COMPONENTIZE_QJS", &tool);
            command.env("SHARDMILL_BUILD_ENV", passed_on);
            command.env("HTTPS_PROXY", "http://me:hunter2@proxy.example:3128");
            command.env("all_proxy", "me:hunter2@proxy.example:1080");
            command.env("CARGO_REGISTRIES_OURS_INDEX", "sparse+https://me:hunter2@crates.example/");
        });
        (fs::read_to_string(&seen).expect("the tool ran"), said(&printed, false))
    };
    let (environment, printed) = built("");
    assert!(!environment.contains("hunter2"), "{environment}");
    for bare in [
        "HTTPS_PROXY=http://proxy.example:3128",
        "all_proxy=proxy.example:1080",
        "CARGO_REGISTRIES_OURS_INDEX=sparse+https://crates.example/",
    ] {
        assert!(environment.contains(bare), "{bare}: {environment}");
        let (name, _) = bare.split_once('=').expect("a variable");
        let warning = format!("{name} is passed to build tools without its user name and password");
        assert_eq!(printed.matches(&warning).count(), 1, "{printed}");
    }
    assert!(!printed.contains("hunter2"), "{printed}");
    let (environment, printed) = built("HTTPS_PROXY");
    assert!(environment.contains("HTTPS_PROXY=http://me:hunter2@proxy"), "{environment}");
    assert!(!printed.contains("HTTPS_PROXY is passed"), "{printed}");
}

#[test]
fn wall_16_a_tool_below_a_folder_that_others_may_exchange_does_not_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let plugin = plugin_in(&folder.path().join("one"), "js");
    let (on_path, seen) = (folder.path().join("bin"), folder.path().join("seen"));
    let (above, local) = (folder.path().join("other"), "node_modules/.bin/componentize-qjs");
    spy(&on_path.join("componentize-qjs"), &seen.join("path"));
    spy(&above.join("q/t.js"), &seen.join("near"));
    let link = plugin.join(local);
    fs::create_dir_all(link.parent().expect("a folder")).expect("created");
    symlink("../../../other/q/t.js", &link).expect("a link");
    let ran = || {
        let _ = fs::remove_dir_all(&seen);
        fs::create_dir(&seen).expect("a folder");
        let path = std::env::var("PATH").unwrap_or_default();
        let built = build(&plugin, |command| {
            command.env("PATH", format!("{}:{path}", on_path.display()));
            command.env_remove("SHARDMILL_COMPONENTIZE_QJS");
        });
        let printed = said(&built, false);
        (seen.join("near").exists(), seen.join("path").exists(), printed)
    };
    let is_near = |is_near: bool| {
        let (near, path, printed) = ran();
        assert_eq!((near, path), (is_near, !is_near), "{printed}");
        printed
    };
    is_near(true);
    // Only the folder above the folder of the link's target is open: another user could replace `q` there.
    chmod(&above, 0o777);
    let printed = is_near(false);
    assert!(
        printed.contains("is not used, because every user may replace what lies in"),
        "{printed}"
    );
    chmod(&above, 0o1777);
    is_near(true);
    if is_root() {
        // The path contains a link that belongs to another user and leads to a folder of this user. Linux may refuse
        // to follow it in an open folder.
        chmod(&above, 0o755);
        fs::rename(above.join("q"), folder.path().join("q")).expect("moved");
        symlink("../q", above.join("q")).expect("a link");
        is_near(true);
        lchown(above.join("q"), Some(65_534), None).expect("owner changed");
        let printed = is_near(false);
        assert!(printed.contains("belongs to user 65534"), "{printed}");
    }
    // PATH is this user's own choice: its tools run, with a warning.
    chmod(&on_path, 0o777);
    chmod(&above, 0o777);
    let printed = is_near(false);
    let warning = format!("build tools may be run from {} in PATH", on_path.display());
    assert_eq!(printed.matches(&warning).count(), 1, "{printed}");
}

#[test]
fn wall_16_a_tool_in_a_folder_above_is_taken_within_the_repository_and_from_this_user_alone() {
    for (language, local, name) in [
        ("js", "node_modules/.bin/componentize-qjs", "componentize-qjs"),
        ("python", ".venv/bin/componentize-py", "componentize-py"),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().join("root");
        let repository = root.join("repository");
        let plugin = plugin_in(&repository.join("plugins/one"), language);
        let (on_path, seen) = (folder.path().join("bin"), folder.path().join("seen"));
        // The file that the tool writes shows which tool ran.
        let ran = || {
            let _ = fs::remove_dir_all(&seen);
            fs::create_dir(&seen).expect("a folder");
            let path = std::env::var("PATH").unwrap_or_default();
            let built = build(&plugin, |command| {
                command.env("PATH", format!("{}:{path}", on_path.display()));
                command.env_remove("SHARDMILL_COMPONENTIZE_QJS");
                command.env_remove("SHARDMILL_COMPONENTIZE_PY");
            });
            let printed = said(&built, false);
            let mut who: Vec<String> = fs::read_dir(&seen)
                .expect("a folder")
                .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
                .collect();
            assert_eq!(who.len(), 1, "{who:?}: {printed}");
            (who.remove(0), printed)
        };
        spy(&on_path.join(name), &seen.join("path"));
        spy(&root.join(local), &seen.join("above"));
        assert_eq!(ran().0, "above");

        let open = |path: &Path| {
            chmod(path, 0o777);
            let (who, printed) = ran();
            assert_eq!(who, "path", "{}: {printed}", path.display());
            chmod(path, 0o755);
            printed
        };
        let printed = open(&root);
        assert!(printed.contains("is not used, because every user may replace"), "{printed}");
        // The search ends before it reaches the tool.
        open(&repository);
        open(&root.join(local));
        if is_root() {
            chown(&root, Some(65_534), None).expect("owner changed");
            let (who, printed) = ran();
            assert_eq!(who, "path", "{printed}");
            assert!(printed.contains("belongs to user 65534"), "{printed}");
            chown(&root, Some(0), None).expect("owner restored");
        }
        assert_eq!(ran().0, "above");

        fs::create_dir(repository.join(".git")).expect("a folder");
        assert_eq!(ran().0, "path");
        spy(&repository.join(local), &seen.join("repository"));
        assert_eq!(ran().0, "repository");
    }
}

#[test]
fn wall_16_cargo_follows_no_settings_of_another_user() {
    let folder = tempfile::tempdir().expect("a folder");
    let plugin = plugin_in(&folder.path().join("one"), "rust");
    let (tool, seen) = (folder.path().join("wrapper"), folder.path().join("seen"));
    spy(&tool, &seen);
    let settings = folder.path().join(".cargo/config.toml");
    fs::create_dir(settings.parent().expect("a folder")).expect("created");
    let text = format!("[build]\nrustc-wrapper = \"{}\"\n", tool.display());
    fs::write(&settings, text).expect("written");
    let is_refused = || {
        let printed = said(&build(&plugin, |command| _ = with_tools(command)), false);
        assert!(printed.contains("refused to build: cargo would read"), "{printed}");
        assert!(printed.contains(&settings.display().to_string()), "{printed}");
        assert!(!seen.exists(), "the wrapper ran");
    };
    chmod(&settings, 0o666);
    is_refused();
    // A link of another user to a file of this one.
    if is_root() {
        chmod(&settings, 0o600);
        let real = folder.path().join("real.toml");
        fs::rename(&settings, &real).expect("moved");
        symlink(&real, &settings).expect("a link");
        lchown(&settings, Some(65_534), None).expect("owner changed");
        is_refused();
    }
}
