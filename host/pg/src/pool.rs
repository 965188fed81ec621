//! The connections that all sinks of one server share.
//!
//! A shard has no connection of its own, because there may be more shards than connections that a server accepts. Half
//! of the pool is reserved in equal parts for the sinks, half is common. So a sink whose table is locked cannot stop
//! the others.
//!
//! The invariant: an idle connection is clean, that is outside of any transaction and with no answer outstanding. A
//! connection counts as dirty from the moment it is lent:
//!
//! | outcome of its use | connection |
//! |---|---|
//! | success | back to the pool |
//! | error, and a ROLLBACK is answered in step by a server that is not in recovery | back to the pool |
//! | error, and the ROLLBACK takes longer than [`ROLLBACK_MAX`] | closed |
//! | error, and the ROLLBACK fails, or the server is in recovery (a standby) | closed, with all idle ones |
//! | an error that condemns the server ([`ServerError::condemns_server`]) | closed, with all idle ones |
//! | dropped without an outcome, such as by a cancelled task | closed |
//!
//! To close all connections, the pool increases its generation. A connection of an earlier generation that comes back
//! later is closed, too: so after a failover no lane continues on a connection to the old primary.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Link, PostgresServer, ServerError};

/// Connections that may be opened at the same time, so that a server that comes back does not meet all lanes at once.
const OPENING_MAX: usize = 4;

/// Pause after the first failure to connect; doubled for each further one up to `PAUSE_MAX`.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Longest time of a rollback. After it the connection is closed, which has the same effect.
const ROLLBACK_MAX: Duration = Duration::from_secs(5);

/// Expression for whether the server is a standby, which cannot be written to.
const IN_RECOVERY: &str = "pg_catalog.pg_is_in_recovery()";

/// Sizes and deadlines of a pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolSpec {
    /// Highest number of connections.
    pub connections_max: usize,
    /// Number of sinks that share them.
    pub sinks: usize,
    /// Time without an answer after which a connection counts as lost.
    pub silence_max: Duration,
}

/// Connections to one server.
pub struct ServerPool {
    server: PostgresServer,
    silence_max: Duration,
    reserved_each: usize,
    common: Semaphore,
    opening: Semaphore,
    idle: Mutex<Idle>,
    refused: Mutex<Option<Refused>>,
}

#[derive(Default)]
struct Idle {
    links: Vec<Link>,
    /// Grows when all connections are condemned: lent ones of an earlier generation are closed when they come back.
    generation: u64,
}

/// Last failure to connect, and the time of the next try.
#[derive(Clone)]
struct Refused {
    cause: String,
    until: Instant,
    pause: Duration,
    /// Number of the failure.
    number: u64,
}

/// Share of one sink in a pool.
pub struct PoolShare {
    pool: Arc<ServerPool>,
    reserved: Semaphore,
}

/// Connection on loan. If it is dropped, it is closed, which ends its transaction and locks.
pub struct Lent<'p> {
    /// `None` after it went back.
    link: Option<Link>,
    pool: &'p ServerPool,
    generation: u64,
    _permit: SemaphorePermit<'p>,
}

impl ServerPool {
    /// Makes a pool. It does not connect yet.
    pub fn new(server: PostgresServer, spec: PoolSpec) -> Self {
        let reserved_each = spec.connections_max / 2 / spec.sinks.max(1);
        let common = spec.connections_max - reserved_each * spec.sinks.max(1);
        Self {
            server,
            silence_max: spec.silence_max,
            reserved_each,
            common: Semaphore::new(common),
            opening: Semaphore::new(OPENING_MAX),
            idle: Mutex::default(),
            refused: Mutex::default(),
        }
    }

    /// Returns the share of one of its sinks.
    pub fn share(self: &Arc<Self>) -> PoolShare {
        PoolShare { pool: Arc::clone(self), reserved: Semaphore::new(self.reserved_each) }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refused(&self) -> MutexGuard<'_, Option<Refused>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection that is idle and alive, if there is one, and returns the current generation.
    fn take_idle(&self) -> (Option<Link>, u64) {
        let mut idle = self.idle();
        idle.links.retain(|link| !link.is_closed());
        (idle.links.pop(), idle.generation)
    }

    /// Closes all idle connections. Lent ones will be closed when they come back.
    fn condemn(&self) {
        let closed = {
            let mut idle = self.idle();
            idle.generation += 1;
            std::mem::take(&mut idle.links)
        };
        if !closed.is_empty() {
            tracing::info!(server = %self.server.place(), connections = closed.len(),
                "closed the idle connections; new ones are opened when needed");
        }
    }

    /// Opens a connection, a few at a time. After a failure the next try waits, and all callers that wait for it share
    /// its outcome. So all lanes together ask a server that is down as rarely as one lane would.
    async fn open(&self) -> Result<Link, String> {
        let number = |refused: &Option<Refused>| refused.as_ref().map(|refused| refused.number);
        let seen = number(&self.refused());
        let failed_since = |seen: Option<u64>| {
            let now = self.refused().clone();
            now.filter(|now| Some(now.number) != seen).map(|now| now.cause)
        };
        let _opening = self.opening.acquire().await;
        if let Some(cause) = failed_since(seen) {
            return Err(cause);
        }
        let until = self.refused().as_ref().map(|refused| refused.until);
        if let Some(until) = until {
            tokio::time::sleep_until(until.into()).await;
            if let Some(cause) = failed_since(seen) {
                return Err(cause);
            }
        }
        let begun = Instant::now();
        let connected = self.server.connect(self.silence_max).await;
        let mut refused = self.refused();
        let error = match connected {
            Ok(link) => {
                *refused = None;
                return Ok(link);
            }
            Err(error) => error,
        };
        let cause = format!("cannot connect to {}: {error}", self.server.place());
        let pause = match &*refused {
            None => PAUSE,
            // Another try that ran at the same time has failed: both count as one failure.
            Some(last) if last.until > begun => last.pause,
            Some(last) => (last.pause * 2).min(PAUSE_MAX),
        };
        let number = refused.as_ref().map_or(0, |last| last.number + 1);
        let until = Instant::now() + pause;
        *refused = Some(Refused { cause: cause.clone(), until, pause, number });
        Err(cause)
    }
}

impl PoolShare {
    /// Makes a pool for one sink.
    pub fn alone(server: PostgresServer, connections_max: usize, silence_max: Duration) -> Self {
        let spec = PoolSpec { connections_max, sinks: 1, silence_max };
        Arc::new(ServerPool::new(server, spec)).share()
    }

    /// Returns the server.
    pub fn server(&self) -> &PostgresServer {
        &self.pool.server
    }

    /// Takes a connection, and waits until one is free.
    ///
    /// # Errors
    /// The reason why none could be opened, as a sentence.
    pub async fn take(&self) -> Result<Lent<'_>, String> {
        let permit = tokio::select! {
            biased;
            Ok(own) = self.reserved.acquire(), if self.pool.reserved_each > 0 => own,
            Ok(common) = self.pool.common.acquire() => common,
            else => return Err("the pool is closed".into()),
        };
        let (idle, generation) = self.pool.take_idle();
        let link = match idle {
            Some(link) => link,
            None => self.pool.open().await?,
        };
        Ok(Lent { link: Some(link), pool: &self.pool, generation, _permit: permit })
    }
}

impl Lent<'_> {
    /// Returns the connection to the pool. It must be outside of any transaction, with no answer outstanding.
    pub fn give_back(mut self) {
        let Some(link) = self.link.take() else { return };
        let mut idle = self.pool.idle();
        if idle.generation == self.generation && !link.is_closed() {
            idle.links.push(link);
        }
    }

    /// Returns or closes the connection according to an outcome, and passes the outcome on.
    ///
    /// # Errors
    /// The error in `outcome`.
    pub async fn end<T>(self, outcome: Result<T, ServerError>) -> Result<T, ServerError> {
        match &outcome {
            Ok(_) => self.give_back(),
            Err(error) => self.fail(error).await,
        }
        outcome
    }

    /// Rolls back after an error. The connection returns to the pool if the rollback was answered in step and the
    /// server is not a standby; otherwise it is closed. If the error condemns the server, no rollback is tried. All
    /// idle connections are closed too then, or if the rollback fails or shows a standby.
    pub async fn fail(self, error: &ServerError) {
        if error.condemns_server() {
            self.pool.condemn();
            return;
        }
        self.roll_back().await;
    }

    /// Rolls back after an error that did not come from the server; see [`Lent::fail`].
    pub async fn roll_back(self) {
        let asked = self.ask_in_step("ROLLBACK", IN_RECOVERY);
        match tokio::time::timeout(ROLLBACK_MAX, asked).await {
            Ok(Ok(Some(in_recovery))) if in_recovery == "f" => self.give_back(),
            // A slow rollback says nothing about other connections.
            Err(_) => {}
            Ok(_) => self.pool.condemn(),
        }
    }
}

impl std::ops::Deref for Lent<'_> {
    type Target = Link;

    fn deref(&self) -> &Link {
        self.link.as_ref().unwrap_or_else(|| unreachable!("it is taken when it goes back"))
    }
}
