//! Limits of time, memory and features of plugins.
