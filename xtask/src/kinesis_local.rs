//! A second Kinesis server for tests, independent of ours: npm's `kinesis-local`, installed below `target/`,
//! started on loopback, and stopped when dropped.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::tools;

/// Longest wait for its first answer.
const START_MAX: Duration = Duration::from_secs(60);
/// Patch to listen on loopback only: the server listens on every interface and has no option for this.
const LOOPBACK_ONLY: &str = "\
const net = require('net');
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (...given) {
  const port = typeof given[0] === 'object' ? given[0].port : given[0];
  const ready = given.find((one) => typeof one === 'function');
  return listen.call(this, { port, host: '127.0.0.1' }, ready);
};
";

/// A running server. Dropping it stops the server.
pub struct KinesisLocal {
    /// URL of the server.
    pub url: String,
    process: Child,
}

impl KinesisLocal {
    /// Installs the server below `folder` if it is missing. Returns the folder of the package.
    pub fn install(folder: &Path) -> Result<PathBuf> {
        tools::npm_install(folder, "kinesis-local").context(
            "failed to install the second Kinesis server of the tests: install nodejs and npm",
        )?;
        Ok(folder.join("node_modules/kinesis-local"))
    }

    /// Installs the server below `folder` if it is missing, and starts it on a free port.
    pub fn start(folder: &Path) -> Result<Self> {
        // The server reads its certificate from the current folder.
        let package = Self::install(folder)?;
        let patch = folder.join("loopback-only.js");
        fs::write(&patch, LOOPBACK_ONLY)?;
        let [plain, tls] = [free_port()?, free_port()?];
        let log = fs::File::create(folder.join("server.log"))?;
        let process = Command::new("node")
            .arg("-r")
            .arg(&patch)
            .arg("main.js")
            .current_dir(&package)
            .env("KINESIS_MOCK_PLAIN_PORT", plain.to_string())
            .env("KINESIS_MOCK_TLS_PORT", tls.to_string())
            .env("SHARD_LIMIT", "500")
            .env("LOG_LEVEL", "ERROR")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("failed to start node")?;
        let mut server = Self { url: format!("http://127.0.0.1:{plain}"), process };
        server.wait_until_it_answers(plain)?;
        Ok(server)
    }

    fn wait_until_it_answers(&mut self, port: u16) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < START_MAX {
            if let Some(status) = self.process.try_wait()? {
                bail!("kinesis-local ended with {status}; see server.log in its folder");
            }
            if answers(port).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("kinesis-local did not answer within {} s", START_MAX.as_secs())
    }
}

impl Drop for KinesisLocal {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Any HTTP answer is sufficient.
fn answers(port: u16) -> std::io::Result<()> {
    let mut connection = TcpStream::connect(("127.0.0.1", port))?;
    connection.set_read_timeout(Some(Duration::from_secs(2)))?;
    connection
        .write_all(b"GET /healthcheck HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
    connection.read_exact(&mut [0; 5])
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
