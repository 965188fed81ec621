//! libFuzzer on the target `rows`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardmill::fuzzing::run("rows", data));
