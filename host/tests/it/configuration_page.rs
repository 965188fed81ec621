//! The page `docs/src/configuration.md` says what the reader of `pipeline.toml` does: which keys a table has, the type
//! of each, what holds without it, and its bounds.
//!
//! Nothing of the reader is looked into. Each key of the page is put into a pipeline that is valid otherwise
//! ([`SECTIONS`]), with values that the page allows and with values that it does not. Cells in other forms than these
//! are sentences for people, and are not compared:
//!
//! | cell | form | what is tried |
//! |---|---|---|
//! | type | a name of [`Form::wrong`] | a value of another type is refused |
//! | default | `required` | the pipeline without the key is refused |
//! | default | one value in backticks | the pipeline with that value is the one without the key |
//! | bounds | `A to B`, `A or more` | `A` and `B` are taken; one less, and one more, are refused |
//! | bounds | values in backticks, with commas | each is taken, and another word is refused |
//! | bounds | `not empty`, `a name` | an empty text, a text with a space, are refused |

use std::collections::BTreeSet;

use shardmill_cli::registry::SINK_TYPES;
use shardmill_config::{ConfigError, PipelineConfig};
use toml::{Table, Value};

use crate::support::root;

/// A pipeline with one sink.
macro_rules! sink_of {
    ($keys:literal) => {
        concat!(
            "[pipeline]\nname = \"cars\"\n[source]\ntype = \"file\"\npath = \"-\"\n[[sink]]\nname = \"out\"\n",
            $keys,
            "\n"
        )
    };
}

/// A table of the page: its heading, a pipeline that has it, and the way to it (numbers are places in lists).
struct Section {
    heading: &'static str,
    pipeline: &'static str,
    way: &'static [&'static str],
}

const KINESIS: &str = r#"
[pipeline]
name = "cars"
[source]
type = "kinesis"
stream = "events"
assume_role = { arn = "arn:aws:iam::123456789012:role/reader" }
create = { shards = 1 }
batch = {}
[[stage]]
name = "decode"
plugin = "decode.wasm"
routes = { rows = ["out"] }
limits = {}
[stage.grant]
lookup = ["makes"]
http = [{ host = "api.example.com" }]
[[sink]]
name = "out"
type = "discard"
commit = {}
[[lookup]]
name = "makes"
url = "sqlite:makes.db"
query = "SELECT id FROM makes WHERE id IN (SELECT value FROM json_each(?1))"
cache = {}
[reload]
trial = {}
probation = {}
[timing]
[admin]
[intake]
listen = "127.0.0.1:8080"
"#;
const FILE: &str = r#"
[pipeline]
name = "cars"
[source]
type = "file"
path = "cars.csv"
[[sink]]
name = "out"
type = "discard"
"#;
const DEAD_LETTERS: &str = sink_of!("type = \"discard\"\n[dead_letters]");
const STDOUT: &str = sink_of!("type = \"stdout\"");
const SQLITE: &str = sink_of!("type = \"sqlite\"\npath = \"cars.db\"\ntable = \"cars\"");
const POSTGRES: &str =
    sink_of!("type = \"postgres\"\nurl = \"postgres://u@db.example.com/d\"\ntable = \"cars\"");
const OBJECTS: &str = sink_of!("type = \"objects\"\nurl = \"out\"");
const REDSHIFT: &str = sink_of!(
    "type = \"redshift\"\nurl = \"postgres://u@db.example.com/d\"\ntable = \"cars\"\n\
     staging = \"s3://bucket/prefix\"\niam_role = \"default\""
);
const STREAM: &str = sink_of!(
    "type = \"kinesis\"\nstream = \"other\"\nassume_role = { arn = \"arn:aws:iam::123456789012:role/w\" }"
);
const HTTP: &str = sink_of!("type = \"http\"\nurl = \"https://api.example.com/rows\"");

const SINK: &[&str] = &["sink", "0"];
const SECTIONS: &[Section] = &[
    section("[pipeline]", KINESIS, &["pipeline"]),
    section("[source] with type = \"kinesis\"", KINESIS, &["source"]),
    section("[source.assume_role]", KINESIS, &["source", "assume_role"]),
    section("[source.create]", KINESIS, &["source", "create"]),
    section("[source] with type = \"file\"", FILE, &["source"]),
    section("[source.batch]", KINESIS, &["source", "batch"]),
    section("[[stage]]", KINESIS, &["stage", "0"]),
    section("[stage.grant]", KINESIS, &["stage", "0", "grant"]),
    section("[[stage.grant.http]]", KINESIS, &["stage", "0", "grant", "http", "0"]),
    section("[stage.limits]", KINESIS, &["stage", "0", "limits"]),
    section("[[sink]]", KINESIS, SINK),
    section("[sink.commit]", KINESIS, &["sink", "0", "commit"]),
    section("[[sink]] with type = \"stdout\"", STDOUT, SINK),
    section("[[sink]] with type = \"sqlite\"", SQLITE, SINK),
    section("[[sink]] with type = \"postgres\"", POSTGRES, SINK),
    section("[[sink]] with type = \"objects\"", OBJECTS, SINK),
    section("[[sink]] with type = \"redshift\"", REDSHIFT, SINK),
    section("[[sink]] with type = \"kinesis\"", STREAM, SINK),
    section("[[sink]] with type = \"http\"", HTTP, SINK),
    section("[dead_letters]", DEAD_LETTERS, &["dead_letters"]),
    section("[[lookup]]", KINESIS, &["lookup", "0"]),
    section("[lookup.cache]", KINESIS, &["lookup", "0", "cache"]),
    section("[reload]", KINESIS, &["reload"]),
    section("[reload.trial]", KINESIS, &["reload", "trial"]),
    section("[reload.probation]", KINESIS, &["reload", "probation"]),
    section("[timing]", KINESIS, &["timing"]),
    section("[admin]", KINESIS, &["admin"]),
    section("[intake]", KINESIS, &["intake"]),
];

/// Keys that mean something only beside others, with those: the section's heading, the key, and lines of TOML.
const COMPANIONS: &[(&str, &str, &str)] = &[
    ("[source] with type = \"kinesis\"", "consumer", "reader = \"fan-out\""),
    ("[source] with type = \"file\"", "delimiter", "format = \"text/csv\""),
    ("[sink.commit]", "give_up_after", "on_failure = \"dead-letter\""),
    ("[[sink]] with type = \"sqlite\"", "mode", "key = [\"id\"]"),
    ("[[sink]] with type = \"sqlite\"", "key", "mode = \"upsert\""),
    ("[[sink]] with type = \"sqlite\"", "newest_by", "mode = \"upsert\"\nkey = [\"id\"]"),
    ("[[sink]] with type = \"postgres\"", "mode", "key = [\"id\"]"),
    ("[[sink]] with type = \"postgres\"", "key", "mode = \"upsert\""),
    ("[[sink]] with type = \"postgres\"", "newest_by", "mode = \"upsert\"\nkey = [\"id\"]"),
    ("[[sink]] with type = \"redshift\"", "mode", "key = [\"id\"]"),
    ("[[sink]] with type = \"redshift\"", "key", "mode = \"upsert\""),
    ("[[sink]] with type = \"redshift\"", "newest_by", "mode = \"upsert\"\nkey = [\"id\"]"),
];

/// Keys that sinks of every type have; the page says them once.
const EVERY_SINK: [&str; 3] = ["name", "type", "commit"];
/// A key of every sink that is read before the others, so that messages do not name it among them.
const READ_BEFORE: &str = "renamed_from";

const fn section(
    heading: &'static str,
    pipeline: &'static str,
    way: &'static [&'static str],
) -> Section {
    Section { heading, pipeline, way }
}

/// A row of a table of the page.
struct Row {
    key: String,
    form: String,
    default: String,
    bounds: String,
}

#[test]
fn the_page_of_keys_is_what_the_reader_reads() {
    let page = std::fs::read_to_string(root().join("docs/src/configuration.md")).expect("the page");
    let mut problems = Vec::new();
    let mut tried = BTreeSet::new();
    for (heading, rows) in tables(&page) {
        let Some(section) = SECTIONS.iter().find(|it| it.heading == heading) else {
            problems.push(format!("{heading}: expected a section that the test knows"));
            continue;
        };
        tried.insert(section.heading);
        compare_keys(section, &rows, &mut problems);
        for row in &rows {
            let place = format!("{heading}: `{}`", row.key);
            let mut found = Vec::new();
            Tried { section, row }.compare(&mut found);
            problems.extend(found.into_iter().map(|problem| format!("{place}: {problem}")));
        }
    }
    let missing = SECTIONS.iter().filter(|it| !tried.contains(it.heading));
    problems.extend(missing.map(|it| format!("{}: expected its table on the page", it.heading)));
    assert!(problems.is_empty(), "docs/src/configuration.md:\n{}", problems.join("\n"));
}

/// The tables of keys, each with the heading before it.
fn tables(page: &str) -> Vec<(String, Vec<Row>)> {
    let mut tables: Vec<(String, Vec<Row>)> = Vec::new();
    let mut heading = String::new();
    let mut is_of_keys = false;
    for line in page.lines() {
        if let Some(text) = line.strip_prefix("## ").or_else(|| line.strip_prefix("### ")) {
            heading = text.replace('`', "");
        } else if line.starts_with("| key | type | default | bounds |") {
            is_of_keys = true;
            tables.push((heading.clone(), Vec::new()));
        } else if !line.starts_with('|') {
            is_of_keys = false;
        } else if is_of_keys && !line.starts_with("|---") {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let [_, key, form, default, bounds, ..] = cells[..] else { panic!("{line}") };
            let cell = |text: &str| text.to_owned();
            let row = Row {
                key: key.replace('`', ""),
                form: cell(form),
                default: cell(default),
                bounds: cell(bounds),
            };
            tables.last_mut().expect("a table").1.push(row);
        }
    }
    tables
}

/// The reader names the keys that it knows where it finds another one.
fn compare_keys(section: &Section, rows: &[Row], problems: &mut Vec<String>) {
    let text = section.with(&[("zzz", Value::Integer(1))]);
    let error = parse(&text).expect_err("an unknown key");
    let helps = error.problems().iter().filter(|it| it.message().contains("`zzz`"));
    let help = helps.filter_map(|it| it.help()).collect::<String>();
    let known: BTreeSet<String> = help.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    let mut shown: BTreeSet<String> = rows.iter().map(|row| row.key.clone()).collect();
    shown.remove(READ_BEFORE);
    if section.heading.starts_with("[[sink]]") {
        shown.extend(EVERY_SINK.map(str::to_owned));
    }
    // The table of all types shows no type's own keys.
    let known: BTreeSet<_> = match section.heading {
        "[[sink]]" => known.into_iter().filter(|key| EVERY_SINK.contains(&key.as_str())).collect(),
        _ => known,
    };
    if known != shown {
        problems.push(format!("{}: expected the keys {known:?}, found {shown:?}", section.heading));
    }
}

struct Tried<'a> {
    section: &'a Section,
    row: &'a Row,
}

impl Tried<'_> {
    fn compare(&self, problems: &mut Vec<String>) {
        let Row { form, default, bounds, .. } = self.row;
        match wrong(form) {
            Some(wrong) => self.expect_refused(wrong, problems),
            None => problems.push(format!("unknown type {form:?}")),
        }
        if default == "required" {
            if parse(&self.section.without(&self.row.key)).is_ok() {
                problems.push("is required on the page, and not by the reader".to_owned());
            }
        } else {
            if let Some(value) = quoted(default) {
                self.expect_default(value, problems);
            }
            if parse(&self.section.without(&self.row.key)).is_err() && !self.is_needed_elsewhere() {
                problems.push("is not required on the page, but by the reader".to_owned());
            }
        }
        self.compare_bounds(bounds.split(';').next().unwrap_or_default().trim(), problems);
    }

    /// The sinks of a pipeline with stages need routes.
    fn is_needed_elsewhere(&self) -> bool {
        (self.section.heading, self.row.key.as_str()) == ("[[stage]]", "routes")
    }

    fn compare_bounds(&self, bounds: &str, problems: &mut Vec<String>) {
        if let Some((least, most)) = bounds.split_once(" to ") {
            let (Some(least), Some(most)) = (self.amount(least), self.amount_or_key(most)) else {
                return;
            };
            self.expect_taken(self.written(least), problems);
            if let Some(less) = least.checked_sub(1) {
                self.expect_refused(self.written(less), problems);
            }
            if let Some(most) = most {
                self.expect_taken(self.written(most), problems);
                self.expect_refused(self.written(most + 1), problems);
            }
        } else if let Some(least) = bounds.strip_suffix(" or more") {
            let least = self.amount(least).expect("a number");
            self.expect_taken(self.written(least), problems);
        } else if bounds.starts_with("not empty") {
            self.expect_refused(Value::from(""), problems);
        } else if bounds.starts_with("a name") && !bounds.contains("table") {
            self.expect_refused(Value::from("two words"), problems);
        } else if bounds.starts_with("`\"") {
            let choices: Vec<&str> = bounds.split(", ").map_while(quoted).collect();
            for choice in choices.iter().filter(|it| !it.chars().any(char::is_uppercase)) {
                let Some(choice) = value(choice) else { continue };
                // A choice may need other keys; it is taken if nothing is said of the key itself.
                self.expect_taken(choice, problems);
            }
            if self.row.form == "text" && !bounds.contains(" or ") {
                self.expect_refused(Value::from("zzz"), problems);
            }
        }
    }

    /// A number, milliseconds or bytes.
    fn amount(&self, text: &str) -> Option<i64> {
        let (number, unit) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        let factor: i64 = match unit {
            "" | "B" | "ms" => 1,
            "s" => 1_000,
            "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "PiB" => 1 << 50,
            _ => return None,
        };
        Some(number.parse::<i64>().ok()? * factor)
    }

    /// `Some(None)` where another key is the bound.
    fn amount_or_key(&self, text: &str) -> Option<Option<i64>> {
        match text.starts_with('`') {
            true => Some(None),
            false => Some(Some(self.amount(text.split(',').next()?)?)),
        }
    }

    fn written(&self, amount: i64) -> Value {
        match self.row.form.as_str() {
            "duration" => Value::from(format!("{amount} ms")),
            "size" => Value::from(format!("{amount} B")),
            "list" => Value::from(vec![amount]),
            _ => Value::from(amount),
        }
    }

    /// The pipeline with the key's companions, and with the key where it has a value.
    fn with(&self, found: Option<Value>) -> String {
        let companions = COMPANIONS
            .iter()
            .filter(|(heading, key, _)| *heading == self.section.heading && *key == self.row.key);
        let companions: Table =
            companions.map(|(.., lines)| *lines).collect::<String>().parse().expect("companions");
        self.section.changed(|table| {
            table.extend(companions);
            table.remove(&self.row.key);
            table.extend(found.map(|value| (self.row.key.clone(), value)));
        })
    }

    /// Problems at the key, or in its table where it has one.
    fn problems_of(&self, found: &Value) -> Vec<String> {
        let text = self.with(Some(found.clone()));
        let Err(error) = parse(&text) else { return Vec::new() };
        let lines: Vec<&str> = text.lines().collect();
        let is_at_the_key = |place: &str| {
            let line = place.split(':').nth(1).and_then(|line| line.parse::<usize>().ok());
            let line = line.and_then(|line| lines.get(line.checked_sub(1)?)).copied();
            let key = &self.row.key;
            line.is_some_and(|line| {
                line.starts_with(&format!("{key} ="))
                    || line.trim_matches(['[', ']']).ends_with(key.as_str())
            })
        };
        let problems = error.problems().iter().filter(|it| is_at_the_key(&it.place()));
        problems.map(|it| it.to_string()).collect()
    }

    fn expect_refused(&self, found: Value, problems: &mut Vec<String>) {
        if self.problems_of(&found).is_empty() {
            problems.push(format!("expected {found} to be refused, it is taken"));
        }
    }

    fn expect_taken(&self, found: Value, problems: &mut Vec<String>) {
        for problem in self.problems_of(&found) {
            problems.push(format!("expected {found} to be taken, found: {problem}"));
        }
    }

    fn expect_default(&self, default: &str, problems: &mut Vec<String>) {
        let default = value(default).unwrap_or_else(|| panic!("{default} is not a value of TOML"));
        // A default may mean something only beside other keys, or only without those that another value needs.
        let alone = |found: Option<Value>| {
            self.section.changed(|table| {
                table.remove(&self.row.key);
                table.extend(found.map(|value| (self.row.key.clone(), value)));
            })
        };
        let shown =
            |text: String| Ok((parse(&text)?, text)).map(|(config, text)| shown(&config, &text));
        let pairs = [
            (alone(None), alone(Some(default.clone()))),
            (self.with(None), self.with(Some(default.clone()))),
        ];
        let are_same = |(without, with): (String, String)| -> Result<bool, ConfigError> {
            Ok(shown(without)? == shown(with)?)
        };
        let [alone, beside] = pairs.map(are_same);
        match alone.or(beside) {
            Ok(true) => {}
            Ok(false) => problems.push(format!("{default} is not the default")),
            Err(error) => problems.push(format!("{default} is refused: {error}")),
        }
    }
}

/// A value of another type than the one of this name.
fn wrong(form: &str) -> Option<Value> {
    match form {
        "text" | "list" | "table" | "true or false" => Some(Value::Integer(7)),
        "number" | "duration" | "size" => Some(Value::Boolean(true)),
        _ => None,
    }
}

/// Returns the text within backticks, if there is nothing else.
fn quoted(text: &str) -> Option<&str> {
    let inner = text.strip_prefix('`')?.strip_suffix('`')?;
    (!inner.contains('`')).then_some(inner)
}

fn value(text: &str) -> Option<Value> {
    format!("value = {text}").parse::<Table>().ok()?.remove("value")
}

fn parse(text: &str) -> Result<PipelineConfig, ConfigError> {
    shardmill_config::parse("pipeline.toml", text, &SINK_TYPES, &|_| None)
}

/// A configuration without the text that it was read from, and without the places in it.
fn shown(config: &PipelineConfig, text: &str) -> String {
    let shown = format!("{config:?}").replace(&format!("{text:?}"), "");
    let mut parts = shown.split("fingerprint_json: \"");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let mut is_escaped = false;
        let end = part.find(|letter| {
            let is_end = letter == '"' && !is_escaped;
            is_escaped = letter == '\\' && !is_escaped;
            is_end
        });
        kept.push_str(&part[end.unwrap_or_default()..]);
    }
    // Places are ranges of bytes: `12..34`.
    let mut words: Vec<&str> = Vec::new();
    for word in kept.split_inclusive([' ', ',', ')', '}']) {
        let (start, end) = word.split_once("..").unwrap_or(("x", ""));
        let is_number =
            |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !(is_number(start.trim_start_matches("Some("))
            && is_number(end.trim_end_matches([' ', ',', ')', '}'])))
        {
            words.push(word);
        }
    }
    words.concat()
}

impl Section {
    /// Its pipeline, with these keys in its table.
    fn with(&self, keys: &[(&str, Value)]) -> String {
        self.changed(|table| {
            for (key, value) in keys {
                table.insert((*key).to_owned(), value.clone());
            }
        })
    }

    fn without(&self, key: &str) -> String {
        self.changed(|table| drop(table.remove(key)))
    }

    fn changed(&self, change: impl FnOnce(&mut Table)) -> String {
        let mut pipeline: Value = Value::Table(self.pipeline.parse().expect("a pipeline"));
        let mut at = &mut pipeline;
        for step in self.way {
            at = match step.parse::<usize>() {
                Ok(place) => at.get_mut(place).expect("an item"),
                Err(_) => at.get_mut(*step).expect("a table"),
            };
        }
        change(at.as_table_mut().expect("a table"));
        toml::to_string(&pipeline).expect("a pipeline as text")
    }
}
