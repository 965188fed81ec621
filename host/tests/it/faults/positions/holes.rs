//! Sinks that were removed, put back or renamed; unreadable state; dead letters and their revisions.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use crate::support::pipeline::PipelineToml;
use crate::support::world::{STREAM, World, row};
use crate::support::{Process, postgres, postgres_url, run, run_ok, shardmill, sqlite, wait_for};
use crate::swap::fixture::stamp;

/// Kind of sink that has a place of its own for rows `{"id":…}`.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Sqlite,
    Postgres,
    Objects,
}

const KINDS: [Kind; 3] = [Kind::Sqlite, Kind::Postgres, Kind::Objects];

/// Table or folder of a sink.
struct Place {
    kind: Kind,
    folder: PathBuf,
    table: String,
}

impl Place {
    fn new(kind: Kind, folder: &Path, name: &str) -> Self {
        let random = folder.file_name().and_then(|name| name.to_str()).expect("a name");
        let random: String = random.chars().filter(char::is_ascii_alphanumeric).collect();
        let table = format!("holes_{}_{name}", random.to_ascii_lowercase());
        // A schema of its own: sinks of other tests keep their positions beside their tables.
        let table = match kind {
            Kind::Postgres => {
                postgres(&format!("CREATE SCHEMA {table}"));
                format!("{table}.rows")
            }
            Kind::Sqlite | Kind::Objects => table,
        };
        let place = Self { kind, folder: folder.to_owned(), table };
        let columns = "id bigint NOT NULL, key text NOT NULL, n bigint NOT NULL";
        let create = format!("CREATE TABLE {} ({columns})", place.table);
        match kind {
            Kind::Sqlite => drop(place.database().execute(&create, ()).expect("created")),
            Kind::Postgres => drop(postgres(&create)),
            Kind::Objects => {}
        }
        place
    }

    fn database(&self) -> rusqlite::Connection {
        sqlite(&self.folder.join("places.db"))
    }

    fn lines(&self) -> String {
        let Self { kind, folder, table } = self;
        let folder = folder.display();
        match kind {
            Kind::Sqlite => {
                format!("type = \"sqlite\"\npath = \"{folder}/places.db\"\ntable = \"{table}\"")
            }
            Kind::Postgres => {
                let url = postgres_url();
                format!("type = \"postgres\"\nurl = \"{url}\"\ntable = \"{table}\"")
            }
            Kind::Objects => {
                format!("type = \"objects\"\nurl = \"{folder}/{table}\"\ncompression = \"none\"")
            }
        }
    }

    /// Returns the ids of all rows, sorted.
    fn ids(&self) -> Vec<u64> {
        let query = format!("SELECT id FROM {}", self.table);
        let mut ids: Vec<u64> = match self.kind {
            Kind::Sqlite => {
                let database = self.database();
                let mut query = database.prepare(&query).expect("sql");
                let ids = query.query_map((), |row| row.get(0)).expect("rows");
                ids.map(|id| id.expect("an id")).collect()
            }
            Kind::Postgres => {
                postgres(&query).iter().map(|id| id.parse().expect("an id")).collect()
            }
            Kind::Objects => {
                let mut ids = Vec::new();
                objects(&self.folder.join(&self.table), &mut ids);
                ids
            }
        };
        ids.sort_unstable();
        ids
    }
}

/// Collects the ids in objects below a folder, except in the claim logs.
fn objects(folder: &Path, ids: &mut Vec<u64>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        if path.ends_with("_shardmill") {
            continue;
        }
        if path.is_dir() {
            objects(&path, ids);
        } else if path.extension().is_some_and(|extension| extension == "ndjson") {
            for line in std::fs::read_to_string(&path).expect("an object").lines() {
                let row: serde_json::Value = serde_json::from_str(line).expect("JSON");
                ids.push(row["id"].as_u64().expect("an id"));
            }
        }
    }
}

/// Lines of a file as a stream, so that each run ends by itself.
struct Lines {
    folder: tempfile::TempDir,
    count: u64,
}

impl Lines {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder"), count: 0 }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("lines.ndjson")
    }

    /// Appends rows.
    fn put(&mut self, count: u64) {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(self.path());
        let mut file = file.expect("a file");
        for id in self.count..self.count + count {
            file.write_all(&row(id, 7)).expect("written");
            file.write_all(b"\n").expect("written");
        }
        self.count += count;
    }

    /// Writes a pipeline of the lines to these sinks; returns its path.
    fn pipeline(&self, sinks: &[(&str, &Place)]) -> String {
        self.with(sinks, "").write()
    }

    fn with(&self, sinks: &[(&str, &Place)], lines: &str) -> PipelineToml {
        let names: Vec<&str> = sinks.iter().map(|(name, _)| *name).collect();
        let format = "format = \"application/json\"";
        let file = PipelineToml::new(self.folder.path(), "lines").file(&self.path(), format);
        let file = file.route_all_to(&names);
        sinks.iter().fold(file, |file, (name, place)| {
            file.sink(name, &format!("{}\n{lines}", place.lines()))
        })
    }
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn ids(range: std::ops::Range<u64>) -> Vec<u64> {
    range.collect()
}

#[test]
fn fault_04_a_sink_that_comes_back_starts_at_the_checkpoint_and_the_gap_is_a_named_hole() {
    for kind in KINDS {
        let mut lines = Lines::new();
        let a = Place::new(kind, lines.folder.path(), "a");
        let b = Place::new(Kind::Sqlite, lines.folder.path(), "b");
        lines.put(10);
        run_ok(&["run", &lines.pipeline(&[("a", &a), ("b", &b)])]);
        // The sink had all records when it was removed: nobody needs to be asked, now or later.
        let without = lines.pipeline(&[("b", &b)]);
        for _ in 0..3 {
            lines.put(5);
            let said = run_ok(&["run", &without]);
            assert!(!said.contains("hole"), "{kind:?}: {said}");
        }
        let with = lines.pipeline(&[("a", &a), ("b", &b)]);
        for _ in 0..2 {
            let said = run_ok(&["run", &with]);
            assert!(said.contains("hole 1: sink a lacks the records of shard"), "{kind:?}: {said}");
        }
        lines.put(5);
        run_ok(&["run", &with]);
        assert_eq!(b.ids(), ids(0..30), "{kind:?}");
        assert_eq!(a.ids(), [ids(0..10), ids(25..30)].concat(), "{kind:?}");
        let said = run_ok(&["check", &with]);
        assert!(said.contains("hole 1: sink a lacks"), "{kind:?}: {said}");
        assert!(said.contains("it was removed at 20"), "{kind:?}: {said}");
        assert!(said.contains("shardmill replay"), "{kind:?}: {said}");
        let report: serde_json::Value =
            serde_json::from_str(&run_ok(&["check", &with, "--json"])).expect("JSON");
        assert_eq!(report["holes"].as_array().map(Vec::len), Some(1), "{kind:?}: {report}");
        if matches!(kind, Kind::Objects) {
            let said = run_ok(&["objects", "verify", &with]);
            assert!(said.contains("hole 1: sink a lacks"), "{said}");
        }
    }
}

#[test]
fn fault_04_each_time_that_a_sink_is_away_is_a_hole_of_its_own() {
    let mut lines = Lines::new();
    let a = Place::new(Kind::Sqlite, lines.folder.path(), "a");
    let b = Place::new(Kind::Objects, lines.folder.path(), "b");
    for _ in 0..3 {
        lines.put(4);
        run_ok(&["run", &lines.pipeline(&[("a", &a), ("b", &b)])]);
        lines.put(3);
        run_ok(&["run", &lines.pipeline(&[("b", &b)])]);
    }
    let said = run_ok(&["run", &lines.pipeline(&[("a", &a), ("b", &b)])]);
    let holes: Vec<&str> = said.lines().filter(|line| line.contains("sink a lacks")).collect();
    assert_eq!(holes.len(), 3, "{said}");
    assert_eq!(a.ids(), [ids(0..4), ids(7..11), ids(14..18)].concat());
    assert_eq!(b.ids(), ids(0..21));
    let said = run_ok(&[
        "replay",
        &lines.pipeline(&[("a", &a), ("b", &b)]),
        "--sink",
        "a",
        "--hole",
        "2",
        "--filled",
    ]);
    assert!(said.contains("hole 2 of sink a is filled"), "{said}");
    let said = run_ok(&["check", &lines.pipeline(&[("a", &a), ("b", &b)])]);
    assert!(!said.contains("hole 2") && said.contains("hole 3"), "{said}");
}

/// Writes a pipeline of the world's stream to these sinks; the slow one commits after an hour.
fn stream_pipeline(world: &World, sinks: &[(&str, &Place, &str)], slow: Option<&str>) -> String {
    let names: Vec<&str> = sinks.iter().map(|(name, _, _)| *name).collect();
    let file = PipelineToml::new(world.folder.path(), "reading");
    let file = file.stream(STREAM, "embedded", "poll_interval = \"20 ms\"").route_all_to(&names);
    let file = sinks.iter().fold(file, |file, (name, place, more)| {
        let lines = format!("{}\n{more}", place.lines());
        match slow == Some(name) {
            true => file.table(&format!(
                "[[sink]]\nname = \"{name}\"\n{lines}\n[sink.commit]\nlinger = \"1 h\""
            )),
            false => file.sink(name, &lines),
        }
    });
    file.write()
}

fn start(world: &World, pipeline: &str) -> Process {
    let log = std::fs::File::create(world.log()).expect("a log");
    let run = shardmill(&["run", pipeline, "-v"]).stdout(Stdio::null()).stderr(log).spawn();
    Process(run.expect("the binary starts"))
}

#[test]
fn fault_04_a_sink_that_lags_is_given_up_once_and_for_all() {
    let world = World::new(2);
    let a = Place::new(Kind::Sqlite, world.folder.path(), "a");
    let b = Place::new(Kind::Sqlite, world.folder.path(), "b");
    let both = [("a", &a, ""), ("b", &b, "")];
    let pipeline = stream_pipeline(&world, &both, Some("b"));
    world.put(0..40, 10);
    let running = start(&world, &pipeline);
    wait_for("rows of a", || a.ids().len() == 40);
    // `check` does not connect to a removed sink: it uses the positions of the last checkpoint.
    let noted = "SELECT count(*) FROM sink_position WHERE sink = 'a'";
    let noted = || world.state().query_row(noted, (), |row| row.get::<_, u64>(0));
    wait_for("a's positions in the state", || noted() == Ok(2));
    drop(running);
    let pipeline = stream_pipeline(&world, &[("a", &a, "")], None);
    let refused = run(&["run", &pipeline, "--until-caught-up"]);
    assert_eq!(refused.status.code(), Some(1));
    for part in ["sink b is missing", "lags the other sinks", "`--drop-sink b`"] {
        assert!(error(&refused).contains(part), "{part} in {}", error(&refused));
    }
    let said = run_ok(&["check", &pipeline]);
    assert!(said.contains("warning: sink b is missing"), "{said}");
    run_ok(&["run", &pipeline, "--until-caught-up", "--drop-sink", "b"]);
    world.put(40..60, 10);
    run_ok(&["run", &pipeline, "--until-caught-up"]);
    // Neither a reload nor a lane that acquires a shard again needs the option.
    let running = start(&world, &pipeline);
    wait_for("the run to read", || world.logged("reading"));
    let with = stream_pipeline(&world, &both, None);
    let said = run_ok(&["reload", &with]);
    assert!(said.contains("+ sink b"), "{said}");
    world.put(60..80, 10);
    wait_for("rows of both", || a.ids().len() == 80 && b.ids().len() == 20);
    assert_eq!(running.terminate(), Some(0));
    assert_eq!((a.ids(), b.ids()), (ids(0..80), ids(60..80)));
    let said = run_ok(&["check", &with]);
    let holes = said.lines().filter(|line| line.contains("sink b lacks the records of shard"));
    assert_eq!(holes.count(), 2, "one in each shard: {said}");
}

#[test]
fn fault_04_shards_that_came_and_went_while_a_sink_was_away_are_holes_too() {
    let world = World::new(1);
    let a = Place::new(Kind::Sqlite, world.folder.path(), "a");
    let b = Place::new(Kind::Sqlite, world.folder.path(), "b");
    let both = [("a", &a, ""), ("b", &b, "")];
    world.put(0..20, 10);
    run_ok(&["run", &stream_pipeline(&world, &both, None), "--until-caught-up"]);
    let parent = &world.open_shards()[0];
    world.split(parent);
    world.put(20..60, 10);
    let alone = stream_pipeline(&world, &[("a", &a, "")], None);
    run_ok(&["run", &alone, "--until-caught-up"]);
    let children = world.open_shards();
    world.merge(&children[0], &children[1]);
    world.put(60..80, 10);
    run_ok(&["run", &alone, "--until-caught-up"]);
    let with = stream_pipeline(&world, &both, None);
    run_ok(&["run", &with, "--until-caught-up"]);
    world.put(80..100, 10);
    run_ok(&["run", &with, "--until-caught-up"]);
    assert_eq!((a.ids(), b.ids()), (ids(0..100), [ids(0..20), ids(80..100)].concat()));
    let said = run_ok(&["check", &with]);
    let holes = said.lines().filter(|line| line.contains("sink b lacks"));
    let whole = holes.clone().filter(|line| line.contains("from its beginning")).count();
    assert_eq!((holes.count(), whole), (3, 3), "two children and their child: {said}");
}

/// Makes a table with lineage columns, so that a replay can replace the rows of a window.
fn with_lineage(world: &World) -> Place {
    let place = Place::new(Kind::Postgres, world.folder.path(), "a");
    postgres(&format!(
        "ALTER TABLE {} ADD shardmill_pipeline text, ADD shardmill_shard text,
         ADD shardmill_sequence numeric, ADD shardmill_arrived_at timestamptz",
        place.table
    ));
    place
}

/// Runs the command that `check` prints, for one hole after the other.
fn fill_holes(pipeline: &str, count: usize) {
    for _ in 0..count {
        let said = run_ok(&["check", pipeline]);
        let command = said.split('`').find(|part| part.starts_with("shardmill replay"));
        let command: Vec<&str> = command.expect("a command").split(' ').skip(1).collect();
        run_ok(&command);
    }
    let said = run_ok(&["check", pipeline]);
    assert!(!said.contains("hole"), "{said}");
}

#[test]
fn fault_04_the_named_command_fills_the_hole() {
    let world = World::new(2);
    let a = with_lineage(&world);
    let b = Place::new(Kind::Sqlite, world.folder.path(), "b");
    let both = [("a", &a, "lineage = true"), ("b", &b, "")];
    world.put(0..40, 10);
    run_ok(&["run", &stream_pipeline(&world, &both, None), "--until-caught-up"]);
    world.put(40..80, 10);
    let alone = stream_pipeline(&world, &[("b", &b, "")], None);
    run_ok(&["run", &alone, "--until-caught-up"]);
    let with = stream_pipeline(&world, &both, None);
    world.put(80..100, 10);
    run_ok(&["run", &with, "--until-caught-up"]);
    assert_eq!(a.ids(), [ids(0..40), ids(80..100)].concat());
    fill_holes(&with, 2);
    assert_eq!(a.ids(), ids(0..100));
}

#[test]
fn fault_04_the_hole_of_a_shard_that_ended_is_filled_too() {
    let world = World::new(1);
    let a = with_lineage(&world);
    let b = Place::new(Kind::Sqlite, world.folder.path(), "b");
    let both = [("a", &a, "lineage = true"), ("b", &b, "")];
    world.put(0..20, 10);
    run_ok(&["run", &stream_pipeline(&world, &both, None), "--until-caught-up"]);
    world.put(20..40, 10);
    world.split(&world.open_shards()[0]);
    world.put(40..60, 10);
    let alone = stream_pipeline(&world, &[("b", &b, "")], None);
    run_ok(&["run", &alone, "--until-caught-up"]);
    world.put(60..80, 10);
    let with = stream_pipeline(&world, &both, None);
    run_ok(&["run", &with, "--until-caught-up"]);
    assert_eq!(a.ids(), [ids(0..20), ids(60..80)].concat());
    // One hole of the parent, and one of each child.
    fill_holes(&with, 3);
    assert_eq!((a.ids(), b.ids()), (ids(0..80), ids(0..80)));
}

#[test]
fn fault_25_a_renamed_sink_on_its_old_destination_is_found_and_goes_on() {
    for kind in KINDS {
        let world = World::new(2);
        let a = Place::new(kind, world.folder.path(), "a");
        let c = Place::new(Kind::Sqlite, world.folder.path(), "c");
        world.put(0..60, 10);
        let pipeline = stream_pipeline(&world, &[("a", &a, ""), ("c", &c, "")], Some("c"));
        let running = start(&world, &pipeline);
        wait_for("rows of a", || a.ids().len() == 60);
        drop(running);
        world.put(60..80, 10);
        // The same sink under another name, while another sink lags.
        let renamed = stream_pipeline(&world, &[("b", &a, ""), ("c", &c, "")], None);
        for _ in 0..2 {
            let refused = run(&["run", &renamed, "--until-caught-up"]);
            assert_eq!(refused.status.code(), Some(1), "{kind:?}: {}", error(&refused));
            for part in ["sink b", "sink a", "renamed_from = \"a\""] {
                assert!(error(&refused).contains(part), "{kind:?}: {part} in {}", error(&refused));
            }
        }
        assert_eq!(a.ids(), ids(0..60), "{kind:?}");
        let sinks = [("b", &a, "renamed_from = \"a\""), ("c", &c, "")];
        let pipeline = stream_pipeline(&world, &sinks, None);
        for _ in 0..2 {
            run_ok(&["run", &pipeline, "--until-caught-up"]);
            assert_eq!((a.ids(), c.ids()), (ids(0..80), ids(0..80)), "{kind:?}");
        }
        // Once the rename is recorded, the key `renamed_from` can be removed.
        world.put(80..90, 10);
        run_ok(&["run", &renamed, "--until-caught-up"]);
        assert_eq!((a.ids(), c.ids()), (ids(0..90), ids(0..90)), "{kind:?}");
        if matches!(kind, Kind::Objects) {
            run_ok(&["objects", "verify", &renamed, "--content"]);
        }
    }
}

#[test]
fn fault_25_a_sink_is_renamed_by_a_reload_and_refused_where_it_would_double() {
    let world = World::new(1);
    let a = Place::new(Kind::Sqlite, world.folder.path(), "a");
    let c = Place::new(Kind::Sqlite, world.folder.path(), "c");
    let first = [("a", &a, ""), ("c", &c, "")];
    let running = start(&world, &stream_pipeline(&world, &first, None));
    world.put(0..20, 10);
    wait_for("rows", || a.ids().len() == 20 && c.ids().len() == 20);
    let renamed = [("b", &a, "renamed_from = \"a\""), ("c", &c, "")];
    run_ok(&["reload", &stream_pipeline(&world, &renamed, None)]);
    world.put(20..40, 10);
    wait_for("more rows", || a.ids().len() >= 40 && c.ids().len() >= 40);
    assert_eq!(running.terminate(), Some(0));
    // Two sinks exchange their destinations, and one of them lags.
    world.put(40..60, 10);
    let same = [("b", &a, ""), ("c", &c, "")];
    let running = start(&world, &stream_pipeline(&world, &same, Some("c")));
    wait_for("rows of one", || a.ids().len() >= 60);
    drop(running);
    let exchanged = stream_pipeline(&world, &[("b", &c, ""), ("c", &a, "")], None);
    let refused = error(&run(&["run", &exchanged, "--until-caught-up"]));
    assert!(
        refused.contains("sink c is new at a destination to which sink b has written"),
        "{refused}"
    );
    run_ok(&["run", &stream_pipeline(&world, &same, None), "--until-caught-up"]);
    assert_eq!((a.ids(), c.ids()), (ids(0..60), ids(0..60)));
}

/// The sink's own position is at its former destination. Starting from the new destination's position would write all
/// rows again.
#[test]
fn fault_25_a_sink_that_moves_to_where_another_wrote_is_refused_whatever_is_configured() {
    for kind in [Kind::Postgres, Kind::Objects] {
        let world = World::new(1);
        let a = Place::new(kind, world.folder.path(), "a");
        let b = Place::new(kind, world.folder.path(), "b");
        let both = [("a", &a, ""), ("b", &b, "")];
        world.put(0..20, 10);
        run_ok(&["run", &stream_pipeline(&world, &both, None), "--until-caught-up"]);
        for (sinks, way_out) in [
            (vec![("a", &b, "")], "Give sink a its earlier destination again"),
            (
                vec![("a", &b, ""), ("b", &a, "")],
                "Give both sinks their earlier destinations again",
            ),
        ] {
            for setting in ["", "on_position_mismatch = \"sink\"\n"] {
                let moved = stream_pipeline(&world, &sinks, None);
                let text = std::fs::read_to_string(&moved).expect("the file");
                let text = text.replacen("[pipeline]\n", &format!("[pipeline]\n{setting}"), 1);
                std::fs::write(&moved, text).expect("written");
                let checked = run(&["check", &moved]);
                let refused = run(&["run", &moved, "--until-caught-up"]);
                assert_eq!(refused.status.code(), Some(1), "{kind:?}: {}", error(&refused));
                let checked = String::from_utf8_lossy(&checked.stdout).into_owned();
                for said in [checked, error(&refused)] {
                    let cause = "sink a is new at a destination to which sink b has written";
                    assert!(said.contains(cause) && said.contains(way_out), "{kind:?}: {said}");
                }
            }
        }
        run_ok(&["run", &stream_pipeline(&world, &both, None), "--until-caught-up"]);
        assert_eq!((a.ids(), b.ids()), (ids(0..20), ids(0..20)), "{kind:?}");
    }
}

#[test]
fn fault_04_a_sink_that_is_killed_before_its_first_commit_still_starts_after_its_hole() {
    for kind in KINDS {
        let world = World::new(1);
        let a = Place::new(Kind::Sqlite, world.folder.path(), "a");
        let b = Place::new(kind, world.folder.path(), "b");
        let both = [("a", &a, ""), ("b", &b, "")];
        world.put(0..10, 10);
        run_ok(&["run", &stream_pipeline(&world, &both, None), "--until-caught-up"]);
        world.put(10..20, 10);
        run_ok(&["run", &stream_pipeline(&world, &[("a", &a, "")], None), "--until-caught-up"]);
        world.put(20..30, 10);
        let running = start(&world, &stream_pipeline(&world, &both, Some("b")));
        wait_for("rows of a", || a.ids().len() == 30);
        drop(running);
        let said = run_ok(&["run", &stream_pipeline(&world, &both, None), "--until-caught-up"]);
        assert_eq!(said.matches("sink b lacks").count(), 1, "{kind:?}: {said}");
        assert_eq!(b.ids(), [ids(0..10), ids(20..30)].concat(), "{kind:?}");
    }
}

#[test]
fn fault_04_copies_of_dead_letters_may_lose_a_sink_too() {
    let mut lines = Lines::new();
    let a = Place::new(Kind::Sqlite, lines.folder.path(), "a");
    let strict = format!("CREATE UNIQUE INDEX one ON {} (key)", a.table);
    a.database().execute(&strict, ()).expect("created");
    let dead_letters_db = lines.folder.path().join("letters.db");
    let pipeline = |lines: &Lines, dead_letters: &[&str]| {
        let head = format!("[dead_letters]\nsinks = {dead_letters:?}");
        dead_letters
            .iter()
            .fold(lines.with(&[("a", &a)], "").table(&head), |file, name| {
                let path = dead_letters_db.display();
                let create = format!("table = \"{name}\"\ncreate = true");
                file.sink(name, &format!("type = \"sqlite\"\npath = \"{path}\"\n{create}"))
            })
            .write()
    };
    let copies = |name: &str| -> u64 {
        let query = format!("SELECT count(*) FROM {name}");
        sqlite(&dead_letters_db).query_row(&query, (), |row| row.get(0)).expect("a count")
    };
    // The rows have seven keys. The table takes each key once; all other rows become dead letters.
    for (dead_letters, more) in
        [(&["x", "y"][..], 10), (&["x"], 10), (&["x"], 10), (&["x", "y"], 0), (&["x", "y"], 10)]
    {
        lines.put(more);
        run_ok(&["run", &pipeline(&lines, dead_letters)]);
    }
    assert_eq!((copies("x"), copies("y")), (33, 13));
    let said = run_ok(&["check", &pipeline(&lines, &["x", "y"])]);
    assert_eq!(said.matches("sink y lacks").count(), 1, "{said}");
}

#[test]
fn fault_25_dead_letters_and_a_lagging_position_move_to_the_new_name() {
    let world = World::new(1);
    let a = Place::new(Kind::Sqlite, world.folder.path(), "a");
    let c = Place::new(Kind::Sqlite, world.folder.path(), "c");
    let strict = format!("CREATE UNIQUE INDEX one ON {} (id)", a.table);
    a.database().execute(&strict, ()).expect("created");
    world.put(0..10, 10);
    world.put(3..5, 10);
    let pipeline = stream_pipeline(&world, &[("a", &a, ""), ("c", &c, "")], None);
    run_ok(&["run", &pipeline, "--until-caught-up"]);
    // The renamed sink is the one that lags.
    world.put(10..30, 10);
    let pipeline = stream_pipeline(&world, &[("a", &a, ""), ("c", &c, "")], Some("a"));
    let running = start(&world, &pipeline);
    wait_for("rows of c", || c.ids().len() == 32);
    drop(running);
    let renamed = stream_pipeline(&world, &[("b", &a, ""), ("c", &c, "")], None);
    let refused = error(&run(&["run", &renamed, "--until-caught-up"]));
    assert!(refused.contains("sink a is missing") && refused.contains("renamed_from"), "{refused}");
    let sinks = [("b", &a, "renamed_from = \"a\""), ("c", &c, "")];
    let pipeline = stream_pipeline(&world, &sinks, None);
    run_ok(&["run", &pipeline, "--until-caught-up"]);
    assert_eq!((a.ids(), c.ids().len()), (ids(0..30), 32));
    let said = run_ok(&["dlq", "list", "--pipeline", &pipeline, "--sink", "b"]);
    assert!(said.contains("sink:b") && said.contains("2 dead letters"), "{said}");
    a.database().execute("DROP INDEX one", ()).expect("dropped");
    run_ok(&["dlq", "redrive", "--pipeline", &pipeline, "--all"]);
    assert_eq!(a.ids().len(), 32);
}

#[test]
fn fault_25_what_was_swapped_in_outlives_a_renamed_sink() {
    let world = World::new(1);
    let path = |name: &str| world.folder.path().join(name);
    let version = "ALTER TABLE rows ADD version TEXT";
    world.mart().execute(version, ()).expect("altered");
    std::fs::write(path("stage.wasm"), stamp("v1 none")).expect("written");
    std::fs::write(path("next.wasm"), stamp("v2 none")).expect("written");
    let pipeline = |sink: &str, more: &str| {
        let file = PipelineToml::new(world.folder.path(), "reading");
        let source = "format = \"application/json\"\npoll_interval = \"20 ms\"";
        let routes = format!("routes = {{ all = [\"{sink}\"] }}");
        let stage = path("stage.wasm").display().to_string();
        let mart = path("mart.db").display().to_string();
        let lines = format!("type = \"sqlite\"\npath = \"{mart}\"\ntable = \"rows\"\n{more}");
        file.stream(STREAM, "embedded", source)
            .stage("stamp", &stage, &routes)
            .sink(sink, &lines)
            .write()
    };
    let first = pipeline("a", "");
    world.put(0..10, 10);
    let running = start(&world, &first);
    world.wait_rows(10);
    let next = path("next.wasm").display().to_string();
    run_ok(&["plugin", "swap", "stamp", &next, "--pipeline", &first]);
    world.put(10..20, 10);
    world.wait_rows(20);
    assert_eq!(running.terminate(), Some(0));
    world.put(20..30, 10);
    run_ok(&["run", &pipeline("b", "renamed_from = \"a\""), "--until-caught-up"]);
    let count = |version: &str| -> u64 {
        let query = "SELECT count(*) FROM rows WHERE version = ?1";
        world.mart().query_row(query, [version], |row| row.get(0)).expect("a count")
    };
    assert_eq!((count("v1"), count("v2")), (10, 20), "the files did not change what runs");
    let ledger = "SELECT count(*) FROM ledger";
    let segments: u64 = world.state().query_row(ledger, (), |row| row.get(0)).expect("a count");
    assert_eq!(segments, 2, "renaming a sink adds no revision");
}

#[test]
fn fault_18_an_unreadable_record_of_what_runs_stops_the_start() {
    let mut lines = Lines::new();
    let a = Place::new(Kind::Sqlite, lines.folder.path(), "a");
    lines.put(5);
    let pipeline = lines.pipeline(&[("a", &a)]);
    run_ok(&["run", &pipeline]);
    let state = rusqlite::Connection::open(lines.folder.path().join("state/lines/state.db"));
    let state = state.expect("the state");
    for running in ["{\"stages\":\"of a later version\"}", "", "{}"] {
        state.execute("UPDATE running SET running = ?1", [running]).expect("damaged");
        lines.put(1);
        let refused = run(&["run", &pipeline]);
        assert_eq!(refused.status.code(), Some(1), "{running}");
        for part in ["record of the running revision", "--files-count", "state.db"] {
            assert!(error(&refused).contains(part), "{part} in {}", error(&refused));
        }
        assert_eq!(a.ids().len() as u64, lines.count - 1, "nothing was read");
        run_ok(&["run", &pipeline, "--files-count"]);
        run_ok(&["run", &pipeline]);
        assert_eq!(a.ids(), ids(0..lines.count));
    }
}

#[test]
fn fault_20_a_record_with_a_dead_letter_has_its_whole_outcome_from_one_revision() {
    let world = World::new(1);
    let path = |name: &str| world.folder.path().join(name);
    world.mart().execute("ALTER TABLE rows ADD version TEXT", ()).expect("altered");
    std::fs::write(path("v1.wasm"), stamp("v1 reject 7")).expect("written");
    std::fs::write(path("v2.wasm"), stamp("v2 none")).expect("written");
    let pipeline = |version: &str, many: u32, linger: &str| {
        let file = PipelineToml::new(world.folder.path(), "reading");
        let source = "format = \"application/json\"\npoll_interval = \"20 ms\"";
        let many = format!(
            "config = {{ many_on = \"\\\"id\\\":7,\", many = {many}, format = \"application/json\" }}"
        );
        let stage = path(version).display().to_string();
        let mart = path("mart.db").display().to_string();
        let file = file.stream(STREAM, "embedded", source).stage("many", "hostile", &many);
        let file = file.stage("stamp", &stage, "routes = { all = [\"mart\"] }");
        file.table(&format!(
            "[[sink]]\nname = \"mart\"\ntype = \"sqlite\"\npath = \"{mart}\"\ntable = \"rows\"\n\
             [sink.commit]\nlinger = \"{linger}\""
        ))
        .write()
    };
    world.put(1..10, 10);
    let running = start(&world, &pipeline("v1.wasm", 1, "1 h"));
    let dead_letters = || -> u64 {
        let query = "SELECT count(*) FROM dead_letter WHERE held = 0";
        let state = world.folder.path().join("state/reading/state.db");
        let Ok(state) = rusqlite::Connection::open(state) else { return 0 };
        state.query_row(query, (), |row| row.get(0)).unwrap_or(0)
    };
    wait_for("the dead letter", || dead_letters() == 1);
    drop(running);
    // The next version accepts the record, and would make three items of it.
    world.put(10..20, 10);
    for _ in 0..2 {
        run_ok(&["run", &pipeline("v2.wasm", 3, "50 ms"), "--until-caught-up"]);
        let mart = world.mart();
        let mut query = mart.prepare("SELECT id, version FROM rows ORDER BY id").expect("sql");
        let rows = query.query_map((), |row| Ok((row.get(0)?, row.get(1)?)));
        let rows: Vec<(u64, String)> = rows.expect("rows").map(|row| row.expect("a row")).collect();
        assert_eq!(dead_letters(), 1);
        let of_seven = rows.iter().filter(|(id, _)| *id == 7).count();
        assert_eq!(of_seven, 0, "the record is a dead letter: {rows:?}");
        let found: Vec<u64> = rows.iter().map(|(id, _)| *id).collect();
        assert_eq!(found, [ids(1..7), ids(8..20)].concat());
        for (id, version) in rows {
            // The record already has an outcome; the records after it have none yet.
            assert_eq!(version, if id < 7 { "v1" } else { "v2" }, "{id}");
        }
    }
}
