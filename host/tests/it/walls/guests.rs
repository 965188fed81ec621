//! Calls of plugins to the host, and what plugins name themselves.
