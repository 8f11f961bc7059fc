//! nf_tables over netlink: one batch is one transaction, all of it or none.
//!
//! Owns the framing of batches and objects. `expr` has the expressions of rules, `ruleset` the
//! rules that we want. Numbers are those of linux/netfilter/nf_tables.h.

pub(crate) mod expr;
pub(crate) mod ruleset;

use std::io;

use super::netlink::attrs::{AttrBuf, Attributes};
use super::netlink::{
    Connection, Message, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, Refusal,
};
use expr::Expr;

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;

const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_DELSETELEM: u16 = 14;

const NFT_SET_MAP: u32 = 0x8;
/// nftables userdata attribute 0 of rules and of set elements: a comment.
const UDATA_COMMENT: u8 = 0;
const COMMENT_MAX: usize = 120;
/// Elements in one message; keeps the nested list far below the 64 KiB of an attribute.
const ELEMENTS_PER_MESSAGE: usize = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    pub(crate) fn number(self) -> u8 {
        match self {
            Family::Ipv4 => 2,
            Family::Ipv6 => 10,
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Hook {
    Prerouting = 0,
    Output = 3,
    Postrouting = 4,
}

/// A chain that the kernel calls.
pub(crate) struct BaseChain {
    pub kind: &'static str,
    pub hook: Hook,
    pub priority: i32,
}

/// The type of a map as `nft list` shows it: concatenated type ids, and the length in registers.
pub(crate) struct MapType {
    pub key_type: u32,
    pub key_length: u32,
    pub data_type: u32,
    pub data_length: u32,
}

pub(crate) struct Element {
    pub key: Vec<u8>,
    pub data: Vec<u8>,
    pub comment: String,
}

/// A transaction under construction.
pub(crate) struct Batch {
    table: &'static str,
    messages: Vec<Message>,
    set_id: u32,
}

impl Batch {
    pub(crate) fn new(table: &'static str) -> Batch {
        let begin = batch_mark(NFNL_MSG_BATCH_BEGIN);
        Batch {
            table,
            messages: vec![begin],
            set_id: 0,
        }
    }

    fn push(&mut self, kind: u16, flags: u16, body: AttrBuf) {
        self.messages.push(Message {
            kind: NFNL_SUBSYS_NFTABLES << 8 | kind,
            flags: NLM_F_REQUEST | NLM_F_ACK | flags,
            body: body.finish(),
        });
    }

    /// A fresh, empty table whether there was one or not.
    pub(crate) fn reset_table(&mut self, family: Family) {
        for (kind, flags) in [
            (NFT_MSG_NEWTABLE, NLM_F_CREATE),
            (NFT_MSG_DELTABLE, 0),
            (NFT_MSG_NEWTABLE, NLM_F_CREATE),
        ] {
            let mut body = header(family);
            body.string(1, self.table);
            self.push(kind, flags, body);
        }
    }

    /// Removes the table; creating it first makes that work when there is none.
    pub(crate) fn drop_table(&mut self, family: Family) {
        self.reset_table(family);
        self.messages.pop();
    }

    pub(crate) fn chain(&mut self, family: Family, name: &str, base: Option<BaseChain>) {
        let mut body = header(family);
        body.string(1, self.table).string(3, name);
        if let Some(base) = base {
            body.string(7, base.kind);
            body.nest(4, |hook| {
                hook.u32_be(1, base.hook as u32)
                    .u32_be(2, base.priority as u32);
            });
        }
        self.push(NFT_MSG_NEWCHAIN, NLM_F_CREATE, body);
    }

    pub(crate) fn map(&mut self, family: Family, name: &str, kind: &MapType) {
        self.set_id += 1;
        let mut body = header(family);
        body.string(1, self.table)
            .string(2, name)
            .u32_be(3, NFT_SET_MAP)
            .u32_be(4, kind.key_type)
            .u32_be(5, kind.key_length)
            .u32_be(6, kind.data_type)
            .u32_be(7, kind.data_length)
            .u32_be(10, self.set_id);
        self.push(NFT_MSG_NEWSET, NLM_F_CREATE, body);
    }

    pub(crate) fn rule(&mut self, family: Family, chain: &str, comment: &str, exprs: Vec<Expr>) {
        let mut body = header(family);
        body.string(1, self.table).string(2, chain);
        body.nest(4, |list| {
            for expr in exprs {
                list.nest(1, |item| {
                    item.string(1, expr.name).nest(2, |data| (expr.fill)(data));
                });
            }
        });
        body.bytes(7, &comment_udata(comment));
        self.push(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, body);
    }

    pub(crate) fn add_elements(&mut self, family: Family, map: &str, elements: &[Element]) {
        self.elements(NFT_MSG_NEWSETELEM, NLM_F_CREATE, family, map, elements);
    }

    /// Fails as a whole when one of them is not there.
    pub(crate) fn delete_elements(&mut self, family: Family, map: &str, elements: &[Element]) {
        self.elements(NFT_MSG_DELSETELEM, 0, family, map, elements);
    }

    fn elements(&mut self, kind: u16, flags: u16, family: Family, map: &str, all: &[Element]) {
        for part in all.chunks(ELEMENTS_PER_MESSAGE) {
            let mut body = header(family);
            body.string(1, self.table).string(2, map);
            body.nest(3, |list| {
                for element in part {
                    list.nest(1, |item| {
                        item.nest(1, |key| {
                            key.bytes(1, &element.key);
                        });
                        if kind == NFT_MSG_NEWSETELEM {
                            item.nest(2, |data| {
                                data.bytes(1, &element.data);
                            });
                            item.bytes(6, &comment_udata(&element.comment));
                        }
                    });
                }
            });
            self.push(kind, flags, body);
        }
    }

    pub(crate) fn commit(mut self) -> Result<(), Refusal> {
        self.messages.push(batch_mark(NFNL_MSG_BATCH_END));
        let mut conn = Connection::netfilter()?;
        conn.apply(&self.messages)
            .map(drop)
            .map_err(|(_, refusal)| refusal)
    }
}

fn batch_mark(kind: u16) -> Message {
    let mut body = vec![0, 0];
    body.extend_from_slice(&NFNL_SUBSYS_NFTABLES.to_be_bytes());
    Message {
        kind,
        flags: NLM_F_REQUEST,
        body,
    }
}

/// struct nfgenmsg
fn header(family: Family) -> AttrBuf {
    AttrBuf::with_header(&[family.number(), 0, 0, 0])
}

fn comment_udata(text: &str) -> Vec<u8> {
    let mut end = text.len().min(COMMENT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = text[..end].replace('\0', "");
    let mut udata = vec![UDATA_COMMENT, (text.len() + 1) as u8];
    udata.extend_from_slice(text.as_bytes());
    udata.push(0);
    udata
}

/// Whether our table is there.
pub(crate) fn table_exists(family: Family, table: &str) -> io::Result<bool> {
    let mut body = header(family);
    body.string(1, table);
    match get(NFT_MSG_GETTABLE, body) {
        Ok(replies) => Ok(replies),
        Err(refusal) if refusal.is(rustix::io::Errno::NOENT) => Ok(false),
        Err(refusal) => Err(io::Error::from_raw_os_error(refusal.errno)),
    }
}

fn get(kind: u16, body: AttrBuf) -> Result<bool, Refusal> {
    let mut conn = Connection::netfilter()?;
    let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
    let outcome = conn.send(&[Message {
        kind,
        flags: NLM_F_REQUEST,
        body: body.finish(),
    }])?;
    match outcome.results.into_iter().next().flatten() {
        Some(Err(refusal)) => Err(refusal),
        _ => Ok(!outcome.replies.is_empty()),
    }
}

/// Forward chains of others (iptables-nft, firewalld, docker) that drop what no rule accepts.
///
/// An accept in our table cannot overrule a drop in another one: nf_tables asks every base chain
/// of a hook. So they can only be named.
pub(crate) fn dropping_forward_chains(family: Family) -> Vec<String> {
    const NFT_CHAIN_HOOK_FORWARD: u32 = 2;
    const NF_DROP: u32 = 0;
    let Ok(mut conn) = Connection::netfilter() else {
        return Vec::new();
    };
    let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN;
    let Ok(replies) = conn.dump(kind, header(family).finish()) else {
        return Vec::new();
    };
    let big_endian = |bytes: &[u8]| bytes.try_into().map(u32::from_be_bytes).ok();
    let text = |bytes: &[u8]| {
        String::from_utf8_lossy(bytes)
            .trim_end_matches('\0')
            .to_owned()
    };
    replies
        .iter()
        .filter_map(|reply| {
            let attributes = reply.body.get(4..)?;
            let hook = Attributes::get(attributes, 4)?;
            let forward = big_endian(Attributes::get(hook, 1)?)? == NFT_CHAIN_HOOK_FORWARD;
            let drops = big_endian(Attributes::get(attributes, 5)?)? == NF_DROP;
            let table = text(Attributes::get(attributes, 1)?);
            let chain = text(Attributes::get(attributes, 3)?);
            (forward && drops).then(|| format!("table {table} chain {chain}"))
        })
        .collect()
}
