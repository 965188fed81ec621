//! Which addresses a request may go to: what a name resolves to is checked before it is connected
//! to, and nothing is resolved a second time.
//!
//! Sources: the IANA special-purpose address registries for IPv4 and IPv6 (RFC 6890 and its
//! successors), the multicast registries, and the IPv6 address space registry: only 2000::/3 is
//! global unicast. What the registries call globally reachable but leads elsewhere is refused too:
//! the translation prefix 64:ff9b::/96 and 6to4 hide an IPv4 address in an IPv6 one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Never a host that anybody means: (first address, prefix length). Link-local holds the metadata
/// services of the clouds, which hand out credentials; those that lie elsewhere are listed.
const NEVER_V4: [(Ipv4Addr, u32); 10] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),          // "this network", RFC 791
    (Ipv4Addr::new(100, 100, 100, 200), 32), // Alibaba Cloud's metadata
    (Ipv4Addr::new(168, 63, 129, 16), 32),   // Azure's WireServer
    (Ipv4Addr::new(169, 254, 0, 0), 16),     // link-local, RFC 3927
    (Ipv4Addr::new(192, 0, 0, 0), 24),       // IETF protocol assignments, RFC 6890
    (Ipv4Addr::new(192, 0, 2, 0), 24),       // documentation, RFC 5737
    (Ipv4Addr::new(198, 51, 100, 0), 24),    // documentation, RFC 5737
    (Ipv4Addr::new(203, 0, 113, 0), 24),     // documentation, RFC 5737
    (Ipv4Addr::new(224, 0, 0, 0), 4),        // multicast, RFC 5771
    (Ipv4Addr::new(240, 0, 0, 0), 4),        // reserved and broadcast, RFC 1112, RFC 919
];

/// Hosts of one's own network: for a grant with `private = true`.
const PRIVATE_V4: [(Ipv4Addr, u32); 6] = [
    (Ipv4Addr::new(10, 0, 0, 0), 8),     // private use, RFC 1918
    (Ipv4Addr::new(100, 64, 0, 0), 10),  // shared (carrier-grade NAT), RFC 6598
    (Ipv4Addr::new(127, 0, 0, 0), 8),    // loopback, RFC 1122
    (Ipv4Addr::new(172, 16, 0, 0), 12),  // private use, RFC 1918
    (Ipv4Addr::new(192, 168, 0, 0), 16), // private use, RFC 1918
    (Ipv4Addr::new(198, 18, 0, 0), 15),  // benchmarking, RFC 2544
];

/// Parts of the public space that are no hosts either: anycast of relays and of AS112.
const ODD_V4: [(Ipv4Addr, u32); 4] = [
    (Ipv4Addr::new(192, 31, 196, 0), 24), // AS112, RFC 7535
    (Ipv4Addr::new(192, 52, 193, 0), 24), // AMT, RFC 7450
    (Ipv4Addr::new(192, 88, 99, 0), 24),  // 6to4 relays, RFC 7526
    (Ipv4Addr::new(192, 175, 48, 0), 24), // AS112, RFC 7534
];

/// Within 2000::/3, what is no host; the rest of the space is refused as a whole.
const NEVER_V6: [(Ipv6Addr, u32); 5] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23), // IETF protocol assignments, Teredo within
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32), // documentation, RFC 3849
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16), // 6to4, RFC 3056
    (Ipv6Addr::new(0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0), 48), // AS112, RFC 7534
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20), // documentation, RFC 9637
];

/// Amazon's metadata and other services of an instance over IPv6; they lie in the private space.
const METADATA_V6: (Ipv6Addr, u32) = (Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0), 32);

const GLOBAL_V6: (Ipv6Addr, u32) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
const UNIQUE_LOCAL_V6: (Ipv6Addr, u32) = (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7);

/// Whether a request may go to this address. With `private`, also to those of one's own machine and
/// network, but never to link-local addresses and metadata services.
pub(super) fn is_allowed(address: IpAddr, private: bool) -> bool {
    match address {
        IpAddr::V4(address) => is_allowed_v4(address, private),
        IpAddr::V6(address) => is_allowed_v6(address, private),
    }
}

fn is_allowed_v4(address: Ipv4Addr, private: bool) -> bool {
    let within = |(first, length): &(Ipv4Addr, u32)| {
        (address.to_bits() ^ first.to_bits()).leading_zeros() >= *length
    };
    let is_own = PRIVATE_V4.iter().any(within);
    !NEVER_V4.iter().any(within) && !ODD_V4.iter().any(within) && (private || !is_own)
}

fn is_allowed_v6(address: Ipv6Addr, private: bool) -> bool {
    let within = |(first, length): &(Ipv6Addr, u32)| {
        (address.to_bits() ^ first.to_bits()).leading_zeros() >= *length
    };
    // An IPv4 address in the clothes of IPv6 (::ffff:0:0/96) goes where the IPv4 address goes.
    if let Some(mapped) = address.to_ipv4_mapped() {
        return private && is_allowed_v4(mapped, private);
    }
    let is_own = address.is_loopback() || (within(&UNIQUE_LOCAL_V6) && !within(&METADATA_V6));
    let is_global = within(&GLOBAL_V6) && !NEVER_V6.iter().any(within);
    is_global || (private && is_own)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Public, of one's own network, or never allowed.
    const TABLE: [(&str, &[&str]); 3] = [
        (
            "public",
            &[
                "1.1.1.1",
                "8.8.8.8",
                "9.255.255.255",
                "11.0.0.0",
                "100.63.255.255",
                "100.128.0.0",
                "126.255.255.255",
                "128.0.0.0",
                "169.253.255.255",
                "169.255.0.0",
                "172.15.255.255",
                "172.32.0.0",
                "192.0.1.0",
                "192.167.255.255",
                "192.169.0.0",
                "198.17.255.255",
                "198.20.0.0",
                "223.255.255.255",
                "2000::",
                "2001:200::",
                "2606:4700:4700::1111",
                "2a00:1450::1",
                "3ffe::",
            ],
        ),
        (
            "own",
            &[
                "10.0.0.0",
                "10.255.255.255",
                "100.64.0.0",
                "100.127.255.255",
                "127.0.0.1",
                "127.255.255.255",
                "172.16.0.0",
                "172.31.255.255",
                "192.168.0.0",
                "192.168.255.255",
                "198.18.0.0",
                "198.19.255.255",
                "::1",
                "fc00::",
                "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
                "::ffff:127.0.0.1",
                "::ffff:10.0.0.1",
                "::ffff:8.8.8.8",
            ],
        ),
        (
            "never",
            &[
                "0.0.0.0",
                "0.255.255.255",
                "100.100.100.200",
                "168.63.129.16",
                "169.254.0.0",
                "169.254.169.254",
                "169.254.170.2",
                "169.254.255.255",
                "192.0.0.0",
                "192.0.0.192",
                "192.0.2.1",
                "192.31.196.1",
                "192.52.193.1",
                "192.88.99.1",
                "192.175.48.1",
                "198.51.100.1",
                "203.0.113.1",
                "224.0.0.1",
                "239.255.255.255",
                "240.0.0.0",
                "255.255.255.255",
                "::",
                "::127.0.0.1",
                "::ffff:169.254.169.254",
                "::ffff:0.0.0.0",
                "64:ff9b::7f00:1",
                "64:ff9b:1::1",
                "100::1",
                "100:0:0:1::1",
                "1fff::",
                "2001::1",
                "2001:1ff::",
                "2001:db8::1",
                "2002:7f00:1::",
                "2620:4f:8000::1",
                "3fff::1",
                "4000::",
                "5f00::1",
                "fd00:ec2::254",
                "fe80::1",
                "febf::1",
                "fec0::1",
                "ff02::1",
                "ffff::",
            ],
        ),
    ];

    #[test]
    fn each_address_is_of_its_kind() {
        for (kind, addresses) in TABLE {
            for text in addresses {
                let address: IpAddr = text.parse().expect(text);
                assert_eq!(is_allowed(address, false), kind == "public", "{text}");
                assert_eq!(is_allowed(address, true), kind != "never", "{text}");
            }
        }
    }

    /// What the standard library knows to be no public host is refused, whatever the tables say.
    #[test]
    fn the_standard_library_agrees() {
        for _ in 0..1_000_000 {
            let four = Ipv4Addr::from_bits(fastrand::u32(..));
            let known = four.is_private()
                || four.is_loopback()
                || four.is_link_local()
                || four.is_broadcast()
                || four.is_documentation()
                || four.is_multicast()
                || four.is_unspecified();
            assert!(!(known && is_allowed(four.into(), false)), "{four}");
            let six = Ipv6Addr::from_bits(fastrand::u128(..));
            let known = six.is_unique_local() || six.is_unicast_link_local() || six.is_multicast();
            assert!(!(known && is_allowed(six.into(), false)), "{six}");
            let mapped = four.to_ipv6_mapped();
            assert!(!is_allowed(mapped.into(), false), "{mapped}");
            let same = is_allowed(mapped.into(), true) == is_allowed(four.into(), true);
            assert!(same, "{mapped}");
        }
    }
}
