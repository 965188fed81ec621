//! Description of a plugin: its descriptor, routes and columns.

use crate::bindings::shardmill::plugin::types::{Column, Context, Descriptor, Route};

impl Descriptor {
    /// Describes a plugin that accepts any media type and has no route yet. It needs at least one route.
    /// `version` is usually `env!("CARGO_PKG_VERSION")`.
    pub fn new(name: &str, version: &str) -> Self {
        Self {
            name: name.into(),
            version: version.into(),
            accepts: Vec::new(),
            routes: Vec::new(),
            extra: Vec::new(),
        }
    }

    /// Adds a media type that the plugin accepts. Without any, it accepts all.
    #[must_use]
    pub fn accepts(mut self, media_type: &str) -> Self {
        self.accepts.push(media_type.into());
        self
    }

    /// Declares the columns that incoming rows must have. They are checked against what the
    /// stage before declares, before a record flows. Nullable columns may be absent.
    #[must_use]
    pub fn needs(mut self, columns: impl IntoIterator<Item = Column>) -> Self {
        let columns = columns.into_iter().map(|column| {
            serde_json::json!({
                "name": column.name,
                "data_type": column.data_type,
                "nullable": column.nullable,
            })
        });
        let columns = serde_json::Value::Array(columns.collect()).to_string();
        self.extra.push(("needs-columns".into(), columns));
        self
    }

    /// Adds a route. The first one added has index 0 in [`Emitter`](crate::Emitter).
    #[must_use]
    pub fn route(mut self, route: Route) -> Self {
        self.routes.push(route);
        self
    }
}

impl Route {
    /// Makes a route whose payloads have the media type `format`.
    pub fn new(name: &str, format: &str) -> Self {
        Self { name: name.into(), format: format.into(), columns: Vec::new() }
    }

    /// Declares these columns, such as those of [`Context::upstream_columns`].
    #[must_use]
    pub fn columns(mut self, columns: impl IntoIterator<Item = Column>) -> Self {
        self.columns.extend(columns);
        self
    }

    /// Declares a column that is never null. `data_type` is a PostgreSQL type name.
    #[must_use]
    pub fn column(self, name: &str, data_type: &str) -> Self {
        self.with_column(name, data_type, false)
    }

    /// Declares a column that may be null or absent. `data_type` is a PostgreSQL type name.
    #[must_use]
    pub fn nullable_column(self, name: &str, data_type: &str) -> Self {
        self.with_column(name, data_type, true)
    }

    fn with_column(mut self, name: &str, data_type: &str, nullable: bool) -> Self {
        self.columns.push(Column { name: name.into(), data_type: data_type.into(), nullable });
        self
    }
}

impl Context {
    /// Returns the columns that every incoming record has: those that all upstream routes declare alike,
    /// otherwise none. A plugin that passes rows on declares them again, so that later tables can be checked.
    pub fn upstream_columns(&self) -> &[Column] {
        let Some((first, others)) = self.upstream.split_first() else { return &[] };
        let alike = |route: &Route| {
            let pairs = route.columns.iter().zip(&first.columns);
            route.columns.len() == first.columns.len()
                && pairs.into_iter().all(|(a, b)| {
                    (&a.name, &a.data_type, a.nullable) == (&b.name, &b.data_type, b.nullable)
                })
        };
        if others.iter().all(alike) { &first.columns } else { &[] }
    }
}
