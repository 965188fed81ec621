//! Writer of one shard's commits: it claims the position range, then writes the data under the claimed keys.
//!
//! Invariants:
//! - A claim is appended before the first byte of its data is written, and no claim follows one whose data is not
//!   complete. So only the last claim of a log can be unfinished.
//! - The claim and the objects are created, never overwritten; only an upload in parts may replace an object by one
//!   with the same rows. So a commit can stop after any step, and each step finds what an earlier try has done.
//! - The keys have the link's number and the owner's id. Only owners of the claim know them: the one that appended it,
//!   and a later one that produces it again.
//! - A commit starts at the sink's position. While a claim is unfinished, the commit must end where the claim ends.
//!
//! | the commit stopped | this writer tries again | the next owner |
//! |---|---|---|
//! | before the claim was in the log | appends the same link | starts at `from`, and claims its own data |
//! | after the claim, or its answer was lost | finds its own link | produces the claim again, from `from` |
//! | after some objects | finds them, and writes the others | produces the claim again, from `from` |
//! | after all objects | finds them all | starts at `to` |
//!
//! Races:
//! - An earlier owner is still running. The fence of the next owner has the number that the earlier owner's next claim
//!   would have, so its append fails ([`SinkError::Fenced`]) before it writes data.
//! - Both write the data of the same claim. Both create objects from the same records and the same revision; the first
//!   one stays. If a stage is not deterministic, the contents differ: then objects of both runs must not be mixed
//!   (`check_differing`).

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use object_store::PutPayload;
use object_store::path::Path;

use super::claim::{Appended, Claim, ClaimLog, Data, LogLink, OwnerId, UnfinishedClaim, WrittenBy};
use super::encode::{Body, Encoded, Encoder, RouteForm, encode};
use super::keys::{KeyLimits, KeyRoom};
use super::layout::file_name;
use super::settings::ObjectLayout;
use super::store::StorePlace;
use shardmill_core::owner::Ownership;
use shardmill_core::record::{Position, RouteName, Row, ShardKey};
use shardmill_core::sink::{
    Commit, Committed, CutRows, EncodeRows, EncodedRows, Refusal, RefusalLog, RowEncoder,
    SinkError, SinkWriter,
};

/// Most objects of one commit; it is cut before the record that would need more. Each object is a request, and is
/// listed in the claim, which is one object itself.
const OBJECTS_MAX: usize = 256;
/// Most objects of one commit that are written at the same time.
const UPLOADS_MAX: usize = 4;

/// Parts that a sink's writers share.
pub(super) struct Shared {
    pub(super) place: StorePlace,
    pub(super) layout: ObjectLayout,
    pub(super) forms: Arc<HashMap<RouteName, RouteForm>>,
    /// Process that writes; `None` in a sink that is only read from.
    pub(super) ownership: Option<Ownership>,
}

/// Writer of one shard's rows, as the owner of the last fence.
pub(super) struct ObjectsWriter {
    shared: Arc<Shared>,
    shard: ShardKey,
    log: ClaimLog,
    owner: OwnerId,
    last_link: u64,
    position: Option<Position>,
    unfinished: Option<UnfinishedClaim>,
}

/// Maker of encoders for the rows of one shard.
struct Arriving {
    shared: Arc<Shared>,
    shard: ShardKey,
}

impl EncodeRows for Arriving {
    fn begin(&self) -> Box<dyn RowEncoder> {
        Box::new(ArrivingRows {
            encoder: Some(self.shared.encoder(
                self.shared.layout.clone(),
                Some(self.shared.place.limits),
                &self.shard,
            )),
            failed: None,
            rows: 0,
            kept: Vec::new(),
            numbers: Vec::new(),
            refusals: Vec::new(),
            kept_bytes: 0,
        })
    }
}

/// Rows of one commit, encoded as they arrive.
struct ArrivingRows {
    /// `None` once it has failed.
    encoder: Option<Encoder>,
    failed: Option<String>,
    rows: usize,
    /// Refused rows, kept because their dead letters need the records.
    kept: Vec<Row>,
    numbers: Vec<usize>,
    refusals: Vec<Refusal>,
    kept_bytes: usize,
}

impl ArrivingRows {
    /// Encodes the rows of one record.
    fn push_record(&mut self, rows: &[Row]) {
        for row in rows {
            let number = self.rows;
            self.rows += 1;
            let Some(encoder) = &mut self.encoder else { continue };
            match encoder.push(row) {
                Ok(None) => {}
                Ok(Some(reason)) => {
                    let row = row.detached();
                    self.kept_bytes +=
                        row.occupied_bytes() + row.batch.occupied_bytes() + reason.len();
                    self.refusals.push(Refusal { row: self.kept.len(), reason });
                    self.kept.push(row);
                    self.numbers.push(number);
                }
                Err(cause) => {
                    self.failed = Some(cause);
                    self.encoder = None;
                }
            }
        }
    }

    /// Returns whether the commit has no room for the rows of one more record. An empty commit has room for any record,
    /// since a position range cannot end inside one.
    fn is_full_for(&self, rows: &[Row], occupied_bytes_max: usize) -> bool {
        let Some(encoder) = &self.encoder else { return false };
        let bytes_max = occupied_bytes_max.saturating_sub(self.kept_bytes);
        encoder.objects() > 0 && !encoder.has_room_for(rows, OBJECTS_MAX, bytes_max)
    }
}

impl RowEncoder for ArrivingRows {
    fn push(&mut self, mut rows: Vec<Row>, occupied_bytes_max: usize) -> Option<CutRows> {
        let mut begin = 0;
        while let Some(first) = rows.get(begin) {
            let is_same =
                |row: &&Row| row.record == first.record && Arc::ptr_eq(&row.batch, &first.batch);
            let end = begin + rows[begin..].iter().take_while(is_same).count();
            if self.is_full_for(&rows[begin..end], occupied_bytes_max) {
                let rest = rows.split_off(begin);
                let to_inclusive = rows.last().map(|last| last.position().clone());
                return Some(CutRows { to_inclusive, rest });
            }
            self.push_record(&rows[begin..end]);
            begin = end;
        }
        None
    }

    fn occupied_bytes(&self) -> usize {
        self.encoder.as_ref().map_or(0, Encoder::occupied_bytes) + self.kept_bytes
    }

    fn finish(self: Box<Self>) -> (Vec<Row>, EncodedRows) {
        let bodies = match (self.encoder, self.failed) {
            (Some(encoder), _) => encoder.finish(),
            (None, failed) => Err(failed.unwrap_or_default()),
        };
        let refusals = self.refusals;
        let occupied = |bodies: &Vec<Body>| bodies.iter().map(Body::occupied_bytes).sum::<usize>();
        let occupied_bytes = self.kept_bytes + bodies.as_ref().map_or(0, occupied);
        let form = bodies.map(|bodies| boxed(Encoded { bodies, refusals }));
        (self.kept, EncodedRows { rows: self.rows, kept: self.numbers, form, occupied_bytes })
    }
}

/// Hides the type of encoded rows from the engine, which keeps them until the commit.
fn boxed(encoded: Encoded) -> Box<dyn Any + Send + Sync> {
    Box::new(encoded)
}

impl Shared {
    fn encoder(
        &self,
        layout: ObjectLayout,
        limits: Option<KeyLimits>,
        shard: &ShardKey,
    ) -> Encoder {
        let room = KeyRoom { prefix: self.place.prefix.clone(), limits };
        Encoder::new(self.forms.clone(), layout, shard.clone(), self.place.sink.clone(), room)
    }
}

impl ObjectsWriter {
    /// Makes a writer that appends after its own fence.
    pub(super) fn new(
        shared: Arc<Shared>,
        shard: ShardKey,
        log: ClaimLog,
        fence: &LogLink,
        position: Option<Position>,
        unfinished: Option<UnfinishedClaim>,
    ) -> Self {
        let (owner, last_link) = (fence.owner.clone(), fence.link);
        Self { shared, shard, log, owner, last_link, position, unfinished }
    }

    /// Claims the commit's position range, then writes its data.
    async fn claim_and_write(
        &mut self,
        commit: &Commit,
        encoded: &Encoded,
    ) -> Result<Committed, SinkError> {
        let refused = encoded.refusals.len();
        let link = self.link_for(commit, &encoded.bodies);
        self.check_keys(&link)?;
        match self.log.append(&link).await? {
            Appended::Ours => {}
            Appended::Taken(found) if found.owner == self.owner => {
                return Err(self.promised_otherwise(&found));
            }
            Appended::Taken(found) => return Err(self.fenced(&found)),
        }
        let keys = link.claim.into_iter().flat_map(|claim| claim.data).map(|data| data.key);
        let committed = self.write(keys.zip(&encoded.bodies), refused).await?;
        self.last_link = link.link;
        Ok(committed)
    }

    /// Writes the data of an earlier owner's claim, under the claimed keys.
    async fn produce_promised(
        &self,
        promised: &UnfinishedClaim,
        encoded: &Encoded,
    ) -> Result<Committed, SinkError> {
        let refused = encoded.refusals.len();
        self.check_content(promised, &encoded.bodies).await?;
        let keys = promised.claim.data.iter().map(|data| data.key.clone());
        self.write(keys.zip(&encoded.bodies), refused).await.map_err(|error| {
            self.shared.place.with_way_out(
                error,
                &promised.way_out(&self.shared.place, self.shard.shard.as_str()),
            )
        })
    }

    async fn write(
        &self,
        objects: impl Iterator<Item = (String, &Body)>,
        refused: usize,
    ) -> Result<Committed, SinkError> {
        let mut committed = Committed { rows_refused: refused as u64, ..Committed::default() };
        let mut puts = Vec::new();
        for (key, body) in objects {
            committed.rows_written += body.rows;
            committed.bytes_written += body.bytes.content_length() as u64;
            puts.push(self.put(self.log.data_path(&key)?, body.bytes.clone()));
        }
        // All uploads end before an error is returned, so that none of them runs beside a retry.
        let results: Vec<_> =
            futures::stream::iter(puts).buffer_unordered(UPLOADS_MAX).collect().await;
        results.into_iter().collect::<Result<(), _>>()?;
        Ok(committed)
    }

    /// Writes an object. One that exists already has these rows: only owners of this claim know its key, and they write
    /// what the same revision made of the same records.
    async fn put(&self, path: Path, bytes: PutPayload) -> Result<(), SinkError> {
        self.shared.place.create_data(&path, bytes).await
    }

    fn link_for(&self, commit: &Commit, bodies: &[Body]) -> LogLink {
        let number = self.last_link + 1;
        let layout = self.shared.layout.clone();
        let data = bodies.iter().map(|body| Data {
            route: body.route.clone(),
            key: self.key(body, number),
            rows: body.rows,
            line_bytes: body.line_bytes,
            sha256: body.sha256.clone(),
            bytes: Some(body.bytes.content_length() as u64),
        });
        let data = data.collect();
        let limits = Some(self.shared.place.limits);
        let claim = Claim { revision: commit.revision.to_string(), layout, limits, data };
        let range = &commit.range;
        let link = LogLink::claim(
            number,
            self.owner.clone(),
            range.from_exclusive.clone(),
            range.to_inclusive.clone(),
            claim,
        );
        LogLink { by: self.shared.ownership.as_ref().map(WrittenBy::now), ..link }
    }

    fn key(&self, body: &Body, number: u64) -> String {
        let file = file_name(&self.shared.layout, number, self.owner.as_str(), &body.route);
        body.folder.clone().join(file).to_string()
    }

    /// Checks that every key can be written, before a claim promises it.
    fn check_keys(&self, link: &LogLink) -> Result<(), SinkError> {
        for data in link.claim.iter().flat_map(|claim| &claim.data) {
            let limits = self.shared.place.limits;
            limits.check(&self.log.data_path(&data.key)?).map_err(|why| {
                self.shared.place.unavailable(format!("cannot write {}: {why}", data.key))
            })?;
        }
        Ok(())
    }

    /// Encodes the commit's rows. Rows that were encoded as they arrived are in the configured layout already; rows of
    /// an unfinished claim are encoded here, in the layout of that claim.
    async fn encode(
        &self,
        commit: &Commit,
        layout: ObjectLayout,
        limits: Option<KeyLimits>,
    ) -> Result<Arc<EncodedRows>, SinkError> {
        if let Some(encoded) = &commit.encoded {
            return Ok(encoded.clone());
        }
        let encoder = self.shared.encoder(layout, limits, &self.shard);
        let rows = commit.rows.clone();
        let encode = move || EncodedRows {
            rows: rows.len(),
            kept: Vec::new(),
            form: encode(&rows, encoder).map(boxed),
            // Counted by the committer, as a copy of the rows.
            occupied_bytes: 0,
        };
        tokio::task::spawn_blocking(encode).await.map(Arc::new).map_err(|error| {
            self.shared.place.unavailable(format!("encoding rows was interrupted: {error}"))
        })
    }

    /// Checks that the commit starts at the sink's position, and ends where an unfinished claim ends.
    fn check_range(&self, commit: &Commit) -> Result<(), SinkError> {
        let (from, to) = (&commit.range.from_exclusive, &commit.range.to_inclusive);
        if let Some(promised) = &self.unfinished
            && *to != promised.to
        {
            return Err(self.shared.place.unavailable(format!(
                "the commit of {} ends at {to}, but link {} of its claim log promises data up to \
                 {}: expected a commit that ends exactly there{}",
                self.shard.shard,
                promised.link,
                promised.to,
                promised.way_out(&self.shared.place, self.shard.shard.as_str())
            )));
        }
        if self.position.is_some() && *from != self.position {
            return Err(self.shared.place.unavailable(format!(
                "the commit of {} starts after {}, expected after {}, the sink's position: acquire the \
                 shard again",
                self.shard.shard,
                shown(from.as_ref()),
                shown(self.position.as_ref())
            )));
        }
        Ok(())
    }

    /// Compares the encoded objects with those that an earlier owner's claim promises.
    ///
    /// Routes and folders must be the same: they are part of the keys. Contents may differ, within limits.
    async fn check_content(
        &self,
        promised: &UnfinishedClaim,
        bodies: &[Body],
    ) -> Result<(), SinkError> {
        let data = &promised.claim.data;
        let places = |body: &Body| (body.route.clone(), body.folder.to_string());
        let expected = data.iter().map(|data| (data.route.clone(), data.folder().to_owned()));
        if !expected.eq(bodies.iter().map(places)) {
            let expected = data.iter().map(|data| data.route.as_str()).collect::<Vec<_>>();
            let made = bodies.iter().map(|body| body.route.as_str()).collect::<Vec<_>>();
            return Err(self.shared.place.unavailable(format!(
                "link {} of {} promises rows of routes {expected:?} up to {}, but the records gave {made:?}, \
                 or other folders: rerun revision {} for this range{}",
                promised.link,
                self.shard.shard,
                promised.to,
                promised.claim.revision,
                promised.way_out(&self.shared.place, self.shard.shard.as_str())
            )));
        }
        let differing = data.iter().zip(bodies).filter(|(data, body)| data.sha256 != body.sha256);
        let differing = differing.map(|(data, _)| data.key.as_str()).collect::<Vec<_>>();
        if differing.is_empty() {
            return Ok(());
        }
        self.check_differing(promised, &differing).await
    }

    /// Decides about contents that differ from the claim, since a stage is not deterministic. All objects of a claim
    /// must come from one run: a row could otherwise be in two of them, or in none.
    ///
    /// | objects of the claim that exist | outcome |
    /// |---|---|
    /// | none | all are written from this run, with a warning |
    /// | all | nothing is written: the earlier owner is still running, and has finished its claim |
    /// | some | an error: the revision of the claim must run again |
    async fn check_differing(
        &self,
        promised: &UnfinishedClaim,
        differing: &[&str],
    ) -> Result<(), SinkError> {
        let mut written = Vec::new();
        for data in &promised.claim.data {
            if self.shared.place.exists(&self.log.data_path(&data.key)?).await? {
                written.push(data.key.as_str());
            }
        }
        if written.len() == promised.claim.data.len() {
            // The earlier owner is still running, and has finished its claim meanwhile.
            return Ok(());
        }
        if written.is_empty() {
            tracing::warn!(
                sink = %self.shared.place.sink,
                shard = %self.shard.shard,
                link = promised.link,
                generation = promised.claim.revision,
                objects = ?differing,
                "a claim that is produced again has other content than promised: \
                 a stage is not deterministic"
            );
            return Ok(());
        }
        Err(self.shared.place.unavailable(format!(
            "link {} of {} promises other content than the records gave for {differing:?}, and \
             {written:?} exists already: rerun revision {} for this range{}",
            promised.link,
            self.shard.shard,
            promised.claim.revision,
            promised.way_out(&self.shared.place, self.shard.shard.as_str())
        )))
    }

    fn promised_otherwise(&self, found: &LogLink) -> SinkError {
        self.shared.place.unavailable(format!(
            "link {} of {} already promises data up to {}, by this owner: retry that commit \
             unchanged, or acquire the shard again",
            found.link,
            self.shard.shard,
            shown(found.to.as_ref())
        ))
    }

    fn fenced(&self, found: &LogLink) -> SinkError {
        SinkError::Fenced {
            sink: self.shared.place.sink.clone(),
            shard: self.shard.shard.to_string(),
            detail: format!(
                "link {} of its claim log in {} belongs to {}, not to {}",
                found.link, self.shared.place.url, found.owner, self.owner
            ),
            by: found.by.as_ref().and_then(WrittenBy::owner),
        }
    }
}

#[async_trait]
impl SinkWriter for ObjectsWriter {
    fn copies_rows(&self) -> bool {
        true
    }

    fn encodes_rows(&self) -> Option<Arc<dyn EncodeRows>> {
        Some(Arc::new(Arriving { shared: self.shared.clone(), shard: self.shard.clone() }))
    }

    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        if self.position.as_ref().is_some_and(|position| *position >= commit.range.to_inclusive) {
            return Ok(Committed::default());
        }
        self.check_range(commit)?;
        let promised = self.unfinished.clone();
        let (layout, limits) = match &promised {
            Some(promised) => (promised.claim.layout.clone(), promised.claim.limits),
            None => (self.shared.layout.clone(), Some(self.shared.place.limits)),
        };
        let encoded = self.encode(commit, layout, limits).await?;
        let failed = |cause: &String| self.shared.place.unavailable(cause);
        let encoded = encoded.form.as_ref().map_err(failed)?;
        let Some(encoded) = encoded.downcast_ref::<Encoded>() else {
            return Err(self.shared.place.unavailable("its rows were encoded by another sink"));
        };
        if !encoded.refusals.is_empty() {
            refusals.record(commit, &encoded.refusals).await?;
        }
        let committed = match promised {
            Some(promised) => self.produce_promised(&promised, encoded).await?,
            None => self.claim_and_write(commit, encoded).await?,
        };
        self.unfinished = None;
        self.position = Some(commit.range.to_inclusive.clone());
        Ok(committed)
    }
}

fn shown(position: Option<&Position>) -> String {
    position.map_or_else(|| "nothing".into(), Position::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parquet::ParquetSchema;
    use crate::settings::{Compression, FolderTemplate, ObjectFormat};
    use shardmill_core::record::Column;
    use shardmill_core::record::{
        Batch, Entry, PositionRange, Record, RowRoute, SequenceNumber, StreamIdentity,
    };
    use shardmill_sinks_common::line::LineFormat;

    const MIB: usize = 1 << 20;

    fn shard() -> ShardKey {
        let stream = StreamIdentity { name: "cars".into(), arn: "arn".into(), created_ms: 0 };
        ShardKey { pipeline: "mart".into(), stream: Arc::new(stream), shard: "shard".into() }
    }

    /// Makes records of one row each, each row for a folder of its own.
    fn rows(count: u32) -> Vec<Row> {
        let position = |number: u32| Position {
            sequence: SequenceNumber::from(u64::from(number) + 1),
            sub_sequence: 0,
        };
        let record = |number| Record {
            position: position(number),
            partition_key: "key".into(),
            payload: "".into(),
            arrived_ms: 0,
        };
        let range = PositionRange { from_exclusive: None, to_inclusive: position(count) };
        let records = (0..count).map(record).collect();
        let batch = Arc::new(Batch { shard: shard(), records, range, entry: Entry::Source });
        let route = RowRoute::from("sold");
        let row = |record: u32| Row {
            batch: batch.clone(),
            record,
            ordinal: 0,
            route: route.clone(),
            key: "key".into(),
            payload: format!("{{\"k\":\"{record}\"}}").into(),
        };
        (0..count).map(row).collect()
    }

    /// Makes an encoder of arriving rows for Parquet files with `k` and this number of further columns.
    fn arriving(columns: usize) -> ArrivingRows {
        let column = |name: String, data_type: &str| Column {
            name,
            data_type: data_type.into(),
            nullable: true,
        };
        let mut all = vec![column("k".into(), "text")];
        all.extend((0..columns).map(|number| column(format!("c{number}"), "bigint")));
        let schema = Some(Arc::new(ParquetSchema::of(&all).expect("a schema")));
        let form = RouteForm { line: Some(LineFormat::Json), schema };
        let layout = ObjectLayout {
            format: ObjectFormat::Parquet,
            compression: Compression::None,
            folder: FolderTemplate::try_from("k={row.k}".to_owned()).expect("a template"),
        };
        let forms = Arc::new(HashMap::from([(RouteName::from("sold"), form)]));
        let room = KeyRoom { prefix: Path::default(), limits: None };
        ArrivingRows {
            encoder: Some(Encoder::new(forms, layout, shard(), "logs".into(), room)),
            failed: None,
            rows: 0,
            kept: Vec::new(),
            numbers: Vec::new(),
            refusals: Vec::new(),
            kept_bytes: 0,
        }
    }

    /// Returns the number of objects of each commit of these rows, cut at `occupied_bytes_max`.
    fn commits(columns: usize, mut rows: Vec<Row>, occupied_bytes_max: usize) -> Vec<usize> {
        let mut commits = Vec::new();
        loop {
            let mut commit = Box::new(arriving(columns));
            let first = rows[0].position().clone();
            let cut = commit.push(rows, occupied_bytes_max);
            let occupied = commit.occupied_bytes();
            let (refused, encoded) = commit.finish();
            assert!(refused.is_empty());
            let objects =
                encoded.form.expect("encoded").downcast::<Encoded>().expect("ours").bodies.len();
            assert!(
                occupied <= occupied_bytes_max || objects == 1,
                "{occupied} of {occupied_bytes_max}"
            );
            assert!(
                encoded.occupied_bytes <= occupied,
                "{} came of {occupied}",
                encoded.occupied_bytes
            );
            commits.push(objects);
            let Some(cut) = cut else { return commits };
            assert!(cut.to_inclusive.is_some_and(|to| to >= first && to < *cut.rest[0].position()));
            rows = cut.rest;
        }
    }

    #[test]
    fn wall_02_a_commit_ends_before_the_record_whose_files_are_too_large_together() {
        // Some 640 bytes and one cell for each column of each file.
        assert_eq!(commits(1_000, rows(20), 4 * MIB), [5, 5, 5, 5]);
        assert_eq!(commits(1_000, rows(6), usize::MAX), [6]);
        assert_eq!(commits(10, rows(300), 4 * MIB), [256, 44], "few columns");
        assert_eq!(commits(1_000, rows(3), 0), [1, 1, 1], "a record always fits");
    }

    #[test]
    fn wall_02_rows_of_many_columns_count_in_a_file_that_is_there() {
        let same: Vec<Row> = rows(50)
            .into_iter()
            .map(|row| Row { payload: "{\"k\":\"a\"}".into(), ..row })
            .collect();
        let mut commit = arriving(1_000);
        let cut = commit.push(same, 2 * MIB).expect("50 rows of 64,000 bytes and more");
        assert!(commit.occupied_bytes() <= 2 * MIB);
        assert!((15..30).contains(&cut.rest.len()), "{} are left", cut.rest.len());
        // The next commit begins with them.
        assert!(arriving(1_000).push(cut.rest, 4 * MIB).is_none());
    }
}
