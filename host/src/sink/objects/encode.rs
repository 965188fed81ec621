//! Rows to JSON lines, one object per route; the same rows always give the same bytes.

use std::collections::BTreeMap;
use std::io::Write as _;

use crate::config::Compression;
use crate::record::RouteName;
use crate::sink::{Commit, Refusal};

/// gzip's level: its default.
const GZIP_LEVEL: flate2::Compression = flate2::Compression::new(6);
/// Zstandard's level: its default.
const ZSTD_LEVEL: i32 = 3;

/// The lines of one route.
pub struct Lines {
    text: Vec<u8>,
    rows: u64,
}

/// An object, ready to be written.
pub struct Encoded {
    /// The route of its rows.
    pub route: RouteName,
    /// How many.
    pub rows: u64,
    /// Its content.
    pub bytes: Vec<u8>,
    /// The end of its name.
    pub extension: &'static str,
}

/// Rows as lines, by route; and the rows that fit no line.
pub fn lines(commit: &Commit) -> (BTreeMap<RouteName, Lines>, Vec<Refusal>) {
    let mut routes: BTreeMap<RouteName, Lines> = BTreeMap::new();
    let mut refused = Vec::new();
    for (index, row) in commit.rows.iter().enumerate() {
        let lines = match routes.get_mut(&row.route) {
            Some(lines) => lines,
            None => routes.entry(row.route.clone()).or_insert(Lines { text: Vec::new(), rows: 0 }),
        };
        let begun = lines.text.len();
        match append(&row.payload, &mut lines.text) {
            Ok(()) => lines.rows += 1,
            Err(reason) => {
                lines.text.truncate(begun);
                refused.push(Refusal { row: index, reason });
            }
        }
    }
    routes.retain(|_, lines| lines.rows > 0);
    (routes, refused)
}

/// One row, one line: what holds line breaks must be JSON, whose breaks mean nothing.
fn append(payload: &[u8], text: &mut Vec<u8>) -> Result<(), String> {
    match payload.contains(&b'\n') {
        false => text.extend_from_slice(payload),
        true => {
            let value: serde_json::Value = serde_json::from_slice(payload).map_err(|error| {
                format!("the payload holds line breaks and is no JSON ({error}): it fits no line")
            })?;
            serde_json::to_writer(&mut *text, &value).map_err(|error| error.to_string())?;
        }
    }
    text.push(b'\n');
    Ok(())
}

/// Compresses each route's lines, on a blocking thread.
pub async fn compress(
    routes: BTreeMap<RouteName, Lines>,
    compression: Compression,
) -> std::io::Result<Vec<Encoded>> {
    tokio::task::spawn_blocking(move || {
        let routes = routes.into_iter();
        routes.map(|(route, lines)| encode(route, lines, compression)).collect()
    })
    .await?
}

fn encode(route: RouteName, lines: Lines, compression: Compression) -> std::io::Result<Encoded> {
    let (bytes, extension) = match compression {
        Compression::None => (lines.text, "ndjson"),
        Compression::Gzip => {
            // The encoder writes no time: equal rows are equal bytes.
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), GZIP_LEVEL);
            encoder.write_all(&lines.text)?;
            (encoder.finish()?, "ndjson.gz")
        }
        Compression::Zstd => (zstd::encode_all(&lines.text[..], ZSTD_LEVEL)?, "ndjson.zst"),
    };
    Ok(Encoded { route, rows: lines.rows, bytes, extension })
}
