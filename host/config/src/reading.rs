//! Readers of sink tables, for crates that implement a sink type.
//!
//! A type declares the shape of its table as a struct that serde fills: [`Spanned`] for required values, [`Maybe`] for
//! optional ones. Then it reads each value with a method of [`Check`], or with a function from here if several types
//! share it. A reader that returns `None` has noted a problem at the value's place; the type continues with the next
//! value, so that one run shows all problems.

pub use toml::Spanned;

pub use super::check::Check;
pub use super::destination::{database, path_digits, without_user};
pub use super::diagnostic::suggest;
pub use super::grant_http::{RESPONSE_BYTES, headers};
pub use super::raw::{
    Count, DurationText, Maybe, RawAssumeRole, RawCommit, RawHeaders, Size, Text,
};
pub use super::source::{server, stream};
pub use super::tables::{
    CREATE_KEY, KEY_KEY, MODE_KEY, NEWEST_BY_KEY, RerunTable, connection, options, table,
    write_mode,
};
