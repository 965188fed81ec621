//! A plugin that stamps its version into each row, for tests of changes while records flow.
//!
//! | | |
//! |---|---|
//! | accepts | JSON objects |
//! | route | `all`, `application/json` |
//! | columns | `id` and `n` (bigint), `key` and `version` (text) |
//! | configuration | any table; it is not read |
//!
//! A mark in the component's own bytes controls its behaviour. Tests overwrite the mark, so they can make any
//! number of versions from one component without a compiler. The mark is `VERSION FAULT [NUMBER]`, padded with
//! spaces; [`Fault`] lists the faults.

use serde_json::Value;
use shardmill_sdk::{Context, Descriptor, Emitter, Error, Plugin, Record, Route};

/// The mark. A test finds it and overwrites the text after the first bar.
static MARK: [u8; 80] =
    *b"shardmill-stamp|v1 none                                                         ";
/// Start of the text in the mark.
const MARK_TEXT: usize = "shardmill-stamp|".len();
/// Bytes that [`Fault::Leak`] leaks for each record.
const LEAK_BYTES: usize = 256 << 10;

/// Fault of a version, for each record whose `id` is a multiple of the number, or in `configure`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// `none`: nothing.
    None,
    /// `trap N`: it traps.
    Trap,
    /// `loop N`: it loops until the host's deadline.
    Loop,
    /// `leak N`: it leaks a quarter of a mebibyte.
    Leak,
    /// `reject N`: it rejects the record.
    Reject,
    /// `other N`: it returns another `n`.
    Other,
    /// `slow N`: it takes about 100 µs.
    Slow,
    /// `configure-trap`: it traps in `configure`.
    ConfigureTrap,
    /// `shard-trap`: it traps in `configure` if the context names a shard.
    ShardTrap,
    /// `columns`: it declares a column that no table has.
    Columns,
}

/// The plugin, in one version.
pub struct Stamp {
    version: String,
    fault: Fault,
    number: u64,
    kept: Vec<Vec<u8>>,
}

/// Returns the mark in this component's bytes.
fn mark() -> String {
    // SAFETY: a plain read of a static. It is volatile, so that the compiler does not use the text that it
    // knows at compile time.
    let mark = unsafe { std::ptr::read_volatile(&raw const MARK) };
    String::from_utf8_lossy(&mark[MARK_TEXT..]).trim().to_owned()
}

impl Stamp {
    fn read() -> Result<Self, Error> {
        let mark = mark();
        let mut words = mark.split_ascii_whitespace();
        let version = words.next().unwrap_or("v1").to_owned();
        let fault = match words.next().unwrap_or("none") {
            "none" => Fault::None,
            "trap" => Fault::Trap,
            "loop" => Fault::Loop,
            "leak" => Fault::Leak,
            "reject" => Fault::Reject,
            "other" => Fault::Other,
            "slow" => Fault::Slow,
            "configure-trap" => Fault::ConfigureTrap,
            "shard-trap" => Fault::ShardTrap,
            "columns" => Fault::Columns,
            unknown => return Err(Error::reject(format_args!("the mark has no {unknown}"))),
        };
        let number = words.next().and_then(|number| number.parse().ok()).unwrap_or(1);
        Ok(Self { version, fault, number, kept: Vec::new() })
    }
}

impl Plugin for Stamp {
    type Config = Value;

    #[expect(clippy::panic, reason = "that is what these versions are for")]
    fn configure(_: Value, context: &Context) -> Result<(Self, Descriptor), Error> {
        let stamp = Self::read()?;
        let has_shard = !context.shard_id.is_empty();
        if stamp.fault == Fault::ConfigureTrap || (stamp.fault == Fault::ShardTrap && has_shard) {
            panic!("configured to trap");
        }
        let mut rows = Route::new("all", "application/json")
            .column("id", "bigint")
            .column("key", "text")
            .column("n", "bigint")
            .column("version", "text");
        if stamp.fault == Fault::Columns {
            rows = rows.column("colour", "text");
        }
        let descriptor =
            Descriptor::new("stamp", &stamp.version).accepts("application/json").route(rows);
        Ok((stamp, descriptor))
    }

    #[expect(clippy::panic, reason = "that is what these versions are for")]
    fn record(&mut self, record: &Record<'_>, out: &mut Emitter<'_>) -> Result<(), Error> {
        let mut row: Value = serde_json::from_slice(record.payload())?;
        let id = row["id"].as_u64().ok_or_else(|| Error::reject("no id"))?;
        match self.fault {
            _ if !id.is_multiple_of(self.number) => {}
            Fault::Trap => panic!("record {id}"),
            Fault::Loop => loop {
                std::hint::black_box(id);
            },
            Fault::Leak => self.kept.push(vec![1; LEAK_BYTES]),
            Fault::Reject => {
                return Err(Error::reject(format_args!("record {id} is not wanted")));
            }
            Fault::Other => row["n"] = (row["n"].as_u64().unwrap_or(0) + 1).into(),
            Fault::Slow => (0..100_000_u64).for_each(|turn| _ = std::hint::black_box(turn)),
            Fault::None | Fault::ConfigureTrap | Fault::ShardTrap | Fault::Columns => {}
        }
        row["version"] = self.version.as_str().into();
        out.emit_json(0, &row)
    }
}

shardmill_sdk::export!(Stamp);
