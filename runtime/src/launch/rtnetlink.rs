//! The little of rtnetlink(7) that moving a device takes: messages as bytes, one socket each.
//!
//! Knows nothing of containers. Every request is acknowledged by the kernel before it returns.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::error::{Error, Result};

type Outcome<T> = std::result::Result<T, Errno>;

const HEADER: usize = 16;
const IFINFOMSG: usize = 16;
const IFADDRMSG: usize = 8;
/// A dump that another change has crossed is asked for again this often.
const ATTEMPTS: usize = 5;

const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const ACKNOWLEDGE: u16 = libc::NLM_F_ACK as u16;
const INTERRUPTED: u16 = libc::NLM_F_DUMP_INTR as u16;

/// What a user may have asked for with an address; the rest is the kernel's to set.
const CARRIED_FLAGS: u32 = libc::IFA_F_NODAD
    | libc::IFA_F_HOMEADDRESS
    | libc::IFA_F_MANAGETEMPADDR
    | libc::IFA_F_NOPREFIXROUTE
    | libc::IFA_F_MCAUTOJOIN;

/// An address of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Address {
    family: u8,
    prefix: u8,
    pub scope: u8,
    pub flags: u32,
    /// IFA_LOCAL, IFA_ADDRESS (the peer's on a point-to-point link) and IFA_BROADCAST.
    attributes: Vec<(u16, Vec<u8>)>,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = self.attributes.first().map(|(_, bytes)| bytes.as_slice());
        let bytes = first.unwrap_or_default();
        match (<[u8; 4]>::try_from(bytes), <[u8; 16]>::try_from(bytes)) {
            (Ok(four), _) => write!(f, "{}/{}", Ipv4Addr::from(four), self.prefix),
            (_, Ok(sixteen)) => write!(f, "{}/{}", Ipv6Addr::from(sixteen), self.prefix),
            _ => write!(f, "{bytes:?}/{}", self.prefix),
        }
    }
}

/// A message under construction.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(REQUEST | flags).to_ne_bytes());
        bytes.extend_from_slice(body);
        Self(bytes)
    }

    /// ifinfomsg: `change` says which of the flags are meant.
    fn link(kind: u16, index: i32, flags: u32, change: u32) -> Self {
        let mut body = [0; IFINFOMSG];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        body[8..12].copy_from_slice(&flags.to_ne_bytes());
        body[12..16].copy_from_slice(&change.to_ne_bytes());
        Self::new(kind, ACKNOWLEDGE, &body)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (value.len() + 4) as u16;
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(align(self.0.len()), 0);
        self
    }

    fn name(self, kind: u16, name: &str) -> Self {
        let mut bytes = name.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = (self.0.len() as u32).to_ne_bytes();
        self.0[..4].copy_from_slice(&length);
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A message as received: type, flags, body.
type Received<'a> = (u16, u16, &'a [u8]);

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = u32_at(bytes, 0)? as usize;
        let message = bytes.get(..length).filter(|_| length >= HEADER)?;
        bytes = bytes.get(align(length)..).unwrap_or_default();
        Some((u16_at(message, 4)?, u16_at(message, 6)?, &message[HEADER..]))
    })
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let value = bytes.get(4..length)?;
        let kind = u16_at(bytes, 2)?;
        bytes = bytes.get(align(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The address in an RTM_NEWADDR, if it is one of that device.
fn address(body: &[u8], index: i32) -> Option<Address> {
    if u32_at(body, 4)? != index.cast_unsigned() {
        return None;
    }
    let mut address = Address {
        family: body[0],
        prefix: body[1],
        flags: u32::from(body[2]),
        scope: body[3],
        attributes: Vec::new(),
    };
    for (kind, value) in attributes(&body[IFADDRMSG..]) {
        match kind {
            libc::IFA_LOCAL | libc::IFA_ADDRESS | libc::IFA_BROADCAST => {
                address.attributes.push((kind, value.to_vec()));
            }
            // The eight bits of the header have become too few.
            libc::IFA_FLAGS => address.flags = u32_at(value, 0)?,
            _ => {}
        }
    }
    Some(address)
}

/// A socket in the network namespace that it was made in.
#[derive(Debug)]
pub struct Route {
    socket: OwnedFd,
}

impl Route {
    /// In the calling thread's namespace.
    ///
    /// # Errors
    /// Those of socket(2).
    pub fn open() -> Result<Self> {
        rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is protocol 0.
            None,
        )
        .map(|socket| Self { socket })
        .map_err(|error| Error::system("socket(AF_NETLINK)", "", error))
    }

    pub fn index_of(&self, name: &str) -> Outcome<i32> {
        let request = Message::link(libc::RTM_GETLINK, 0, 0, 0).name(libc::IFLA_IFNAME, name);
        let mut index = None;
        self.ask(request, |kind, body| {
            if kind == libc::RTM_NEWLINK {
                index = u32_at(body, 4).map(u32::cast_signed);
            }
        })?;
        index.ok_or(Errno::NODEV)
    }

    pub fn addresses(&self, index: i32) -> Outcome<Vec<Address>> {
        for _ in 1..ATTEMPTS {
            match self.dump_addresses(index) {
                Err(Errno::INTR) => {}
                dumped => return dumped,
            }
        }
        self.dump_addresses(index)
    }

    fn dump_addresses(&self, index: i32) -> Outcome<Vec<Address>> {
        let dump = libc::NLM_F_DUMP as u16;
        let request = Message::new(libc::RTM_GETADDR, dump, &[0; IFADDRMSG]);
        let mut found = Vec::new();
        self.ask(request, |kind, body| {
            if kind == libc::RTM_NEWADDR {
                found.extend(address(body, index));
            }
        })?;
        Ok(found)
    }

    pub fn set_up(&self, index: i32, up: bool) -> Outcome<()> {
        let flag = libc::IFF_UP as u32;
        let flags = if up { flag } else { 0 };
        self.ask(
            Message::link(libc::RTM_NEWLINK, index, flags, flag),
            |_, _| {},
        )
    }

    pub fn move_link(&self, index: i32, name: &str, namespace: BorrowedFd<'_>) -> Outcome<()> {
        let fd = namespace.as_raw_fd().to_ne_bytes();
        let request = Message::link(libc::RTM_NEWLINK, index, 0, 0)
            .name(libc::IFLA_IFNAME, name)
            .attribute(libc::IFLA_NET_NS_FD, &fd);
        self.ask(request, |_, _| {})
    }

    pub fn add_address(&self, index: i32, address: &Address) -> Outcome<()> {
        let mut body = [address.family, address.prefix, 0, address.scope, 0, 0, 0, 0];
        body[4..].copy_from_slice(&index.to_ne_bytes());
        let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
        let mut request = Message::new(libc::RTM_NEWADDR, ACKNOWLEDGE | flags, &body);
        for (kind, value) in &address.attributes {
            request = request.attribute(*kind, value);
        }
        let carried = address.flags & CARRIED_FLAGS;
        if carried != 0 {
            request = request.attribute(libc::IFA_FLAGS, &carried.to_ne_bytes());
        }
        self.ask(request, |_, _| {})
    }

    /// Sends a request and takes the answers up to the last.
    fn ask(&self, request: Message, mut each: impl FnMut(u16, &[u8])) -> Outcome<()> {
        let request = request.finish(1);
        rustix::net::send(&self.socket, &request, SendFlags::empty())?;
        let mut interrupted = false;
        // The kernel fills no more than this at a time for a reader who offers it.
        let mut buffer = vec![0u8; 32 * 1024];
        loop {
            let received = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty())
            })?;
            for (kind, flags, body) in messages(&buffer[..received.0]) {
                interrupted |= flags & INTERRUPTED != 0;
                match i32::from(kind) {
                    libc::NLMSG_DONE if interrupted => return Err(Errno::INTR),
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => {
                        // Minus the error, 0 for an acknowledgement.
                        return match u32_at(body, 0).map(u32::cast_signed) {
                            Some(0) => Ok(()),
                            Some(error) => Err(Errno::from_raw_os_error(-error)),
                            None => Err(Errno::IO),
                        };
                    }
                    _ => each(kind, body),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_is_laid_out_as_the_kernel_reads_it() {
        let bytes = Message::link(libc::RTM_NEWLINK, 7, 1, 1)
            .name(libc::IFLA_IFNAME, "eth0")
            .finish(3);
        assert_eq!(bytes.len(), 16 + 16 + 12);
        let all: Vec<Received<'_>> = messages(&bytes).collect();
        let [(kind, flags, body)] = all.as_slice() else {
            panic!("{all:?}")
        };
        assert_eq!((*kind, *flags), (libc::RTM_NEWLINK, REQUEST | ACKNOWLEDGE));
        assert_eq!(u32_at(body, 4), Some(7));
        let named: Vec<_> = attributes(&body[IFINFOMSG..]).collect();
        assert_eq!(named, [(libc::IFLA_IFNAME, &b"eth0\0"[..])]);
    }

    #[test]
    fn address_of_another_device_is_passed_over() {
        let request = |index: u8| {
            Message::new(libc::RTM_NEWADDR, 0, &[2, 24, 0x80, 0, index, 0, 0, 0])
                .attribute(libc::IFA_LOCAL, &[10, 0, 0, 1])
                .attribute(libc::IFA_LABEL, b"eth0\0")
                .attribute(libc::IFA_FLAGS, &0x280_u32.to_ne_bytes())
                .finish(1)
        };
        let bytes = request(5);
        let (_, _, body) = messages(&bytes).next().unwrap();
        assert_eq!(address(body, 6), None);
        let found = address(body, 5).unwrap();
        assert_eq!(found.to_string(), "10.0.0.1/24");
        assert_eq!((found.flags, found.attributes.len()), (0x280, 1));
    }

    #[test]
    fn truncated_bytes_end_the_walk() {
        assert_eq!(messages(&[1, 2, 3]).count(), 0);
        assert_eq!(
            messages(&[200, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).count(),
            0
        );
        assert_eq!(attributes(&[2, 0, 0, 0]).count(), 0);
        assert_eq!(attributes(&[9, 0, 0, 0, 1]).count(), 0);
    }

    #[test]
    fn own_loopback_is_found() {
        let route = Route::open().unwrap();
        assert!(route.index_of("lo").unwrap() > 0);
        assert_eq!(route.index_of("no-such-link0"), Err(Errno::NODEV));
        route.addresses(1).unwrap();
    }
}
