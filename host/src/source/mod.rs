//! Where records come from: what a lane asks of a source.
