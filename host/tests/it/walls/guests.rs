//! Calls of plugins to the host, and names that plugins give themselves.

mod arguments;
mod asking;
mod budgets;
mod configure;
mod ends;
mod stderr;
mod terminal;
mod trials;
