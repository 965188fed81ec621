//! The connections that all sinks of one server share.
//!
//! A shard has none of its own: there may be more shards than a server takes connections. Half of the
//! pool is reserved in equal parts for the sinks, half is common, so that one whose table is locked
//! does not stop the others. A connection is dirty from the moment it is lent: it comes back after
//! success, or after a ROLLBACK that was answered in step, and is closed otherwise.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Link, PostgresServer, ServerError};

/// Connections that are being opened at the same time: a server that comes back is not to be met by
/// all lanes at once.
const OPENING_MAX: usize = 4;

/// After a connection could not be opened, the next is tried after this, doubled up to the most.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Longest time for a rollback: a connection that needs more is closed, which does the same.
const ROLLBACK_MAX: Duration = Duration::from_secs(5);

/// Ends a transaction, and asks whether the server can be written to.
const IN_RECOVERY: &str = "pg_catalog.pg_is_in_recovery()";

/// Sizes and deadlines of a pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolSpec {
    /// Connections at most.
    pub connections_max: usize,
    /// Sinks that share them.
    pub sinks: usize,
    /// Time without an answer after which a connection is lost.
    pub silence_max: Duration,
}

/// The connections to one server.
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
    /// Grows when all sessions of the server are condemned: those that are lent then do not come back.
    generation: u64,
}

/// That no connection could be opened, and until when none is tried.
#[derive(Clone)]
struct Refused {
    cause: String,
    until: Instant,
    pause: Duration,
    /// Which failure it is.
    number: u64,
}

/// One sink's part in a pool.
pub struct PoolShare {
    pool: Arc<ServerPool>,
    reserved: Semaphore,
}

/// A connection on loan. Dropped without a word, it is closed, which ends its transaction and the locks.
pub struct Lent<'p> {
    /// `None` once it has gone back.
    link: Option<Link>,
    pool: &'p ServerPool,
    generation: u64,
    _permit: SemaphorePermit<'p>,
}

impl ServerPool {
    /// A pool that connects to nothing yet.
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

    /// The part of one of its sinks.
    pub fn share(self: &Arc<Self>) -> PoolShare {
        PoolShare { pool: Arc::clone(self), reserved: Semaphore::new(self.reserved_each) }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refused(&self) -> MutexGuard<'_, Option<Refused>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that is idle and alive, with the generation that it belongs to.
    fn take_idle(&self) -> (Option<Link>, u64) {
        let mut idle = self.idle();
        idle.links.retain(|link| !link.is_closed());
        (idle.links.pop(), idle.generation)
    }

    /// Closes all idle connections; those that are lent do not come back.
    fn condemn(&self) {
        let closed = {
            let mut idle = self.idle();
            idle.generation += 1;
            std::mem::take(&mut idle.links)
        };
        if !closed.is_empty() {
            tracing::info!(server = %self.server.place(), connections = closed.len(),
                "closed the idle connections: they are made again when needed");
        }
    }

    /// Opens a connection, a few at a time. After a failure the next try waits; all that wait for it are
    /// given its outcome, so all lanes together ask a server that is down no more often than one would.
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
            // Another that was begun at the same time has failed: together they are one failure.
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
    /// A pool for one sink alone.
    pub fn alone(server: PostgresServer, connections_max: usize, silence_max: Duration) -> Self {
        let spec = PoolSpec { connections_max, sinks: 1, silence_max };
        Arc::new(ServerPool::new(server, spec)).share()
    }

    /// Where the server is.
    pub fn server(&self) -> &PostgresServer {
        &self.pool.server
    }

    /// A connection, once one is free.
    ///
    /// # Errors
    /// Why none could be opened, as a sentence.
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
    /// Gives the connection back, outside of any transaction and with nothing unanswered.
    pub fn give_back(mut self) {
        let Some(link) = self.link.take() else { return };
        let mut idle = self.pool.idle();
        if idle.generation == self.generation && !link.is_closed() {
            idle.links.push(link);
        }
    }

    /// Passes on the outcome of what was done with the connection, which goes back or is closed.
    ///
    /// # Errors
    /// Those of `outcome`.
    pub async fn end<T>(self, outcome: Result<T, ServerError>) -> Result<T, ServerError> {
        match &outcome {
            Ok(_) => self.give_back(),
            Err(error) => self.fail(error).await,
        }
        outcome
    }

    /// After an error: rolls back, and gives the connection back if that was answered in step and the
    /// server is no standby. Otherwise the connection is closed, with all idle ones where the error
    /// says that they are no better.
    pub async fn fail(self, error: &ServerError) {
        if error.condemns_server() {
            self.pool.condemn();
            return;
        }
        self.roll_back().await;
    }

    /// After an error that is not the server's: as [`Lent::fail`].
    pub async fn roll_back(self) {
        let asked = self.ask_in_step("ROLLBACK", IN_RECOVERY);
        match tokio::time::timeout(ROLLBACK_MAX, asked).await {
            Ok(Ok(Some(in_recovery))) if in_recovery == "f" => self.give_back(),
            // One rollback that took long says nothing of the other connections.
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
