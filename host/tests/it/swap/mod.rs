//! Changes of a running pipeline, by the real binary: swaps, refusals, rollbacks, canaries, reloads, and
//! kills in the middle of them. Whatever happens, each record is there once, by the version that the
//! ledger says.

mod canary;
pub mod fixture;
mod kills;
mod refused;
mod reloads;
mod rerun;
mod swaps;
