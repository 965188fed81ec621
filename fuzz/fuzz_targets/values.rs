//! libFuzzer on the target `values`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardmill_fuzz::run("values", data));
