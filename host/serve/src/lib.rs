//! Ports for people and programs: health, metrics, status and changes ([`admin`]), and events by HTTP ([`intake`]).

pub mod admin;
pub mod intake;
