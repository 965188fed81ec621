//! Rows to objects: one NDJSON body per route, compressed and hashed.
//!
//! A pure function of the rows: the same rows become the same lines in the same order, which is
//! what lets a claim be produced again. It uses the processor only; the writer runs it off the
//! async threads.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};

use bytes::Bytes;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};

use crate::config::Compression;
use crate::record::{RouteName, Row};
use crate::sink::Refusal;
use crate::sink::line::LineFormat;

/// zstd's own default: about 3:1 on JSON at several hundred MB/s.
const ZSTD_LEVEL: i32 = 3;

/// How much is hashed and compressed at once, in bytes.
const LINES_BYTES: usize = 32 << 10;

/// What the rows of a commit became.
#[derive(Debug, Default)]
pub(super) struct Encoded {
    /// One body per route that has a line, by route name.
    pub(super) bodies: Vec<Body>,
    /// The rows that cannot be a line.
    pub(super) refusals: Vec<Refusal>,
}

/// The content of one object.
#[derive(Debug)]
pub(super) struct Body {
    /// The route that its rows took.
    pub(super) route: RouteName,
    /// How many rows it holds.
    pub(super) rows: u64,
    /// The length of its lines before compression.
    pub(super) line_bytes: u64,
    /// The SHA-256 of its lines before compression, in hex.
    pub(super) sha256: String,
    /// The object's bytes.
    pub(super) bytes: Bytes,
}

/// Encodes the rows; a route without a known format is taken as text.
pub(super) fn encode(
    rows: &[Row],
    formats: &HashMap<RouteName, LineFormat>,
    compression: Compression,
) -> io::Result<Encoded> {
    let mut open: BTreeMap<&RouteName, OpenBody> = BTreeMap::new();
    let mut refusals = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let body = match open.entry(&row.route) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let format = formats.get(&row.route).copied().unwrap_or(LineFormat::Text);
                new.insert(OpenBody::new(format, compression)?)
            }
        };
        match body.format.line(&row.payload) {
            Ok(line) => body.push(&line)?,
            Err(reason) => refusals.push(Refusal { row: index, reason }),
        }
    }
    let with_lines = open.into_iter().filter(|(_, body)| body.rows > 0);
    let bodies = with_lines.map(|(route, body)| body.finish(route.clone()));
    Ok(Encoded { bodies: bodies.collect::<io::Result<_>>()?, refusals })
}

/// The file name's ending for a compression.
pub(super) fn extension(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "ndjson",
        Compression::Gzip => "ndjson.gz",
        Compression::Zstd => "ndjson.zst",
    }
}

struct OpenBody {
    format: LineFormat,
    rows: u64,
    line_bytes: u64,
    /// Lines that are not hashed and compressed yet: many at once cost less. Without a compressor
    /// they become the object.
    lines: Vec<u8>,
    hash: Sha256,
    compressor: Option<Compressor>,
}

impl OpenBody {
    fn new(format: LineFormat, compression: Compression) -> io::Result<Self> {
        Ok(Self {
            format,
            rows: 0,
            line_bytes: 0,
            lines: Vec::with_capacity(LINES_BYTES),
            hash: Sha256::new(),
            compressor: Compressor::new(compression)?,
        })
    }

    fn push(&mut self, line: &[u8]) -> io::Result<()> {
        self.lines.extend_from_slice(line);
        self.lines.push(b'\n');
        self.rows += 1;
        match &mut self.compressor {
            Some(compressor) if self.lines.len() >= LINES_BYTES => {
                self.hash.update(&self.lines);
                compressor.write_all(&self.lines)?;
                self.line_bytes += self.lines.len() as u64;
                self.lines.clear();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn finish(mut self, route: RouteName) -> io::Result<Body> {
        self.hash.update(&self.lines);
        self.line_bytes += self.lines.len() as u64;
        let bytes = match self.compressor {
            None => self.lines,
            Some(mut compressor) => {
                compressor.write_all(&self.lines)?;
                compressor.finish()?
            }
        };
        Ok(Body {
            route,
            rows: self.rows,
            line_bytes: self.line_bytes,
            sha256: hex::encode(self.hash.finalize()),
            bytes: bytes.into(),
        })
    }
}

enum Compressor {
    /// `GzEncoder` writes no name and no time into its header.
    Gzip(GzEncoder<Vec<u8>>),
    Zstd(zstd::Encoder<'static, Vec<u8>>),
}

impl Compressor {
    fn new(compression: Compression) -> io::Result<Option<Self>> {
        Ok(match compression {
            Compression::None => None,
            Compression::Gzip => {
                let level = flate2::Compression::default();
                Some(Self::Gzip(GzEncoder::new(Vec::new(), level)))
            }
            Compression::Zstd => {
                let mut encoder = zstd::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
                encoder.include_checksum(true)?;
                Some(Self::Zstd(encoder))
            }
        })
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Gzip(encoder) => encoder.write_all(bytes),
            Self::Zstd(encoder) => encoder.write_all(bytes),
        }
    }

    fn finish(self) -> io::Result<Vec<u8>> {
        match self {
            Self::Gzip(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
        }
    }
}
