//! shardmill: a stream processor whose logic is WebAssembly.
//!
//! The modules are named after the path of a record: a [`source`] reads a shard, [`stage`]s run its
//! records through [`plugin`]s, [`sink`]s write the results, [`position`]s say what is settled.
//! [`pipeline`] is that path on one screen; [`supervisor`] starts a lane per shard; [`swap`] changes what
//! runs while it does.

pub mod admin;
pub mod budget;
pub mod cli;
pub mod config;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod http;
pub mod intake;
pub mod lane;
pub mod lease;
mod masking;
mod off_thread;
pub mod pipeline;
pub mod plugin;
pub mod position;
pub mod postgres;
pub mod private;
mod rarely;
pub mod record;
mod serve;
pub mod sink;
pub mod source;
pub mod stage;
mod stderr;
pub mod stop;
pub mod supervisor;
pub mod swap;
pub mod system;
pub mod terminal;
pub mod tls;
pub mod workbench;
