//! shardmill: a stream processor whose logic is WebAssembly.
//!
//! The modules are named after the path of a record: a `source` reads a shard, `stage`s run its
//! records through `plugin`s, [`sink`]s write the results, `position`s say what is settled.
//! `pipeline` is that path on one screen.

pub mod config;
pub mod record;
pub mod sink;
pub mod tls;
