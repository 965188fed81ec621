//! libFuzzer on the target `outcome`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardmill_fuzz::run("outcome", data));
