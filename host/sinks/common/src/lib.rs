//! What several sinks share: how JSON values become values of columns ([`rows`]), rows as lines ([`line`]), progress
//! through a commit of several requests ([`progress`]), files and folders of this machine ([`local`]), and the sink
//! that drops what it gets ([`discard`]).

pub mod discard;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod line;
pub mod local;
pub mod progress;
pub mod rows;
