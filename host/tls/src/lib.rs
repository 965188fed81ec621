//! TLS for the whole process: rustls with ring.
//!
//! Every crate that speaks TLS calls [`install`] first. It knows no certificate and no server, and uses no other crate of
//! the host.

/// Makes ring the process's provider of cryptography; once is enough, more does no harm.
pub fn install() {
    // An error says that a provider is installed already: then there is nothing to do.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
