//! Code that several sinks share: JSON values as values of columns ([`rows`]), rows as lines ([`mod@line`]), progress
//! through a commit of several requests ([`progress`]), files and folders of this machine ([`local`]), and the sink
//! that drops its rows ([`discard`]).
//!
//! A new sink is a folder beside this one, and a line in the program's registry (`host/cli/src/registry.rs`). It
//! implements [`Sink`](shardmill_core::sink::Sink) for the rows, [`SinkType`](shardmill_config::SinkType) for its table
//! in `pipeline.toml` and for the reference, and [`SinkSettings`](shardmill_config::SinkSettings) for questions of the
//! engine and the commands. [`discard`] is the shortest example.
//!
//! A sink knows its destination; code here does not connect to any. It uses `config` and `core`, and no heavy
//! dependency.
//!
//! ```
//! use shardmill_sinks_common::line::LineFormat;
//!
//! // JSON becomes one line, whatever its layout.
//! let line = LineFormat::Json.line(b"{\"id\":\n 1}")?;
//! assert_eq!(&*line, b"{\"id\": 1}");
//! assert!(LineFormat::Json.line(b"{\"id\":").is_err());
//! # Ok::<(), String>(())
//! ```

pub mod discard;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod line;
pub mod local;
pub mod progress;
pub mod rows;
