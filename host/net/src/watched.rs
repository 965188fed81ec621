//! A request body that reports when it was sent completely.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::oneshot;

/// Size of a piece for the connection. It takes the next piece only after it has written most of the previous ones, so
/// the end is reported when it is sent and not when the body is queued.
const PIECE_BYTES: usize = 16 << 10;

/// Body that the connection takes piece by piece.
pub(super) struct WatchedBody {
    rest: Bytes,
    /// Sent when nothing is left. If it is dropped before, the body was abandoned.
    done: Option<oneshot::Sender<()>>,
}

/// Reports whether a body was taken to its end.
pub(super) struct Sent(oneshot::Receiver<()>);

impl Sent {
    /// Waits until the whole body was taken; false if that can no longer happen.
    pub(super) async fn all(self) -> bool {
        self.0.await.is_ok()
    }
}

impl WatchedBody {
    pub(super) fn new(bytes: Bytes) -> (Self, Sent) {
        let (done, sent) = oneshot::channel();
        let mut body = Self { rest: bytes, done: Some(done) };
        body.note();
        (body, Sent(sent))
    }

    fn note(&mut self) {
        if self.rest.is_empty()
            && let Some(done) = self.done.take()
        {
            // It does not matter whether somebody waits.
            let _ = done.send(());
        }
    }
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let body = self.get_mut();
        if body.rest.is_empty() {
            return Poll::Ready(None);
        }
        let piece = body.rest.split_to(body.rest.len().min(PIECE_BYTES));
        body.note();
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}
