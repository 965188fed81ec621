//! Amazon Kinesis: reading a stream, putting records on one, and the sink.
//!
//! [`source::KinesisSource`] reads a stream. [`client`] connects to the server, and its readers share a [`connection`].
//! [`polling`] and [`fan_out`] read one shard each and put its records into an [`inbox`], which takes an [`aggregate`]
//! apart. Calls fail when the server is silent ([`silence`]), and use no more memory than is booked for them.
//!
//! [`stream`], [`consumers`], [`input`] and [`producer`] create streams and fill them. All code that puts records uses
//! [`put`]. [`served`] finds a stream that another process of this user serves.
//!
//! [`sink::TYPE`] is the entry in the program's registry of sinks: it reads `type = "kinesis"`, lists its keys and
//! makes the sink.
//!
//! This crate gives the engine a source and a sink, by the contracts of `core`. It knows nothing of stages and state.
//! It uses `config`, `core`, `file` for the lines of inputs, and `sinks/common`; its heavy dependency is the AWS SDK.

pub mod aggregate;
pub(crate) mod answer_size;
mod booking;
pub mod client;
pub mod connection;
pub mod consumers;
pub mod fan_out;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod inbox;
mod informational;
pub mod input;
pub mod polling;
pub mod producer;
pub mod put;
pub mod put_call;
pub mod served;
pub mod silence;
pub mod sink;
pub mod source;
pub mod stream;
