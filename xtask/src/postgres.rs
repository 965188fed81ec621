//! A temporary PostgreSQL server for tests: found or installed, started on loopback, and stopped when dropped.
//!
//! The server refuses to run as root, so root starts it as an unprivileged user. Its data is in its own folder,
//! which is deleted with it. No other server is ever stopped.

use std::ffi::OsStr;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::is_installed;

/// Attempts to start: another process may take a free port before the server listens on it.
const START_ATTEMPTS: usize = 5;

/// Maximum length of a Unix socket's path on all systems, less the socket's own name.
const SOCKET_FOLDER_BYTES_MAX: usize = 80;

/// Users that the server may run as if we are root, in order of preference.
const UNPRIVILEGED_USERS: [&str; 2] = ["postgres", "nobody"];

/// Folder in which Debian's packages install the server, with one folder per version.
const DEBIAN_FOLDER: &str = "/usr/lib/postgresql";

/// Path of the pooler in Debian's package; its folder is not on every user's PATH.
const DEBIAN_POOLER: &str = "/usr/sbin/pgbouncer";

/// Settings file that keeps Debian's packages from starting a cluster.
const DEBIAN_CLUSTER_SETTINGS: &str = "/etc/postgresql-common/createcluster.conf";

/// A running server. Dropping it stops the server and deletes its data.
pub struct Cluster {
    /// URL of a database that the user owns: `postgres://…`.
    pub url: String,
    /// The server's own certificate, for 127.0.0.1 and no other name.
    pub certificate: PathBuf,
    /// Folder of `pg_ctl`.
    pub programs: PathBuf,
    folder: PathBuf,
    user: Option<User>,
}

/// Unprivileged user that the server runs as.
#[derive(Clone, Copy)]
struct User {
    uid: u32,
    gid: u32,
}

impl Cluster {
    /// Starts a server with its data below `scratch`, or below the system's temporary folder if the server's
    /// user cannot access `scratch`.
    pub fn start(scratch: &Path) -> Result<Self> {
        let programs = find_or_install()?;
        let user = if is_root()? { Some(unprivileged_user()?) } else { None };
        let folder = make_folder(scratch, user)?;
        let certificate = folder.join("server.pem");
        let mut cluster = Self { url: String::new(), certificate, programs, folder, user };
        cluster.initialise()?;
        cluster.make_certificate()?;
        cluster.listen()?;
        Ok(cluster)
    }

    fn initialise(&self) -> Result<()> {
        let mut initdb = self.program("initdb");
        initdb.args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N", "-D"]);
        run(initdb.arg(self.data()))
    }

    /// Makes the server's key and certificate. Debian's package of the server installs openssl, too; other
    /// packages may not.
    fn make_certificate(&self) -> Result<()> {
        if !is_installed("openssl") {
            apt_get(&["update"])?;
            apt_get(&["install", "-y", "--no-install-recommends", "openssl"])
                .context("failed to install openssl for the tests of TLS: install it")?;
        }
        let mut openssl = as_user(self.user, OsStr::new("openssl"));
        openssl
            .current_dir(&self.folder)
            .args(["req", "-x509", "-nodes", "-days", "30", "-subj", "/CN=127.0.0.1"])
            .args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
            .args(["-addext", "subjectAltName=IP:127.0.0.1"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-keyout", "server.key", "-out", "server.pem"])
            .stdin(Stdio::null());
        let output = openssl.output().context("failed to start openssl: install it")?;
        ensure!(
            output.status.success(),
            "openssl failed to make a certificate: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Starts the server on a free port of the loopback interface.
    fn listen(&mut self) -> Result<()> {
        let mut last = None;
        for _ in 0..START_ATTEMPTS {
            let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
            match run(self.program("pg_ctl").args(["start", "-w", "-t", "60", "-D"]).args([
                self.data().as_os_str(),
                OsStr::new("-l"),
                self.log().as_os_str(),
                OsStr::new("-o"),
                OsStr::new(&self.settings(port)),
            ])) {
                Ok(()) => {
                    self.url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
                    return Ok(());
                }
                Err(error) => last = Some(error),
            }
        }
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let error = last.unwrap_or_else(|| anyhow::anyhow!("no attempt was made"));
        Err(error.context(format!("failed to start the temporary PostgreSQL; its log: {log}")))
    }

    /// Returns the server's options. Tests kill our processes, but never the machine, so data that the server
    /// has given to the kernel is safe without fsync.
    fn settings(&self, port: u16) -> String {
        let folder = self.folder.as_os_str();
        let sockets = match folder.to_str() {
            Some(path) if path.len() <= SOCKET_FOLDER_BYTES_MAX && !path.contains([' ', '\'']) => {
                path
            }
            _ => "",
        };
        format!(
            "-c listen_addresses=127.0.0.1 -p {port} -c unix_socket_directories='{sockets}' \
             -c max_connections=200 -c fsync=off \
             -c ssl=on -c ssl_cert_file=../server.pem -c ssl_key_file=../server.key"
        )
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// Returns a command for one of PostgreSQL's programs, run as the server's user.
    fn program(&self, name: &str) -> Command {
        let mut command = as_user(self.user, self.programs.join(name).as_os_str());
        command.current_dir(&self.folder).env("LC_ALL", "C");
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.data().join("postmaster.pid").exists() {
            let mut stop = self.program("pg_ctl");
            stop.args(["stop", "-w", "-m", "immediate", "-D"]).arg(self.data());
            if let Err(error) = run(&mut stop) {
                eprintln!("failed to stop the PostgreSQL in {}: {error:#}", self.folder.display());
                return;
            }
        }
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("failed to delete {}: {error}", self.folder.display());
        }
    }
}

/// Installs PgBouncer if it is missing. Tests start it themselves, each with its own settings.
pub fn install_pooler() -> Result<()> {
    if is_installed("pgbouncer") || Path::new(DEBIAN_POOLER).is_file() {
        return Ok(());
    }
    ensure!(is_root()?, "missing pgbouncer: install it (only root may install packages)");
    apt_get(&["update"])?;
    apt_get(&["install", "-y", "--no-install-recommends", "pgbouncer"])
        .context("failed to install pgbouncer, which tests start on loopback")
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    run(Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Returns the folder of `initdb` and `pg_ctl`: on the PATH, named by `pg_config`, Debian's newest, or Debian's
/// after an installation.
pub fn find_or_install() -> Result<PathBuf> {
    if let Some(found) = find() {
        return Ok(found);
    }
    let hint = "install PostgreSQL's server, or put its `initdb` and `pg_ctl` on the PATH";
    install().context(hint)?;
    find().with_context(|| format!("PostgreSQL was installed but cannot be found: {hint}"))
}

fn find() -> Option<PathBuf> {
    on_path().or_else(by_pg_config).or_else(newest_of_debian)
}

/// Follows links: a link on the PATH may be in a folder without the other programs.
fn on_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let initdb = std::env::split_paths(&path).map(|folder| folder.join("initdb"));
    initdb.filter_map(|file| file.canonicalize().ok()).find_map(|file| complete(file.parent()?))
}

fn by_pg_config() -> Option<PathBuf> {
    let answer = Command::new("pg_config").arg("--bindir").output().ok()?;
    complete(Path::new(String::from_utf8(answer.stdout).ok()?.trim()))
}

fn newest_of_debian() -> Option<PathBuf> {
    let versions = fs::read_dir(DEBIAN_FOLDER).ok()?;
    let mut found: Vec<(u32, PathBuf)> = versions
        .filter_map(|version| {
            let version = version.ok()?;
            let number = version.file_name().to_str()?.parse().ok()?;
            Some((number, complete(&version.path().join("bin"))?))
        })
        .collect();
    found.sort();
    found.pop().map(|(_, folder)| folder)
}

/// Returns the folder if it has all required programs.
fn complete(folder: &Path) -> Option<PathBuf> {
    let programs = ["initdb", "pg_ctl", "postgres"];
    programs.iter().all(|name| folder.join(name).is_file()).then(|| folder.to_owned())
}

/// Installs Debian's package without the cluster that it would start.
fn install() -> Result<()> {
    ensure!(is_root()?, "only root may install packages");
    apt_get(&["update"])?;
    apt_get(&["install", "-y", "--no-install-recommends", "postgresql-common"])?;
    let mut settings = fs::read_to_string(DEBIAN_CLUSTER_SETTINGS).unwrap_or_default();
    settings.push_str("\ncreate_main_cluster = false\n");
    fs::write(DEBIAN_CLUSTER_SETTINGS, settings)
        .with_context(|| format!("failed to write {DEBIAN_CLUSTER_SETTINGS}"))?;
    apt_get(&["install", "-y", "--no-install-recommends", "postgresql"])
}

fn is_root() -> Result<bool> {
    Ok(id(&["-u"])? == 0)
}

fn unprivileged_user() -> Result<User> {
    for name in UNPRIVILEGED_USERS {
        if let (Ok(uid), Ok(gid)) = (id(&["-u", name]), id(&["-g", name])) {
            return Ok(User { uid, gid });
        }
    }
    bail!(
        "PostgreSQL refuses to run as root, and there is no user {}",
        UNPRIVILEGED_USERS.join(" or ")
    )
}

fn id(arguments: &[&str]) -> Result<u32> {
    let answer = Command::new("id").args(arguments).output().context("failed to run id")?;
    let text = String::from_utf8_lossy(&answer.stdout);
    text.trim()
        .parse()
        .with_context(|| format!("id {}: expected a number, found {text:?}", arguments.join(" ")))
}

/// Makes a folder that belongs to the server's user, in the first place that this user can access.
fn make_folder(scratch: &Path, user: Option<User>) -> Result<PathBuf> {
    fs::create_dir_all(scratch)
        .with_context(|| format!("failed to create {}", scratch.display()))?;
    let mut tried = Vec::new();
    for place in [scratch.canonicalize()?, std::env::temp_dir()] {
        let folder = place.join(format!("postgres-{}-{}", std::process::id(), unique()));
        fs::create_dir(&folder)
            .with_context(|| format!("failed to create {}", folder.display()))?;
        if let Some(User { uid, gid }) = user {
            std::os::unix::fs::chown(&folder, Some(uid), Some(gid))?;
        }
        let mut reach = as_user(user, OsStr::new("test"));
        if reach.arg("-w").arg(&folder).status().is_ok_and(|status| status.success()) {
            return Ok(folder);
        }
        fs::remove_dir(&folder)?;
        tried.push(place.display().to_string());
    }
    bail!("the user that PostgreSQL would run as cannot access {}", tried.join(" or "))
}

/// Returns a number that is unique among the clusters of this process.
fn unique() -> usize {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Returns a command that runs as another user, if one is given.
fn as_user(user: Option<User>, program: &OsStr) -> Command {
    let Some(User { uid, gid }) = user else { return Command::new(program) };
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={uid}"), format!("--regid={gid}")]);
    command.arg("--clear-groups").arg("--").arg(program);
    command
}

/// Runs a program to its end, and shows its output only if it fails.
///
/// The output goes to a file instead of a pipe: a server started by `pg_ctl` keeps inherited pipes open.
fn run(command: &mut Command) -> Result<()> {
    let output = tempfile_for_output()?;
    let status = command
        .stdin(Stdio::null())
        .stdout(output.1.try_clone()?)
        .stderr(output.1)
        .status()
        .with_context(|| format!("failed to run {:?}", command.get_program()))?;
    let said = fs::read_to_string(&output.0).unwrap_or_default();
    fs::remove_file(&output.0)?;
    ensure!(status.success(), "{command:?} ended with {status}: {}", said.trim());
    Ok(())
}

fn tempfile_for_output() -> Result<(PathBuf, fs::File)> {
    let name = format!("shardmill-xtask-{}-{}", std::process::id(), unique());
    let path = std::env::temp_dir().join(name);
    let file =
        fs::File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    Ok((path, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_listens_until_it_is_dropped() {
        let cluster = Cluster::start(&std::env::temp_dir()).expect("a cluster");
        let address = cluster.url.split(['@', '/']).nth(3).expect("an address").to_owned();
        let folder = cluster.folder.clone();
        assert!(std::net::TcpStream::connect(&address).is_ok(), "{address}");
        drop(cluster);
        assert!(std::net::TcpStream::connect(&address).is_err(), "{address}");
        assert!(!folder.exists());
    }
}
