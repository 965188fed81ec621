//! Readers for the tables of sinks, for crates that bring a type.
//!
//! A type declares the shape of its table as a struct that serde fills: [`Spanned`] values that must be there,
//! [`Maybe`] values that need not. Then it reads each value with a method of [`Check`], or with a function here where
//! several types share it. A reader that returns `None` has noted a problem at the value's place; the type goes on
//! with the next value, so that one run of the program shows all that is wrong.

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
