//! Bound on the informational heads (such as `100 Continue`) before an answer.
//!
//! The HTTP client skips them in a loop, and reads while there is something to read. A server that sends them without a
//! pause would never be silent, would never send a body, which is bounded, and would keep a thread of the runtime busy
//! for long.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Waker};

use hyper::Request;
use hyper::ext::on_informational;
use tokio::task::coop;
use tokio_util::sync::CancellationToken;

/// Most informational heads before one answer. Servers send one or two.
const HEADS_MAX: u32 = 16;
/// Steps that surely use up the turn of a task: the runtime gives it 128.
const TURN_STEPS: u32 = 256;

/// Counts the informational heads before the answer to a request. The token is cancelled when there are more than
/// [`HEADS_MAX`]. The caller then drops the request, which ends its connection.
pub(super) fn count<B>(request: &mut Request<B>) -> CancellationToken {
    let too_many = CancellationToken::new();
    let (heads, token) = (AtomicU32::new(0), too_many.clone());
    on_informational(request, move |_| {
        if heads.fetch_add(1, Ordering::Relaxed) >= HEADS_MAX {
            token.cancel();
            end_turn();
        }
    });
    too_many
}

/// Uses up the turn of the calling task, so that its next read yields to other tasks. The one that waits for the answer
/// can then drop the request.
fn end_turn() {
    // The next read wakes the task for its next turn, so nothing needs to be woken here.
    let mut context = Context::from_waker(Waker::noop());
    // The bound is for a task without turns (`unconstrained`), whose steps never end.
    for _ in 0..TURN_STEPS {
        match coop::poll_proceed(&mut context) {
            Poll::Ready(step) => step.made_progress(),
            Poll::Pending => return,
        }
    }
}

/// Error of a server that sends informational heads and no answer.
#[derive(Debug)]
pub(super) struct TooManyHeads;

impl fmt::Display for TooManyHeads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "expected an answer after at most {HEADS_MAX} informational heads (such as 100 Continue), found more: \
             check which server answers at this address"
        )
    }
}

impl std::error::Error for TooManyHeads {}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::Empty;
    use hyper::client::conn::http1;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    const HEAD: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    const DEADLINE: Duration = Duration::from_secs(60);

    /// Returns the status that a server answers after this number of heads; `None`: the request was dropped and its
    /// connection has ended.
    async fn answered(heads: usize) -> Option<u16> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let server = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.expect("a client");
            let _ = socket.read(&mut [0; 1_024]).await;
            let piece = HEAD.repeat(heads.clamp(1, 10_000));
            for _ in 0..heads / 10_000 {
                // Fails once the client is gone.
                if socket.write_all(&piece).await.is_err() {
                    return;
                }
            }
            let _ = socket.write_all(&HEAD.repeat(heads % 10_000)).await;
            let _ = socket.write_all(ANSWER).await;
        });
        let socket = TcpStream::connect(address).await.expect("connected");
        let (mut client, connection) =
            http1::handshake::<_, Empty<&[u8]>>(TokioIo::new(socket)).await.expect("a client");
        let connection = tokio::spawn(connection);
        let mut request = Request::new(Empty::new());
        let too_many = count(&mut request);
        let status = tokio::select! {
            answer = client.send_request(request) => Some(answer.expect("an answer").status().as_u16()),
            () = too_many.cancelled() => None,
        };
        if status.is_none() {
            connection.await.expect("no panic").ok();
            server.await.expect("no panic");
        }
        status
    }

    #[tokio::test]
    async fn wall_02_a_server_that_sends_informational_heads_without_end_is_given_up() {
        for (heads, expected) in [(0, Some(200)), (16, Some(200)), (100_000_000, None)] {
            let status = tokio::time::timeout(DEADLINE, answered(heads)).await;
            assert_eq!(status.expect("in time"), expected, "{heads} heads");
        }
    }

    #[tokio::test]
    async fn wall_02_a_turn_ends_and_a_task_without_turns_goes_on() {
        tokio::spawn(async {
            end_turn();
            assert!(!coop::has_budget_remaining());
            tokio::task::yield_now().await;
            assert!(coop::has_budget_remaining());
        })
        .await
        .expect("no panic");
        coop::unconstrained(async { end_turn() }).await;
    }
}
