//! Decides to which IP addresses a request may go. The addresses of a name are checked before connecting, and the name
//! is not resolved again.
//!
//! Sources: the IANA special-purpose address registries for IPv4 and IPv6 (RFC 6890 and its successors), the multicast
//! registries, and the IPv6 address space registry: only 2000::/3 is global unicast. Some ranges count as globally
//! reachable in the registries but hide an IPv4 address in an IPv6 address, and are refused, too: the translation
//! prefix 64:ff9b::/96 and 6to4.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// Ranges without any legitimate host. The link-local range contains the metadata services of clouds, which give out
/// credentials; metadata services elsewhere are listed one by one.
const NEVER_V4: [Ipv4Net; 10] = [
    v4([0, 0, 0, 0], 8),          // "this network", RFC 791
    v4([100, 100, 100, 200], 32), // Alibaba Cloud's metadata
    v4([168, 63, 129, 16], 32),   // Azure's WireServer
    v4([169, 254, 0, 0], 16),     // link-local, RFC 3927
    v4([192, 0, 0, 0], 24),       // IETF protocol assignments, RFC 6890
    v4([192, 0, 2, 0], 24),       // documentation, RFC 5737
    v4([198, 51, 100, 0], 24),    // documentation, RFC 5737
    v4([203, 0, 113, 0], 24),     // documentation, RFC 5737
    v4([224, 0, 0, 0], 4),        // multicast, RFC 5771
    v4([240, 0, 0, 0], 4),        // reserved and broadcast, RFC 1112, RFC 919
];

/// Ranges of private networks: allowed by a grant with `private = true`.
const PRIVATE_V4: [Ipv4Net; 6] = [
    v4([10, 0, 0, 0], 8),     // private use, RFC 1918
    v4([100, 64, 0, 0], 10),  // shared (carrier-grade NAT), RFC 6598
    v4([127, 0, 0, 0], 8),    // loopback, RFC 1122
    v4([172, 16, 0, 0], 12),  // private use, RFC 1918
    v4([192, 168, 0, 0], 16), // private use, RFC 1918
    v4([198, 18, 0, 0], 15),  // benchmarking, RFC 2544
];

/// Public ranges that contain no hosts either: anycast of relays and of AS112.
const ODD_V4: [Ipv4Net; 4] = [
    v4([192, 31, 196, 0], 24), // AS112, RFC 7535
    v4([192, 52, 193, 0], 24), // AMT, RFC 7450
    v4([192, 88, 99, 0], 24),  // 6to4 relays, RFC 7526
    v4([192, 175, 48, 0], 24), // AS112, RFC 7534
];

/// Ranges within 2000::/3 that contain no hosts. Addresses outside 2000::/3 are refused anyway.
const NEVER_V6: [Ipv6Net; 5] = [
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23), // IETF protocol assignments, Teredo within
    v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32), // documentation, RFC 3849
    v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16), // 6to4, RFC 3056
    v6([0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0], 48), // AS112, RFC 7534
    v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20), // documentation, RFC 9637
];

/// Amazon's metadata and other instance services over IPv6. They lie in the private range.
const METADATA_V6: Ipv6Net = v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0], 32);

const GLOBAL_V6: Ipv6Net = v6([0x2000, 0, 0, 0, 0, 0, 0, 0], 3);
const UNIQUE_LOCAL_V6: Ipv6Net = v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7);

/// Makes an IPv4 range; checked at compile time.
const fn v4([a, b, c, d]: [u8; 4], prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

/// Makes an IPv6 range; checked at compile time.
const fn v6([a, b, c, d, e, f, g, h]: [u16; 8], prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), prefix)
}

/// Whether a request may go to this address. With `private`, also to addresses of this machine and of private networks,
/// but never to link-local addresses and metadata services.
pub(super) fn is_allowed(address: IpAddr, private: bool) -> bool {
    match address {
        IpAddr::V4(address) => is_allowed_v4(address, private),
        IpAddr::V6(address) => is_allowed_v6(address, private),
    }
}

fn is_allowed_v4(address: Ipv4Addr, private: bool) -> bool {
    let within = |range: &Ipv4Net| range.contains(&address);
    let is_own = PRIVATE_V4.iter().any(within);
    !NEVER_V4.iter().any(within) && !ODD_V4.iter().any(within) && (private || !is_own)
}

fn is_allowed_v6(address: Ipv6Addr, private: bool) -> bool {
    // An IPv4-mapped IPv6 address (::ffff:0:0/96) leads to the IPv4 address.
    if let Some(mapped) = address.to_ipv4_mapped() {
        return private && is_allowed_v4(mapped, private);
    }
    let is_unique_local = UNIQUE_LOCAL_V6.contains(&address) && !METADATA_V6.contains(&address);
    let is_own = address.is_loopback() || is_unique_local;
    let is_never = NEVER_V6.iter().any(|range| range.contains(&address));
    let is_global = GLOBAL_V6.contains(&address) && !is_never;
    is_global || (private && is_own)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Public addresses, addresses of private networks, and addresses that are never allowed.
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

    /// Each range as its first and last address, and its kind. Written out, so that no prefix arithmetic is needed to
    /// read it. If ranges overlap, the first one in the list counts.
    const RANGES: [(&str, &str, &str); 33] = [
        ("0.0.0.0", "0.255.255.255", "never"),
        ("100.100.100.200", "100.100.100.200", "never"),
        ("168.63.129.16", "168.63.129.16", "never"),
        ("169.254.0.0", "169.254.255.255", "never"),
        ("192.0.0.0", "192.0.0.255", "never"),
        ("192.0.2.0", "192.0.2.255", "never"),
        ("192.31.196.0", "192.31.196.255", "never"),
        ("192.52.193.0", "192.52.193.255", "never"),
        ("192.88.99.0", "192.88.99.255", "never"),
        ("192.175.48.0", "192.175.48.255", "never"),
        ("198.51.100.0", "198.51.100.255", "never"),
        ("203.0.113.0", "203.0.113.255", "never"),
        ("224.0.0.0", "239.255.255.255", "never"),
        ("240.0.0.0", "255.255.255.255", "never"),
        ("10.0.0.0", "10.255.255.255", "own"),
        ("100.64.0.0", "100.127.255.255", "own"),
        ("127.0.0.0", "127.255.255.255", "own"),
        ("172.16.0.0", "172.31.255.255", "own"),
        ("192.168.0.0", "192.168.255.255", "own"),
        ("198.18.0.0", "198.19.255.255", "own"),
        ("0.0.0.0", "255.255.255.255", "public"),
        ("2001::", "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff", "never"),
        ("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", "never"),
        ("2002::", "2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "never"),
        ("2620:4f:8000::", "2620:4f:8000:ffff:ffff:ffff:ffff:ffff", "never"),
        ("3fff::", "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff", "never"),
        ("2000::", "3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "public"),
        ("::1", "::1", "own"),
        ("fd00:ec2::", "fd00:ec2:ffff:ffff:ffff:ffff:ffff:ffff", "never"),
        ("fc00::", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "own"),
        ("64:ff9b::", "64:ff9b::ffff:ffff", "never"),
        ("fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "never"),
        ("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "never"),
    ];

    /// Returns the address `steps` after this one, if there is one.
    fn stepped(address: IpAddr, steps: i32) -> Option<IpAddr> {
        match address {
            IpAddr::V4(four) => {
                let bits = four.to_bits().checked_add_signed(steps)?;
                Some(Ipv4Addr::from_bits(bits).into())
            }
            IpAddr::V6(six) => {
                let bits = six.to_bits().checked_add_signed(steps.into())?;
                Some(Ipv6Addr::from_bits(bits).into())
            }
        }
    }

    #[test]
    fn the_edges_of_each_range_are_of_their_kind() {
        let ranges = RANGES.map(|(first, last, kind)| {
            let parsed = |text: &str| text.parse::<IpAddr>().expect(text);
            (parsed(first), parsed(last), kind)
        });
        let kind_of = |address: IpAddr| {
            let within = |(first, last, _): &&(IpAddr, IpAddr, &str)| {
                first.is_ipv4() == address.is_ipv4() && (*first..=*last).contains(&address)
            };
            // The rest of IPv6 is not assigned.
            ranges.iter().find(within).map_or("never", |(_, _, kind)| kind)
        };
        let mut compared = 0;
        for (first, last, _) in &ranges {
            let edges =
                [stepped(*first, -1), Some(*first), Some(*last), stepped(*last, 1)].into_iter();
            for address in edges.flatten() {
                let kind = kind_of(address);
                assert_eq!(is_allowed(address, false), kind == "public", "{address}");
                assert_eq!(is_allowed(address, true), kind != "never", "{address}");
                compared += 1;
                // An IPv4-mapped address is allowed like the IPv4 address, but only by a private grant.
                if let IpAddr::V4(four) = address {
                    let mapped = four.to_ipv6_mapped().into();
                    assert!(!is_allowed(mapped, false), "{mapped}");
                    assert_eq!(is_allowed(mapped, true), kind != "never", "{mapped}");
                }
            }
        }
        assert!(compared > RANGES.len() * 3, "only {compared} addresses were compared");
    }

    /// Addresses that the standard library does not consider public are refused, whatever the tables contain.
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
