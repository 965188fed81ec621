//! TLS to a PostgreSQL server, and whether it was spoken.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres::Socket;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres_rustls::MakeRustlsConnect;

type RustlsConnect = <MakeRustlsConnect as MakeTlsConnect<Socket>>::TlsConnect;
type RustlsStream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;

/// How TLS is spoken to a server.
#[derive(Clone)]
pub(super) struct Tls(MakeRustlsConnect);

impl Tls {
    /// Trusts the certificates of a PEM file, or those of the system, for the server's own name.
    ///
    /// # Errors
    /// Why there are none.
    pub fn verified(roots_file: Option<&str>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        match roots_file {
            Some(file) => {
                let unreadable = |cause: &dyn std::fmt::Display| {
                    format!("the certificates of sslrootcert={file} cannot be read: {cause}")
                };
                let certificates = CertificateDer::pem_file_iter(Path::new(file))
                    .map_err(|cause| unreadable(&cause))?;
                for certificate in certificates {
                    let certificate = certificate.map_err(|cause| unreadable(&cause))?;
                    roots.add(certificate).map_err(|cause| unreadable(&cause))?;
                }
                if roots.is_empty() {
                    return Err(unreadable(&"the file holds none"));
                }
            }
            None => {
                let found = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(found.certs);
                if roots.is_empty() {
                    return Err("this system trusts no certificate: name those to trust by \
                                sslrootcert=FILE in the connection string"
                        .into());
                }
            }
        }
        crate::tls::install();
        let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        Ok(Self(MakeRustlsConnect::new(config)))
    }

    /// Speaks to any server, whoever it is.
    pub fn unverified() -> Self {
        crate::tls::install();
        let config = ClientConfig::builder().dangerous();
        let config = config.with_custom_certificate_verifier(Arc::new(Anybody));
        Self(MakeRustlsConnect::new(config.with_no_client_auth()))
    }

    /// The same, and what becomes of the handshake is noted.
    pub fn noting(&self, handshake: &Handshake) -> Noting<MakeRustlsConnect> {
        Noting { inner: self.0.clone(), handshake: handshake.clone() }
    }
}

/// What became of a handshake; its clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Handshake(Arc<AtomicU8>);

const BEGUN: u8 = 1;
const DONE: u8 = 2;

impl Handshake {
    /// Whether the connection is encrypted.
    pub fn is_done(&self) -> bool {
        self.0.load(Ordering::Acquire) == DONE
    }

    /// Whether the server has TLS and it did not succeed.
    pub fn has_failed(&self) -> bool {
        self.0.load(Ordering::Acquire) == BEGUN
    }
}

/// TLS that notes its outcome. The client asks for it only after the server has agreed to TLS.
#[derive(Clone)]
pub(super) struct Noting<T> {
    inner: T,
    handshake: Handshake,
}

impl MakeTlsConnect<Socket> for Noting<MakeRustlsConnect> {
    type Stream = RustlsStream;
    type TlsConnect = Noting<RustlsConnect>;
    type Error = std::convert::Infallible;

    fn make_tls_connect(&mut self, domain: &str) -> Result<Self::TlsConnect, Self::Error> {
        // Of several hosts, the last one that was reached counts.
        self.handshake.0.store(0, Ordering::Release);
        let inner = MakeTlsConnect::<Socket>::make_tls_connect(&mut self.inner, domain)?;
        Ok(Noting { inner, handshake: self.handshake.clone() })
    }
}

impl TlsConnect<Socket> for Noting<RustlsConnect> {
    type Stream = RustlsStream;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<RustlsStream>> + Send>>;

    fn connect(self, stream: Socket) -> Self::Future {
        self.handshake.0.store(BEGUN, Ordering::Release);
        let connecting = self.inner.connect(stream);
        Box::pin(async move {
            let stream = connecting.await?;
            self.handshake.0.store(DONE, Ordering::Release);
            Ok(stream)
        })
    }
}

/// Takes every certificate. It keeps out who only listens: whoever can answer in the server's place could
/// as well say that it has no TLS, so that checking anything here would protect from nobody.
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
