//! Files of the project that the tests include at compile time.

/// Aggregates that another implementation encoded (`aggregates/make.py`), together with the records in them.
pub const AGGREGATES: &str = include_str!("aggregates/aggregates.json");

/// Query of the book that joins dead letters with their records.
pub const DEAD_LETTERS_SQL: &str = include_str!("../../../docs/sql/dead-letters.sql");

/// Text of a handwritten plugin that calls the host, with placeholders.
pub const ASKING_WAT: &str = include_str!("walls/guests/asking.wat");

/// Text of a handwritten plugin that misbehaves, with placeholders.
pub const SKELETON_WAT: &str = include_str!("hostile/skeleton.wat");
