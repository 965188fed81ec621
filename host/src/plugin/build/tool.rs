//! Tools of builds: where they are looked for, and what they learn of this process's environment.
//!
//! A build runs programs of others with this user's rights. It must not run one that another user of the
//! machine has put into a folder above the plugin, and it has no use for the secrets in the environment.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, io};

use super::{BuildError, file_error};
use crate::private::{self, Reach};

/// The variable that lists further variables for build tools, by commas.
const PASSED_ON: &str = "SHARDMILL_BUILD_ENV";

/// Variables that tools need, by name: the user's places and language, the network, the compilers.
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
/// The same by the beginning of their names.
const NEEDED_PREFIXES: &[&str] = &[
    "LC_", "XDG_", "CARGO_", "RUSTC", "RUSTUP_", "RUST_", "ZIG_", "PYTHON", "NIX_", "CC_",
    "CFLAGS_",
];
/// Parts of names of variables that hold secrets, whatever they begin with.
const SECRET: &[&str] = &["TOKEN", "SECRET", "PASSW", "CREDENTIAL", "APIKEY", "_KEY"];

/// A build tool's command, with what it needs of the environment and nothing else.
pub(super) fn command(program: impl AsRef<OsStr>) -> Command {
    let passed_on = env::var(PASSED_ON).unwrap_or_default();
    let passed_on: Vec<&str> = passed_on.split(',').map(str::trim).collect();
    let mut command = Command::new(program);
    command.env_clear();
    for (name, value) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        if text == "PATH" {
            command.env(name, absolute_folders(&value));
        } else if passed_on.contains(&text) || is_needed(text) {
            command.env(name, value);
        }
    }
    // Else `python3 -m` takes modules of the folder that it runs in before its own.
    command.env("PYTHONSAFEPATH", "1");
    command
}

fn is_needed(name: &str) -> bool {
    let is_listed =
        NEEDED.contains(&name) || NEEDED_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    let upper = name.to_ascii_uppercase();
    is_listed && !SECRET.iter().any(|part| upper.contains(part))
}

/// The folders of a PATH without those that depend on where a tool runs: in a plugin's folder, they would
/// be the plugin's.
fn absolute_folders(path: &OsStr) -> OsString {
    let folders = env::split_paths(path).filter(|folder| folder.is_absolute());
    // It was split at what may not be in them.
    env::join_paths(folders).unwrap_or_default()
}

/// Whether a program is in a folder of PATH.
pub(super) fn is_on_path(name: &str) -> bool {
    let path = absolute_folders(&env::var_os("PATH").unwrap_or_default());
    env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// The program that a variable names, else the one at `local` in the plugin's folder or one above it, up
/// to the one with `.git`, else the one on PATH.
///
/// The search ends at a folder that is not this user's, or where others may write: a tool there may be
/// anybody's.
pub(super) fn find_tool(variable: &str, dir: &Path, local: &str, name: &str) -> OsString {
    if let Some(named) = env::var_os(variable) {
        return named;
    }
    match find_near(dir, local) {
        Ok(Some(tool)) => tool.into(),
        Ok(None) => name.into(),
        Err(PassedOver { tool, why }) => {
            tracing::warn!(
                "{} is not used, because {why}; `{name}` is taken from PATH. Set {variable} to use it anyway",
                tool.display()
            );
            name.into()
        }
    }
}

/// A tool that is there and not used.
struct PassedOver {
    tool: PathBuf,
    why: String,
}

fn find_near(dir: &Path, local: &str) -> Result<Option<PathBuf>, PassedOver> {
    let Ok(dir) = dir.canonicalize() else { return Ok(None) };
    for folder in dir.ancestors() {
        let tool = folder.join(local);
        let is_there = tool.is_file();
        if let Err(why) = only_ours(folder) {
            return if is_there { Err(PassedOver { tool, why }) } else { Ok(None) };
        }
        if is_there {
            return match tool_is_ours(folder, &tool) {
                Ok(()) => Ok(Some(tool)),
                Err(why) => Err(PassedOver { tool, why }),
            };
        }
        if folder.join(".git").exists() {
            return Ok(None);
        }
    }
    Ok(None)
}

/// Checks the folders between `folder` and a tool, and the file that its link leads to.
fn tool_is_ours(folder: &Path, tool: &Path) -> Result<(), String> {
    let mut between = tool.ancestors().skip(1).take_while(|above| *above != folder);
    between.try_for_each(only_ours)?;
    let real = tool.canonicalize().map_err(|cause| cause.to_string())?;
    only_ours(&real)?;
    real.parent().map_or(Ok(()), only_ours)
}

/// Checks that a file or folder is this user's, and that nobody else may write there.
fn only_ours(path: &Path) -> Result<(), String> {
    let looked_at = |cause: io::Error| format!("failed to look at {}: {cause}", path.display());
    let uid = fs::metadata(path).map_err(looked_at)?.uid();
    if uid != private::uid() {
        return Err(Reach::Owner { path: path.to_owned(), uid }.to_string());
    }
    match private::reach_of(path).map_err(looked_at)? {
        Some(reach) => Err(reach.to_string()),
        None => Ok(()),
    }
}

/// Refuses to build where a tool would take settings from a folder above the plugin that another user wrote:
/// cargo's name compilers and wrappers, which it runs.
///
/// Whoever owns the plugin is trusted by building it.
///
/// # Errors
/// [`BuildError::ForeignSettings`].
pub(super) fn refuse_foreign_settings(dir: &Path, names: &[&str]) -> Result<(), BuildError> {
    let dir = dir.canonicalize().map_err(file_error("read", dir))?;
    let owner = fs::metadata(&dir).map_err(file_error("read", &dir))?.uid();
    for folder in dir.ancestors().skip(1) {
        for file in names.iter().map(|name| folder.join(name)).filter(|file| file.exists()) {
            // The folder that holds it alone, such as `.cargo`, and then the file.
            let holder = file.parent().filter(|holder| *holder != folder);
            for path in holder.into_iter().chain([&*file]) {
                // A link of another user may lead to a file of this one that was never meant to be followed.
                let about = fs::symlink_metadata(path).map_err(file_error("read", path))?;
                let uid = about.uid();
                let is_foreign_link =
                    about.is_symlink() && ![private::uid(), owner, 0].contains(&uid);
                let reach = match is_foreign_link {
                    true => Some(Reach::Owner { path: path.to_owned(), uid }),
                    false => private::reach_of(path).map_err(file_error("read", path))?,
                };
                match reach {
                    None => {}
                    Some(Reach::Owner { uid, .. }) if uid == owner => {}
                    Some(reach) => {
                        return Err(BuildError::ForeignSettings { file: file.clone(), reach });
                    }
                }
            }
        }
    }
    Ok(())
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
        find_near(plugin, "node_modules/.bin/tool").unwrap_or(None)
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
        let folder = settings.parent().unwrap();
        fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(refused());
    }
}
