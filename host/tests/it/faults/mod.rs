//! Faults that strangers found, by the numbers under which they were reported: `fault_NN_…`. Each test
//! shows the right behaviour, and failed before the fault was mended.

mod commands;
mod destinations;
mod dead_letters;
mod memory;
mod positions;
mod postgres;
mod reading;
mod waits;
