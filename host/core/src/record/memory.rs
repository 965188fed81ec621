//! Memory that rows keep alive, and its limit.
//!
//! A row points into memory that it shares: its record lies in a batch, its payload often in the arena of a plugin's
//! answer. Without a limit, one row of one byte would keep a batch of 256 KiB, or an answer of 60 MiB, for as long as
//! its sink buffers it.
//!
//! The invariant: shared memory is kept only where it is not much more than the rows' own, and
//! [`CopyPlan::occupied_bytes`] counts all that they keep. So [`CopyPlan::apply`] copies the other rows together,
//! before they wait for anything:
//!
//! | shared memory | kept if it is at most |
//! |---|---|
//! | batch | twice the bytes of the rows' own records, and 128 bytes per row |
//! | arena of an answer | twice the rows' own bytes in it, and 128 bytes per row |

use std::sync::Arc;

use bytes::Bytes;

use super::{Batch, Entry, Record, Redrive, Row};

/// Bytes that a row may keep alive besides twice its own bytes.
const EXTRA_BYTES: usize = 128;

/// Whether shared bytes may be kept for this number of users, who own `own_bytes` of them together.
pub fn is_kept_whole(shared_bytes: usize, own_bytes: usize, users: usize) -> bool {
    let most = own_bytes.saturating_mul(2).saturating_add(users.saturating_mul(EXTRA_BYTES));
    shared_bytes <= most
}

/// Arenas of the answers that a batch's rows came from.
#[derive(Debug, Default)]
pub struct Arenas {
    /// By ascending address. All are alive, so none overlaps another.
    arenas: Vec<Bytes>,
}

impl Arenas {
    /// Adds an arena.
    pub fn add(&mut self, arena: Bytes) {
        if arena.is_empty() {
            return;
        }
        let start = arena.as_ptr();
        let place = self.arenas.partition_point(|other| other.as_ptr() < start);
        self.arenas.insert(place, arena);
    }

    /// Drops the arenas that nobody else uses.
    pub fn forget_unused(&mut self) {
        self.arenas.retain(|arena| !arena.is_unique());
    }

    /// Returns the index of the arena that the bytes lie in. `likely` is tried first, and is set to the index.
    fn find(&self, bytes: &Bytes, likely: &mut usize) -> Option<usize> {
        let at = bytes.as_ptr() as usize;
        let contains = |arena: &Bytes| {
            let start = arena.as_ptr() as usize;
            start <= at && at < start + arena.len()
        };
        if self.arenas.get(*likely).is_some_and(contains) {
            return Some(*likely);
        }
        let after = self.arenas.partition_point(|arena| arena.as_ptr() as usize <= at);
        let found = after.checked_sub(1).filter(|place| contains(&self.arenas[*place]))?;
        *likely = found;
        Some(found)
    }
}

/// Whether bytes are unchanged: the same memory as those of the record.
#[inline]
fn is_same(bytes: &Bytes, came: &Bytes) -> bool {
    (bytes.as_ptr(), bytes.len()) == (came.as_ptr(), came.len())
}

/// Share of a sink's rows in an arena.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    own_bytes: usize,
    rows: usize,
    is_kept: bool,
}

/// Memory that a sink's rows of one batch occupy, once rows from sparse memory are copied.
#[derive(Debug, Default)]
pub struct CopyPlan {
    occupied_bytes: usize,
    copied_bytes: usize,
    keeps_batch: bool,
    /// One for each arena.
    shares: Vec<Share>,
}

impl CopyPlan {
    /// Measures rows of one batch, by ascending record. `batch_bytes` is the memory of the batch.
    pub fn of(rows: &[Row], batch_bytes: usize, arenas: &Arenas) -> Self {
        let Some(first) = rows.first() else { return Self::default() };
        let records = &first.batch.records;
        let mut shares = vec![Share::default(); arenas.arenas.len()];
        let mut likely = 0;
        // Bytes outside the record and the arenas: they count as the row's alone, because nothing else is known.
        let mut other_bytes = 0;
        let (mut own_records, mut own_record_bytes, mut last) = (0, 0, None);
        for row in rows {
            let source = &records[row.record as usize];
            if last != Some(row.record) {
                last = Some(row.record);
                own_records += 1;
                own_record_bytes += source.payload.len() + source.partition_key.len();
            }
            let mut counted = None;
            for (bytes, came) in
                [(&row.payload, &source.payload), (&row.key, &source.partition_key)]
            {
                if bytes.is_empty() || is_same(bytes, came) {
                    continue;
                }
                match arenas.find(bytes, &mut likely) {
                    None => other_bytes += bytes.len(),
                    Some(arena) => {
                        shares[arena].own_bytes += bytes.len();
                        shares[arena].rows += usize::from(counted.replace(arena) != Some(arena));
                    }
                }
            }
        }
        let own_batch_bytes =
            Batch::OVERHEAD_BYTES + own_record_bytes + own_records * Record::OVERHEAD_BYTES;
        let spare_bytes = batch_bytes.saturating_sub(own_batch_bytes);
        let shared_bytes = spare_bytes + own_record_bytes;
        let keeps_batch = own_records == records.len()
            || is_kept_whole(shared_bytes, own_record_bytes, rows.len());
        let (mut occupied_bytes, mut copied_bytes) = match keeps_batch {
            true => (batch_bytes, 0),
            false => (own_batch_bytes, own_record_bytes),
        };
        for (share, arena) in shares.iter_mut().zip(&arenas.arenas) {
            share.is_kept = is_kept_whole(arena.len(), share.own_bytes, share.rows);
            match (share.is_kept, share.rows) {
                (true, 0) => {}
                (true, _) => occupied_bytes += arena.len(),
                (false, _) => {
                    occupied_bytes += share.own_bytes;
                    copied_bytes += share.own_bytes;
                }
            }
        }
        occupied_bytes += other_bytes + size_of_val(rows);
        Self { occupied_bytes, copied_bytes, keeps_batch, shares }
    }

    /// Returns the memory that the rows occupy after [`CopyPlan::apply`], in bytes.
    pub fn occupied_bytes(&self) -> usize {
        self.occupied_bytes
    }

    /// Returns the number of bytes that [`CopyPlan::apply`] copies.
    pub fn copied_bytes(&self) -> usize {
        self.copied_bytes
    }

    /// Copies what the rows may not keep. `rows` must be the rows that were given to [`CopyPlan::of`].
    pub fn apply(&self, rows: &mut [Row], arenas: &Arenas) {
        if self.copied_bytes == 0 && self.keeps_batch {
            return;
        }
        // One copy for each arena; empty for an arena that is kept.
        let mut copies: Vec<Copied> = self.shares.iter().map(Copied::of).collect();
        let mut likely = 0;
        if copies.iter().any(|copied| copied.is_copied) {
            for row in rows.iter_mut() {
                let source = &row.batch.records[row.record as usize];
                for (bytes, came) in
                    [(&row.payload, &source.payload), (&row.key, &source.partition_key)]
                {
                    if !bytes.is_empty()
                        && !is_same(bytes, came)
                        && let Some(arena) = arenas.find(bytes, &mut likely)
                    {
                        copies[arena].append(bytes);
                    }
                }
            }
            let mut made: Vec<Bytes> =
                copies.into_iter().map(|copied| Bytes::from(copied.bytes)).collect();
            for row in rows.iter_mut() {
                let source = &row.batch.records[row.record as usize];
                for (bytes, came) in
                    [(&mut row.payload, &source.payload), (&mut row.key, &source.partition_key)]
                {
                    if !bytes.is_empty()
                        && !is_same(bytes, came)
                        && let Some(arena) = arenas.find(bytes, &mut likely)
                        && !self.shares[arena].is_kept
                    {
                        *bytes = made[arena].split_to(bytes.len());
                    }
                }
            }
        }
        if !self.keeps_batch {
            with_own_records(rows);
        }
    }
}

/// Copy of the rows' bytes in one arena, while it is made.
struct Copied {
    is_copied: bool,
    bytes: Vec<u8>,
}

impl Copied {
    fn of(share: &Share) -> Self {
        let is_copied = !share.is_kept && share.rows > 0;
        let room = if is_copied { share.own_bytes } else { 0 };
        Self { is_copied, bytes: Vec::with_capacity(room) }
    }

    fn append(&mut self, bytes: &Bytes) {
        if self.is_copied {
            self.bytes.extend_from_slice(bytes);
        }
    }
}

/// Moves rows of one batch, by ascending record, to a new batch that has only their own records.
fn with_own_records(rows: &mut [Row]) {
    let Some(first) = rows.first() else { return };
    let batch = first.batch.clone();
    let mut indexes: Vec<u32> = rows.iter().map(|row| row.record).collect();
    indexes.dedup();
    let own = || indexes.iter().map(|index| &batch.records[*index as usize]);
    let bytes = own().map(|record| record.payload.len() + record.partition_key.len()).sum();
    let mut arena = Vec::with_capacity(bytes);
    for record in own() {
        arena.extend_from_slice(&record.partition_key);
        arena.extend_from_slice(&record.payload);
    }
    let mut arena = Bytes::from(arena);
    let records = own().map(|record| Record {
        position: record.position.clone(),
        partition_key: arena.split_to(record.partition_key.len()),
        payload: arena.split_to(record.payload.len()),
        arrived_ms: record.arrived_ms,
    });
    let records = records.collect();
    let entry = match &batch.entry {
        Entry::Source => Entry::Source,
        Entry::Redrive(redrive) => Entry::Redrive(Box::new(Redrive {
            place: redrive.place.clone(),
            route: redrive.route.clone(),
            origins: indexes.iter().map(|index| redrive.origins[*index as usize].clone()).collect(),
            delivered_to: redrive.delivered_to.clone(),
            keeps_whole: redrive.keeps_whole,
        })),
    };
    let (shard, range) = (batch.shard.clone(), batch.range.clone());
    let own_batch = Arc::new(Batch { shard, records, range, entry });
    let mut place = 0;
    for row in rows {
        while indexes[place] != row.record {
            place += 1;
        }
        let came = &batch.records[row.record as usize];
        let own = &own_batch.records[place];
        if is_same(&row.payload, &came.payload) {
            row.payload = own.payload.clone();
        }
        if is_same(&row.key, &came.partition_key) {
            row.key = own.partition_key.clone();
        }
        row.batch = own_batch.clone();
        row.record = place as u32;
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
