//! Base crate of shardmill: records, and the contracts of sources and sinks.
//!
//! [`record`] has the data that flows: shards, positions, batches, rows. [`source`] and [`sink`] are the two contracts
//! at the ends of a lane; [`owner`] names the process that writes to a sink. [`budget`] bounds the bytes in memory,
//! [`stop`] ends every wait, [`metric`] lists what is counted. The other modules are what all crates need of the
//! machine: files that only this user can reach ([`private`]), limits of the system ([`system`]), threads that may
//! block ([`off_thread`]), and texts from plugins and servers ([`escape`], [`masking`]).
//!
//! Nothing here talks to a server, runs a plugin or knows a type of source or sink. The crate uses no other crate of
//! the host and no heavy dependency, so that every other crate can use it.
//!
//! Sequence numbers compare as numbers, and positions by their place in the shard:
//!
//! ```
//! use shardmill_core::record::{Position, SequenceNumber};
//!
//! let at = |sequence, sub_sequence| -> Result<Position, Box<dyn std::error::Error>> {
//!     Ok(Position { sequence: SequenceNumber::parse(sequence)?, sub_sequence })
//! };
//! assert!(at("9", 0)? < at("10", 0)?);
//! // The third record of an aggregate, and the record after the aggregate.
//! assert!(at("10", 2)? < at("11", 0)?);
//! assert!(SequenceNumber::parse("shardId-0").is_err());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod budget;
pub mod escape;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod log_throttle;
pub mod masking;
pub mod metric;
pub mod off_thread;
pub mod owner;
pub mod private;
pub mod record;
pub mod retry;
pub mod secret;
pub mod sink;
pub mod source;
pub mod stop;
pub mod system;
pub mod values;

/// Turns an `async fn` into a function that returns a boxed future.
///
/// The compiler generates the code of a plain `async fn` in each crate that awaits it, with all that it awaits in turn.
/// Mark a function that other crates call, but not for each record: its code is then generated in its own crate only,
/// and the crates above build faster. The cost is one allocation for each call.
pub use async_recursion::async_recursion as boxed;
