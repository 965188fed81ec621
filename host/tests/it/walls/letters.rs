//! Bounds of dead letters and of commits, and stored settings.
