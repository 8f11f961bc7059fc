//! Removal of connection tracking entries.
//!
//! Owns the few ctnetlink messages for that; numbers are those of
//! linux/netfilter/nfnetlink_conntrack.h.

use std::collections::HashSet;

use super::netlink::attrs::{AttrBuf, Attributes};
use super::netlink::{Connection, Message, NLM_F_ACK, NLM_F_REQUEST, Refusal};

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;
const UDP: u8 = 17;
const NLA_F_NESTED: u16 = 0x8000;

/// Forgets every UDP flow whose first packet went to one of the ports.
pub(super) fn forget_udp(ports: &HashSet<u16>) -> Result<(), Refusal> {
    let mut conn = Connection::netfilter()?;
    // nfgenmsg: family 0 is all of them.
    let kind = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET;
    let replies = conn.dump(kind, vec![0, 0, 0, 0])?;
    let doomed: Vec<Message> = replies
        .iter()
        .filter_map(|r| doom(&r.body, ports))
        .collect();
    if doomed.is_empty() {
        return Ok(());
    }
    for message in doomed {
        match conn.apply(&[message]) {
            // It expired meanwhile.
            Err((_, refusal)) if !refusal.is(rustix::io::Errno::NOENT) => return Err(refusal),
            _ => {}
        }
    }
    Ok(())
}

/// The message that deletes this entry, when it is one to delete.
fn doom(entry: &[u8], ports: &HashSet<u16>) -> Option<Message> {
    let attributes = entry.get(4..)?;
    let tuple = Attributes::get(attributes, CTA_TUPLE_ORIG)?;
    let proto = Attributes::get(tuple, CTA_TUPLE_PROTO)?;
    let number = *Attributes::get(proto, CTA_PROTO_NUM)?.first()?;
    let port = Attributes::get(proto, CTA_PROTO_DST_PORT)?;
    let port = u16::from_be_bytes([*port.first()?, *port.get(1)?]);
    if number != UDP || !ports.contains(&port) {
        return None;
    }
    let mut body = AttrBuf::with_header(&[entry[0], 0, 0, 0]);
    body.bytes(CTA_TUPLE_ORIG | NLA_F_NESTED, tuple);
    Some(Message {
        kind: NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE,
        flags: NLM_F_REQUEST | NLM_F_ACK,
        body: body.finish(),
    })
}
