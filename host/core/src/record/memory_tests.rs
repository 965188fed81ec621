//! Tests of the memory that rows keep alive.

use super::*;
use crate::record::{
    PipelineName, Position, PositionRange, RowRoute, SequenceNumber, ShardId, ShardKey,
    StreamIdentity,
};

fn batch(records: impl Iterator<Item = (Bytes, Bytes)>) -> Arc<Batch> {
    let stream = StreamIdentity { name: "cars".into(), arn: "arn".into(), created_ms: 0 };
    let shard = ShardKey {
        pipeline: PipelineName::new("cars"),
        stream: Arc::new(stream),
        shard: ShardId::new("shardId-000000000000"),
    };
    let records: Vec<Record> = records
        .zip(1u64..)
        .map(|((partition_key, payload), number)| Record {
            position: Position { sequence: SequenceNumber::from(number), sub_sequence: 0 },
            partition_key,
            payload,
            arrived_ms: number,
        })
        .collect();
    let to_inclusive = records.last().expect("a record").position.clone();
    let range = PositionRange { from_exclusive: None, to_inclusive };
    Arc::new(Batch { shard, records, range, entry: Entry::Source })
}

fn row(batch: &Arc<Batch>, record: u32, key: Bytes, payload: Bytes) -> Row {
    Row { batch: batch.clone(), record, ordinal: 0, route: RowRoute::from("out"), key, payload }
}

/// Content of rows, which copying must not change.
fn shown(rows: &[Row]) -> Vec<(Position, Bytes, Bytes, Bytes, Bytes, u64)> {
    let show = |row: &Row| {
        let copy = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
        let source = row.source();
        (
            row.position().clone(),
            copy(&row.key),
            copy(&row.payload),
            copy(&source.partition_key),
            copy(&source.payload),
            source.arrived_ms,
        )
    };
    rows.iter().map(show).collect()
}

/// For any rows of any answers: their content is unchanged, they keep no more memory than allowed, and all of it is
/// counted.
#[test]
fn wall_02_rows_keep_no_more_than_twice_their_own_bytes() {
    let (mut kept, mut copied) = (0, 0);
    for seed in 0..2_000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let records = random.usize(1..200);
        let most = [1, 40, 3_000][random.usize(0..3)];
        let text = |random: &mut fastrand::Rng, most: usize| -> Bytes {
            let length = random.usize(0..=most);
            std::iter::repeat_with(|| random.u8(..)).take(length).collect::<Vec<u8>>().into()
        };
        let batch = batch((0..records).map(|_| (text(&mut random, 20), text(&mut random, most))));
        let (mut arenas, mut handles) = (Arenas::default(), Vec::new());
        for _ in 0..random.usize(0..4) {
            let length = [1_000, 100_000][random.usize(0..2)];
            let arena = Bytes::from(vec![random.u8(..); length]);
            arenas.add(arena.clone());
            handles.push(arena);
        }
        // Every record, some, or few.
        let every = [1, 3, 50][random.usize(0..3)];
        let mut rows = Vec::new();
        for (record, index) in batch.records.iter().zip(0..).step_by(every) {
            for _ in 0..random.usize(0..3) {
                let part = |random: &mut fastrand::Rng, came: &Bytes| match random.choice(&handles)
                {
                    Some(arena) if random.bool() => {
                        let start = random.usize(0..arena.len());
                        arena.slice(start..arena.len().min(start + random.usize(0..most + 1)))
                    }
                    _ => came.clone(),
                };
                let key = part(&mut random, &record.partition_key);
                let payload = part(&mut random, &record.payload);
                rows.push(row(&batch, index, key, payload));
            }
        }
        let before = shown(&rows);
        let (mut own_in, mut rows_in) = (vec![0; handles.len()], vec![0; handles.len()]);
        for row in &rows {
            for (index, arena) in handles.iter().enumerate() {
                let range = arena.as_ptr_range();
                let lies = |bytes: &&Bytes| !bytes.is_empty() && range.contains(&bytes.as_ptr());
                let own: Vec<_> = [&row.key, &row.payload].into_iter().filter(lies).collect();
                own_in[index] += own.iter().map(|bytes| bytes.len()).sum::<usize>();
                rows_in[index] += usize::from(!own.is_empty());
            }
        }
        let plan = CopyPlan::of(&rows, batch.occupied_bytes(), &arenas);
        plan.apply(&mut rows, &arenas);
        drop(arenas);
        assert_eq!(shown(&rows), before, "seed {seed}");

        // Memory that is alive only because of the rows.
        let mut alive_bytes = size_of_val(&rows[..]);
        for (index, arena) in handles.iter().enumerate() {
            if !arena.is_unique() {
                alive_bytes += arena.len();
                let may = 2 * own_in[index] + 128 * rows_in[index];
                assert!(arena.len() <= may, "seed {seed}: {} of {may} bytes", arena.len());
                kept += 1;
            } else {
                alive_bytes += own_in[index];
                copied += usize::from(own_in[index] > 0);
            }
        }
        if let Some(first) = rows.first() {
            assert!(rows.iter().all(|row| Arc::ptr_eq(&row.batch, &first.batch)));
            let mut own: Vec<u32> = rows.iter().map(|row| row.record).collect();
            own.dedup();
            let of = |index: &u32| first.batch.records[*index as usize].occupied_bytes();
            let own_occupied: usize = own.iter().map(of).sum();
            let own_bytes = own_occupied - own.len() * Record::OVERHEAD_BYTES;
            let may = own_occupied + own_bytes + 128 * rows.len() + Batch::OVERHEAD_BYTES;
            let is_whole = own.len() == batch.records.len();
            let occupied = first.batch.occupied_bytes();
            assert!(is_whole || occupied <= may, "seed {seed}: {occupied} of {may} bytes");
            alive_bytes += occupied;
        }
        assert_eq!(plan.occupied_bytes(), alive_bytes, "seed {seed}");
    }
    assert!(kept > 100 && copied > 100, "{kept} arenas kept, {copied} copied");
}

#[test]
fn wall_02_what_all_rows_share_is_not_copied() {
    let answer = Bytes::from(vec![7; 1_000]);
    let records = (0..10).map(|index| (Bytes::from(format!("key-{index}")), Bytes::from("record")));
    let batch = batch(records);
    let mut arenas = Arenas::default();
    arenas.add(answer.clone());
    let part = |index: usize| answer.slice(index * 100..(index + 1) * 100);
    let mut rows: Vec<Row> = batch
        .records
        .iter()
        .zip(0..)
        .map(|(record, index)| {
            row(&batch, index, record.partition_key.clone(), part(index as usize))
        })
        .collect();
    let plan = CopyPlan::of(&rows, batch.occupied_bytes(), &arenas);
    assert_eq!(plan.copied_bytes(), 0);
    plan.apply(&mut rows, &arenas);
    assert!(rows.iter().all(|row| Arc::ptr_eq(&row.batch, &batch)));
    assert!(rows.iter().zip(0..).all(|(row, index)| row.payload.as_ptr() == part(index).as_ptr()));
    // Once nobody uses the arena, it is dropped.
    drop((rows, answer));
    arenas.forget_unused();
    assert!(arenas.arenas.is_empty());
}

/// One byte of an answer of 60 MiB.
#[test]
fn wall_02_a_byte_does_not_keep_an_answer_in_memory() {
    let answer = Bytes::from(vec![1; 60 << 20]);
    let batch = batch((0..1_000).map(|_| (Bytes::from("key"), Bytes::from(vec![0; 250]))));
    let mut arenas = Arenas::default();
    arenas.add(answer.clone());
    let mut rows = vec![row(&batch, 500, Bytes::from("own"), answer.slice(5..6))];
    let plan = CopyPlan::of(&rows, batch.occupied_bytes(), &arenas);
    plan.apply(&mut rows, &arenas);
    drop(arenas);
    assert!(answer.is_unique() && rows[0].batch.records.len() == 1);
    assert!(plan.occupied_bytes() < 2_000, "{}", plan.occupied_bytes());
    assert_eq!(rows[0].position(), &batch.records[500].position);
}

/// Records of a redrive keep their positions in their original shards.
#[test]
fn wall_02_copied_rows_of_a_redrive_keep_their_origins() {
    let mut own = batch((0..100).map(|_| (Bytes::from("key"), Bytes::from(vec![0; 2_000]))));
    let batch = Arc::get_mut(&mut own).expect("the only one");
    let origin = |number: u64| Position { sequence: SequenceNumber::from(number), sub_sequence: 7 };
    batch.entry = Entry::Redrive(Box::new(Redrive {
        place: super::super::DeadLetterPlace::Sink("mart".into()),
        route: "cars".into(),
        origins: (1_000..1_100).map(origin).collect(),
        delivered_to: vec!["other".into()],
        keeps_whole: true,
    }));
    let as_came = |record: u32| {
        let came = &own.records[record as usize];
        row(&own, record, came.partition_key.clone(), came.payload.clone())
    };
    let mut rows: Vec<Row> = [3, 3, 70].map(as_came).into();
    let arenas = Arenas::default();
    CopyPlan::of(&rows, own.occupied_bytes(), &arenas).apply(&mut rows, &arenas);
    let origins: Vec<_> = rows.iter().map(|row| row.batch.origin(row.record).clone()).collect();
    assert_eq!(origins, [1_003, 1_003, 1_070].map(origin));
    assert!(rows[0].batch.is_delivered_to(&"other".into()));
    assert!(matches!(&rows[0].batch.entry, Entry::Redrive(redrive) if redrive.keeps_whole));
    assert_eq!(rows[2].batch.records.len(), 2);
    // A row with an unchanged payload shares the bytes of its record, so they are stored once.
    assert_eq!(rows[1].payload.as_ptr(), rows[1].source().payload.as_ptr());
}
