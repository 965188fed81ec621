//! Calls of plugins to the host, and what plugins name themselves.

mod arguments;
mod asking;
mod budgets;
mod configure;
mod ends;
mod stderr;
mod terminal;
mod trials;
