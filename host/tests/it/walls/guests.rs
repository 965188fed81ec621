//! Calls of plugins to the host, and what plugins name themselves.

mod arguments;
mod asking;
mod budgets;
mod configure;
mod stderr;
mod terminal;
mod trials;
