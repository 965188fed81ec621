//! Activity of a connection: whether we work for its peer, or what it waits for from its peer, and since when.
//!
//! | the peer must | deadline |
//! |---|---|
//! | send a first byte, or the next request | `idle_max` |
//! | send the rest of a head | `head_max`, from its first byte |
//! | send more of a body | that of the body ([`RequestBody`](super::body::RequestBody)), which answers 408 |
//! | read more of an answer | `body_max`, at the lowest pace |
//!
//! The race: between the accept and the first read, a whole request may already be in the system's buffer. So a
//! connection counts as waiting only after one read found nothing, and a health check is not closed before it is read.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::pace::Pace;
use shardmill_config::HttpDeadlines;

/// How many times slower than a request an answer may be read. Lanes read those of the embedded stream only as fast as
/// their sinks take the rows.
const ANSWER_SHARE: usize = 8;

/// Activity of one connection. Clones share it.
#[derive(Clone)]
pub(super) struct Activity(Arc<Mutex<State>>);

#[derive(Clone, Debug)]
struct State {
    /// Whether the connection was read once. Before that, a whole request may already have arrived.
    is_looked_at: bool,
    /// Requests whose answers are not completely written to the system.
    requests: usize,
    /// Whether a complete request head has arrived.
    has_asked: bool,
    /// Since when there has been no request.
    idle_since: Instant,
    /// Arrival of the first byte of a head that is not complete yet.
    head_since: Option<Instant>,
    /// Since when the connection waits for a body that does not arrive, or arrives below the lowest pace.
    body_since: Option<Instant>,
    /// Pace at which the peer reads an answer that it did not read at once.
    unread: Option<Pace>,
}

/// Event that a connection waits for. Connections make room for others in this order: first those that have not asked for
/// anything, last those whose work would be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wait {
    /// First byte.
    FirstByte,
    /// Rest of a request's head. Honest clients send a head in one piece.
    Head,
    /// Next request.
    NextRequest,
    /// More of a body, or the peer to read more of an answer.
    Body,
}

/// Request whose answer is not completely written to the system.
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

    /// Notes that bytes arrived.
    pub fn came(&self) {
        let mut state = self.lock();
        state.is_looked_at = true;
        if state.requests == 0 {
            state.head_since.get_or_insert_with(Instant::now);
        }
    }

    /// Notes since when a body is awaited; `None`: more of it arrived, or no more is needed.
    pub(crate) fn body_waits(&self, since: Option<Instant>) {
        self.lock().body_since = since;
    }

    /// Notes how much of the written bytes the peer has read.
    fn took(&self, bytes: usize) {
        let now = Instant::now();
        let mut state = self.lock();
        let pace = state.unread.get_or_insert_with(|| Pace::begin(now));
        pace.came(bytes.saturating_mul(ANSWER_SHARE), now);
    }

    /// Notes that the peer has read all that was written.
    fn took_all(&self) {
        self.lock().unread = None;
    }

    /// Whether a request is in progress, or an answer is not completely written.
    pub fn is_at_work(&self) -> bool {
        let state = self.lock();
        state.requests > 0 || state.unread.is_some()
    }

    /// Returns what the peer must send or read next, and since when; `None`: the peer waits for us.
    pub fn wait(&self) -> Option<(Wait, Instant)> {
        self.lock().wait()
    }

    /// Whether a deadline has passed. The deadline of a body is not checked here: the body checks it, and the request
    /// is answered.
    pub fn is_late(&self, deadlines: &HttpDeadlines, now: Instant) -> bool {
        self.lock().is_late(deadlines, now)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Since when the peer reads nothing of an answer, or less than the lowest pace.
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

/// Stream of a connection that notes when bytes arrive, and when the peer does not read.
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

    /// Notes the result of a write of `bytes`.
    fn wrote(&mut self, bytes: usize, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &written {
            Poll::Pending => {
                self.is_unread = true;
                self.activity.took(0);
            }
            // Only then, because each write would take the lock otherwise.
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
        // Only once, because each read would take the lock otherwise.
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
        // The state of a connection, what it waits for, and the second after which it is closed.
        for (state, wait, late_after) in [
            (&new, None, None),
            (&idle, Some(Wait::FirstByte), Some(4)),
            (&asked, Some(Wait::NextRequest), Some(4)),
            (&head, Some(Wait::Head), Some(2)),
            (&at_work, None, None),
            // The deadline of the body answers with 408.
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
