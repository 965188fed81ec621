//! Build tools: where they are searched, and which part of this process's environment they get.
//!
//! A build runs other programs with this user's rights. It must not run a program that another user of the
//! machine has placed in a folder above the plugin, and it must not get the secrets in the environment.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::{env, fs, io};

use super::{PluginBuildError, file_error};
use shardmill_core::private;
use shardmill_core::private::{Reach, Trusted};

/// Variable that lists further variables for build tools, separated by commas.
const PASSED_ON: &str = "SHARDMILL_BUILD_ENV";

/// Names of variables that tools need: the user's folders and language, the network, the compilers.
const NEEDED: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "TMPDIR",
    "TMP",
    "TEMP",
    "TZ",
    "LANG",
    "LANGUAGE",
    "TERM",
    "COLORTERM",
    "NO_COLOR",
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "FORCE_COLOR",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "DYLD_FALLBACK_LIBRARY_PATH",
    "SOURCE_DATE_EPOCH",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "NODE_PATH",
    "NODE_OPTIONS",
    "NVM_DIR",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "MAKEFLAGS",
    "NUM_JOBS",
    "CC",
    "CXX",
    "AR",
    "RANLIB",
    "CFLAGS",
    "CXXFLAGS",
    "LDFLAGS",
    "GOPATH",
    "GOROOT",
    "GOCACHE",
    "GOMODCACHE",
    "GOENV",
    "GOTMPDIR",
    "GOPRIVATE",
    "GONOSUMDB",
    "GOSUMDB",
    "GOEXPERIMENT",
    "GODEBUG",
    "CGO_ENABLED",
    "DEVELOPER_DIR",
    "SDKROOT",
    "MACOSX_DEPLOYMENT_TARGET",
    "RUSTFLAGS",
];
/// Prefixes of names of variables that tools need.
const NEEDED_PREFIXES: &[&str] = &[
    "LC_", "XDG_", "CARGO_", "RUSTC", "RUSTUP_", "RUST_", "ZIG_", "PYTHON", "NIX_", "CC_",
    "CFLAGS_",
];
/// Parts of names of variables that contain secrets; these are never passed on by [`NEEDED`] or
/// [`NEEDED_PREFIXES`]. `NIX_CONFIG` contains access tokens of hosts.
const SECRET: &[&str] = &["TOKEN", "SECRET", "PASSW", "CREDENTIAL", "APIKEY", "_KEY", "NIX_CONFIG"];

/// Makes a command for a build tool, with only the part of the environment that it needs.
pub(super) fn command(program: impl AsRef<OsStr>) -> Command {
    let passed_on = env::var(PASSED_ON).unwrap_or_default();
    let passed_on: Vec<&str> = passed_on.split(',').map(str::trim).collect();
    let mut command = Command::new(program);
    command.env_clear();
    for (name, value) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        if text == "PATH" {
            let path = absolute_folders(&value);
            warn_of_open_folders(&path);
            command.env(name, path);
        } else if passed_on.contains(&text) {
            command.env(name, value);
        } else if is_needed(text) {
            match without_credentials(text, &value.to_string_lossy()) {
                Some(bare) => {
                    warn_once(format!(
                        "{text} is passed to build tools without its user name and password; list it in \
                         {PASSED_ON} to pass it unchanged"
                    ));
                    command.env(name, bare);
                }
                None => _ = command.env(name, &value),
            }
        }
    }
    // Without this, `python3 -m` imports modules of the current folder before its own.
    command.env("PYTHONSAFEPATH", "1");
    command
}

/// Warns once per process: a build runs several tools, and `shardmill dev` builds at each save.
fn warn_once(text: String) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if !said.contains(&text) {
        tracing::warn!("{text}");
        said.insert(text);
    }
}

/// Warns about folders in PATH that every user can change. They are used nevertheless: this user has named
/// them, and common container images make cargo's folder writable for everybody.
fn warn_of_open_folders(path: &OsStr) {
    for folder in env::split_paths(path) {
        // A folder that is missing or inaccessible has no tools.
        let Ok(way) = private::way_to(&folder, Trusted::Owners) else { continue };
        let itself = private::reach_of(&folder, Trusted::Owners).ok().flatten();
        if let Some(reach) = way.reach.or(itself) {
            warn_once(format!(
                "build tools may be run from {} in PATH, and {reach}",
                folder.display()
            ));
        }
    }
}

/// Returns the value of a variable without user names and passwords in its URLs. `None`: it has none.
fn without_credentials(name: &str, value: &str) -> Option<String> {
    let upper = name.to_ascii_uppercase();
    let bare = match upper.ends_with("_PROXY") && upper != "NO_PROXY" {
        // Also handles values without a scheme, and passwords that are not URL-encoded: a proxy has at most one
        // real `@`, the last one.
        true => {
            let is_scheme = |text: &str| {
                text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
            };
            let scheme = value.find("://").filter(|at| is_scheme(&value[..*at]));
            let scheme_len = scheme.map_or(0, |at| at + "://".len());
            let (scheme, rest) = value.split_at(scheme_len);
            let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
            format!("{scheme}{host}")
        }
        false => urls_without_credentials(value),
    };
    (bare != value).then_some(bare)
}

/// Same for a text with any number of URLs.
fn urls_without_credentials(value: &str) -> String {
    let mut bare = String::with_capacity(value.len());
    let mut rest = value;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + "://".len());
        bare.push_str(before);
        let ends = |c: char| matches!(c, '/' | '?' | '#' | '"' | '\'' | ',') || c.is_whitespace();
        let (authority, after) = after.split_at(after.find(ends).unwrap_or(after.len()));
        match authority.rsplit_once('@') {
            // SSH needs the user name, which is not a secret.
            Some((user, _)) if before.ends_with("ssh://") && !user.contains(':') => {
                bare.push_str(authority);
            }
            Some((_, host)) => bare.push_str(host),
            None => bare.push_str(authority),
        }
        rest = after;
    }
    bare + rest
}

fn is_needed(name: &str) -> bool {
    let is_listed =
        NEEDED.contains(&name) || NEEDED_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    let upper = name.to_ascii_uppercase();
    is_listed && !SECRET.iter().any(|part| upper.contains(part))
}

/// Returns the absolute folders of a PATH. Relative ones depend on the tool's current folder, so the plugin
/// would control them.
fn absolute_folders(path: &OsStr) -> OsString {
    let folders = env::split_paths(path).filter(|folder| folder.is_absolute());
    // Cannot fail: the folders were split at the separator that they must not contain.
    env::join_paths(folders).unwrap_or_default()
}

/// Whether a program is in a folder of PATH.
pub(super) fn is_on_path(name: &str) -> bool {
    let path = absolute_folders(&env::var_os("PATH").unwrap_or_default());
    env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// Returns the program that a variable names, otherwise the one at `local` in the plugin's folder or in one of
/// its parents up to the one with `.git`, otherwise the one on PATH.
///
/// The search ends at a folder that does not belong to this user, or that others may write to: a tool there may
/// be anybody's.
pub(super) fn find_tool(variable: &str, dir: &Path, local: &str, name: &str) -> Command {
    if let Some(named) = env::var_os(variable) {
        return command(named);
    }
    match find_near(dir, local) {
        Ok(Some(Found { tool, real })) => {
            let mut command = command(real);
            // One program may act as several tools, by the name that it is called with.
            command.arg0(tool);
            command
        }
        Ok(None) => command(name),
        Err(PassedOver { tool, why }) => {
            tracing::warn!(
                "{} is not used, because {why}; `{name}` from PATH is used instead. Set {variable} to use it anyway",
                tool.display()
            );
            command(name)
        }
    }
}

/// A tool that was found, and its checked path without links. The checked path is run, so that no link is
/// followed a second time after the check.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    tool: PathBuf,
    real: PathBuf,
}

/// A tool that exists and is not used.
struct PassedOver {
    tool: PathBuf,
    why: String,
}

fn find_near(dir: &Path, local: &str) -> Result<Option<Found>, PassedOver> {
    let Ok(dir) = dir.canonicalize() else { return Ok(None) };
    for folder in dir.ancestors() {
        let tool = folder.join(local);
        let is_there = tool.is_file();
        if let Err(why) = only_ours(folder) {
            return if is_there { Err(PassedOver { tool, why }) } else { Ok(None) };
        }
        if is_there {
            return match checked(folder, &tool) {
                Ok(real) => Ok(Some(Found { tool, real })),
                Err(why) => Err(PassedOver { tool, why }),
            };
        }
        if folder.join(".git").exists() {
            return Ok(None);
        }
    }
    Ok(None)
}

/// Checks a tool: the folders between `folder` and the tool, every folder and link from `/` to the file that it
/// leads to, and that file. Returns the path of the file.
///
/// Folders further up count as well: a user who may write there can exchange a folder on the path between this
/// check and the start of the tool.
fn checked(folder: &Path, tool: &Path) -> Result<PathBuf, String> {
    let mut between = tool.ancestors().skip(1).take_while(|above| *above != folder);
    between.try_for_each(only_ours)?;
    let way = private::way_to(tool, Trusted::Nobody).map_err(|cause| cause.to_string())?;
    if let Some(reach) = way.reach {
        return Err(reach.to_string());
    }
    // In a sticky folder, another user may have created an entry that did not exist.
    [Some(&*way.real), way.real.parent()].into_iter().flatten().try_for_each(nobody_elses)?;
    Ok(way.real)
}

/// Checks that a file or folder belongs to this user, and that nobody else may write to it.
fn only_ours(path: &Path) -> Result<(), String> {
    let uid = fs::metadata(path).map_err(|cause| not_seen(path, &cause))?.uid();
    if uid != private::uid() {
        return Err(Reach::Owner { path: path.to_owned(), uid }.to_string());
    }
    nobody_elses(path)
}

/// Checks that a file or folder belongs to this user or root, and that nobody else may write to it.
fn nobody_elses(path: &Path) -> Result<(), String> {
    match private::reach_of(path, Trusted::Nobody).map_err(|cause| not_seen(path, &cause))? {
        Some(reach) => Err(reach.to_string()),
        None => Ok(()),
    }
}

fn not_seen(path: &Path, cause: &io::Error) -> String {
    format!("failed to read metadata of {}: {cause}", path.display())
}

/// Refuses to build if a tool would read settings, in a folder above the plugin, that another user can write.
/// Cargo's settings name compilers and wrappers, which cargo runs.
///
/// The owner of the plugin is trusted: the user chose to build the plugin.
///
/// # Errors
/// [`PluginBuildError::ForeignSettings`].
pub(super) fn refuse_foreign_settings(dir: &Path, names: &[&str]) -> Result<(), PluginBuildError> {
    let dir = dir.canonicalize().map_err(file_error("read", dir))?;
    let owner = fs::metadata(&dir).map_err(file_error("read", &dir))?.uid();
    for folder in dir.ancestors().skip(1) {
        for file in names.iter().map(|name| folder.join(name)).filter(|file| file.exists()) {
            let found = reach_of_settings(folder, &file, Trusted::User(owner));
            if let Some(reach) = found.map_err(file_error("read", &file))? {
                return Err(PluginBuildError::ForeignSettings { file, reach });
            }
        }
    }
    Ok(())
}

/// Returns how another user can have written a settings file in `folder`, or can exchange it.
fn reach_of_settings(folder: &Path, file: &Path, trusted: Trusted) -> io::Result<Option<Reach>> {
    // A link of another user may lead to a file of this user that was never meant as settings.
    if let Some(reach) = private::way_to(file, trusted)?.reach {
        return Ok(Some(reach));
    }
    // The folder that contains only this file, such as `.cargo`: if it is sticky, anybody may have created the
    // file.
    let outer = file.parent().filter(|outer| *outer != folder);
    match outer {
        Some(outer) => private::reach_of(outer, trusted),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn wall_16_tools_get_what_they_need_and_no_secrets() {
        for name in
            ["PATH", "HOME", "LC_ALL", "CARGO_HOME", "RUSTC", "RUSTFLAGS", "GOPATH", "https_proxy"]
        {
            assert!(is_needed(name), "{name}");
        }
        for name in [
            "AWS_SECRET_ACCESS_KEY",
            "AWS_PROFILE",
            "PGPASSWORD",
            "CARGO_REGISTRY_TOKEN",
            "CARGO_REGISTRIES_OURS_TOKEN",
            "GOOGLE_APPLICATION_CREDENTIALS",
            "GITHUB_TOKEN",
            "SSH_AUTH_SOCK",
            "DATABASE_URL",
            "LD_PRELOAD",
            "NIX_CONFIG",
            "PIP_INDEX_URL",
            "npm_config_registry",
            "GOPROXY",
        ] {
            assert!(!is_needed(name), "{name}");
        }
        let path = absolute_folders(OsStr::new(".:/usr/bin::bin:/bin"));
        assert_eq!(path, OsStr::new("/usr/bin:/bin"));
    }

    fn tool_in(folder: &Path) -> PathBuf {
        let bin = folder.join("node_modules/.bin");
        fs::create_dir_all(&bin).unwrap();
        let tool = bin.join("tool");
        fs::write(&tool, "").unwrap();
        tool
    }

    fn found(plugin: &Path) -> Option<PathBuf> {
        find_near(plugin, "node_modules/.bin/tool").unwrap_or(None).map(|found| found.tool)
    }

    #[test]
    fn wall_16_a_tool_is_looked_for_up_to_the_repository_in_folders_of_this_user() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().canonicalize().unwrap();
        let plugin = root.join("repository/plugins/one");
        fs::create_dir_all(&plugin).unwrap();
        let outside = tool_in(&root);
        assert_eq!(found(&plugin), Some(outside));
        fs::create_dir(root.join("repository/.git")).unwrap();
        assert_eq!(found(&plugin), None);
        let inside = tool_in(&root.join("repository"));
        assert_eq!(found(&plugin), Some(inside));

        let chmod = |path: &str, mode: u32| {
            fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).unwrap();
        };
        for (path, usual) in [
            ("repository", 0o755),
            ("repository/plugins", 0o755),
            ("repository/node_modules", 0o755),
            ("repository/node_modules/.bin", 0o755),
            ("repository/node_modules/.bin/tool", 0o755),
        ] {
            for mode in [0o777, 0o1777] {
                chmod(path, mode);
                assert_eq!(found(&plugin), None, "{path} {mode:o}");
            }
            chmod(path, usual);
            assert!(found(&plugin).is_some(), "{path}");
        }
    }

    #[test]
    fn wall_16_what_is_run_is_the_path_that_was_checked() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().canonicalize().unwrap();
        let (plugin, above) = (root.join("plugin"), root.join("other"));
        let target = above.join("q/t.js");
        fs::create_dir_all(plugin.join("node_modules/.bin")).unwrap();
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::write(&target, "").unwrap();
        let tool = plugin.join("node_modules/.bin/tool");
        std::os::unix::fs::symlink("../../../other/q/t.js", &tool).unwrap();
        let near = || find_near(&plugin, "node_modules/.bin/tool");
        let expected = Found { tool, real: target.clone() };
        assert_eq!(near().unwrap_or(None).as_ref(), Some(&expected));
        for (path, mode, is_used) in [
            (&above, 0o777, false),
            // Users who may write to a sticky folder cannot exchange a folder of another user.
            (&above, 0o1777, true),
            (&above, 0o755, true),
            (&target, 0o666, false),
            (&target, 0o755, true),
        ] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            let found = near();
            assert_eq!(matches!(found, Ok(Some(_))), is_used, "{} {mode:o}", path.display());
            assert_eq!(found.is_err(), !is_used, "{} {mode:o}", path.display());
        }
    }

    #[test]
    fn wall_16_users_and_passwords_in_urls_are_left_out() {
        for (name, value, bare) in [
            ("HTTPS_PROXY", "http://user:pw@host:3128", "http://host:3128"),
            ("https_proxy", "http://user:pw@host:3128/", "http://host:3128/"),
            ("ALL_PROXY", "socks5h://user@host:1080", "socks5h://host:1080"),
            ("HTTP_PROXY", "user:pw@host:3128", "host:3128"),
            ("HTTP_PROXY", "user:p://w@host:3128", "host:3128"),
            ("CARGO_HTTP_PROXY", "http://user:p/w@x@host", "http://host"),
            (
                "CARGO_REGISTRIES_OURS_INDEX",
                "sparse+https://u:pw@h/index/",
                "sparse+https://h/index/",
            ),
            ("CARGO_REGISTRIES_OURS_INDEX", "ssh://git:pw@h/index", "ssh://h/index"),
            ("RUSTUP_DIST_SERVER", "https://key@h:8443/a@b", "https://h:8443/a@b"),
            ("CARGO_X", "http://a:b@c, https://d:e@f/ https://g", "http://c, https://f/ https://g"),
        ] {
            assert_eq!(without_credentials(name, value).as_deref(), Some(bare), "{name}={value}");
        }
        for (name, value) in [
            ("HTTPS_PROXY", "http://host:3128"),
            ("HTTPS_PROXY", ""),
            ("NO_PROXY", "localhost,.example.com"),
            ("CARGO_REGISTRIES_OURS_INDEX", "ssh://git@h/index"),
            ("CARGO_REGISTRIES_OURS_INDEX", "https://h/@scope/index"),
            ("LC_ALL", "de_DE.UTF-8@euro"),
            ("CARGO_HOME", "/home/me@work/.cargo"),
        ] {
            assert_eq!(without_credentials(name, value), None, "{name}={value}");
        }
    }

    #[test]
    fn wall_16_settings_that_anybody_can_write_end_the_build() {
        let place = tempfile::tempdir().unwrap();
        let plugin = place.path().join("plugin");
        let settings = place.path().join(".cargo/config.toml");
        fs::create_dir_all(settings.parent().unwrap()).unwrap();
        fs::create_dir_all(&plugin).unwrap();
        fs::write(&settings, "").unwrap();
        let refused = || refuse_foreign_settings(&plugin, &[".cargo/config.toml"]).is_err();
        assert!(!refused());
        fs::set_permissions(&settings, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(refused());
        fs::set_permissions(&settings, fs::Permissions::from_mode(0o644)).unwrap();
        let chmod = |folder: &Path, mode: u32| {
            fs::set_permissions(folder, fs::Permissions::from_mode(mode)).unwrap();
        };
        let folder = settings.parent().unwrap();
        for mode in [0o777, 0o1777] {
            chmod(folder, mode);
            assert!(refused(), "{mode:o}");
        }
        chmod(folder, 0o755);
        // Another `.cargo` may be put in place of the folder.
        chmod(place.path(), 0o777);
        assert!(refused());
        chmod(place.path(), 0o1777);
        assert!(!refused());
    }
}
