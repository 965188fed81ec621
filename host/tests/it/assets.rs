//! Files of the project that the tests read when they are compiled.

/// Aggregates that another implementation encoded (`aggregates/make.py`), with the records in them.
pub const AGGREGATES: &str = include_str!("aggregates/aggregates.json");

/// The book's query that joins dead letters with their records.
pub const DEAD_LETTERS_SQL: &str = include_str!("../../../docs/sql/dead-letters.sql");

/// The text of a plugin by hand that calls the host, with marks to fill in.
pub const ASKING_WAT: &str = include_str!("walls/guests/asking.wat");

/// The text of a plugin by hand that misbehaves, with marks to fill in.
pub const SKELETON_WAT: &str = include_str!("hostile/skeleton.wat");
