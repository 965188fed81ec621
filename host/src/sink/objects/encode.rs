//! Rows to objects: one body per route and folder, compressed and hashed.
//!
//! A pure function of the rows: the same rows become the same bytes in the same order, which is
//! what lets a claim be produced again. It uses the processor only; the writer runs it off the
//! async threads.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::sync::Arc;

use bytes::Bytes;
use flate2::write::GzEncoder;
use object_store::path::Path;
use sha2::{Digest, Sha256};

use super::keys::KeyRoom;
use super::layout::{ObjectFormat, ObjectLayout};
use super::parquet::{ParquetRows, ParquetSchema};
use crate::config::Compression;
use crate::record::{RouteName, Row, ShardKey, SinkName};
use crate::sink::Refusal;
use crate::sink::line::LineFormat;

/// zstd's own default: about 3:1 on JSON at several hundred MB/s.
const ZSTD_LEVEL: i32 = 3;

/// How much is hashed and compressed at once, in bytes.
const LINES_BYTES: usize = 32 << 10;

/// What the rows of a commit became.
#[derive(Debug, Default)]
pub(super) struct Encoded {
    /// One body per route and folder that has a row, in their order.
    pub(super) bodies: Vec<Body>,
    /// The rows that cannot be written, by ascending row.
    pub(super) refusals: Vec<Refusal>,
}

/// The content of one object.
#[derive(Debug)]
pub(super) struct Body {
    /// The route that its rows took.
    pub(super) route: RouteName,
    /// Its folder below the sink's URL.
    pub(super) folder: Path,
    /// How many rows it holds.
    pub(super) rows: u64,
    /// The length of its rows before they are compressed, or become columns.
    pub(super) line_bytes: u64,
    /// The SHA-256 of the same, in hex.
    pub(super) sha256: String,
    /// The object's bytes.
    pub(super) bytes: Bytes,
}

/// What is known of a route's rows.
#[derive(Clone, Debug, Default)]
pub(super) struct RouteForm {
    /// How they become lines; `None`: they are none.
    pub(super) line: Option<LineFormat>,
    /// Their columns; `None`: no Parquet file can hold them.
    pub(super) schema: Option<Arc<ParquetSchema>>,
}

/// Encodes a shard's rows; a route without a known form is taken as text.
///
/// # Errors
/// What has no cause in a row: a sentence's end.
pub(super) fn encode(
    rows: &[Row],
    forms: &HashMap<RouteName, RouteForm>,
    layout: &ObjectLayout,
    shard: &ShardKey,
    sink: &SinkName,
    room: &KeyRoom,
) -> Result<Encoded, String> {
    let mut open: BTreeMap<&RouteName, OpenRoute> = BTreeMap::new();
    let mut refusals = Vec::new();
    let folders_differ = layout.folder.differs_by_row();
    for (index, row) in rows.iter().enumerate() {
        let route = match open.entry(row.route.name()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(OpenRoute::default()),
        };
        let body = match route.bodies.first_mut() {
            Some((_, only)) if !folders_differ => Ok(only),
            _ => match layout
                .folder
                .folder(row, shard, sink)
                .and_then(|folder| room.check(&folder, row.route.name(), layout).map(|()| folder))
            {
                Ok(folder) => {
                    let form = || forms.get(row.route.name()).cloned().unwrap_or_default();
                    Ok(route.body(folder, || OpenBody::new(row.route.name(), form(), layout))?)
                }
                Err(reason) => Err(reason),
            },
        };
        let refused = match body {
            Ok(body) => body.push(&row.payload)?.err(),
            Err(reason) => Some(reason),
        };
        refusals.extend(refused.map(|reason| Refusal { row: index, reason }));
    }
    let mut bodies = Vec::new();
    for (route, mut open) in open {
        open.bodies.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        for (folder, body) in open.bodies.into_iter().filter(|(_, body)| body.rows > 0) {
            bodies.push(body.finish(route.clone(), folder)?);
        }
    }
    Ok(Encoded { bodies, refusals })
}

/// The bodies of one route.
#[derive(Default)]
struct OpenRoute {
    bodies: Vec<(Path, OpenBody)>,
    /// The places of folders in `bodies`.
    places: HashMap<Path, usize>,
}

impl OpenRoute {
    /// The body of a folder, which is made if it is new.
    fn body(
        &mut self,
        folder: Path,
        make: impl FnOnce() -> Result<OpenBody, String>,
    ) -> Result<&mut OpenBody, String> {
        let place = match self.places.get(&folder) {
            Some(place) => *place,
            None => {
                self.bodies.push((folder.clone(), make()?));
                self.places.insert(folder, self.bodies.len() - 1);
                self.bodies.len() - 1
            }
        };
        Ok(&mut self.bodies[place].1)
    }
}

struct OpenBody {
    format: BodyFormat,
    compression: Compression,
    rows: u64,
    line_bytes: u64,
    /// Lines that are not hashed and compressed yet: many at once cost less, and a small body needs
    /// no compressor until its end. Without compression they become the object.
    lines: Vec<u8>,
    hash: Sha256,
    compressor: Option<Compressor>,
}

enum BodyFormat {
    Lines(LineFormat),
    Raw,
    Parquet(Box<ParquetRows>),
}

impl OpenBody {
    fn new(route: &RouteName, form: RouteForm, layout: &ObjectLayout) -> Result<Self, String> {
        let format = match (layout.format, form.schema) {
            (ObjectFormat::Ndjson, _) => BodyFormat::Lines(form.line.unwrap_or(LineFormat::Text)),
            (ObjectFormat::Raw, _) => BodyFormat::Raw,
            (ObjectFormat::Parquet, Some(schema)) => {
                BodyFormat::Parquet(Box::new(ParquetRows::new(schema)))
            }
            (ObjectFormat::Parquet, None) => {
                return Err(format!(
                    "route {route} has no columns for a Parquet file: run the plugin that declares \
                     them until the sink has caught up"
                ));
            }
        };
        Ok(Self {
            format,
            compression: layout.compression,
            rows: 0,
            line_bytes: 0,
            lines: Vec::new(),
            hash: Sha256::new(),
            compressor: None,
        })
    }

    /// Takes a row; the inner error: why it is refused.
    fn push(&mut self, payload: &[u8]) -> Result<Result<(), String>, String> {
        match &mut self.format {
            BodyFormat::Lines(format) => match format.line(payload) {
                Ok(line) => {
                    self.lines.extend_from_slice(&line);
                    self.lines.push(b'\n');
                }
                Err(reason) => return Ok(Err(reason)),
            },
            BodyFormat::Raw => self.lines.extend_from_slice(payload),
            BodyFormat::Parquet(rows) => {
                if let Err(reason) = rows.push(payload) {
                    return Ok(Err(reason));
                }
                self.hash.update(payload);
                self.hash.update(b"\n");
                self.line_bytes += payload.len() as u64 + 1;
            }
        }
        self.rows += 1;
        if self.compression != Compression::None && self.lines.len() >= LINES_BYTES {
            self.compress().map_err(cannot_compress)?;
        }
        Ok(Ok(()))
    }

    fn compress(&mut self) -> io::Result<()> {
        let compressor = match &mut self.compressor {
            Some(open) => open,
            none => {
                let Some(new) = Compressor::new(self.compression)? else { return Ok(()) };
                none.insert(new)
            }
        };
        self.hash.update(&self.lines);
        compressor.write_all(&self.lines)?;
        self.line_bytes += self.lines.len() as u64;
        self.lines.clear();
        Ok(())
    }

    fn finish(mut self, route: RouteName, folder: Path) -> Result<Body, String> {
        let bytes = match self.format {
            BodyFormat::Parquet(rows) => rows
                .finish(self.compression)
                .map_err(|error| format!("rows became no Parquet file: {error}"))?,
            BodyFormat::Lines(_) | BodyFormat::Raw => match self.compression {
                Compression::None => {
                    self.hash.update(&self.lines);
                    self.line_bytes += self.lines.len() as u64;
                    self.lines
                }
                Compression::Gzip | Compression::Zstd => {
                    self.compress().map_err(cannot_compress)?;
                    let ended = self.compressor.map(Compressor::finish).transpose();
                    ended.map_err(cannot_compress)?.unwrap_or_default()
                }
            },
        };
        Ok(Body {
            route,
            folder,
            rows: self.rows,
            line_bytes: self.line_bytes,
            sha256: hex::encode(self.hash.finalize()),
            bytes: bytes.into(),
        })
    }
}

fn cannot_compress(error: io::Error) -> String {
    format!("cannot compress rows: {error}")
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
