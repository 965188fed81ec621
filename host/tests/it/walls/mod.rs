//! Walls: hostile events, hostile plugins and other users of the machine harm nobody else.
//!
//! A test is named after the case that it was made for: `wall_NN_what_is_right`.

mod answers;
mod clocks;
mod connections;
mod dead_letters;
mod guests;
mod kpl;
mod machine;
mod memory;
mod threats;

pub use clocks::assert_parts_fit;
