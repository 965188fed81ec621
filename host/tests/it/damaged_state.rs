//! A state database with values that cannot be read, after a disk error, a truncated copy or an edit by hand. Every
//! command that needs such a value names the value, its place and the way out. No command uses a default instead.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rusqlite::Connection;

use crate::support::pipeline::PipelineToml;
use crate::support::{output, run_ok, shardmill};

/// Time limit of a command. A command that retried an error that cannot pass would never end.
const COMMAND_SECONDS: &str = "60";
/// Rows of the first runs, and of the run that meets the damage. Every tenth row is not JSON.
const ROWS: u64 = 60;
const MORE: u64 = 10;

/// Commands that read the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    Run,
    Check,
    List,
    Show,
    Export,
    Redrive,
    Purge,
    History,
}

use Asks::{Check, Export, History, List, Purge, Redrive, Run, Show};

impl Asks {
    fn arguments(self, pipeline: &str) -> Vec<String> {
        let words: &[&str] = match self {
            Run => &["run", pipeline],
            Check => &["check", pipeline],
            List => &["dlq", "list", "--pipeline", pipeline],
            Show => &["dlq", "show", "1", "--pipeline", pipeline],
            Export => &["dlq", "export", "--pipeline", pipeline],
            Redrive => &["dlq", "redrive", "--all", "--pipeline", pipeline],
            Purge => &["dlq", "purge", "--all", "--pipeline", pipeline],
            History => &["plugin", "history", "--shards", "--pipeline", pipeline],
        };
        words.iter().map(|&word| word.to_owned()).collect()
    }
}

/// Pipeline that has run, with a copy of everything that it stores.
struct Kept {
    folder: tempfile::TempDir,
    file: String,
}

impl Kept {
    fn new() -> Self {
        let mut kept = Self { folder: tempfile::tempdir().expect("a folder"), file: String::new() };
        let mart = Connection::open(kept.path("mart.db")).expect("a database");
        for table in ["a", "back", "gone"] {
            let create = format!("CREATE TABLE {table} (id INTEGER NOT NULL)");
            mart.execute(&create, ()).expect("created");
        }
        drop(mart);
        // One sink is removed for good, and one is put back: the state has removals and a hole.
        for (rows, sinks) in
            [(0..20, &["a", "back", "gone"][..]), (20..40, &["a"]), (40..ROWS, &["a", "back"])]
        {
            kept.put(rows);
            kept.file = kept.pipeline(sinks);
            run_ok(&["run", &kept.file]);
        }
        let state = kept.state();
        for row in [
            // Rows as left by a change, a lost commit, another state folder and an interrupted redrive.
            "INSERT INTO change (at_ms, kind, stage, before, after, outcome, reason)
             SELECT 1700000000000, 'swap', 'route', id, id, 'promoted', '' FROM generation LIMIT 1",
            "INSERT INTO given_up SELECT 'a', stream, shard, substr('0000000000', 1, 10), 0, '', 0 FROM shard",
            "INSERT INTO seen_state VALUES ('other', 3)",
        ] {
            state.execute(row, ()).expect(row);
        }
        drop(state);
        for database in kept.databases() {
            let all = Connection::open(&database).expect("a database");
            // Moves everything from the write-ahead log into the one file that is copied.
            all.query_row("PRAGMA wal_checkpoint(TRUNCATE)", (), |_| Ok(())).expect("written");
            drop(all);
            std::fs::copy(&database, database.with_extension("kept")).expect("copied");
        }
        kept.put(ROWS..ROWS + MORE);
        kept
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn state(&self) -> Connection {
        Connection::open(self.path("state/kept/state.db")).expect("the state")
    }

    fn databases(&self) -> [PathBuf; 4] {
        ["mart.db", "letters.db", "state/kept/state.db", "state/kept/letters/kept/state.db"]
            .map(|name| self.path(name))
    }

    fn put(&self, rows: std::ops::Range<u64>) {
        let file =
            std::fs::File::options().create(true).append(true).open(self.path("rows.ndjson"));
        let mut file = file.expect("a file");
        for id in rows {
            match id % 10 {
                0 => writeln!(file, "no JSON {id}"),
                _ => writeln!(file, "{{\"id\":{id}}}"),
            }
            .expect("written");
        }
    }

    fn pipeline(&self, sinks: &[&str]) -> String {
        let dead_letters = self.path("letters.db");
        let file = PipelineToml::new(self.folder.path(), "kept")
            .file(&self.path("rows.ndjson"), "format = \"application/json\"")
            .route_all_to(sinks)
            .table("[dead_letters]\nsinks = [\"copies\"]")
            .sink(
                "copies",
                &format!(
                    "type = \"sqlite\"\npath = \"{}\"\ntable = \"copies\"\ncreate = true",
                    dead_letters.display()
                ),
            );
        sinks.iter().fold(file, |file, name| file.sqlite(name, name)).write()
    }

    /// Restores all files from the copies.
    fn restore(&self) {
        for database in self.databases() {
            for end in ["db-wal", "db-shm"] {
                let _ = std::fs::remove_file(database.with_extension(end));
            }
            std::fs::copy(database.with_extension("kept"), &database).expect("copied");
        }
    }

    /// Runs a command, which must end by itself. Returns its exit code and output.
    fn ask(&self, asks: Asks) -> (Option<i32>, String) {
        let own = shardmill(&[]);
        let mut command = Command::new("timeout");
        command.arg(COMMAND_SECONDS).arg(own.get_program()).args(asks.arguments(&self.file));
        let done = output(command.stdin(Stdio::null()));
        let said =
            [done.stdout, done.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        (done.status.code(), said.concat())
    }

    /// Asserts that a sink has each row of the file exactly once.
    fn assert_exact(&self, what: &str) {
        let mart = Connection::open(self.path("mart.db")).expect("the data mart");
        let mut query = mart.prepare("SELECT id FROM a ORDER BY id").expect("sql");
        let ids = query.query_map((), |row| row.get(0)).expect("rows");
        let ids: Vec<u64> = ids.map(|id| id.expect("an id")).collect();
        let expected: Vec<u64> = (0..ROWS + MORE).filter(|id| id % 10 != 0).collect();
        assert_eq!(ids, expected, "{what}: lost or duplicated rows");
    }
}

/// Sets a column in all rows of a table and ignores the table's constraints: real damage does not respect them.
fn damage(state: &Path, table: &str, column: &str, value: &str) {
    let own = Connection::open(state).expect("the state");
    own.execute_batch("PRAGMA foreign_keys = OFF; PRAGMA writable_schema = ON").expect("set");
    let without = "UPDATE sqlite_schema SET sql = replace(sql, ' NOT NULL', '') WHERE name = ?1";
    own.execute(without, [table]).expect("without constraints");
    drop(own);
    let own = Connection::open(state).expect("the state");
    own.execute_batch("PRAGMA foreign_keys = OFF").expect("set");
    let changed = own.execute(&format!("UPDATE OR REPLACE {table} SET {column} = {value}"), ());
    assert!(changed.expect("damaged") > 0, "{table} has no row");
}

/// Table, column and damaged value; the commands that need the value; and the texts that each of them must print.
type Case = (&'static str, &'static str, &'static str, &'static [Asks], &'static [&'static str]);

/// Bytes that are not valid text.
const BYTES: &str = "x'ff00'";
/// Text that cannot be parsed as anything else.
const TEXT: &str = "'damaged'";

const CASES: &[Case] = &[
    ("shard", "sequence", TEXT, &[Run, Check], &["\"damaged\"", "sequence number"]),
    ("shard", "sequence", BYTES, &[Run, Check], &["column sequence", "Blob"]),
    ("shard", "sub_sequence", TEXT, &[Run, Check], &["column sub_sequence", "Text"]),
    ("shard", "sub_sequence", "-7", &[Run, Check], &["-7", "out of range"]),
    ("shard", "sub_sequence", "NULL", &[Run, Check], &["column sub_sequence is missing"]),
    ("shard", "ended", TEXT, &[Run, Check], &["ended"]),
    ("shard", "ended", "7", &[Run, Check], &["expected 0 or 1, found 7"]),
    ("shard", "ended", "-1", &[Run, Check], &["expected 0 or 1, found -1"]),
    ("shard", "ended", "NULL", &[Run, Check], &["ended"]),
    ("shard", "start_at_ms", TEXT, &[Run, Check], &["column start_at_ms"]),
    ("shard", "start_at_sequence", TEXT, &[Run, Check], &["\"damaged\"", "sequence number"]),
    ("shard", "caught_up_ms", TEXT, &[Run, Check], &["column caught_up_ms"]),
    ("shard", "reread_to", TEXT, &[Run, Check], &["column reread_to_sub is missing"]),
    ("sink_position", "sequence", TEXT, &[Run, Check], &["\"damaged\"", "sequence number"]),
    ("sink_position", "sequence", "NULL", &[Run, Check], &["column sequence is missing"]),
    ("sink_position", "sub_sequence", TEXT, &[Run, Check], &["column sub_sequence"]),
    ("sink_position", "sub_sequence", "-7", &[Run, Check], &["-7", "out of range"]),
    ("sink_position", "arrived_ms", TEXT, &[Run], &["column arrived_ms"]),
    ("ledger", "generation", BYTES, &[Run, History], &["column generation", "Blob"]),
    ("ledger", "recorded_ms", TEXT, &[History], &["column recorded_ms"]),
    ("given_up", "from_sequence", TEXT, &[Run, Check], &["\"damaged\"", "sequence number"]),
    ("given_up", "from_sequence", BYTES, &[Run, Check], &["column from_sequence"]),
    ("sink_known", "destination", BYTES, &[Run, Check], &["column destination"]),
    ("sink_known", "removed_ms", TEXT, &[Run, Check], &["column removed_ms"]),
    ("sink_removed", "sequence", TEXT, &[Run, Check], &["\"damaged\"", "sequence number"]),
    ("sink_removed", "sub_sequence", "-7", &[Run, Check], &["-7", "out of range"]),
    ("sink_removed", "removed_ms", TEXT, &[Run, Check], &["column removed_ms"]),
    ("hole", "from_sequence", TEXT, &[Run, Check], &["\"damaged\"", "sequence number"]),
    ("hole", "to_sub", "-7", &[Run, Check], &["-7", "out of range"]),
    ("hole", "why", BYTES, &[Run, Check], &["column why"]),
    ("hole", "recorded_ms", TEXT, &[Run, Check], &["column recorded_ms"]),
    (
        "running",
        "declared",
        TEXT,
        &[Run, Check],
        &["record of the running revision", "--files-count"],
    ),
    (
        "running",
        "running",
        "'{\"stages\":7}'",
        &[Run, Check],
        &["record of the running revision", "7"],
    ),
    (
        "running",
        "running",
        "json_set(running, '$.stages[0].digest', 'abc')",
        &[Run, Check],
        &["record of the running revision", "\"abc\"", "64 hexadecimal digits"],
    ),
    ("running", "running", BYTES, &[Run, Check], &["column running"]),
    ("change", "kind", TEXT, &[History], &["unknown word \"damaged\""]),
    ("change", "outcome", TEXT, &[History], &["unknown word \"damaged\""]),
    ("change", "at_ms", TEXT, &[History], &["column at_ms"]),
    ("change", "reason", BYTES, &[History], &["column reason"]),
    ("letter_log_stream", "created_ms", TEXT, &[Run, Check], &["created_ms"]),
    ("state_mark", "number", TEXT, &[Run, Check, List], &["read its mark", "number"]),
    ("state_mark", "id", BYTES, &[Run, Check, List], &["read its mark", "id"]),
    ("letters", "sub_sequence", "-7", &[Run, List, Show, Export, Redrive], &["-7", "out of range"]),
    ("letters", "place", BYTES, &[List, Show, Export, Redrive], &["column place"]),
    (
        "letters",
        "entered_kind",
        "7",
        &[Show, Export, Redrive],
        &["entered_kind 7", "expected 0, 1 or 2"],
    ),
    ("letters", "entered_kind", TEXT, &[Show, Export, Redrive], &["entered_kind"]),
    ("letters", "arrived_ms", "-7", &[List, Show, Export, Redrive], &["-7", "out of range"]),
    ("letters", "arrived_ms", TEXT, &[List, Show, Export, Redrive], &["column arrived_ms"]),
    ("letters", "written_ms", TEXT, &[List, Show, Export], &["column written_ms"]),
    ("letters", "digest", BYTES, &[List, Show, Export], &["column digest"]),
    ("letter_record", "original", "7", &[Show, Export, Redrive], &["column"]),
    ("seen_state", "number", TEXT, &[Run, Check], &["column number"]),
];

/// Tables that have no value that could be damaged so that it cannot be read, each with the reason.
const WITHOUT: &[(&str, &str)] = &[
    ("component", "bytes are compared with their digest where a change is undone: see damaged.rs"),
    ("doubtful_letters", "one number, of a state that was replaced"),
    ("generation", "what runs is read from `running`; fault_18 damages an old one"),
    ("letter_carrier", "numbers of letters, matched alone"),
    ("letter_delivered", "numbers and names, matched alone"),
    ("letter_log", "numbers of letters, matched alone"),
    ("letter_store", "a sum that each start counts again"),
    ("redrive", "numbers of letters, matched alone"),
    ("redrive_rest", "numbers of redrives, matched alone"),
    ("redrive_sink", "numbers and names, matched alone"),
    ("replay", "numbers and names, matched alone"),
    ("replay_letter", "numbers of letters, matched alone"),
    ("running_sink", "texts that are compared alone"),
    ("seen_shard", "names of shards, compared alone"),
    ("sink_owner", "epochs of sinks that keep none themselves: see checkpoint.rs"),
    ("stream_start", "one time, of streams of Kinesis"),
    ("variable", "hashes that are compared alone: one that differs is said"),
];

#[test]
fn a_value_that_cannot_be_read_is_named_with_its_place_and_the_way_out() {
    let kept = Kept::new();
    let mut missing = String::new();
    for (table, column, value, refused, parts) in CASES {
        let what = format!("{table}.{column} = {value}");
        // Commands that do not need the value work as usual.
        let others = [Run, Check].into_iter().filter(|asks| !refused.contains(asks));
        for asks in refused.iter().copied().chain(others) {
            kept.restore();
            damage(&kept.path("state/kept/state.db"), table, column, value);
            let (code, said) = kept.ask(asks);
            assert!(!said.contains("panicked"), "{what}, {asks:?}: {said}");
            if !refused.contains(&asks) {
                if code != Some(0) {
                    missing +=
                        &format!("{what}, {asks:?}: expected success, found {code:?}: {said}\n");
                } else if asks == Run {
                    kept.assert_exact(&what);
                }
                continue;
            }
            let place = "state/kept/state.db: failed to ";
            let way_out = ["restore the state folder", "--files-count", "move the file away"];
            let is_reported = code == Some(1)
                && said.contains(place)
                && way_out.iter().any(|way_out| said.contains(way_out))
                && parts.iter().all(|part| said.contains(part));
            if !is_reported {
                missing +=
                    &format!("{what}, {asks:?}: expected {parts:?}, found {code:?}: {said}\n");
            }
        }
    }
    assert!(missing.is_empty(), "{missing}");
}

#[test]
fn every_table_of_the_state_is_damaged_or_has_a_reason() {
    let kept = Kept::new();
    let state = kept.state();
    let mut query = state
        .prepare("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        .expect("sql");
    let tables = query.query_map((), |row| row.get(0)).expect("tables");
    let tables: BTreeSet<String> = tables.map(|name| name.expect("a name")).collect();
    let damaged = CASES.iter().map(|(table, ..)| (*table).to_owned());
    let without = WITHOUT.iter().map(|(table, _)| (*table).to_owned());
    assert_eq!(damaged.chain(without).collect::<BTreeSet<_>>(), tables);
}

/// The copying of dead letters has a state of its own, in the same file format.
#[test]
fn a_damaged_state_of_the_copies_stops_the_run_too() {
    let kept = Kept::new();
    let state = "state/kept/letters/kept/state.db";
    for (table, column, value) in [
        ("shard", "sequence", TEXT),
        ("sink_position", "sub_sequence", "-7"),
        ("state_mark", "number", TEXT),
    ] {
        kept.restore();
        damage(&kept.path(state), table, column, value);
        let (code, said) = kept.ask(Run);
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(code, Some(1), "{table}.{column} = {value}: {said}");
        assert!(said.contains(&format!("{state}: failed to ")), "{said}");
    }
}

/// A file that was truncated or overwritten is not a database any more.
#[test]
fn a_file_that_is_no_database_is_refused() {
    let kept = Kept::new();
    let path = kept.path("state/kept/state.db");
    for (what, bytes) in [
        ("text", b"not a database, but long enough to be one, one would think".repeat(40)),
        ("half", {
            let mut whole = std::fs::read(&path).expect("the state");
            whole.truncate(whole.len() / 2 / 4096 * 4096 + 100);
            whole
        }),
        ("overwritten", {
            let mut whole = std::fs::read(&path).expect("the state");
            whole[4096..].fill(0x5a);
            whole
        }),
    ] {
        for asks in [Run, Check, List, Purge, History] {
            kept.restore();
            std::fs::write(&path, &bytes).expect("written");
            let (code, said) = kept.ask(asks);
            assert!(!said.contains("panicked"), "{what}, {asks:?}: {said}");
            assert_eq!(code, Some(1), "{what}, {asks:?}: {said}");
            assert!(said.contains("state/kept/state.db"), "{what}, {asks:?}: {said}");
        }
    }
}
