//! Databases and state that were restored from a backup, or lost.
