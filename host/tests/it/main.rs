//! Tests of the host from outside: the library's sinks and the real binary against real servers. They are one
//! program, so that the library is linked once.
#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests fail by panicking, and what helps them is read by the tests beside it"
)]

mod accounts;
mod architecture;
mod assets;
mod bad_input;
mod book;
mod completions;
mod config;
mod configuration_page;
mod crash;
mod damaged_state;
mod dead_letter_sinks;
mod demo;
mod dlq;
mod drop_sink;
mod faults;
mod file_source;
mod flights;
mod given_up;
mod hostile;
mod http_capability;
mod iam;
mod languages;
mod lookup;
mod model;
mod parquet;
mod plugin_test;
mod postgres_restarts;
mod producers;
mod reading;
mod replay;
mod resharding;
mod sink_objects;
mod sink_postgres;
mod sink_redshift;
mod sink_sqlite;
mod sink_stdout;
mod sink_streams;
mod source;
mod sql_sinks;
mod stream_commands;
mod support;
mod swap;
mod tail;
mod walls;
