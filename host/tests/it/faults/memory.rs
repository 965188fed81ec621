//! Memory and lag: what is held is bounded, and what waits is seen.
