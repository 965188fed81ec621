//! Changes of a running pipeline, through the real binary: swaps, refusals, rollbacks, canaries, reloads, and kills
//! during any of them. Whatever happens, each record is there once, written by the version that the ledger says.

mod canary;
pub mod fixture;
mod kills;
mod refused;
mod reloads;
mod rerun;
mod swaps;
