//! TLS for the whole process: rustls with ring.

/// Makes ring the process's provider of cryptography; once is enough, more does no harm.
pub fn install() {
    // An error says that a provider is installed already: then there is nothing to do.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
