//! Our table, as a whole.
//!
//! ```text
//! table ip coracle {                       (and ip6, when pods have IPv6)
//!   map any_address { proto . port : pod address . pod port }
//!   map one_address { address . proto . port : pod address . pod port }
//!   chain hostports { dnat by one_address; to an address of this host: dnat by any_address }
//!   chain prerouting { nat hook -100: jump hostports }     from outside and from pods
//!   chain output { nat hook -100: jump hostports }         from this host itself
//!   chain postrouting { nat hook 100:
//!     pods to anywhere outside the subnet: masquerade
//!     pods to pods through a host port, and 127.0.0.1 to pods: masquerade }
//!   chain guard { prerouting hook -300: 127.0.0.0/8 from or to the bridge: drop }
//! }
//! ```
//! `guard` closes what route_localnet on the bridge opens (CVE-2020-8558); replies to the host's
//! own 127.0.0.1 connections pass, as they still carry the bridge's address at that point.
//!
//! There is no forward chain: nothing here drops, and an accept could not overrule another
//! table's drop. Renders only; `hostport` decides when.

use super::expr::{
    Base, Compare, Expr, Meta, Register, Verdict, compare, connection_status, destination_nat,
    destination_type, lookup, mask, masquerade, meta, payload, verdict,
};
use super::{BaseChain, Batch, Element, Family, Hook, MapType};
use crate::network::subnet::Subnet;

pub(crate) const TABLE: &str = "coracle";
pub(crate) const ANY_ADDRESS: &str = "any_address";
pub(crate) const ONE_ADDRESS: &str = "one_address";
const HOSTPORTS: &str = "hostports";

const R0: Register = Register(0);
/// Data of the maps is looked up to here; keys need six registers at most.
const DATA: u32 = 8;

const PRIORITY_RAW: i32 = -300;
const PRIORITY_DSTNAT: i32 = -100;
const PRIORITY_SRCNAT: i32 = 100;

/// Where a family keeps its addresses, and nftables' ids of its types.
struct Layout {
    family: Family,
    address: u32,
    source: u32,
    destination: u32,
    type_id: u32,
    multicast: &'static [u8],
    multicast_mask: &'static [u8],
}

const IPV4: Layout = Layout {
    family: Family::Ipv4,
    address: 4,
    source: 12,
    destination: 16,
    type_id: 7,
    multicast: &[224],
    multicast_mask: &[0xf0],
};

const IPV6: Layout = Layout {
    family: Family::Ipv6,
    address: 16,
    source: 8,
    destination: 24,
    type_id: 8,
    multicast: &[0xff],
    multicast_mask: &[0xff],
};

impl Layout {
    fn of(family: Family) -> &'static Layout {
        match family {
            Family::Ipv4 => &IPV4,
            Family::Ipv6 => &IPV6,
        }
    }

    fn words(&self) -> u32 {
        self.address / 4
    }

    fn load_source(&self) -> Expr {
        payload(Base::Network, self.source, self.address, R0)
    }

    fn load_destination(&self) -> Expr {
        payload(Base::Network, self.destination, self.address, R0)
    }
}

pub(crate) struct Wanted<'a> {
    pub bridge: &'a str,
    pub subnet: Subnet,
    pub masquerade: bool,
    pub any_address: Vec<Element>,
    pub one_address: Vec<Element>,
}

/// Replaces the table of the subnet's family by exactly this.
pub(crate) fn render(batch: &mut Batch, wanted: &Wanted<'_>) {
    let family = if wanted.subnet.is_ipv4() {
        Family::Ipv4
    } else {
        Family::Ipv6
    };
    let layout = Layout::of(family);
    batch.reset_table(family);
    maps(batch, layout);
    batch.add_elements(family, ANY_ADDRESS, &wanted.any_address);
    batch.add_elements(family, ONE_ADDRESS, &wanted.one_address);

    batch.chain(family, HOSTPORTS, None);
    hostport_rules(batch, layout);
    for (name, hook) in [("prerouting", Hook::Prerouting), ("output", Hook::Output)] {
        let base = BaseChain {
            kind: "nat",
            hook,
            priority: PRIORITY_DSTNAT,
        };
        batch.chain(family, name, Some(base));
        batch.rule(
            family,
            name,
            "host ports of pods",
            vec![verdict(Verdict::Jump(HOSTPORTS))],
        );
    }
    let base = BaseChain {
        kind: "nat",
        hook: Hook::Postrouting,
        priority: PRIORITY_SRCNAT,
    };
    batch.chain(family, "postrouting", Some(base));
    postrouting_rules(batch, layout, wanted);
    if family == Family::Ipv4 {
        let base = BaseChain {
            kind: "filter",
            hook: Hook::Prerouting,
            priority: PRIORITY_RAW,
        };
        batch.chain(family, "guard", Some(base));
        for (comment, load) in [
            ("pods to the host's loopback", layout.load_destination()),
            ("pods as the host's loopback", layout.load_source()),
        ] {
            let mut rule = vec![meta(Meta::InputName, R0), compare_name(wanted.bridge), load];
            rule.extend([
                mask(R0, vec![0xff, 0, 0, 0]),
                compare(Compare::Equal, R0, vec![127, 0, 0, 0]),
                verdict(Verdict::Drop),
            ]);
            batch.rule(family, "guard", comment, rule);
        }
    }
}

fn maps(batch: &mut Batch, layout: &Layout) {
    const INET_PROTOCOL: u32 = 12;
    const INET_SERVICE: u32 = 13;
    const TYPE_BITS: u32 = 6;
    let port = INET_PROTOCOL << TYPE_BITS | INET_SERVICE;
    let data_type = layout.type_id << TYPE_BITS | INET_SERVICE;
    let data_length = layout.address + 4;
    let any = MapType {
        key_type: port,
        key_length: 8,
        data_type,
        data_length,
    };
    let one = MapType {
        key_type: layout.type_id << (2 * TYPE_BITS) | port,
        key_length: layout.address + 8,
        data_type,
        data_length,
    };
    batch.map(layout.family, ANY_ADDRESS, &any);
    batch.map(layout.family, ONE_ADDRESS, &one);
}

fn hostport_rules(batch: &mut Batch, layout: &Layout) {
    /// RTN_LOCAL, in host byte order as the fib expression stores it.
    const LOCAL: u32 = 2;
    // TCP, UDP and SCTP all have the destination port at offset 2; no other protocol is a key.
    let port_key = |at: u32| {
        [
            meta(Meta::L4Protocol, Register(at)),
            payload(Base::Transport, 2, 2, Register(at + 1)),
        ]
    };
    let nat = || {
        destination_nat(
            layout.family,
            Register(DATA),
            Register(DATA + layout.words()),
        )
    };
    let mut rule = vec![layout.load_destination()];
    rule.extend(port_key(layout.words()));
    rule.extend([lookup(ONE_ADDRESS, R0, Register(DATA)), nat()]);
    batch.rule(layout.family, HOSTPORTS, "host_ip given", rule);

    let mut rule = vec![
        destination_type(R0),
        compare(Compare::Equal, R0, LOCAL.to_ne_bytes().to_vec()),
    ];
    rule.extend(port_key(0));
    rule.extend([lookup(ANY_ADDRESS, R0, Register(DATA)), nat()]);
    batch.rule(layout.family, HOSTPORTS, "any address of this host", rule);
}

fn postrouting_rules(batch: &mut Batch, layout: &Layout, wanted: &Wanted<'_>) {
    /// IPS_DST_NAT, in host byte order.
    const DST_NAT: u32 = 1 << 5;
    let family = layout.family;
    let subnet = super::super::subnet::octets(wanted.subnet.base());
    let in_subnet = |how: Compare| {
        [
            mask(R0, wanted.subnet.mask_bytes()),
            compare(how, R0, subnet.clone()),
        ]
    };
    if wanted.masquerade {
        let mut rule = vec![layout.load_source()];
        rule.extend(in_subnet(Compare::Equal));
        rule.push(layout.load_destination());
        rule.extend(in_subnet(Compare::NotEqual));
        rule.extend([
            payload(Base::Network, layout.destination, 1, R0),
            mask(R0, layout.multicast_mask.to_vec()),
            compare(Compare::NotEqual, R0, layout.multicast.to_vec()),
            masquerade(),
        ]);
        batch.rule(family, "postrouting", "pods leaving the subnet", rule);
    }
    let host_port = || {
        vec![
            meta(Meta::OutputName, R0),
            compare_name(wanted.bridge),
            connection_status(R0),
            mask(R0, DST_NAT.to_ne_bytes().to_vec()),
            compare(Compare::NotEqual, R0, vec![0; 4]),
        ]
    };
    // The server would answer a neighbour directly, past the translation.
    let mut rule = host_port();
    rule.push(layout.load_source());
    rule.extend(in_subnet(Compare::Equal));
    rule.push(masquerade());
    batch.rule(family, "postrouting", "pod to pod by host port", rule);
    if family == Family::Ipv4 {
        let mut rule = host_port();
        rule.extend([
            layout.load_source(),
            mask(R0, vec![0xff, 0, 0, 0]),
            compare(Compare::Equal, R0, vec![127, 0, 0, 0]),
            masquerade(),
        ]);
        batch.rule(
            family,
            "postrouting",
            "this host's 127.0.0.1 to a host port",
            rule,
        );
    }
}

/// Interface names are compared as IFNAMSIZ bytes.
fn compare_name(name: &str) -> Expr {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(16, 0);
    compare(Compare::Equal, R0, bytes)
}
