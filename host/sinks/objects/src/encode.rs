//! Encodes rows as objects: one body per route and folder, compressed and hashed.
//!
//! Invariant: the result is a pure function of the rows and the layout. The same rows give the same hashes in the same
//! order, so a claim can be produced again. Therefore bodies are sorted by route and folder, and no header has a time.
//!
//! This uses the processor only; the writer runs it off the async threads.
//!
//! Memory: a commit is cut by the memory that its encoder uses, so what an open body uses beside its bytes is counted
//! too (compressor, Parquet columns). Lines are gathered first, and a compressor is opened only for a body that is
//! large enough, because an open one uses more memory than the lines.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Write};
use std::sync::Arc;

use flate2::write::GzEncoder;
use object_store::PutPayload;
use object_store::path::Path;
use sha2::{Digest, Sha256};

use super::chunks::Chunks;
use super::keys::KeyRoom;
use super::layout::folder_of;
use super::parquet::{ParquetRows, ParquetSchema};
use super::settings::{Compression, ObjectFormat, ObjectLayout};
use shardmill_core::record::{RouteName, Row, ShardKey, SinkName};
use shardmill_core::sink::Refusal;
use shardmill_sinks_common::line::LineFormat;

/// Compression level: zstd's default. About 3:1 on JSON, at several hundred MB/s.
const ZSTD_LEVEL: i32 = 3;

/// Bytes that are hashed and compressed at once.
const LINES_BYTES: usize = 32 << 10;
/// Bytes of lines that a body gathers before it opens a compressor, which uses more memory than they do.
const LINES_BYTES_GZIP: usize = 256 << 10;
const LINES_BYTES_ZSTD: usize = 1 << 20;
/// Bytes of memory that a compressor uses.
///
/// Source: zlib's manual, `deflateInit2` (268 KiB at level 6); zstd's `ZSTD_estimateCStreamSize(3)`.
const GZIP_BYTES: usize = 320 << 10;
const ZSTD_BYTES: usize = 3_500 << 10;
/// Bytes of memory that an open body uses in addition to its content: hash, folder, indexes.
const BODY_BYTES: usize = 512;
/// Bytes of memory that a cell of a Parquet column uses in addition to its content.
const CELL_BYTES: usize = 64;
/// Bytes of memory that a Parquet column of an open body uses even without values: its vectors, with room for the first
/// four values (32 bytes each for texts) and their levels.
const COLUMN_BYTES_OPEN: usize = 256;
/// Bytes that a Parquet column adds to a file even without values: headers of a dictionary page and a data page, the
/// column's metadata with its statistics, and its entries in both page indexes and in the schema. That is some 230
/// bytes, plus its name twice.
///
/// Source: Parquet format specification, "parquet.thrift".
const COLUMN_BYTES_IN_FILE: usize = 384;

/// Encoded rows of a commit.
#[derive(Debug, Default)]
pub struct Encoded {
    /// One body per route and folder that has a row, sorted by route and folder.
    pub(super) bodies: Vec<Body>,
    /// Refused rows, in ascending order. If the rows were encoded as they arrived, the index is that among the kept
    /// rows.
    pub(super) refusals: Vec<Refusal>,
}

/// Content of one object.
#[derive(Debug)]
pub(super) struct Body {
    /// Route of its rows.
    pub(super) route: RouteName,
    /// Folder below the sink's URL.
    pub(super) folder: Path,
    /// Number of its rows.
    pub(super) rows: u64,
    /// Length of its rows as lines, before they are compressed or become columns.
    pub(super) line_bytes: u64,
    /// SHA-256 of these lines, in hex.
    pub(super) sha256: String,
    /// Bytes of the object.
    pub(super) bytes: PutPayload,
}

impl Body {
    /// Returns the memory that it uses, in bytes.
    pub(super) fn occupied_bytes(&self) -> usize {
        BODY_BYTES + self.bytes.content_length()
    }
}

/// Forms that the rows of a route can have.
#[derive(Clone, Debug, Default)]
pub(super) struct RouteForm {
    /// Format as lines; `None`: they cannot be lines.
    pub(super) line: Option<LineFormat>,
    /// Columns; `None`: they cannot be in a Parquet file.
    pub(super) schema: Option<Arc<ParquetSchema>>,
}

/// Encodes a shard's rows.
///
/// # Errors
/// An error that is not the fault of a row, as the end of a sentence.
pub(super) fn encode(rows: &[Row], mut encoder: Encoder) -> Result<Encoded, String> {
    let mut refusals = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let refused = encoder.push(row)?;
        refusals.extend(refused.map(|reason| Refusal { row: index, reason }));
    }
    Ok(Encoded { bodies: encoder.finish()?, refusals })
}

/// Encoder of rows, one after the other. Rows of a route without a known form are text.
pub(super) struct Encoder {
    forms: Arc<HashMap<RouteName, RouteForm>>,
    layout: ObjectLayout,
    shard: ShardKey,
    sink: SinkName,
    room: KeyRoom,
    folders_differ: bool,
    open: BTreeMap<RouteName, OpenRoute>,
    /// Number of open bodies.
    objects: usize,
    /// Bytes of memory that they use.
    occupied_bytes: usize,
}

/// Bodies that rows would open.
struct NewBodies {
    count: usize,
    /// Bytes of memory that they would use without a row.
    occupied_bytes: usize,
}

impl Encoder {
    /// Makes an encoder of a shard's rows.
    pub(super) fn new(
        forms: Arc<HashMap<RouteName, RouteForm>>,
        layout: ObjectLayout,
        shard: ShardKey,
        sink: SinkName,
        room: KeyRoom,
    ) -> Self {
        let folders_differ = layout.folder.differs_by_row();
        let (open, objects, occupied_bytes) = (BTreeMap::new(), 0, 0);
        Self { forms, layout, shard, sink, room, folders_differ, open, objects, occupied_bytes }
    }

    /// Returns the number of objects of its rows.
    pub(super) fn objects(&self) -> usize {
        self.objects
    }

    /// Returns whether these rows fit into `objects_max` objects and `occupied_bytes_max` bytes of memory.
    pub(super) fn has_room_for(
        &self,
        rows: &[Row],
        objects_max: usize,
        occupied_bytes_max: usize,
    ) -> bool {
        let rows_bytes: usize = rows.iter().map(|row| self.row_bytes(row)).sum();
        let (objects, occupied_bytes) = (self.objects, self.occupied_bytes + rows_bytes);
        // A quick upper bound first: as if each row made an object of its own.
        let most_bytes: usize = rows.iter().map(|row| self.body_bytes(row.route.name())).sum();
        if objects + rows.len() <= objects_max && occupied_bytes + most_bytes <= occupied_bytes_max
        {
            return true;
        }
        let new = self.new_bodies(rows, objects_max.saturating_sub(objects));
        objects + new.count <= objects_max
            && occupied_bytes + new.occupied_bytes <= occupied_bytes_max
    }

    /// Counts the bodies that these rows would open; stops at `most` + 1.
    fn new_bodies(&self, rows: &[Row], most: usize) -> NewBodies {
        let mut new: HashSet<(&RouteName, Option<Path>)> = HashSet::new();
        let mut occupied_bytes = 0;
        for row in rows {
            let name = row.route.name();
            let open = self.open.get(name);
            let folder = match self.folders_differ {
                false => None,
                // A row without a folder is refused.
                true => match folder_of(&self.layout.folder, row, &self.shard, &self.sink) {
                    Ok(folder) => Some(folder),
                    Err(_) => continue,
                },
            };
            let is_open = open.is_some_and(|open| match &folder {
                None => !open.bodies.is_empty(),
                Some(folder) => open.places.contains_key(folder),
            });
            if !is_open && new.insert((name, folder)) {
                occupied_bytes += self.body_bytes(name);
            }
            if new.len() > most {
                break;
            }
        }
        NewBodies { count: new.len(), occupied_bytes }
    }

    /// Returns the columns of a route's Parquet files; `None`: its rows become lines.
    fn columns(&self, route: &RouteName) -> Option<&ParquetSchema> {
        match self.layout.format {
            ObjectFormat::Parquet => self.forms.get(route)?.schema.as_deref(),
            ObjectFormat::Ndjson | ObjectFormat::Raw => None,
        }
    }

    /// Returns the memory that a body of a route uses before it has a row, in bytes.
    fn body_bytes(&self, route: &RouteName) -> usize {
        BODY_BYTES + self.columns(route).map_or(0, columns_bytes)
    }

    /// Returns the memory that a row uses in a body, in bytes.
    fn row_bytes(&self, row: &Row) -> usize {
        let columns = self.columns(row.route.name()).map_or(0, ParquetSchema::width);
        row.payload.len() + 1 + columns * CELL_BYTES
    }

    /// Encodes a row; `Some`: the reason why the row is refused.
    ///
    /// # Errors
    /// An error that is not the fault of the row, as the end of a sentence.
    pub(super) fn push(&mut self, row: &Row) -> Result<Option<String>, String> {
        let name = row.route.name();
        if !self.open.contains_key(name) {
            self.open.insert(name.clone(), OpenRoute::default());
        }
        let Some(route) = self.open.get_mut(name) else { return Ok(None) };
        let body = match route.bodies.first_mut() {
            Some((_, only)) if !self.folders_differ => only,
            _ => match folder_of(&self.layout.folder, row, &self.shard, &self.sink)
                .and_then(|folder| self.room.check(&folder, name, &self.layout).map(|()| folder))
            {
                Ok(folder) => {
                    let form = || self.forms.get(name).cloned().unwrap_or_default();
                    let (objects, occupied_bytes) = (&mut self.objects, &mut self.occupied_bytes);
                    route.body(folder, || {
                        let body = OpenBody::new(name, form(), &self.layout)?;
                        *objects += 1;
                        *occupied_bytes += body.occupied_bytes();
                        Ok(body)
                    })?
                }
                Err(reason) => return Ok(Some(reason)),
            },
        };
        let occupied_before = body.occupied_bytes();
        let refused = body.push(&row.payload)?.err();
        self.occupied_bytes += body.occupied_bytes();
        self.occupied_bytes -= occupied_before;
        Ok(refused)
    }

    /// Returns the memory that it uses, in bytes, plus what Parquet columns will add to their files.
    pub(super) fn occupied_bytes(&self) -> usize {
        self.occupied_bytes
    }

    /// Returns the bodies that have a row, sorted by route and folder.
    ///
    /// # Errors
    /// An error as the end of a sentence.
    pub(super) fn finish(self) -> Result<Vec<Body>, String> {
        let mut bodies = Vec::new();
        for (route, mut open) in self.open {
            open.bodies.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
            for (folder, body) in open.bodies.into_iter().filter(|(_, body)| body.rows > 0) {
                bodies.push(body.finish(route.clone(), folder)?);
            }
        }
        Ok(bodies)
    }
}

/// Open bodies of one route.
#[derive(Default)]
struct OpenRoute {
    bodies: Vec<(Path, OpenBody)>,
    /// Indexes of folders in `bodies`.
    places: HashMap<Path, usize>,
}

impl OpenRoute {
    /// Returns the body of a folder, which is made if it is new.
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
    /// Lines that are not hashed and compressed yet. Many at once cost less time, and a small body needs no compressor
    /// until its end.
    lines: Vec<u8>,
    /// Without compression: the hashed lines before `lines`.
    plain: Chunks,
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
            plain: Chunks::default(),
            hash: Sha256::new(),
            compressor: None,
        })
    }

    /// Encodes a row; the inner error is the reason why it is refused.
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
        let lines_max = match (&self.compressor, self.compression) {
            (None, Compression::Gzip) => LINES_BYTES_GZIP,
            (None, Compression::Zstd) => LINES_BYTES_ZSTD,
            (Some(_), _) | (None, Compression::None) => LINES_BYTES,
        };
        if self.lines.len() >= lines_max {
            self.compress().map_err(cannot_compress)?;
        }
        Ok(Ok(()))
    }

    fn occupied_bytes(&self) -> usize {
        let format = match &self.format {
            BodyFormat::Lines(_) | BodyFormat::Raw => 0,
            BodyFormat::Parquet(rows) => {
                let cells = self.rows as usize * rows.schema().width();
                self.line_bytes as usize + cells * CELL_BYTES + columns_bytes(rows.schema())
            }
        };
        let compressor = self.compressor.as_ref().map_or(0, Compressor::occupied_bytes);
        BODY_BYTES + format + self.lines.capacity() + self.plain.occupied_bytes() + compressor
    }

    /// Hashes the gathered lines, and compresses them if that is configured.
    fn compress(&mut self) -> io::Result<()> {
        self.hash.update(&self.lines);
        self.line_bytes += self.lines.len() as u64;
        let compressor = match &mut self.compressor {
            Some(open) => open,
            none => {
                let Some(new) = Compressor::new(self.compression)? else {
                    self.plain.write_all(&self.lines)?;
                    self.lines.clear();
                    return Ok(());
                };
                none.insert(new)
            }
        };
        compressor.write_all(&self.lines)?;
        self.lines.clear();
        // So much memory was only needed before the compressor was opened.
        self.lines.shrink_to(2 * LINES_BYTES);
        Ok(())
    }

    fn finish(mut self, route: RouteName, folder: Path) -> Result<Body, String> {
        let bytes = match self.format {
            BodyFormat::Parquet(rows) => rows
                .finish(self.compression)
                .map_err(|error| format!("cannot encode rows as a Parquet file: {error}"))?
                .into(),
            BodyFormat::Lines(_) | BodyFormat::Raw => {
                self.compress().map_err(cannot_compress)?;
                let ended = self.compressor.map(Compressor::finish).transpose();
                ended.map_err(cannot_compress)?.unwrap_or(self.plain).into_payload()
            }
        };
        Ok(Body {
            route,
            folder,
            rows: self.rows,
            line_bytes: self.line_bytes,
            sha256: hex::encode(self.hash.finalize()),
            bytes,
        })
    }
}

/// Returns the memory that the columns of a body use without a row, plus what they add to its file, in bytes.
fn columns_bytes(schema: &ParquetSchema) -> usize {
    let columns = schema.width() * (COLUMN_BYTES_OPEN + COLUMN_BYTES_IN_FILE);
    columns + 2 * schema.names_bytes()
}

fn cannot_compress(error: io::Error) -> String {
    format!("cannot compress rows: {error}")
}

enum Compressor {
    /// `GzEncoder` writes no name and no time into its header.
    Gzip(Box<GzEncoder<Chunks>>),
    Zstd(Box<zstd::Encoder<'static, Chunks>>),
}

impl Compressor {
    fn new(compression: Compression) -> io::Result<Option<Self>> {
        Ok(match compression {
            Compression::None => None,
            Compression::Gzip => {
                let level = flate2::Compression::default();
                Some(Self::Gzip(Box::new(GzEncoder::new(Chunks::default(), level))))
            }
            Compression::Zstd => {
                let mut encoder = zstd::Encoder::new(Chunks::default(), ZSTD_LEVEL)?;
                encoder.include_checksum(true)?;
                Some(Self::Zstd(Box::new(encoder)))
            }
        })
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Gzip(encoder) => encoder.write_all(bytes),
            Self::Zstd(encoder) => encoder.write_all(bytes),
        }
    }

    fn occupied_bytes(&self) -> usize {
        match self {
            Self::Gzip(encoder) => GZIP_BYTES + encoder.get_ref().occupied_bytes(),
            Self::Zstd(encoder) => ZSTD_BYTES + encoder.get_ref().occupied_bytes(),
        }
    }

    fn finish(self) -> io::Result<Chunks> {
        match self {
            Self::Gzip(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
        }
    }
}
