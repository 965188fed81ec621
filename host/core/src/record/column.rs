//! Columns that routes declare, and routes as sinks get them.

use serde::{Deserialize, Serialize};

use super::RouteName;

/// A column that a route declares: the name and the type as the plugin's author wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// The column's name, as in the table.
    pub name: String,
    /// A SQL type name, for example `bigint` or `timestamptz`.
    pub data_type: String,
    /// Whether null may come.
    pub nullable: bool,
}

/// A route that a pipeline bound to a sink: what the sink will be given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundRoute {
    /// The route's name.
    pub name: RouteName,
    /// The media type of its payloads, for example `application/json`.
    pub format: String,
    /// The columns that the plugin declares; empty: not declared.
    pub columns: Vec<Column>,
}
