//! Resolves names to addresses, without those that a request may not go to.
//!
//! The client connects to the addresses that this resolver returns, and resolves nothing itself. So a name cannot
//! resolve to an allowed address for the check and to another one for the connection (DNS rebinding).

use std::net::SocketAddr;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::address::is_allowed;

/// Resolver that uses the system and applies the rule of `private`.
pub(super) struct GuardedResolver {
    pub(super) private: bool,
}

/// Error: all addresses of a name are refused.
#[derive(Debug, thiserror::Error)]
#[error("{name} has the address {address}, {}", why(*.private))]
pub(super) struct RefusedAddress {
    pub(super) name: String,
    pub(super) address: std::net::IpAddr,
    pub(super) private: bool,
}

fn why(private: bool) -> &'static str {
    match private {
        true => "which no grant can allow (link-local, metadata, multicast or reserved)",
        false => {
            "which is not public: if this is intended, set `private = true` for the host in \
             [stage.grant]"
        }
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let private = self.private;
        let name = name.as_str().to_owned();
        Box::pin(async move {
            // The client sets the port.
            let found: Vec<SocketAddr> =
                tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let (good, bad): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|address| is_allowed(address.ip(), private));
            match bad.first() {
                Some(bad) if good.is_empty() => {
                    Err(RefusedAddress { name, address: bad.ip(), private }.into())
                }
                _ => Ok(Box::new(good.into_iter()) as Addrs),
            }
        })
    }
}
