//! JSON values in columns of every type of every sink.

use fastrand::Rng;
use shardmill_core::fuzzing::FuzzTarget;
use shardmill_sinks_common::fuzz::{self, FuzzColumn};

/// Checks that each column keeps a value exactly or refuses it.
pub const VALUES: FuzzTarget = FuzzTarget { name: "values", run, grow, words: &fuzz::WORDS };

fn columns() -> Vec<FuzzColumn> {
    let sinks: [&[FuzzColumn]; 4] = [
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
