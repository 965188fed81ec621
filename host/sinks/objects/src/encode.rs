//! Rows to objects: one body per route and folder, compressed and hashed.
//!
//! A pure function of the rows: the same rows become the same bytes in the same order, which is
//! what lets a claim be produced again. It uses the processor only; the writer runs it off the
//! async threads.

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

/// zstd's own default: about 3:1 on JSON at several hundred MB/s.
const ZSTD_LEVEL: i32 = 3;

/// How much is hashed and compressed at once, in bytes.
const LINES_BYTES: usize = 32 << 10;
/// Lines that a body gathers before it opens a compressor, which holds as much by itself.
const LINES_BYTES_GZIP: usize = 256 << 10;
const LINES_BYTES_ZSTD: usize = 1 << 20;
/// Bytes that a compressor holds.
///
/// Source: zlib's manual, `deflateInit2` (268 KiB at level 6); zstd's `ZSTD_estimateCStreamSize(3)`.
const GZIP_BYTES: usize = 320 << 10;
const ZSTD_BYTES: usize = 3_500 << 10;
/// What an open body holds beside its bytes: hash, folder, places.
const BODY_BYTES: usize = 512;
/// What a cell of a Parquet column holds beside its bytes.
const CELL_BYTES: usize = 64;
/// What a Parquet column of an open body holds, however few values it has: the place of its values, and room
/// for the first four (32 bytes each, where they are texts) and their levels.
const COLUMN_BYTES_OPEN: usize = 256;
/// What a Parquet column adds to a file, however few values it has: headers of a dictionary page and a data
/// page, the column's metadata with its statistics, its entries in both page indexes and in the schema: some
/// 230 bytes. Its name is there twice.
///
/// Source: Parquet format specification, "parquet.thrift".
const COLUMN_BYTES_IN_FILE: usize = 384;

/// What the rows of a commit became.
#[derive(Debug, Default)]
pub struct Encoded {
    /// One body per route and folder that has a row, in their order.
    pub(super) bodies: Vec<Body>,
    /// The rows that cannot be written, by ascending row; in a commit whose rows were encoded as they
    /// arrived, by their index among those that were kept.
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
    pub(super) bytes: PutPayload,
}

impl Body {
    /// The memory that it holds, in bytes.
    pub(super) fn occupied_bytes(&self) -> usize {
        BODY_BYTES + self.bytes.content_length()
    }
}

/// What is known of a route's rows.
#[derive(Clone, Debug, Default)]
pub(super) struct RouteForm {
    /// How they become lines; `None`: they are none.
    pub(super) line: Option<LineFormat>,
    /// Their columns; `None`: no Parquet file can hold them.
    pub(super) schema: Option<Arc<ParquetSchema>>,
}

/// Encodes a shard's rows.
///
/// # Errors
/// What has no cause in a row: a sentence's end.
pub(super) fn encode(rows: &[Row], mut encoder: Encoder) -> Result<Encoded, String> {
    let mut refusals = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let refused = encoder.push(row)?;
        refusals.extend(refused.map(|reason| Refusal { row: index, reason }));
    }
    Ok(Encoded { bodies: encoder.finish()?, refusals })
}

/// Encodes rows one after the other; a route without a known form is taken as text.
pub(super) struct Encoder {
    forms: Arc<HashMap<RouteName, RouteForm>>,
    layout: ObjectLayout,
    shard: ShardKey,
    sink: SinkName,
    room: KeyRoom,
    folders_differ: bool,
    open: BTreeMap<RouteName, OpenRoute>,
    /// How many bodies are open.
    objects: usize,
    /// The memory that they hold, in bytes.
    occupied_bytes: usize,
}

/// Bodies that rows would open.
struct NewBodies {
    count: usize,
    /// The memory that they would hold without a row, in bytes.
    occupied_bytes: usize,
}

impl Encoder {
    /// For a shard's rows.
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

    /// How many objects its rows become.
    pub(super) fn objects(&self) -> usize {
        self.objects
    }

    /// Whether some rows can be taken without more than `objects_max` objects, and without holding more than
    /// `occupied_bytes_max`.
    pub(super) fn has_room_for(
        &self,
        rows: &[Row],
        objects_max: usize,
        occupied_bytes_max: usize,
    ) -> bool {
        let rows_bytes: usize = rows.iter().map(|row| self.row_bytes(row)).sum();
        let (objects, occupied_bytes) = (self.objects, self.occupied_bytes + rows_bytes);
        // As if each row made an object of its own: this costs less to know.
        let most_bytes: usize = rows.iter().map(|row| self.body_bytes(row.route.name())).sum();
        if objects + rows.len() <= objects_max && occupied_bytes + most_bytes <= occupied_bytes_max
        {
            return true;
        }
        let new = self.new_bodies(rows, objects_max.saturating_sub(objects));
        objects + new.count <= objects_max
            && occupied_bytes + new.occupied_bytes <= occupied_bytes_max
    }

    /// The bodies that some rows would open; counts no further than one above `most`.
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

    /// The columns of a route's Parquet files; `None`: its rows become lines.
    fn columns(&self, route: &RouteName) -> Option<&ParquetSchema> {
        match self.layout.format {
            ObjectFormat::Parquet => self.forms.get(route)?.schema.as_deref(),
            ObjectFormat::Ndjson | ObjectFormat::Raw => None,
        }
    }

    /// The memory that a body of a route holds before it has a row, in bytes.
    fn body_bytes(&self, route: &RouteName) -> usize {
        BODY_BYTES + self.columns(route).map_or(0, columns_bytes)
    }

    /// The memory that a row holds in a body, in bytes.
    fn row_bytes(&self, row: &Row) -> usize {
        let columns = self.columns(row.route.name()).map_or(0, ParquetSchema::width);
        row.payload.len() + 1 + columns * CELL_BYTES
    }

    /// Takes a row; `Some`: why it is refused.
    ///
    /// # Errors
    /// What has no cause in the row: a sentence's end.
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

    /// The memory that it holds, in bytes, with what its columns will add to their files.
    pub(super) fn occupied_bytes(&self) -> usize {
        self.occupied_bytes
    }

    /// The bodies of all that have a row.
    ///
    /// # Errors
    /// A sentence's end.
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
    /// no compressor until its end.
    lines: Vec<u8>,
    /// Without compression: the lines before them, hashed.
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

    /// Hashes the lines, and compresses them, where that is configured.
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
        // What was gathered before the compressor was opened is not needed again.
        self.lines.shrink_to(2 * LINES_BYTES);
        Ok(())
    }

    fn finish(mut self, route: RouteName, folder: Path) -> Result<Body, String> {
        let bytes = match self.format {
            BodyFormat::Parquet(rows) => rows
                .finish(self.compression)
                .map_err(|error| format!("rows became no Parquet file: {error}"))?
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

/// The memory that the columns of a body hold without a row, and that they add to its file, in bytes.
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
