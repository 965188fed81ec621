//! Changes of a running pipeline, by the real binary: swaps, refusals, rollbacks, canaries, reloads, and
//! kills in the middle of them. Whatever happens, each record is there once, by the version that the
//! ledger says.

mod rerun;
mod canary;
mod kills;
mod refused;
mod reloads;
pub mod fixture;
mod swaps;
