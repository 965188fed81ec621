//! Aggregates and the memory that records keep alive.
