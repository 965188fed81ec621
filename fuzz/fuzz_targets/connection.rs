//! libFuzzer on the target `connection`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardmill_fuzz::run("connection", data));
