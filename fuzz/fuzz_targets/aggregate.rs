//! libFuzzer on the target `aggregate`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardmill::fuzzing::run("aggregate", data));
