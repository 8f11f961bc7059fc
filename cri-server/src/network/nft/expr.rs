//! The expressions that our rules are made of.
//!
//! A rule is a list of them, run in order over sixteen 4-byte registers; one that does not match
//! ends the rule. Each function here is one expression of `nft --debug=netlink`.

use super::super::netlink::attrs::AttrBuf;
use super::Family;

/// NFT_REG32_00 and its fifteen successors; concatenated keys lie in consecutive ones.
#[derive(Clone, Copy)]
pub(crate) struct Register(pub u32);

impl Register {
    fn number(self) -> u32 {
        8 + self.0
    }
}

pub(crate) struct Expr {
    pub(super) name: &'static str,
    pub(super) fill: Box<dyn FnOnce(&mut AttrBuf)>,
}

fn expr(name: &'static str, fill: impl FnOnce(&mut AttrBuf) + 'static) -> Expr {
    Expr {
        name,
        fill: Box::new(fill),
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Meta {
    InputName = 6,
    OutputName = 7,
    L4Protocol = 16,
}

#[derive(Clone, Copy)]
pub(crate) enum Base {
    Network = 1,
    Transport = 2,
}

#[derive(Clone, Copy)]
pub(crate) enum Compare {
    Equal = 0,
    NotEqual = 1,
}

pub(crate) enum Verdict {
    Drop,
    Jump(&'static str),
}

pub(crate) fn meta(key: Meta, to: Register) -> Expr {
    expr("meta", move |a| {
        a.u32_be(1, to.number()).u32_be(2, key as u32);
    })
}

pub(crate) fn payload(base: Base, offset: u32, length: u32, to: Register) -> Expr {
    expr("payload", move |a| {
        a.u32_be(1, to.number())
            .u32_be(2, base as u32)
            .u32_be(3, offset)
            .u32_be(4, length);
    })
}

pub(crate) fn compare(how: Compare, from: Register, value: Vec<u8>) -> Expr {
    expr("cmp", move |a| {
        a.u32_be(1, from.number())
            .u32_be(2, how as u32)
            .nest(3, |data| {
                data.bytes(1, &value);
            });
    })
}

/// register = register & mask
pub(crate) fn mask(register: Register, mask: Vec<u8>) -> Expr {
    expr("bitwise", move |a| {
        a.u32_be(1, register.number())
            .u32_be(2, register.number())
            .u32_be(3, mask.len() as u32);
        a.nest(4, |data| {
            data.bytes(1, &mask);
        });
        a.nest(5, |data| {
            data.bytes(1, &vec![0; mask.len()]);
        });
    })
}

/// The type of the destination address as the routing table sees it (RTN_*).
pub(crate) fn destination_type(to: Register) -> Expr {
    const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
    const NFTA_FIB_F_DADDR: u32 = 2;
    expr("fib", move |a| {
        a.u32_be(1, to.number())
            .u32_be(2, NFT_FIB_RESULT_ADDRTYPE)
            .u32_be(3, NFTA_FIB_F_DADDR);
    })
}

/// IPS_* bits of the connection.
pub(crate) fn connection_status(to: Register) -> Expr {
    const NFT_CT_STATUS: u32 = 2;
    expr("ct", move |a| {
        a.u32_be(1, to.number()).u32_be(2, NFT_CT_STATUS);
    })
}

/// Looks the key up; the map's data goes to `to`. Ends the rule when there is none.
pub(crate) fn lookup(map: &'static str, key: Register, to: Register) -> Expr {
    expr("lookup", move |a| {
        a.string(1, map)
            .u32_be(2, key.number())
            .u32_be(3, to.number());
    })
}

pub(crate) fn destination_nat(family: Family, address: Register, port: Register) -> Expr {
    const NFT_NAT_DNAT: u32 = 1;
    expr("nat", move |a| {
        a.u32_be(1, NFT_NAT_DNAT)
            .u32_be(2, u32::from(family.number()))
            .u32_be(3, address.number())
            .u32_be(5, port.number());
    })
}

/// Source ports are picked at random: without it two connections racing for one port lose a
/// packet (the kernel's nf_nat_l4proto_unique_tuple searches in the same order for both).
pub(crate) fn masquerade() -> Expr {
    const NF_NAT_RANGE_PROTO_RANDOM_FULLY: u32 = 1 << 4;
    expr("masq", |a| {
        a.u32_be(1, NF_NAT_RANGE_PROTO_RANDOM_FULLY);
    })
}

pub(crate) fn verdict(verdict: Verdict) -> Expr {
    const NF_DROP: i32 = 0;
    const NFT_JUMP: i32 = -3;
    expr("immediate", move |a| {
        a.u32_be(1, 0).nest(2, |data| {
            data.nest(2, |v| match verdict {
                Verdict::Drop => {
                    v.u32_be(1, NF_DROP as u32);
                }
                Verdict::Jump(chain) => {
                    v.u32_be(1, NFT_JUMP as u32).string(2, chain);
                }
            });
        });
    })
}
