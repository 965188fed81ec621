//! Files of the project that unit tests read.

/// The pipeline at the project's root.
pub(crate) const PIPELINE: &str = include_str!("../../../pipeline.toml");
