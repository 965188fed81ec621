//! Faults that strangers found, by the numbers under which they were reported: `fault_NN_…`. Each test
//! shows the right behaviour, and failed before the fault was mended.

mod commands;
mod dead_letters;
mod destinations;
mod memory;
mod positions;
mod postgres;
mod reading;
mod waits;
