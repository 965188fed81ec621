//! libFuzzer on the target `rows`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardmill_fuzz::run("rows", data));
