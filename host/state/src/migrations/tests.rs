//! A database of each version is opened by the present code.
//!
//! The schemas are those of the commits named in their first lines, not the steps of today: a step that is edited
//! shows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rusqlite::Connection;
use rusqlite::types::Value;

use super::*;
use crate::StateStore;
use crate::assets::schemas;

/// A schema of the past, with rows in each of its tables.
struct Past {
    version: i64,
    schema: &'static str,
    rows: &'static [&'static str],
}

const ROWS_2: &str = "
    INSERT INTO shard (stream, shard, sequence, sub_sequence, ended, start_at_ms, start_at_sequence,
        caught_up_ms) VALUES
        ('s', 'shard-0', '0011', 3, 0, 1700000000000, '0001', 1700000000500),
        ('s', 'shard-1', NULL, NULL, 1, NULL, NULL, NULL);
    INSERT INTO sink_position (sink, stream, shard, sequence, sub_sequence) VALUES
        ('mart', 's', 'shard-0', '0011', 3), ('log', 's', 'shard-0', '0012', 0);
    INSERT INTO generation VALUES ('g1', '{\"stages\":[]}'), ('g2', '{}');
    INSERT INTO component VALUES ('d1', x'00ff'), ('d2', x'');
    INSERT INTO ledger VALUES ('s', 'shard-0', '', 0, 'g1', 5), ('s', 'shard-0', '0009', 1, 'g2', 6);";
/// Dead letters of versions 2 to 5: two of one record, and one that is pending.
const DEAD_LETTERS_2: &str = "
    INSERT INTO dead_letter (stream, shard, sequence, sub_sequence, place, output, held, partition_key, original,
        entered_key, entered, arrived_ms, plugin, digest, reason, backtrace, written_ms) VALUES
        ('s', 'shard-0', '0001', 0, 'stage:decode', 0, 0, x'6b', x'6f', x'6b', x'6f', 7, 'p', 'd', 'why', 'at', 9),
        ('s', 'shard-0', '0001', 0, 'stage:route', 1, 0, x'6b', x'6f', x'6c', x'65', 7, 'p', 'd', 'why', '', 8),
        ('s', 'shard-0', '0002', 4, 'sink:mart', 0, 1, x'6b', x'70', x'', x'72', 7, '', '', 'no', '', 10);";
const ROWS_3: &str = "
    INSERT INTO sink_owner VALUES ('log', 's', 'shard-0', 4), ('mart', 's', 'shard-1', 1);
    INSERT INTO given_up (sink, stream, shard, sequence, sub_sequence) VALUES
        ('mart', 's', 'shard-0', '0010', 0), ('mart', 's', 'shard-0', '0011', 3);
    INSERT INTO redrive VALUES (5, 1, 2), (5, 2, 1);";
const DEAD_LETTERS_3: &str = "UPDATE dead_letter SET route = 'all' WHERE place = 'sink:mart';";
/// The triggers of this version have filled the log.
const ROWS_4: &str = "UPDATE letter_log_stream SET created_ms = 1700000000000;";
const ROWS_5: &str = "
    INSERT INTO running VALUES ('{\"a\":1}', '{\"a\":2}');
    INSERT INTO change VALUES
        (1, 11, 'swap', 'decode', 'd1', 'd2', 'promoted', ''), (3, 12, 'rollback', 'decode', 'd2', 'd1', 'done', 'w');";
const ROWS_6: &str = "
    INSERT INTO hole VALUES (2, 'mart', 's', 'shard-0', '', 0, '0003', 1, 'given up', 20, NULL);
    INSERT INTO sink_known VALUES ('mart', 'db/t', 21, NULL), ('old', 'db/o', 22, 23);
    INSERT INTO sink_removed VALUES ('old', 's', 'shard-0', '0004', 0, 23);
    INSERT INTO stream_start VALUES ('s', 24);
    INSERT INTO seen_shard VALUES ('s', 'shard-0');
    INSERT INTO seen_state VALUES ('abc', 25);
    INSERT INTO doubtful_letters VALUES (2);
    INSERT INTO redrive_rest VALUES (4);
    INSERT INTO redrive_sink VALUES (5, 'mart');
    INSERT INTO running_sink VALUES ('mart', 'f');
    INSERT INTO replay VALUES (1, 'mart');
    INSERT INTO variable VALUES ('g1', 'TOKEN', 'h');
    INSERT INTO letter_record VALUES (1, 's', 'shard-0', '0001', 0, x'6b', x'6f');
    INSERT INTO letters VALUES
        (1, 's', 'shard-0', '0001', 0, 'stage:decode', 0, 0, 1, 1, x'', x'', 1, '', '', 7, 'p', 'd', 'why', 'at',
            9, '', 517),
        (2, 's', 'shard-0', '0001', 0, 'stage:route', 1, 0, 1, 0, x'6c', x'65', 1, '', '', 7, 'p', 'd', 'why', '',
            8, '', 517);
    INSERT INTO letter_delivered VALUES (1, 'mart');
    INSERT INTO replay_letter VALUES (1, 2, 0);";

const PAST: [Past; 5] = [
    Past { version: 2, schema: schemas::V2, rows: &[ROWS_2, DEAD_LETTERS_2] },
    Past {
        version: 3,
        schema: schemas::V3,
        rows: &[ROWS_2, DEAD_LETTERS_2, ROWS_3, DEAD_LETTERS_3],
    },
    Past {
        version: 4,
        schema: schemas::V4,
        rows: &[ROWS_2, DEAD_LETTERS_2, ROWS_3, DEAD_LETTERS_3, ROWS_4],
    },
    Past {
        version: 5,
        schema: schemas::V5,
        rows: &[ROWS_2, DEAD_LETTERS_2, ROWS_3, DEAD_LETTERS_3, ROWS_4, ROWS_5],
    },
    Past { version: 6, schema: schemas::V6, rows: &[ROWS_2, ROWS_3, ROWS_4, ROWS_5, ROWS_6] },
];

/// Writes a database as a commit of the past did.
fn write(folder: &Path, past: &Past) {
    let database = Connection::open(folder.join("state.db")).expect("a database");
    database.execute_batch(past.schema).expect("its schema");
    past.rows.iter().try_for_each(|rows| database.execute_batch(rows)).expect("its rows");
    database.pragma_update(None, "user_version", past.version).expect("its version");
}

/// A table's rows as values, in their order.
type Rows = Vec<Vec<Value>>;

/// The columns of each table and view.
fn columns(database: &Connection) -> BTreeMap<String, Vec<String>> {
    let mut query = database
        .prepare(
            "SELECT s.name, c.name FROM sqlite_schema s, pragma_table_info(s.name) c
             WHERE s.type IN ('table', 'view') AND s.name NOT GLOB 'sqlite_*' ORDER BY s.name, c.cid",
        )
        .expect("a query");
    let found = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).expect("rows");
    let mut columns = BTreeMap::<String, Vec<String>>::new();
    for (table, column) in found.map(Result::unwrap) {
        columns.entry(table).or_default().push(column);
    }
    columns
}

fn rows(database: &Connection, table: &str, columns: &[String]) -> Rows {
    let names = columns.join(", ");
    let places = (1..=columns.len()).map(|place| place.to_string()).collect::<Vec<_>>().join(", ");
    let mut query = database
        .prepare(&format!("SELECT {names} FROM {table} ORDER BY {places}"))
        .unwrap_or_else(|error| panic!("{table}: {error}"));
    let row = |row: &rusqlite::Row<'_>| (0..columns.len()).map(|place| row.get(place)).collect();
    query.query_map([], row).expect("rows").map(Result::unwrap).collect()
}

/// The schema's objects, each in one line.
fn schema_of(database: &Connection) -> BTreeSet<String> {
    let mut query =
        database.prepare("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL").expect("a query");
    let found = query.query_map([], |row| row.get::<_, String>(0)).expect("rows");
    found.map(|sql| sql.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

fn connect(folder: &Path) -> Connection {
    Connection::open(folder.join("state.db")).expect("the database")
}

#[test]
fn a_database_of_each_earlier_version_keeps_all_rows_and_gets_the_newest_schema() {
    let new = tempfile::tempdir().expect("a folder");
    StateStore::open(new.path()).expect("a new database");
    let newest = schema_of(&connect(new.path()));
    for past in &PAST {
        let number = past.version;
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), past);
        let database = connect(folder.path());
        let before: BTreeMap<_, _> = columns(&database)
            .into_iter()
            .map(|(table, columns)| {
                let rows = rows(&database, &table, &columns);
                assert!(!rows.is_empty(), "version {number}: the test fills no row of {table}");
                (table, (columns, rows))
            })
            .collect();
        for opening in 1..=2 {
            StateStore::open(folder.path())
                .unwrap_or_else(|error| panic!("version {number}, opening {opening}: {error}"));
            assert_eq!(version(&database).expect("a version"), NEWEST, "version {number}");
            assert_eq!(schema_of(&database), newest, "version {number}, opening {opening}");
            for (table, (columns, before)) in &before {
                let after = rows(&database, table, columns);
                assert_eq!(after, *before, "version {number}, opening {opening}: {table}");
            }
        }
    }
}

#[test]
fn the_log_of_a_database_without_one_has_the_visible_dead_letters_in_the_order_of_their_writing() {
    for past in &PAST[..2] {
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), past);
        StateStore::open(folder.path()).expect("opened");
        let names = ["number".to_owned(), "letter".to_owned()];
        let found = rows(&connect(folder.path()), "letter_log", &names);
        let of = |number, dead_letter| vec![Value::Integer(number), Value::Integer(dead_letter)];
        assert_eq!(found, [of(1, 2), of(2, 1)], "version {}", past.version);
    }
}

#[test]
fn each_supported_version_has_a_schema_of_the_past() {
    let past: Vec<i64> = PAST.iter().map(|past| past.version).collect();
    let supported: Vec<i64> = VERSIONS.iter().map(|version| version.number).collect();
    assert_eq!(past, supported, "add the schema of the new version to migrations/schemas");
}

#[test]
fn other_databases_are_refused_and_not_changed() {
    let unfinished = "a build between two versions wrote it; run the version of shardmill that wrote it, or \
                      set `state_dir` elsewhere";
    for (version, schema, expected) in [
        (
            1,
            schemas::V1,
            "failed to use it: expected schema version 2 to 6, found 1, which is not supported; run the \
             version of shardmill that wrote it, or set `state_dir` elsewhere",
        ),
        (2, schemas::V2_UNFINISHED, unfinished),
        (3, schemas::V3_UNFINISHED, unfinished),
        // The first commit of version 6 had the schema of version 5.
        (6, schemas::V5, unfinished),
        (
            6,
            schemas::V6_UNFINISHED,
            "expected schema version 6 with the column carrier of table letter_carrier, found it without",
        ),
        (
            7,
            schemas::V6,
            "expected schema version 2 to 6, found 7, which a newer shardmill wrote; run the version of \
             shardmill that wrote it",
        ),
        (-1, schemas::V6, "found -1, which is not supported"),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), &Past { version, schema, rows: &[] });
        let before = schema_of(&connect(folder.path()));
        let error = StateStore::open(folder.path()).err().expect("refused").to_string();
        assert!(error.contains(expected), "version {version}: {error}");
        let after = connect(folder.path());
        assert_eq!(schema_of(&after), before, "version {version}");
        assert_eq!(self::version(&after).expect("a version"), version);
    }
}
