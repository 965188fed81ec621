//! libFuzzer on the target `values`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardmill::fuzzing::run("values", data));
