//! Ports for people and programs: health, metrics, status and changes ([`admin`]), and events by HTTP ([`intake`]).
//!
//! A running pipeline goes in, by what `engine` shows of it; answers to requests come out, and events on a stream. Each
//! port is one of `ports`, so that clients cannot take what the pipeline needs. What may be changed, and in which
//! steps, is decided in `engine`; who may ask for it, in [`admin::access`]. Its heavy dependency is axum.

pub mod admin;
pub mod intake;
