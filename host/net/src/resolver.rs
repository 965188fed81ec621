//! Names to addresses, with those left out that a request may not go to.
//!
//! The client connects to what this hands out and asks nobody else: a name that resolves to a good
//! address for a check and to a bad one for the connection (rebinding) has no second answer to give.

use std::net::SocketAddr;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::address::is_allowed;

/// Resolves by the system, as `private` allows.
pub(super) struct GuardedResolver {
    pub(super) private: bool,
}

/// A name has only addresses that a request may not go to.
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
            "which is not public: if that is meant, set `private = true` for the host in \
             [stage.grant]"
        }
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let private = self.private;
        let name = name.as_str().to_owned();
        Box::pin(async move {
            // The client puts the port in.
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
