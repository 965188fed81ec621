//! libFuzzer on the target `claims`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardmill_fuzz::run("claims", data));
