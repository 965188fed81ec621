//! JSON values in columns of every type of every sink.

use fastrand::Rng;
use shardmill_core::fuzzing::Target;
use shardmill_sinks_common::fuzz::{self, Column};

/// Checks that each column keeps a value exactly or refuses it.
pub const VALUES: Target = Target { name: "values", run, grow, words: &fuzz::WORDS };

fn columns() -> Vec<Column> {
    let sinks: [&[Column]; 4] = [
        &shardmill_sink_postgres::fuzz::COLUMNS,
        &shardmill_sink_sqlite::fuzz::COLUMNS,
        &shardmill_sink_redshift::fuzz::COLUMNS,
        &shardmill_sink_objects::fuzz::PARQUET_COLUMNS,
    ];
    sinks.concat()
}

fn run(data: &[u8]) {
    fuzz::check(&columns(), data);
}

fn grow(random: &mut Rng) -> Vec<u8> {
    fuzz::grow(&columns(), random)
}
