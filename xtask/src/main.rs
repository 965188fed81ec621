//! Development tasks.
#[cfg_attr(not(test), expect(dead_code, reason = "`cargo xtask test` will start it"))]
mod postgres;

fn main() {}
