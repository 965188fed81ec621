//! Values of variables that this process has read. What it says shows their names, whoever worded it: a library's
//! line of the log, a server that repeats its request, the system about a path.
//!
//! Sinks, stages and the configuration hide values where their texts are made, as those also go into dead letters and
//! the state. Here is the last door: standard error and the causes of what is blocked.

use std::sync::{LazyLock, PoisonError, RwLock};

use crate::config::Values;

static VALUES: LazyLock<RwLock<Values>> = LazyLock::new(RwLock::default);

/// Hides these from now on.
pub(crate) fn learn(values: &Values) {
    VALUES.write().unwrap_or_else(PoisonError::into_inner).extend(values);
}

/// Puts `${NAME}` in the place of each value in a text.
pub(crate) fn hide(text: String) -> String {
    let values = VALUES.read().unwrap_or_else(PoisonError::into_inner);
    match values.is_empty() {
        true => text,
        false => values.hide(text),
    }
}
