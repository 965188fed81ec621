//! The end of a run: every wait ends when a stop is requested, and work in progress has a limited time to finish.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Token that requests the end of a run, with the time that is left from then on. Clones share both.
///
/// There are two kinds of waits. A wait for more work ([`Stop::unless_asked`]) ends as soon as the stop is requested. A
/// wait for work in progress, such as a last commit ([`Stop::until_over`]), ends when the drain time is over; what is
/// not durable by then is read again after the next start.
///
/// ```
/// use std::time::Duration;
///
/// use shardmill_core::stop::Stop;
///
/// # #[tokio::main]
/// # async fn main() {
/// let stop = Stop::new(Duration::from_secs(10));
/// assert_eq!(stop.unless_asked(async { "a batch" }).await, Some("a batch"));
///
/// stop.ask();
/// // No more work is started, but the commit in progress may finish.
/// assert_eq!(stop.unless_asked(async { "a batch" }).await, None);
/// assert_eq!(stop.until_over(async { "a commit" }).await, Some("a commit"));
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Stop {
    token: CancellationToken,
    drain_max: Duration,
    /// End of the drain time; set by whoever first sees that a stop is requested.
    deadline: Arc<OnceLock<Instant>>,
    parent: Option<Arc<Self>>,
}

impl Stop {
    /// Makes a token that nobody has asked to stop yet.
    pub fn new(drain_max: Duration) -> Self {
        Self::at(CancellationToken::new(), drain_max)
    }

    /// Wraps a token that requests the stop.
    pub fn at(token: CancellationToken, drain_max: Duration) -> Self {
        Self { token, drain_max, deadline: Arc::default(), parent: None }
    }

    /// Makes the token of a part of the run. The part stops when asked itself or when the whole stops, and never has
    /// more time than the whole.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            token: self.token.child_token(),
            drain_max: self.drain_max,
            deadline: Arc::default(),
            parent: Some(Arc::new(self.clone())),
        }
    }

    /// Requests the stop.
    pub fn ask(&self) {
        self.deadline();
        self.token.cancel();
    }

    /// Whether a stop is requested.
    pub fn is_asked(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Returns the token, for parts that need no time to drain.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Returns the time that is left once a stop is requested.
    pub fn drain_max(&self) -> Duration {
        self.drain_max
    }

    /// Completes when a stop is requested.
    pub async fn asked(&self) {
        self.token.cancelled().await;
        // The drain time starts now.
        self.deadline();
    }

    /// Completes when the drain time is over.
    pub fn over(&self) -> BoxFuture<'static, ()> {
        let stop = self.clone();
        async move {
            stop.asked().await;
            let own = tokio::time::sleep_until(stop.deadline());
            match &stop.parent {
                Some(parent) => tokio::select! {
                    () = own => {}
                    () = parent.over() => {}
                },
                None => own.await,
            }
        }
        .boxed()
    }

    /// Waits for a future, or returns `None` when a stop is requested.
    pub async fn unless_asked<T>(&self, wait: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.asked() => None,
            done = wait => Some(done),
        }
    }

    /// Waits for a future, or returns `None` when the drain time is over.
    pub async fn until_over<T>(&self, wait: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            done = wait => Some(done),
            () = self.over() => None,
        }
    }

    fn deadline(&self) -> Instant {
        *self.deadline.get_or_init(|| Instant::now() + self.drain_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAIN: Duration = Duration::from_millis(400);

    #[tokio::test]
    async fn fault_01_a_wait_for_more_ends_at_once_and_one_for_work_in_hand_when_the_time_is_over()
    {
        let stop = Stop::new(DRAIN);
        assert_eq!(stop.unless_asked(async { 1 }).await, Some(1));
        let (part, begun) = (stop.child(), Instant::now());
        stop.ask();
        assert_eq!(part.unless_asked(std::future::pending::<()>()).await, None);
        assert!(begun.elapsed() < DRAIN);
        assert_eq!(part.until_over(async { 1 }).await, Some(1));
        assert_eq!(part.until_over(std::future::pending::<()>()).await, None);
        assert!(begun.elapsed() >= DRAIN);
    }

    #[tokio::test]
    async fn fault_01_a_part_that_ends_later_has_no_more_time_than_the_whole() {
        let stop = Stop::new(DRAIN);
        let (part, begun) = (stop.child(), Instant::now());
        stop.ask();
        tokio::time::sleep(DRAIN * 3 / 4).await;
        part.over().await;
        assert!(begun.elapsed() < DRAIN * 3 / 2);
    }

    #[tokio::test]
    async fn fault_01_a_part_that_ends_alone_has_its_own_time() {
        let stop = Stop::new(DRAIN);
        let (part, begun) = (stop.child(), Instant::now());
        part.ask();
        part.over().await;
        assert!(begun.elapsed() >= DRAIN && !stop.is_asked());
    }
}
