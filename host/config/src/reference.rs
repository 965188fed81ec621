//! Reference of sinks: a Markdown page that is made from the descriptions in the sink types.

use std::fmt::Write as _;
use std::time::Duration;

use super::check::bytes_text;
use super::{CommitPolicy, Key, KeyDefault, KeyForm, SinkTypes};

/// Keys that sinks of every type have, besides `type`.
const COMMON: [Key; 3] = [
    Key {
        name: "name",
        form: KeyForm::Text,
        default: KeyDefault::Required("\"mart\""),
        about: "Name of the sink, unique among stages and sinks: part of the key of its positions.",
    },
    Key {
        name: "renamed_from",
        form: KeyForm::Text,
        default: KeyDefault::None,
        about: "Former name of the sink: the state that is stored under it moves to the new name.",
    },
    Key {
        name: "commit",
        form: KeyForm::Table,
        default: KeyDefault::None,
        about: "Commit policy: the keys below.",
    },
];

/// Keys of `[sink.commit]`.
const COMMIT: [Key; 5] = [
    Key {
        name: "rows",
        form: KeyForm::Number,
        default: KeyDefault::ByType,
        about: "Commit when one shard has this number of buffered rows.",
    },
    Key {
        name: "bytes",
        form: KeyForm::Size,
        default: KeyDefault::ByType,
        about: "Commit when the buffered rows of one shard have this size; at most `buffer` of `[pipeline]`.",
    },
    Key {
        name: "linger",
        form: KeyForm::Duration,
        default: KeyDefault::ByType,
        about: "Commit when the oldest buffered row has this age.",
    },
    Key {
        name: "on_failure",
        form: KeyForm::Text,
        default: KeyDefault::Value("\"block\""),
        about: "What to do while the sink is unreachable: `block`: its shards wait; `dead-letter`: they go on after a \
                while, and its rows become dead letters.",
    },
    Key {
        name: "give_up_after",
        form: KeyForm::Duration,
        default: KeyDefault::Value("\"5 min\""),
        about: "With `dead-letter`: how long shards wait for the sink.",
    },
];

impl SinkTypes {
    /// Returns the reference of these types: a Markdown page with a table of keys for each.
    pub fn reference(&self) -> String {
        let mut page = String::from(
            "# Sink types and their keys\n\n\
             `cargo xtask test` compares this page with what the sink types say, in `host/sinks/` and \
             `host/kinesis/`.\n\n\
             ## Every sink\n\n\
             A `[[sink]]` has a `type`, which is one of the sections below, and these keys:\n\n",
        );
        table(&mut page, &COMMON);
        page.push_str(
            "\n`[sink.commit]` says when a sink commits (at the first of `rows`, `bytes` and `linger`), and what \
             happens while it cannot:\n\n",
        );
        table(&mut page, &COMMIT);
        for own in self.iter() {
            // Writing to a string does not fail.
            let _ = write!(page, "\n## {}\n\n{}\n\n", own.name(), own.about());
            if !own.keys().is_empty() {
                table(&mut page, own.keys());
                page.push('\n');
            }
            let CommitPolicy { rows_max, bytes_max, linger_max, .. } = own.commit_policy();
            let (bytes, linger) = (bytes_text(bytes_max), duration_text(linger_max));
            let _ = writeln!(page, "Commits by default: `{rows_max}` rows, `{bytes}`, `{linger}`.");
        }
        page
    }
}

/// Formats a duration as in `pipeline.toml`.
fn duration_text(duration: Duration) -> String {
    match duration.as_millis() {
        ms if ms % 60_000 == 0 => format!("{} min", ms / 60_000),
        ms if ms % 1_000 == 0 => format!("{} s", ms / 1_000),
        ms => format!("{ms} ms"),
    }
}

fn table(page: &mut String, keys: &[Key]) {
    page.push_str("| key | value | default | |\n|---|---|---|---|\n");
    for Key { name, form, default, about } in keys {
        let default = match default {
            KeyDefault::Required(example) => format!("required, such as `{example}`"),
            KeyDefault::ByType => "depends on the type".to_owned(),
            KeyDefault::None => "none".to_owned(),
            KeyDefault::Value(value) => format!("`{value}`"),
        };
        let _ = writeln!(page, "| `{name}` | {} | {default} | {about} |", form.as_str());
    }
}
