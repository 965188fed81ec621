//! libFuzzer on the target `arguments`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardmill_fuzz::run("arguments", data));
