//! Installs the TLS implementation of the process: rustls with ring.
//!
//! Every crate that uses TLS calls [`install`] first. This crate knows no certificates and no servers, and uses no
//! other crate of the host.

/// Makes ring the cryptography provider of the process. More than one call does no harm.
pub fn install() {
    // An error means that a provider is already installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
