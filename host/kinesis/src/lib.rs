//! Amazon Kinesis: reading a stream, putting records on one, and the sink.
//!
//! [`source::KinesisSource`] reads a stream: [`client`] reaches the server, [`connection`] is what its readers share,
//! [`polling`] and [`fan_out`] read one shard each in their way and pass what comes through an [`inbox`], which takes
//! apart what is an [`aggregate`]. Calls end when the server is silent ([`silence`]), and hold no more memory than is
//! booked. [`stream`], [`consumers`], [`input`] and [`producer`] are for those who make streams and fill them; all who put
//! records do so by [`put`].
//! [`served`] finds a stream that another process of this user serves.
//!
//! [`sink::TYPE`] is what the program's registry of sinks lists: it reads `type = "kinesis"`, names its keys and makes
//! the sink.
//!
//! It gives the engine a source and a sink, by the contracts of `core`, and knows no stage and no state. It uses
//! `config`, `core`, `file` for the lines of inputs, and `sinks/common`; its heavy dependency is the AWS SDK.

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
