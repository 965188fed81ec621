//! A proxy in front of a server that cuts a connection at a chosen word of the client.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Message by which a client asks for TLS, before its first one.
pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// When to cut, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The server never receives the message with this word.
    Before(&'static str),
    /// The server answers the message with this word; the client never receives the answer.
    After(&'static str),
    /// Like `After`, and new connections are closed until [`Proxy::accept`].
    AfterAndRefuse(&'static str),
    /// On a connection on which the client has sent the first word, the server answers the message with the second
    /// word. The client receives nothing more, and the connection stays open.
    Mute(&'static str, &'static str),
}

impl Cut {
    fn word(self) -> &'static str {
        match self {
            Self::Before(word)
            | Self::After(word)
            | Self::AfterAndRefuse(word)
            | Self::Mute(_, word) => word,
        }
    }
}

#[derive(Default)]
struct State {
    cut: Option<Cut>,
    refuses: bool,
    /// Whether nothing is passed on, on any connection.
    frozen: bool,
    /// Word that is counted, and how often clients have sent it.
    counted: Option<(&'static str, usize)>,
}

/// Running proxy; it ends with the test's runtime.
pub struct Proxy {
    pub port: u16,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    /// Listens on loopback and passes everything on to `server`, a `host:port`.
    pub async fn start(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let state = Arc::<Mutex<State>>::default();
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if !shared.lock().expect("a lock").refuses {
                    let server = TcpStream::connect(&server).await.expect("the server");
                    tokio::spawn(pass(client, server, Arc::clone(&shared)));
                }
            }
        });
        Self { port, state }
    }

    /// Cuts the next connection on which the client sends the word.
    pub fn cut(&self, cut: Cut) {
        self.state.lock().expect("a lock").cut = Some(cut);
    }

    /// Whether the last [`Proxy::cut`] has happened.
    pub fn has_cut(&self) -> bool {
        self.state.lock().expect("a lock").cut.is_none()
    }

    /// Stops passing anything on, as in front of a stopped server: its kernel still accepts connections.
    pub fn freeze(&self) {
        self.state.lock().expect("a lock").frozen = true;
    }

    /// Resumes passing on.
    pub fn thaw(&self) {
        self.state.lock().expect("a lock").frozen = false;
    }

    /// Counts from now on how often clients send a word.
    pub fn count(&self, word: &'static str) {
        self.state.lock().expect("a lock").counted = Some((word, 0));
    }

    /// Returns how often they have sent it.
    pub fn counted(&self) -> usize {
        self.state.lock().expect("a lock").counted.expect("counted").1
    }

    /// Accepts new connections again.
    pub fn accept(&self) {
        self.state.lock().expect("a lock").refuses = false;
    }
}

/// Passes bytes both ways until one side ends, or until the cut.
async fn pass(mut client: TcpStream, mut server: TcpStream, state: Arc<Mutex<State>>) {
    let (mut said, mut answer) = (vec![0; 65_536], vec![0; 65_536]);
    let mut before = false;
    let mut is_mute = false;
    loop {
        tokio::select! {
            read = client.read(&mut said) => {
                let Ok(length @ 1..) = read else { return };
                while_frozen(&state).await;
                // Refuses TLS: the proxy must be able to read what follows.
                if said[..length] == SSL_REQUEST {
                    if client.write_all(b"N").await.is_err() {
                        return;
                    }
                    continue;
                }
                let cut = take_cut(&state, &said[..length], &mut before);
                if let Some(Cut::Before(_)) = cut {
                    return;
                }
                if server.write_all(&said[..length]).await.is_err() {
                    return;
                }
                match cut {
                    Some(Cut::Mute(..)) => is_mute = true,
                    Some(_) => {
                        let _ = server.read(&mut answer).await;
                        return;
                    }
                    None => {}
                }
            }
            read = server.read(&mut answer) => {
                let Ok(length @ 1..) = read else { return };
                while_frozen(&state).await;
                if !is_mute && client.write_all(&answer[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn while_frozen(state: &Mutex<State>) {
    while state.lock().expect("a lock").frozen {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

/// Takes the cut if the client's bytes contain its word. `before`: whether the word that must come before it was
/// sent.
fn take_cut(state: &Mutex<State>, said: &[u8], before: &mut bool) -> Option<Cut> {
    let has = |word: &str| said.windows(word.len()).any(|window| window == word.as_bytes());
    let mut state = state.lock().expect("a lock");
    if let Some((word, times)) = &mut state.counted {
        let word = word.as_bytes();
        *times += said.windows(word.len()).filter(|window| *window == word).count();
    }
    let cut = state.cut?;
    if let Cut::Mute(first, _) = cut {
        *before |= has(first);
        if !*before {
            return None;
        }
    }
    if !has(cut.word()) {
        return None;
    }
    state.refuses = matches!(cut, Cut::AfterAndRefuse(_));
    state.cut.take()
}
