//! Request bodies with a deadline, and answer bodies that keep their request in progress.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use super::activity::{Activity, InHand};
use super::pace::{BYTES_PER_SECOND_MIN, Pace};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Error of a body that did not arrive in time.
#[derive(Debug, thiserror::Error)]
#[error("the body did not arrive within {} s", .0.as_secs_f64())]
pub struct BodyLate(Duration);

/// Request body that must arrive within a time that grows with its bytes.
pub(super) struct RequestBody {
    body: Incoming,
    activity: Activity,
    wait_max: Duration,
    pace: Pace,
    received: u64,
    begun: Option<Instant>,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl RequestBody {
    pub fn new(body: Incoming, activity: Activity, wait_max: Duration) -> Self {
        let pace = Pace::begin(std::time::Instant::now());
        Self { body, activity, wait_max, pace, received: 0, begun: None, deadline: None }
    }

    /// Returns the deadline for the rest.
    fn end(&mut self) -> Instant {
        let begun = *self.begun.get_or_insert_with(Instant::now);
        begun + self.wait_max + Duration::from_secs(self.received / BYTES_PER_SECOND_MIN)
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let end = self.end();
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(frame) => {
                self.activity.body_waits(None);
                if let Some(Ok(frame)) = &frame {
                    let bytes = frame.data_ref().map_or(0, Bytes::len);
                    self.received += bytes as u64;
                    self.pace.came(bytes, std::time::Instant::now());
                }
                Poll::Ready(frame.map(|frame| frame.map_err(BoxError::from)))
            }
            Poll::Pending => {
                self.activity.body_waits(Some(self.pace.lagging_since()));
                let deadline =
                    self.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(end)));
                if deadline.deadline() != end {
                    deadline.as_mut().reset(end);
                }
                match deadline.as_mut().poll(context) {
                    Poll::Pending => Poll::Pending,
                    Poll::Ready(()) => {
                        self.activity.body_waits(None);
                        Poll::Ready(Some(Err(BodyLate(self.wait_max).into())))
                    }
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        // The owner no longer wants the rest.
        self.activity.body_waits(None);
    }
}

/// Answer body. Its request is in progress until the body is completely written.
pub(super) struct AnswerBody {
    body: Body,
    in_hand: Option<InHand>,
}

impl AnswerBody {
    pub fn new(body: Body, in_hand: InHand) -> Self {
        Self { body, in_hand: Some(in_hand) }
    }
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.in_hand = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Returns the next bytes of a body as they arrive; `None` at its end.
///
/// # Errors
/// The body is cut off, or [`BodyLate`] as the cause.
pub async fn read(body: &mut Body) -> Option<Result<Bytes, axum::Error>> {
    loop {
        let frame = std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await;
        match frame? {
            Ok(frame) => {
                // Trailers are ignored.
                if let Ok(data) = frame.into_data() {
                    return Some(Ok(data));
                }
            }
            Err(error) => return Some(Err(error)),
        }
    }
}
