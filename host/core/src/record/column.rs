//! Columns that routes declare, and routes as sinks receive them.

use serde::{Deserialize, Serialize};

use super::RouteName;

/// Column that a route declares, with the name and type that the plugin's author wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// Name, as in the table.
    pub name: String,
    /// SQL type name, for example `bigint` or `timestamptz`.
    pub data_type: String,
    /// Whether the value may be null.
    pub nullable: bool,
}

/// Route that a pipeline binds to a sink: describes the rows that the sink will receive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundRoute {
    /// Name of the route.
    pub name: RouteName,
    /// Media type of the payloads, for example `application/json`.
    pub format: String,
    /// Columns that the plugin declares; empty if it declares none.
    pub columns: Vec<Column>,
}
