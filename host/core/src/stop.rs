//! The end of a run: every wait ends when it is asked for, and what is in hand has a time to get done.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A token that asks for the end, and the time that is left from then on. Its clones share both.
///
/// Two kinds of waits know it. One for more work ([`Stop::unless_asked`]) ends when the end is asked for.
/// One for work in hand, such as a last commit ([`Stop::until_over`]), ends when the time is over: what
/// is not durable by then is read again.
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
/// // No more work is taken on, but the commit in hand may get done.
/// assert_eq!(stop.unless_asked(async { "a batch" }).await, None);
/// assert_eq!(stop.until_over(async { "a commit" }).await, Some("a commit"));
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Stop {
    token: CancellationToken,
    drain_max: Duration,
    /// When the time is over; set by whoever first sees that the end is asked for.
    deadline: Arc<OnceLock<Instant>>,
    parent: Option<Arc<Self>>,
}

impl Stop {
    /// An end that nobody has asked for yet.
    pub fn new(drain_max: Duration) -> Self {
        Self::at(CancellationToken::new(), drain_max)
    }

    /// The end that a token asks for.
    pub fn at(token: CancellationToken, drain_max: Duration) -> Self {
        Self { token, drain_max, deadline: Arc::default(), parent: None }
    }

    /// The end of a part: asked for by itself, or with the whole, and then over with the whole.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            token: self.token.child_token(),
            drain_max: self.drain_max,
            deadline: Arc::default(),
            parent: Some(Arc::new(self.clone())),
        }
    }

    /// Asks for the end.
    pub fn ask(&self) {
        self.deadline();
        self.token.cancel();
    }

    /// Whether the end is asked for.
    pub fn is_asked(&self) -> bool {
        self.token.is_cancelled()
    }

    /// The token, for parts that need no more time.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// The time that is left once the end is asked for.
    pub fn drain_max(&self) -> Duration {
        self.drain_max
    }

    /// Completes when the end is asked for.
    pub async fn asked(&self) {
        self.token.cancelled().await;
        // From now on the time runs.
        self.deadline();
    }

    /// Completes when the time of the end is over.
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

    /// Waits for something, unless the end is asked for.
    pub async fn unless_asked<T>(&self, wait: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.asked() => None,
            done = wait => Some(done),
        }
    }

    /// Waits for something, until the time of the end is over.
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
