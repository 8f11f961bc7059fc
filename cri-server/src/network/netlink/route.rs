//! Links, addresses and routes, in the few forms that pods need.
//!
//! Owns the translation to rtnetlink messages. Decides nothing: names, addresses and order come
//! from the caller.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{Emitable, NetlinkSerializable, Parseable};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoBridgePort, InfoData, InfoKind, InfoPortData,
    InfoPortKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, Stats64,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{
    Connection, Message, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, Refusal, Reply,
};

pub(crate) type Mac = [u8; 6];

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;

const CREATE: u16 = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
const CHANGE: u16 = NLM_F_REQUEST | NLM_F_ACK;

fn message(flags: u16, payload: RouteNetlinkMessage) -> Message {
    let mut body = vec![0; NetlinkSerializable::buffer_len(&payload)];
    payload.serialize(&mut body);
    Message {
        kind: payload.message_type(),
        flags,
        body,
    }
}

/// What a link is, as far as we ask.
#[derive(Clone, Debug, Default)]
pub(crate) struct Link {
    pub index: u32,
    pub name: String,
    pub alias: String,
    pub up: bool,
    pub controller: Option<u32>,
    pub mac: Vec<u8>,
    pub mtu: u32,
    pub is_bridge: bool,
    pub stats: Option<Stats64>,
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Link {
            index: message.header.index,
            up: message.header.flags.contains(LinkFlags::Up),
            ..Link::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = alias,
                LinkAttribute::Controller(index) => link.controller = Some(index),
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Stats64(stats) => link.stats = Some(stats),
                LinkAttribute::LinkInfo(infos) => {
                    link.is_bridge = infos
                        .iter()
                        .any(|i| matches!(i, LinkInfo::Kind(InfoKind::Bridge)));
                }
                _ => {}
            }
        }
        link
    }
}

fn link_from(reply: &Reply) -> Option<Link> {
    (reply.kind == RTM_NEWLINK)
        .then(|| LinkMessage::parse(&reply.body[..]).ok())?
        .map(Link::from)
}

/// None when there is no link of that name.
pub(crate) fn link_by_name(conn: &mut Connection, name: &str) -> Result<Option<Link>, Refusal> {
    let mut query = LinkMessage::default();
    query
        .attributes
        .push(LinkAttribute::IfName(name.to_owned()));
    let outcome = conn.send(&[message(NLM_F_REQUEST, RouteNetlinkMessage::GetLink(query))])?;
    match outcome.results.into_iter().next().flatten() {
        Some(Err(refusal)) if refusal.is(rustix::io::Errno::NODEV) => Ok(None),
        Some(Err(refusal)) => Err(refusal),
        _ => Ok(outcome.replies.iter().find_map(link_from)),
    }
}

pub(crate) fn links(conn: &mut Connection) -> Result<Vec<Link>, Refusal> {
    let mut body = vec![0; 16];
    LinkMessage::default().header.emit(&mut body);
    Ok(conn
        .dump(RTM_GETLINK, body)?
        .iter()
        .filter_map(link_from)
        .collect())
}

/// A bridge, down, with a fixed hardware address (a bridge without one takes its ports' lowest).
pub(crate) fn create_bridge(name: &str, mac: Mac, mtu: Option<u32>) -> Message {
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Address(mac.to_vec()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
    ];
    link.attributes.extend(mtu.map(LinkAttribute::Mtu));
    message(CREATE, RouteNetlinkMessage::NewLink(link))
}

pub(crate) struct VethPair<'a> {
    pub host_name: &'a str,
    pub bridge_index: u32,
    pub pod_name: &'a str,
    pub pod_mac: Mac,
    pub pod_netns: BorrowedFd<'a>,
    pub mtu: Option<u32>,
    pub alias: &'a str,
}

/// Both ends at once: one in our namespace on the bridge, the other born in the pod's.
///
/// Two messages, to be sent together: what a bridge port is like, its alias and its having no
/// IPv6 address of its own can only be said of a link that exists (rtnl_changelink, do_setlink).
pub(crate) fn create_veth(pair: &VethPair<'_>) -> [Message; 2] {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(pair.pod_name.to_owned()),
        LinkAttribute::Address(pair.pod_mac.to_vec()),
        LinkAttribute::NetNsFd(pair.pod_netns.as_raw_fd()),
    ];
    peer.attributes.extend(pair.mtu.map(LinkAttribute::Mtu));
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(pair.host_name.to_owned()),
        LinkAttribute::Controller(pair.bridge_index),
    ];
    link.attributes.extend(pair.mtu.map(LinkAttribute::Mtu));
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));

    [
        message(CREATE, RouteNetlinkMessage::NewLink(link)),
        set_port(pair.host_name, pair.alias),
    ]
}

/// Plugs a link that is there into the bridge. On its own: the port's settings are only accepted
/// when it is a port already (rtnl_changelink looks at the controller of before the message).
pub(crate) fn plug_in(name: &str, bridge_index: u32) -> [Message; 2] {
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Controller(bridge_index),
    ];
    [
        message(CHANGE, RouteNetlinkMessage::SetLink(link)),
        set_port(name, ""),
    ]
}

/// Sets up a port of the bridge; an empty alias leaves the one that it has.
fn set_port(name: &str, alias: &str) -> Message {
    let mut port = LinkMessage::default();
    port.header.flags = LinkFlags::Up;
    port.header.change_mask = LinkFlags::Up;
    port.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        // A pod reaches itself through its own host port when br_netfilter answers on the bridge.
        LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(
                true,
            )])),
        ]),
    ];
    if !alias.is_empty() {
        port.attributes
            .push(LinkAttribute::IfAlias(alias.to_owned()));
    }
    if has_ipv6() {
        port.attributes
            .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
                vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
            )]));
    }
    message(CHANGE, RouteNetlinkMessage::NewLink(port))
}

/// A kernel booted without IPv6 refuses its attributes.
pub(crate) fn has_ipv6() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6").exists()
}

pub(crate) fn set_up(index: u32) -> Message {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    message(CHANGE, RouteNetlinkMessage::SetLink(link))
}

pub(crate) fn delete_link(name: &str) -> Message {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message(CHANGE, RouteNetlinkMessage::DelLink(link))
}

fn family_of(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

fn address_message(index: u32, address: IpAddr, prefix: u8) -> AddressMessage {
    let mut addr = AddressMessage::default();
    addr.header.family = family_of(address);
    addr.header.prefix_len = prefix;
    addr.header.index = index;
    addr.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
    ];
    addr
}

/// IPv6 addresses are ours by lease, so nobody is asked whether they are free (no DAD wait).
pub(crate) fn add_address(index: u32, address: IpAddr, prefix: u8) -> Message {
    let mut addr = address_message(index, address, prefix);
    match address {
        IpAddr::V4(v4) => {
            let host_bits = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
            let broadcast = std::net::Ipv4Addr::from(u32::from(v4) | host_bits);
            addr.attributes.push(AddressAttribute::Broadcast(broadcast));
        }
        IpAddr::V6(_) => {
            addr.header.flags = AddressHeaderFlags::Nodad;
            addr.attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
    }
    message(CREATE, RouteNetlinkMessage::NewAddress(addr))
}

pub(crate) fn delete_address(index: u32, address: IpAddr, prefix: u8) -> Message {
    let addr = address_message(index, address, prefix);
    message(CHANGE, RouteNetlinkMessage::DelAddress(addr))
}

pub(crate) fn add_default_route(index: u32, gateway: IpAddr) -> Message {
    let mut route = RouteMessage::default();
    route.header.address_family = family_of(gateway);
    route.header.table = netlink_packet_route::route::RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = RouteProtocol::Static;
    route.header.scope = RouteScope::Universe;
    route.header.kind = RouteType::Unicast;
    route.attributes = vec![
        RouteAttribute::Oif(index),
        RouteAttribute::Gateway(RouteAddress::from(gateway)),
    ];
    message(CREATE, RouteNetlinkMessage::NewRoute(route))
}

#[derive(Clone, Debug)]
pub(crate) struct LinkAddress {
    pub index: u32,
    pub address: IpAddr,
    pub prefix: u8,
}

pub(crate) fn addresses(conn: &mut Connection) -> Result<Vec<LinkAddress>, Refusal> {
    let mut body = vec![0; 8];
    AddressMessage::default().header.emit(&mut body);
    let replies = conn.dump(RTM_GETADDR, body)?;
    let parsed = replies.iter().filter(|r| r.kind == RTM_NEWADDR);
    Ok(parsed
        .filter_map(|r| AddressMessage::parse(&r.body[..]).ok())
        .filter_map(own_address)
        .collect())
}

fn own_address(message: AddressMessage) -> Option<LinkAddress> {
    // IFA_LOCAL is ours where both are given (point to point); IPv6 sends IFA_ADDRESS only.
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => found = Some(*address),
            AddressAttribute::Address(address) if found.is_none() => found = Some(*address),
            _ => {}
        }
    }
    let (index, prefix) = (message.header.index, message.header.prefix_len);
    found.map(|address| LinkAddress {
        index,
        address,
        prefix,
    })
}

/// A route of the main table with a destination.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub destination: IpAddr,
    pub prefix: u8,
    pub oif: Option<u32>,
}

pub(crate) fn routes(conn: &mut Connection) -> Result<Vec<Route>, Refusal> {
    let mut body = vec![0; 12];
    RouteMessage::default().header.emit(&mut body);
    let replies = conn.dump(RTM_GETROUTE, body)?;
    let parsed = replies.iter().filter(|r| r.kind == RTM_NEWROUTE);
    Ok(parsed
        .filter_map(|r| RouteMessage::parse(&r.body[..]).ok())
        .filter_map(unicast)
        .collect())
}

fn unicast(message: RouteMessage) -> Option<Route> {
    let header = &message.header;
    let main = netlink_packet_route::route::RouteHeader::RT_TABLE_MAIN;
    if header.table != main || header.kind != RouteType::Unicast {
        return None;
    }
    let mut route = None;
    let mut oif = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(a)) => route = Some(IpAddr::V4(*a)),
            RouteAttribute::Destination(RouteAddress::Inet6(a)) => route = Some(IpAddr::V6(*a)),
            RouteAttribute::Oif(index) => oif = Some(*index),
            _ => {}
        }
    }
    let prefix = header.destination_prefix_length;
    route.map(|destination| Route {
        destination,
        prefix,
        oif,
    })
}
