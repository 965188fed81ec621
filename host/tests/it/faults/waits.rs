//! Waits: each ends at stop, at a fatal error elsewhere, or at a deadline.
