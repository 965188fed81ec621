//! Ports for people and programs: health, metrics, status and changes ([`admin`]), and events by HTTP
//! ([`intake`]).
//!
//! Input is a running pipeline, through the status that `engine` publishes. Output is answers to requests, and
//! events on a stream. Each port is one of `ports`, so that clients cannot use up what the pipeline needs. The
//! crate `engine` decides which changes are possible and in which steps; [`admin::access`] decides who may
//! request them. Its heavy dependency is axum.

pub mod admin;
pub mod intake;
