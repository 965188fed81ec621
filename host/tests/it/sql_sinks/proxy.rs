//! A proxy before a server that cuts a connection at a chosen word of the client.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// When to cut, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The server never sees the message with this word.
    Before(&'static str),
    /// The server answers the message with this word; the client never sees the answer.
    After(&'static str),
    /// Likewise, and new connections are closed until [`Proxy::accept`].
    AfterAndRefuse(&'static str),
}

impl Cut {
    fn word(self) -> &'static str {
        match self {
            Self::Before(word) | Self::After(word) | Self::AfterAndRefuse(word) => word,
        }
    }
}

#[derive(Default)]
struct State {
    cut: Option<Cut>,
    refuses: bool,
}

/// The proxy; it ends with the test's runtime.
pub struct Proxy {
    pub port: u16,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    /// Listens on loopback and passes on to `server`, a `host:port`.
    pub async fn start(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let state = Arc::<Mutex<State>>::default();
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if !shared.lock().expect("no panic").refuses {
                    let server = TcpStream::connect(&server).await.expect("the server");
                    tokio::spawn(pass(client, server, Arc::clone(&shared)));
                }
            }
        });
        Self { port, state }
    }

    /// Cuts the next connection on which the client says the word.
    pub fn cut(&self, cut: Cut) {
        self.state.lock().expect("no panic").cut = Some(cut);
    }

    /// Whether the last [`Proxy::cut`] has happened.
    pub fn has_cut(&self) -> bool {
        self.state.lock().expect("no panic").cut.is_none()
    }

    /// Takes new connections again.
    pub fn accept(&self) {
        self.state.lock().expect("no panic").refuses = false;
    }
}

/// Passes bytes both ways until one side ends, or until the cut.
async fn pass(mut client: TcpStream, mut server: TcpStream, state: Arc<Mutex<State>>) {
    let (mut said, mut answer) = (vec![0; 65_536], vec![0; 65_536]);
    loop {
        tokio::select! {
            read = client.read(&mut said) => {
                let Ok(length @ 1..) = read else { return };
                let cut = take_cut(&state, &said[..length]);
                if let Some(Cut::Before(_)) = cut {
                    return;
                }
                if server.write_all(&said[..length]).await.is_err() {
                    return;
                }
                if cut.is_some() {
                    let _ = server.read(&mut answer).await;
                    return;
                }
            }
            read = server.read(&mut answer) => {
                let Ok(length @ 1..) = read else { return };
                if client.write_all(&answer[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// The cut, if its word is in what the client says.
fn take_cut(state: &Mutex<State>, said: &[u8]) -> Option<Cut> {
    let mut state = state.lock().expect("no panic");
    let word = state.cut?.word().as_bytes();
    said.windows(word.len()).find(|window| *window == word)?;
    state.refuses = matches!(state.cut, Some(Cut::AfterAndRefuse(_)));
    state.cut.take()
}
