//! libFuzzer on the target `connection`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardmill::fuzzing::run("connection", data));
