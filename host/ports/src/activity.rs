//! Activity of a connection: its request in hand, or since when it waits for its peer.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::pace::Pace;
use shardmill_config::HttpDeadlines;

/// How many times slower than a request an answer may be taken: lanes take those of the embedded stream as fast
/// as their sinks go.
const ANSWER_SHARE: usize = 8;

/// Activity of one connection; its clones share it.
#[derive(Clone)]
pub(super) struct Activity(Arc<Mutex<State>>);

#[derive(Clone, Debug)]
struct State {
    /// Whether it was looked at what the peer has sent. Before, a whole request may be there.
    is_looked_at: bool,
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
    /// The pace at which the peer takes an answer of which it did not take all at once.
    unread: Option<Pace>,
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
            is_looked_at: false,
            requests: 0,
            has_asked: false,
            idle_since: now,
            head_since: None,
            body_since: None,
            unread: None,
        })))
    }

    pub(crate) fn begin_request(&self) -> InHand {
        let mut state = self.lock();
        state.requests += 1;
        state.has_asked = true;
        state.head_since = None;
        InHand(self.clone())
    }

    /// Notes that the peer has sent nothing yet.
    pub(crate) fn nothing_came(&self) {
        self.lock().is_looked_at = true;
    }

    /// Notes that bytes came.
    pub fn came(&self) {
        let mut state = self.lock();
        state.is_looked_at = true;
        if state.requests == 0 {
            state.head_since.get_or_insert_with(Instant::now);
        }
    }

    /// Notes since when a body is waited for; `None`: more of it came, or nothing more is wanted.
    pub(crate) fn body_waits(&self, since: Option<Instant>) {
        self.lock().body_since = since;
    }

    /// Notes that the peer took some of what is written, or nothing.
    fn took(&self, bytes: usize) {
        let now = Instant::now();
        let mut state = self.lock();
        let pace = state.unread.get_or_insert_with(|| Pace::begin(now));
        pace.came(bytes.saturating_mul(ANSWER_SHARE), now);
    }

    /// Notes that the peer took all that is written.
    fn took_all(&self) {
        self.lock().unread = None;
    }

    /// Whether a request is in hand, or an answer not written yet.
    pub fn is_at_work(&self) -> bool {
        let state = self.lock();
        state.requests > 0 || state.unread.is_some()
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
    /// Since when the peer takes nothing of an answer, or less than the slowest pace.
    fn unread_since(&self) -> Option<Instant> {
        self.unread.map(|pace| pace.lagging_since())
    }

    fn wait(&self) -> Option<(Wait, Instant)> {
        if !self.is_looked_at {
            return None;
        }
        if let Some(since) = self.unread_since().or(self.body_since) {
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
        if let Some(since) = self.unread_since() {
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
    is_looked_at: bool,
    is_unread: bool,
}

impl Watched {
    pub fn new(stream: TcpStream, activity: Activity) -> Self {
        Self { stream, activity, is_looked_at: false, is_unread: false }
    }

    /// Notes the outcome of a write of `bytes`.
    fn wrote(&mut self, bytes: usize, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &written {
            Poll::Pending => {
                self.is_unread = true;
                self.activity.took(0);
            }
            // Each write would take the lock otherwise.
            Poll::Ready(Ok(taken)) if self.is_unread => match *taken < bytes {
                true => self.activity.took(*taken),
                false => {
                    self.is_unread = false;
                    self.activity.took_all();
                }
            },
            Poll::Ready(_) => {}
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
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        // Each read would take the lock otherwise.
        if read.is_pending() && !self.is_looked_at {
            self.is_looked_at = true;
            self.activity.nothing_came();
        }
        ready!(read)?;
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
        self.wrote(bytes.len(), written)
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
        self.wrote(parts.iter().map(|part| part.len()).sum(), written)
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
            is_looked_at: true,
            requests: 0,
            has_asked: false,
            idle_since: begun,
            head_since: None,
            body_since: None,
            unread: None,
        };
        let new = State { is_looked_at: false, ..idle.clone() };
        let asked = State { has_asked: true, ..idle.clone() };
        let head = State { head_since: Some(begun), ..idle.clone() };
        let at_work = State { requests: 1, has_asked: true, ..idle.clone() };
        let body = State { body_since: Some(begun), ..at_work.clone() };
        let mut pace = Pace::begin(begun);
        let unread = State { unread: Some(pace), ..at_work.clone() };
        pace.came(1, begun + second);
        let dripped = State { unread: Some(pace), ..at_work.clone() };
        // The connection, what it waits for, and the second after which it is closed for that.
        for (state, wait, late_after) in [
            (&new, None, None),
            (&idle, Some(Wait::FirstByte), Some(4)),
            (&asked, Some(Wait::NextRequest), Some(4)),
            (&head, Some(Wait::Head), Some(2)),
            (&at_work, None, None),
            // Answered 408 by its own deadline.
            (&body, Some(Wait::Body), None),
            (&unread, Some(Wait::Body), Some(3)),
            (&dripped, Some(Wait::Body), Some(3)),
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
