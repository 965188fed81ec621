//! Shows a call that gets no answer, so that no wait is silent.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// The call that a reader waits for; cheap to clone. A [`WaitWatch`] shows it.
#[derive(Clone, Debug, Default)]
pub struct Waiting(Arc<watch::Sender<Option<Wait>>>);

#[derive(Clone, Debug, PartialEq)]
struct Wait {
    call: &'static str,
    /// Time since which no call has succeeded.
    since: Instant,
    /// Error of the last try.
    cause: Option<String>,
}

impl Waiting {
    /// Notes that a call begins. The time of several tries counts from the first.
    pub fn begins(&self, call: &'static str) {
        self.0.send_modify(|wait| match wait {
            Some(wait) => wait.call = call,
            None => *wait = Some(Wait { call, since: Instant::now(), cause: None }),
        });
    }

    /// Notes that the call failed and will be tried again.
    pub fn failed(&self, cause: impl Display) {
        self.0.send_modify(|wait| {
            if let Some(wait) = wait {
                wait.cause = Some(cause.to_string());
            }
        });
    }

    /// Notes that the call was answered.
    pub fn answered(&self) {
        self.0.send_if_modified(|wait| wait.take().is_some());
    }

    /// Watches for calls that get no answer for longer than `after`.
    pub fn watch(&self, after: Duration) -> WaitWatch {
        WaitWatch { wait: self.0.subscribe(), after, shown: None }
    }
}

/// Decides when a call is shown as blocked, and when no longer.
#[derive(Debug)]
pub struct WaitWatch {
    wait: watch::Receiver<Option<Wait>>,
    after: Duration,
    shown: Option<String>,
}

impl WaitWatch {
    /// Completes when the shown state changes: with a cause, or with `None` once calls are answered again. Dropping the
    /// future loses nothing.
    pub async fn changed(&mut self) -> Option<String> {
        loop {
            let wait = self.wait.borrow_and_update().clone();
            let deadline = wait.as_ref().map(|wait| wait.since + self.after);
            let is_late = deadline.is_some_and(|deadline| deadline <= Instant::now());
            let cause = wait.filter(|_| is_late).map(|wait| self.text(&wait));
            // Report only changes: a call that stays blocked is reported once, and again if its cause changes.
            if cause != self.shown {
                self.shown.clone_from(&cause);
                return cause;
            }
            let until_deadline = async {
                match deadline.filter(|_| !is_late) {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.wait.changed() => if changed.is_err() {
                    // Nobody makes calls any more.
                    std::future::pending::<()>().await;
                },
                () = until_deadline => {}
            }
        }
    }

    fn text(&self, wait: &Wait) -> String {
        let after = humantime::format_duration(self.after);
        match &wait.cause {
            Some(cause) => {
                format!("no answer to {} for more than {after}; last try: {cause}", wait.call)
            }
            None => format!("no answer to {} for more than {after}", wait.call),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_millis(40);

    #[tokio::test]
    async fn fault_03_a_call_is_shown_after_its_time_and_no_longer_than_it_lasts() {
        let waiting = Waiting::default();
        let mut watch = waiting.watch(AFTER);
        let begun = Instant::now();
        waiting.begins("GetRecords");
        let shown = watch.changed().await.expect("a cause");
        assert!(begun.elapsed() >= AFTER);
        assert!(shown.contains("GetRecords") && shown.contains("40ms"), "{shown}");
        waiting.failed("the connection broke");
        waiting.begins("GetShardIterator");
        let shown = watch.changed().await.expect("a cause");
        assert!(shown.contains("GetShardIterator") && shown.contains("broke"), "{shown}");
        waiting.answered();
        assert_eq!(watch.changed().await, None);
    }

    #[tokio::test]
    async fn fault_03_calls_that_are_answered_are_never_shown() {
        let waiting = Waiting::default();
        let mut watch = waiting.watch(AFTER);
        let answered = async {
            for _ in 0..30 {
                waiting.begins("GetRecords");
                tokio::time::sleep(Duration::from_millis(4)).await;
                waiting.answered();
            }
        };
        tokio::select! {
            shown = watch.changed() => panic!("{shown:?}"),
            () = answered => {}
        }
    }
}
