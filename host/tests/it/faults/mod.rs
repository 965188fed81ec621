//! Regression tests for faults that users reported, named by the report's number: `fault_NN_…`. Each test shows the
//! right behaviour, and failed before the fault was fixed.

mod commands;
mod dead_letters;
mod destinations;
mod memory;
mod positions;
mod postgres;
mod reading;
mod waits;
