//! Functions of the host that a plugin may use if its stage grants them: see `wit/0.1.0/capabilities.wit`.
//!
//! A capability that is not used is not imported. In a native build (tests, benches) there is no host: log
//! lines go to standard error, metrics are ignored, the clock is the system's, and [`lookup`] and [`http`]
//! return a failure.

/// Lines in the host's log.
pub mod log {
    pub use crate::bindings::shardmill::plugin::log::Level;

    /// Writes one line; see also [`info!`](crate::info), [`warn!`](crate::warn) and [`error!`](crate::error).
    pub fn write(level: Level, message: &str) {
        #[cfg(target_arch = "wasm32")]
        crate::bindings::shardmill::plugin::log::write(level, message);
        #[cfg(not(target_arch = "wasm32"))]
        eprintln!("{level:?}: {message}");
    }
}

/// Writes a line of level `error` to the host's log, formatted as by `format!`.
#[macro_export]
macro_rules! error {
    ($($argument:tt)+) => {
        $crate::log::write($crate::log::Level::Error, &::std::format!($($argument)+))
    };
}

/// Writes a line of level `warn` to the host's log, formatted as by `format!`.
#[macro_export]
macro_rules! warn {
    ($($argument:tt)+) => {
        $crate::log::write($crate::log::Level::Warn, &::std::format!($($argument)+))
    };
}

/// Writes a line of level `info` to the host's log, formatted as by `format!`.
#[macro_export]
macro_rules! info {
    ($($argument:tt)+) => {
        $crate::log::write($crate::log::Level::Info, &::std::format!($($argument)+))
    };
}

/// Time series of the plugin, beside those of the host.
pub mod metrics {
    use crate::Error;
    #[cfg(target_arch = "wasm32")]
    use crate::bindings::shardmill::plugin::metrics as host;
    use crate::bindings::shardmill::plugin::metrics::Kind;

    /// A metric that adds up its values.
    #[derive(Clone, Copy, Debug)]
    pub struct Counter(u32);

    /// A metric that keeps its last value.
    #[derive(Clone, Copy, Debug)]
    pub struct Gauge(u32);

    /// A metric that counts the distribution of its values.
    #[derive(Clone, Copy, Debug)]
    pub struct Histogram(u32);

    impl Counter {
        /// Registers a counter in `configure`. The name must match `[a-z][a-z0-9_]*`.
        ///
        /// # Errors
        /// The host refuses the name, or there are too many metrics.
        pub fn register(name: &str, help: &str) -> Result<Self, Error> {
            register(Kind::Counter, name, help).map(Self)
        }

        /// Adds a value. Negative values are ignored.
        pub fn add(self, value: f64) {
            observe(self.0, value);
        }
    }

    impl Gauge {
        /// Registers a gauge in `configure`. The name must match `[a-z][a-z0-9_]*`.
        ///
        /// # Errors
        /// The host refuses the name, or there are too many metrics.
        pub fn register(name: &str, help: &str) -> Result<Self, Error> {
            register(Kind::Gauge, name, help).map(Self)
        }

        /// Sets the value.
        pub fn set(self, value: f64) {
            observe(self.0, value);
        }
    }

    impl Histogram {
        /// Registers a histogram in `configure`. The name must match `[a-z][a-z0-9_]*`.
        ///
        /// # Errors
        /// The host refuses the name, or there are too many metrics.
        pub fn register(name: &str, help: &str) -> Result<Self, Error> {
            register(Kind::Histogram, name, help).map(Self)
        }

        /// Records a value.
        pub fn observe(self, value: f64) {
            observe(self.0, value);
        }
    }

    #[cfg(target_arch = "wasm32")]
    fn register(kind: Kind, name: &str, help: &str) -> Result<u32, Error> {
        host::register(kind, name, help).map_err(Error::reject)
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn register(_: Kind, _: &str, _: &str) -> Result<u32, Error> {
        Ok(0)
    }

    fn observe(metric: u32, value: f64) {
        #[cfg(target_arch = "wasm32")]
        host::observe(metric, value);
        #[cfg(not(target_arch = "wasm32"))]
        let _ = (metric, value);
    }
}

/// Rows of reference tables, by key.
pub mod lookup {
    use crate::Error;

    /// Gets the rows of `keys` in the table `name`, all at once. A row is a JSON object.
    ///
    /// # Errors
    /// The host's failure. After a retryable one, the batch is tried again.
    pub fn get(name: &str, keys: &[&str]) -> Result<Vec<Option<String>>, Error> {
        #[cfg(target_arch = "wasm32")]
        return ask(name, keys);
        #[cfg(not(target_arch = "wasm32"))]
        return Err(Error::reject(format!(
            "there is no host to look {} keys up in {name}",
            keys.len()
        )));
    }

    #[cfg(target_arch = "wasm32")]
    fn ask(name: &str, keys: &[&str]) -> Result<Vec<Option<String>>, Error> {
        use crate::bindings::shardmill::plugin::lookup as host;
        let mut words = Vec::with_capacity(2 * keys.len());
        let mut start = 0;
        for key in keys {
            words.extend([start, key.len() as u32]);
            start += key.len() as u32;
        }
        let found = host::get(name, keys.concat().as_bytes(), &words).map_err(|failure| {
            match failure.retryable {
                true => Error::retry(failure.message),
                false => Error::reject(failure.message),
            }
        })?;
        let row = |[start, length]: &[u32; 2]| {
            let (start, length) = (*start as usize, *length as usize);
            let row = found.arena.get(start..start + length)?;
            Some(String::from_utf8_lossy(row).into_owned())
        };
        Ok(found.rows.as_chunks().0.iter().map(row).collect())
    }
}

/// The wall clock.
pub mod clock {
    /// Returns the milliseconds since the Unix epoch. Unlike [`Record::now`](crate::Record::now), a replay gets
    /// another time.
    pub fn now_ms() -> u64 {
        #[cfg(target_arch = "wasm32")]
        return crate::bindings::shardmill::plugin::clock::now_ms();
        #[cfg(not(target_arch = "wasm32"))]
        return std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |time| time.as_millis() as u64);
    }
}

/// Unpredictable random numbers.
pub mod random {
    /// Returns 64 random bits. Unlike [`Record::rng`](crate::Record::rng), a replay gets other numbers.
    pub fn next_u64() -> u64 {
        #[cfg(target_arch = "wasm32")]
        return crate::bindings::shardmill::plugin::random::next_u64();
        #[cfg(not(target_arch = "wasm32"))]
        {
            use std::hash::{BuildHasher as _, Hasher as _};
            std::hash::RandomState::new().build_hasher().finish()
        }
    }
}

/// Requests to the hosts that the stage's grant lists.
pub mod http {
    pub use crate::bindings::shardmill::plugin::http::{Request, Response};

    use crate::Error;

    /// Sends a request and waits for the response, whatever its status.
    ///
    /// # Errors
    /// The host's failure: the request is not allowed, or there was no response in time. After a retryable one,
    /// the batch is tried again.
    pub fn send(request: &Request) -> Result<Response, Error> {
        #[cfg(target_arch = "wasm32")]
        return crate::bindings::shardmill::plugin::http::send(request).map_err(|failure| {
            match failure.retryable {
                true => Error::retry(failure.message),
                false => Error::reject(failure.message),
            }
        });
        #[cfg(not(target_arch = "wasm32"))]
        return Err(Error::reject(format!("there is no host to ask {}", request.url)));
    }
}
