//! Cost of exactly-once writes into a table: lines of a file, decoded by the bundled plugin in its sandbox and
//! committed with their positions; against a bare loop that COPYs the same rows, which it already has in
//! memory, in transactions of equal size on one connection. The case `objects` is in `objects.rs`.

mod child;
mod objects;
mod report;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use report::Report;
use tokio_postgres::binary_copy::BinaryCopyInWriter;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, NoTls};

const UNIT: &str = "rows/s, higher is better";
const ROWS: i64 = 2_000_000;
/// Rows per transaction, for both sides.
const COMMIT_ROWS: i64 = 10_000;
/// The rate of a bare COPY varies by a quarter from run to run.
const ROUNDS: usize = 9;
const MAKES: [&str; 4] = ["Honda", "Volvo", "Peugeot", "Mazda"];

/// Write mode of a case.
struct Case {
    name: &'static str,
    /// Text after the columns in the table's definition.
    constraint: &'static str,
    /// Configuration lines of the sink.
    mode: &'static str,
}

const CASES: [Case; 2] = [
    Case { name: "postgres append", constraint: "", mode: "mode = \"append\"" },
    Case {
        name: "postgres upsert",
        constraint: ", PRIMARY KEY (id)",
        mode: "mode = \"upsert\"\nkey = [\"id\"]",
    },
];

#[tokio::main]
async fn main() -> Result<()> {
    let report = Report::start("sinks", UNIT);
    let url = std::env::var("SHARDMILL_TEST_POSTGRES")
        .context("missing SHARDMILL_TEST_POSTGRES: run `cargo xtask bench sinks`")?;
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
    let connection = tokio::spawn(connection);
    let folder = tempfile::tempdir()?;
    let lines = folder.path().join("cars.csv");
    fs::write(&lines, csv())?;
    for case in CASES.iter().filter(|case| report.wants(case.name)) {
        let (mut ours, mut baseline) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let our = pipeline(case, folder.path(), &lines, &url, &client).await?;
            let their = bare_copy(case, &client).await?;
            // The first round compiles the plugin, so it does not count.
            if round > 0 {
                ours.push(our);
                baseline.push(their);
            }
        }
        let (our, their) = report::median_round(&ours, &baseline);
        report.line(case.name, our, their);
    }
    drop(client);
    connection.await??;
    if report.wants("objects") {
        let server = objects::Server::start().await?;
        let lines = folder.path().join("lines.ndjson");
        objects::write_lines(&lines)?;
        let (mut ours, mut baseline) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (folder, lines) = (folder.path(), &lines);
            ours.push(tokio::task::block_in_place(|| objects::pipeline(&server, folder, lines))?);
            baseline.push(objects::bare_puts(&server, lines).await?);
        }
        let (our, their) = report::median_round(&ours, &baseline);
        report.line_in("objects", our, their, "MiB/s, higher is better");
    }
    Ok(())
}

/// Returns the values of a row.
fn row(id: i64) -> (&'static str, i64, i64) {
    let place = usize::try_from(id.rem_euclid(MAKES.len() as i64)).unwrap_or(0);
    (MAKES[place], id * 7 % 100_000, 1_700_000_000_000 + id)
}

fn csv() -> String {
    let mut text = String::new();
    for id in 0..ROWS {
        let (make, cents, at) = row(id);
        // Writing into a String cannot fail.
        _ = writeln!(text, "{id},{make},{cents},{at}");
    }
    text
}

async fn create(case: &Case, client: &Client) -> Result<()> {
    let constraint = case.constraint;
    let sql = format!(
        "DROP TABLE IF EXISTS bench_cars, shardmill_position; CREATE TABLE bench_cars \
         (id bigint NOT NULL, make text, cents bigint, at bigint{constraint}); CHECKPOINT"
    );
    Ok(client.batch_execute(&sql).await?)
}

async fn check(client: &Client) -> Result<()> {
    let query = "SELECT count(*), count(DISTINCT id), sum(cents)::bigint FROM bench_cars";
    let found = client.query_one(query, &[]).await?;
    let found: (i64, i64, i64) = (found.get(0), found.get(1), found.get(2));
    let cents = (0..ROWS).map(|id| row(id).1).sum();
    ensure!(found == (ROWS, ROWS, cents), "the table has other rows than expected: {found:?}");
    Ok(())
}

/// Measures a whole run, including its start and end, in rows per second.
async fn pipeline(
    case: &Case,
    folder: &Path,
    lines: &Path,
    url: &str,
    client: &Client,
) -> Result<f64> {
    create(case, client).await?;
    let state = folder.join("state/sinks");
    if state.exists() {
        fs::remove_dir_all(&state)?;
    }
    let plugin = here("../plugins/prebuilt/csv-decode.wasm").canonicalize()?;
    let mode = case.mode;
    let text = format!(
        r#"
[pipeline]
name = "sinks"
state_dir = "state"
[source]
type = "file"
path = {lines:?}
[[stage]]
name = "decode"
plugin = {plugin:?}
routes = {{ rows = ["mart"] }}
[stage.config]
columns = [
    {{ name = "id", type = "bigint", nullable = false }},
    {{ name = "make", type = "text" }},
    {{ name = "cents", type = "bigint" }},
    {{ name = "at", type = "bigint" }},
]
[[sink]]
name = "mart"
type = "postgres"
url = "{url}"
table = "bench_cars"
{mode}
[sink.commit]
rows = {COMMIT_ROWS}
bytes = "16 MiB"
linger = "10 s"
"#
    );
    let path = folder.join("pipeline.toml");
    fs::write(&path, text)?;
    let begun = Instant::now();
    child::cost(child::shardmill()?.arg("run").arg(&path))?;
    let took = begun.elapsed();
    check(client).await?;
    Ok(ROWS as f64 / took.as_secs_f64())
}

/// Measures the bare loop, in rows per second.
async fn bare_copy(case: &Case, client: &Client) -> Result<f64> {
    create(case, client).await?;
    let begun = Instant::now();
    for first in (0..ROWS).step_by(COMMIT_ROWS as usize) {
        client.batch_execute("BEGIN").await?;
        let sink = client.copy_in("COPY bench_cars FROM STDIN (FORMAT binary)").await?;
        let types = [Type::INT8, Type::TEXT, Type::INT8, Type::INT8];
        let writer = BinaryCopyInWriter::new(sink, &types);
        let mut writer = std::pin::pin!(writer);
        for id in first..first + COMMIT_ROWS {
            let (make, cents, at) = row(id);
            writer.as_mut().write(&[&id, &make, &cents, &at]).await?;
        }
        writer.finish().await?;
        client.batch_execute("COMMIT").await?;
    }
    let took = begun.elapsed();
    check(client).await?;
    Ok(ROWS as f64 / took.as_secs_f64())
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
