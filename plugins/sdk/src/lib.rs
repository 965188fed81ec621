//! Write [shardmill](https://github.com/shardmill/shardmill) plugins in Rust.
//!
//! A plugin implements one trait and is exported by one macro. [`Plugin`] handles one
//! record at a time, [`BatchPlugin`] a whole batch. This is a complete plugin:
//!
//! ```
//! use shardmill_sdk::{Context, Descriptor, Emitter, Error, NoConfig, Plugin, Record, Route};
//!
//! struct Upper;
//!
//! impl Plugin for Upper {
//!     type Config = NoConfig;
//!
//!     fn configure(_: NoConfig, _: &Context) -> Result<(Self, Descriptor), Error> {
//!         Ok((Upper, Descriptor::new("upper", "0.1.0").route(Route::new("out", "text/plain"))))
//!     }
//!
//!     fn record(&mut self, record: &Record<'_>, out: &mut Emitter<'_>) -> Result<(), Error> {
//!         let text = std::str::from_utf8(record.payload())?; // an error rejects this record
//!         out.emit(0, text.to_uppercase());
//!         Ok(())
//!     }
//! }
//!
//! shardmill_sdk::export!(Upper);
//! # use shardmill_sdk::testing::{Fate, Harness};
//! # let mut upper = Harness::<Upper>::new("{}")?;
//! # assert_eq!(upper.run_one(b"honda"), Fate::delivered("out", b"HONDA"));
//! # assert!(matches!(upper.run_one(b"\xff"), Fate::Rejected(_)));
//! # Ok::<(), String>(())
//! ```
//!
//! The crate that holds it has `crate-type = ["cdylib", "rlib"]`: the first is what
//! `shardmill plugin build` turns into a component, the second lets native tests and
//! benches call the same code. [`testing::Harness`] runs a plugin natively.
//!
//! # What becomes of a record
//!
//! | the plugin | the record is |
//! |---|---|
//! | emits or passes it | delivered on the routes named |
//! | emits nothing and returns `Ok` | filtered: dropped on purpose |
//! | returns an [`Error`], by `?` or [`Error::reject`] | dead-lettered, with the reason |
//! | returns [`Error::retry`] | tried again with its whole batch, after a pause |
//! | panics, runs out of time or memory | dead-lettered alone, with a backtrace |
//!
//! # What it costs
//!
//! Payloads are borrowed from the batch's arena and outputs are appended to another, so
//! this crate allocates per batch, not per record. Outputs are made fastest by writing
//! them in place: [`Emitter::emit_json`] and [`Emitter::emit_with`].
//!
//! # Determinism
//!
//! A plugin has no clock and no randomness, because a record may be replayed: in another
//! batch, by another instance, a day later. [`Record::now`] and [`Record::rng`] are
//! functions of the record and give the replay what they gave before.

mod batch;
#[doc(hidden)]
#[allow(missing_docs, reason = "generated from the WIT, which holds the documentation")]
pub mod bindings;
mod capability;
mod describe;
mod error;
#[doc(hidden)]
pub mod glue;
mod out;
mod plugin;
pub mod testing;
#[doc(hidden)]
#[path = "../../../wit/0.1.0/words.rs"]
pub mod words;

pub use batch::{Batch, Record, Records};
pub use bindings::shardmill::plugin::types::{Column, Context, Descriptor, Route};
pub use capability::{clock, http, log, lookup, metrics, random};
pub use error::Error;
pub use fastrand::Rng;
pub use out::{Emitter, Outbox, Writer};
pub use plugin::{BatchPlugin, NoConfig, Plugin};
