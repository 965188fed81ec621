//! Positions: databases and state that were restored, lost, removed or renamed.

mod holes;
mod restored;
