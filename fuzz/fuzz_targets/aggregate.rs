//! libFuzzer on the target `aggregate`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardmill_fuzz::run("aggregate", data));
