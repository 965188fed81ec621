//! SQL files that are compiled in: migration steps, and for tests the schemas of earlier versions.

/// Migration step to version 2.
pub(crate) const TO_2: &str = include_str!("migrations/to_2.sql");
/// Migration step to version 3.
pub(crate) const TO_3: &str = include_str!("migrations/to_3.sql");
/// Migration step to version 4.
pub(crate) const TO_4: &str = include_str!("migrations/to_4.sql");
/// Migration step to version 5.
pub(crate) const TO_5: &str = include_str!("migrations/to_5.sql");
/// Migration step to version 6.
pub(crate) const TO_6: &str = include_str!("migrations/to_6.sql");

/// The schema of each earlier version, as made by the commit that its first line names.
#[cfg(test)]
pub(crate) mod schemas {
    /// Version 1.
    pub(crate) const V1: &str = include_str!("migrations/schemas/v1.sql");
    /// Version 2.
    pub(crate) const V2: &str = include_str!("migrations/schemas/v2.sql");
    /// Version 2, as a build between two releases left it.
    pub(crate) const V2_UNFINISHED: &str = include_str!("migrations/schemas/v2_unfinished.sql");
    /// Version 3.
    pub(crate) const V3: &str = include_str!("migrations/schemas/v3.sql");
    /// Version 3, as a build between two releases left it.
    pub(crate) const V3_UNFINISHED: &str = include_str!("migrations/schemas/v3_unfinished.sql");
    /// Version 4.
    pub const V4: &str = include_str!("migrations/schemas/v4.sql");
    /// Version 5.
    pub(crate) const V5: &str = include_str!("migrations/schemas/v5.sql");
    /// Version 6.
    pub const V6: &str = include_str!("migrations/schemas/v6.sql");
    /// Version 6, as a build between two releases left it.
    pub(crate) const V6_UNFINISHED: &str = include_str!("migrations/schemas/v6_unfinished.sql");
}
