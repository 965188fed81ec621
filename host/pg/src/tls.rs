//! The byte stream between a client and a PostgreSQL server: its encryption, and the limit of answers.
//!
//! The state of the handshake tells afterwards why a connection failed, and whether plain text may be tried:
//!
//! | state | meaning |
//! |---|---|
//! | 0 | nothing is known: no host was reached, or TLS is off |
//! | [`REFUSED`] | the server has answered that it has no TLS |
//! | [`BEGUN`] | the handshake has started; if the connection failed, TLS has failed |
//! | [`DONE`] | the connection is encrypted |

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres::{Config, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::either::Either;

use super::answer::{AnswerLength, Prepared};

/// Message with which a client asks for TLS: its length, and a code instead of a version. Source: PostgreSQL, "Message
/// Formats", SSLRequest.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

type RustlsConnect = <MakeRustlsConnect as MakeTlsConnect<Socket>>::TlsConnect;
type RustlsStream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;

/// TLS settings for a server.
#[derive(Clone)]
pub(super) struct Tls(MakeRustlsConnect);

impl Tls {
    /// Verifies the server's name with the certificates of a PEM file, or with those of the system.
    ///
    /// # Errors
    /// The reason why there are no certificates.
    pub fn verified(roots_file: Option<&str>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        match roots_file {
            Some(file) => {
                let unreadable = |cause: &dyn std::fmt::Display| {
                    format!("failed to read the certificates of sslrootcert={file}: {cause}")
                };
                let certificates = CertificateDer::pem_file_iter(Path::new(file))
                    .map_err(|cause| unreadable(&cause))?;
                for certificate in certificates {
                    let certificate = certificate.map_err(|cause| unreadable(&cause))?;
                    roots.add(certificate).map_err(|cause| unreadable(&cause))?;
                }
                if roots.is_empty() {
                    return Err(unreadable(&"the file contains none"));
                }
            }
            None => {
                let found = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(found.certs);
                if roots.is_empty() {
                    return Err("no trusted certificates found on this system: add sslrootcert=FILE to the \
                                connection string"
                        .into());
                }
            }
        }
        shardmill_tls::install();
        let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        Ok(Self(MakeRustlsConnect::new(config)))
    }

    /// Accepts any certificate.
    pub(crate) fn unverified() -> Self {
        shardmill_tls::install();
        let config = ClientConfig::builder().dangerous();
        let config = config.with_custom_certificate_verifier(Arc::new(Anybody));
        Self(MakeRustlsConnect::new(config.with_no_client_auth()))
    }
}

/// State of the TLS handshake of a connection. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Handshake(Arc<AtomicU8>);

const REFUSED: u8 = 1;
const BEGUN: u8 = 2;
const DONE: u8 = 3;

impl Handshake {
    /// Whether the connection is encrypted.
    pub fn is_done(&self) -> bool {
        self.0.load(Ordering::Acquire) == DONE
    }

    /// Whether the server has TLS but the handshake failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.0.load(Ordering::Acquire) == BEGUN
    }

    /// Whether the server has no TLS.
    pub(crate) fn was_refused(&self) -> bool {
        self.0.load(Ordering::Acquire) == REFUSED
    }

    fn note(&self, state: u8) {
        self.0.store(state, Ordering::Release);
    }
}

/// Encryption of a connection.
#[derive(Clone)]
pub(super) enum Mode {
    /// TLS, or no connection.
    Required(Tls),
    /// TLS if the server has it.
    Preferred(Tls),
    /// Never.
    Off,
}

/// Wraps a socket for the client: with or without TLS, and with a limit on answers.
///
/// The client is configured to start TLS at once, and this type takes the place of TLS. So the question whether the
/// server has TLS is asked here, and plain connections are limited as well. Otherwise the client would use the plain
/// socket directly.
#[derive(Clone)]
pub(super) struct Connector {
    mode: Mode,
    /// Whether TLS starts without asking (`sslnegotiation=direct`).
    is_direct: bool,
    handshake: Handshake,
    prepared: Prepared,
}

impl Connector {
    /// Makes a connector, and the configuration that makes the client use it.
    pub fn new(
        config: &Config,
        mode: Mode,
        handshake: &Handshake,
        prepared: &Prepared,
    ) -> (Config, Self) {
        let is_direct = config.get_ssl_negotiation() == SslNegotiation::Direct;
        let mut config = config.clone();
        config.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
        let (handshake, prepared) = (handshake.clone(), prepared.clone());
        (config, Self { mode, is_direct, handshake, prepared })
    }
}

impl MakeTlsConnect<Socket> for Connector {
    type Stream = Transport;
    type TlsConnect = Connecting;
    type Error = std::convert::Infallible;

    fn make_tls_connect(&mut self, domain: &str) -> Result<Self::TlsConnect, Self::Error> {
        // The client tries the hosts in turn and calls this for each.
        // Of several hosts, the last one that was reached counts.
        self.handshake.note(0);
        let (tls, is_required) = match &mut self.mode {
            Mode::Off => (None, false),
            Mode::Preferred(tls) => (Some(tls), false),
            Mode::Required(tls) => (Some(tls), true),
        };
        let tls = tls.map(|Tls(tls)| MakeTlsConnect::<Socket>::make_tls_connect(tls, domain));
        Ok(Connecting {
            tls: tls.transpose()?,
            is_required,
            is_direct: self.is_direct,
            handshake: self.handshake.clone(),
            prepared: self.prepared.clone(),
        })
    }
}

/// Connection in progress.
pub(super) struct Connecting {
    tls: Option<RustlsConnect>,
    is_required: bool,
    is_direct: bool,
    handshake: Handshake,
    prepared: Prepared,
}

impl TlsConnect<Socket> for Connecting {
    type Stream = Transport;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Transport>> + Send>>;

    fn connect(self, mut socket: Socket) -> Self::Future {
        Box::pin(async move {
            let over = |stream| Transport { stream, answer: AnswerLength::new(self.prepared) };
            let Some(tls) = self.tls else { return Ok(over(Either::Left(socket))) };
            if !self.is_direct && !has_tls(&mut socket).await? {
                self.handshake.note(REFUSED);
                return match self.is_required {
                    true => Err(io::Error::other("server does not support TLS")),
                    false => Ok(over(Either::Left(socket))),
                };
            }
            self.handshake.note(BEGUN);
            let stream = tls.connect(socket).await?;
            self.handshake.note(DONE);
            Ok(over(Either::Right(Box::new(stream))))
        })
    }
}

/// Asks whether the server has TLS. Source: PostgreSQL, "Message Flow", "SSL Session Encryption".
async fn has_tls(socket: &mut Socket) -> io::Result<bool> {
    socket.write_all(&SSL_REQUEST).await?;
    // Read one byte only: plain bytes after it could come from an attacker on the network (CVE-2021-23222).
    Ok(socket.read_u8().await? == b'S')
}

/// Byte stream between client and server.
pub(super) struct Transport {
    stream: Either<Socket, Box<RustlsStream>>,
    answer: AnswerLength,
}

impl TlsStream for Transport {
    fn channel_binding(&self) -> ChannelBinding {
        match &self.stream {
            Either::Left(_) => ChannelBinding::none(),
            Either::Right(tls) => tls.channel_binding(),
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        if let Poll::Ready(Ok(())) = read {
            this.answer.add(&buffer.filled()[before..])?;
        }
        read
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// Accepts every certificate. This protects only against passive listeners. An active attacker could also claim that
/// the server has no TLS, so checks here would not help.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let provider = CryptoProvider::get_default();
        let schemes = provider.map(|it| it.signature_verification_algorithms.supported_schemes());
        schemes.unwrap_or_default()
    }
}
