//! Activity of a connection: its request in hand, or since when it waits for its peer.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::config::HttpDeadlines;

/// Activity of one connection; its clones share it.
#[derive(Clone)]
pub(super) struct Activity(Arc<Mutex<State>>);

#[derive(Clone, Debug)]
struct State {
    /// Requests whose answers are not handed to the system in full.
    requests: usize,
    /// Whether a whole request head has come.
    has_asked: bool,
    /// Since when there is no request.
    idle_since: Instant,
    /// When the first byte came of a head that is not complete yet.
    head_since: Option<Instant>,
    /// Since when a body is waited for of which nothing comes, or less than the slowest pace.
    body_since: Option<Instant>,
    /// Since when the peer takes nothing of an answer.
    unread_since: Option<Instant>,
}

/// Thing that a connection waits for. The order is that in which connections make room for others: who has
/// not asked for anything goes first, whose work would be lost goes last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wait {
    /// For a first byte.
    FirstByte,
    /// For the rest of a request's head, which comes in one piece from who means well.
    Head,
    /// For another request.
    NextRequest,
    /// For more of a body, or for the peer to take more of an answer.
    Body,
}

/// A request whose answer is not handed to the system in full.
pub(super) struct InHand(Activity);

impl Activity {
    pub fn new(now: Instant) -> Self {
        Self(Arc::new(Mutex::new(State {
            requests: 0,
            has_asked: false,
            idle_since: now,
            head_since: None,
            body_since: None,
            unread_since: None,
        })))
    }

    pub fn begin_request(&self) -> InHand {
        let mut state = self.lock();
        state.requests += 1;
        state.has_asked = true;
        state.head_since = None;
        InHand(self.clone())
    }

    /// Notes that bytes came.
    fn came(&self) {
        let mut state = self.lock();
        if state.requests == 0 {
            state.head_since.get_or_insert_with(Instant::now);
        }
    }

    /// Notes since when a body is waited for; `None`: more of it came, or nothing more is wanted.
    pub fn body_waits(&self, since: Option<Instant>) {
        self.lock().body_since = since;
    }

    /// Notes whether the peer takes what is written.
    fn written(&self, is_taken: bool) {
        let mut state = self.lock();
        match is_taken {
            true => state.unread_since = None,
            false => _ = state.unread_since.get_or_insert_with(Instant::now),
        }
    }

    /// Whether a request is in hand, or an answer not written yet.
    pub fn is_at_work(&self) -> bool {
        let state = self.lock();
        state.requests > 0 || state.unread_since.is_some()
    }

    /// Gives the thing that the peer has to send or take next, and since when; `None`: the peer waits for us.
    pub fn wait(&self) -> Option<(Wait, Instant)> {
        self.lock().wait()
    }

    /// Whether a deadline has passed. That of a body is the body's own, which is answered.
    pub fn is_late(&self, deadlines: &HttpDeadlines, now: Instant) -> bool {
        self.lock().is_late(deadlines, now)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn wait(&self) -> Option<(Wait, Instant)> {
        if let Some(since) = self.unread_since.or(self.body_since) {
            return Some((Wait::Body, since));
        }
        match (self.requests, self.head_since, self.has_asked) {
            (1.., _, _) => None,
            (0, Some(since), _) => Some((Wait::Head, since)),
            (0, None, true) => Some((Wait::NextRequest, self.idle_since)),
            (0, None, false) => Some((Wait::FirstByte, self.idle_since)),
        }
    }

    fn is_late(&self, deadlines: &HttpDeadlines, now: Instant) -> bool {
        let passed = |since: Instant, max| now.saturating_duration_since(since) > max;
        if let Some(since) = self.unread_since {
            return passed(since, deadlines.body_max);
        }
        match self.wait() {
            Some((Wait::Head, since)) => passed(since, deadlines.head_max),
            Some((Wait::FirstByte | Wait::NextRequest, since)) => passed(since, deadlines.idle_max),
            Some((Wait::Body, _)) | None => false,
        }
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.requests = state.requests.saturating_sub(1);
        state.idle_since = Instant::now();
    }
}

/// A connection's stream that notes when bytes come, and when nobody takes those that go.
pub(super) struct Watched {
    stream: TcpStream,
    activity: Activity,
    is_unread: bool,
}

impl Watched {
    pub fn new(stream: TcpStream, activity: Activity) -> Self {
        Self { stream, activity, is_unread: false }
    }

    fn wrote(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let is_unread = written.is_pending();
        // Each write would take the lock otherwise.
        if is_unread || self.is_unread {
            self.activity.written(!is_unread);
            self.is_unread = is_unread;
        }
        written
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            self.activity.came();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.wrote(written)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn wall_03_each_wait_for_the_peer_has_a_deadline_of_its_own() {
        let second = Duration::from_secs(1);
        let deadlines =
            HttpDeadlines { head_max: 2 * second, body_max: 3 * second, idle_max: 4 * second };
        let begun = Instant::now();
        let idle = State {
            requests: 0,
            has_asked: false,
            idle_since: begun,
            head_since: None,
            body_since: None,
            unread_since: None,
        };
        let asked = State { has_asked: true, ..idle.clone() };
        let head = State { head_since: Some(begun), ..idle.clone() };
        let at_work = State { requests: 1, has_asked: true, ..idle.clone() };
        let body = State { body_since: Some(begun), ..at_work.clone() };
        let unread = State { unread_since: Some(begun), ..at_work.clone() };
        // The connection, what it waits for, and the second after which it is closed for that.
        for (state, wait, late_after) in [
            (&idle, Some(Wait::FirstByte), Some(4)),
            (&asked, Some(Wait::NextRequest), Some(4)),
            (&head, Some(Wait::Head), Some(2)),
            (&at_work, None, None),
            // Answered 408 by its own deadline.
            (&body, Some(Wait::Body), None),
            (&unread, Some(Wait::Body), Some(3)),
        ] {
            assert_eq!(state.wait().map(|(wait, _)| wait), wait, "{state:?}");
            let first = (0..10).find(|second| {
                let now = begun + Duration::from_secs(*second) + Duration::from_millis(1);
                state.is_late(&deadlines, now)
            });
            assert_eq!(first, late_after, "{state:?}");
        }
    }
}
