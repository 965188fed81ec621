//! PostgreSQL and Redshift: pooled sessions, odd rows, poolers, what `check` must see.
