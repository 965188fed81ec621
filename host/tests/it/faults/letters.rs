//! Dead letters, replays and swaps: what runs again runs once.
