//! An address range in CIDR form and the arithmetic that leases need.
//!
//! Pure; IPv4 and IPv6 alike by counting in u128.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A subnet; host bits are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    base: IpAddr,
    prefix: u8,
}

impl Subnet {
    /// Host bits of `address` are cleared. None when the prefix is longer than the address.
    pub fn containing(address: IpAddr, prefix: u8) -> Option<Subnet> {
        let bits = width(address);
        if u32::from(prefix) > bits {
            return None;
        }
        let mask = mask(bits, prefix);
        Some(Subnet {
            base: from_number(address, to_number(address) & mask),
            prefix,
        })
    }

    pub fn base(&self) -> IpAddr {
        self.base
    }

    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    pub fn is_ipv4(&self) -> bool {
        self.base.is_ipv4()
    }

    /// The first address: the bridge's own, and the pods' default gateway.
    pub fn gateway(&self) -> IpAddr {
        self.host(1)
    }

    /// The address `offset` above the base.
    pub(crate) fn host(&self, offset: u128) -> IpAddr {
        from_number(self.base, to_number(self.base).wrapping_add(offset))
    }

    /// How far `address` is above the base.
    pub(crate) fn offset(&self, address: IpAddr) -> u128 {
        to_number(address).wrapping_sub(to_number(self.base))
    }

    /// Offsets that pods may have: not the base, not the gateway, not the IPv4 broadcast.
    pub(crate) fn pod_offsets(&self) -> std::ops::RangeInclusive<u128> {
        let size = 1u128 << (width(self.base) - u32::from(self.prefix)).min(127);
        let last = if self.is_ipv4() {
            size.saturating_sub(2)
        } else {
            size - 1
        };
        2..=last
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.is_ipv4()
            && Subnet::containing(address, self.prefix).is_some_and(|s| s.base == self.base)
    }

    pub fn overlaps(&self, other: &Subnet) -> bool {
        self.contains(other.base) || other.contains(self.base)
    }

    /// Prefix as a mask in network byte order, as nf_tables compares it.
    pub(crate) fn mask_bytes(&self) -> Vec<u8> {
        octets(from_number(self.base, mask(width(self.base), self.prefix)))
    }
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn width(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn mask(bits: u32, prefix: u8) -> u128 {
    let all = if bits == 128 {
        u128::MAX
    } else {
        (1 << bits) - 1
    };
    let host = bits - u32::from(prefix);
    all & u128::MAX.checked_shl(host).unwrap_or(0)
}

fn to_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn from_number(family: IpAddr, number: u128) -> IpAddr {
    match family {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from(number as u32)),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(number)),
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a subnet such as 10.88.0.0/16");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        let subnet = Subnet::containing(address, prefix).ok_or_else(wrong)?;
        if subnet.base != address {
            return Err(format!(
                "{text:?} has host bits set; the subnet is {subnet}"
            ));
        }
        if subnet.pod_offsets().is_empty() {
            return Err(format!("{text:?} is too small for any pod"));
        }
        Ok(subnet)
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn parse_refuses_what_is_no_subnet() {
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/33",
            "10.0.0.1/8",
            "x/8",
            "10.0.0.0/31",
            "::/129",
        ] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
        assert_eq!(subnet("10.88.0.0/16").to_string(), "10.88.0.0/16");
        assert_eq!(subnet("fd00:10::/64").to_string(), "fd00:10::/64");
    }

    #[test]
    fn arithmetic() {
        let small = subnet("10.1.2.0/29");
        assert_eq!(small.gateway().to_string(), "10.1.2.1");
        assert_eq!(small.pod_offsets(), 2..=6);
        assert_eq!(small.host(6).to_string(), "10.1.2.6");
        assert_eq!(small.offset("10.1.2.5".parse().unwrap()), 5);
        assert_eq!(subnet("fd00::/126").pod_offsets(), 2..=3);
        assert_eq!(subnet("0.0.0.0/0").pod_offsets(), 2..=0xffff_fffe);
        assert_eq!(small.mask_bytes(), [255, 255, 255, 248]);
        assert_eq!(subnet("fd00::/64").mask_bytes()[7..9], [255, 0]);
    }

    #[test]
    fn overlap_is_symmetric_and_keeps_families_apart() {
        let wide = subnet("10.0.0.0/8");
        assert!(wide.overlaps(&subnet("10.88.0.0/16")) && subnet("10.88.0.0/16").overlaps(&wide));
        assert!(!wide.overlaps(&subnet("11.0.0.0/8")) && !wide.overlaps(&subnet("fd00::/64")));
    }
}
