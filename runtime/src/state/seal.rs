//! A record as it is on disk: a JSON object whose first member is a checksum over the rest.
//!
//! Against accidents (a disk, a bit of memory, an editor), not against an attacker: who may write
//! the state root is root already.

const HEAD: &[u8] = b"{\"checksum\":\"";
const TAIL: &[u8] = b"\",";
const DIGITS: usize = 16;

/// FNV-1a, 64 bits: every step is a bijection, so that one changed byte always changes the sum.
fn sum(bytes: &[u8]) -> [u8; DIGITS] {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let mut digits = [0; DIGITS];
    for (at, digit) in digits.iter_mut().enumerate() {
        let nibble = (hash >> (60 - 4 * at)) & 0xf;
        *digit = b"0123456789abcdef"[nibble as usize];
    }
    digits
}

/// Puts the checksum in front of an object's first member.
pub(super) fn seal(object: &[u8]) -> Vec<u8> {
    let rest = object.strip_prefix(b"{").unwrap_or(object);
    [HEAD, &sum(rest), TAIL, rest].concat()
}

/// Whether a record is as it was written. The error is the reason.
pub(super) fn check(bytes: &[u8]) -> Result<(), &'static str> {
    let damaged = "the record is damaged";
    let bytes = bytes.strip_prefix(HEAD).ok_or(damaged)?;
    let (want, rest) = bytes.split_at_checked(DIGITS).ok_or(damaged)?;
    let rest = rest.strip_prefix(TAIL).ok_or(damaged)?;
    if sum(rest) == want {
        Ok(())
    } else {
        Err(damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_object_is_json_with_a_checksum() {
        let sealed = seal(br#"{"a":1,"b":[2]}"#);
        assert_eq!(check(&sealed), Ok(()));
        let value: serde_json::Value = serde_json::from_slice(&sealed).unwrap();
        assert_eq!((&value["a"], &value["b"][0]), (&1.into(), &2.into()));
        assert_eq!(value["checksum"].as_str().map(str::len), Some(16));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let sealed = seal(br#"{"id":"c","path":"/sys/fs/cgroup/pids/a"}"#);
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut damaged = sealed.clone();
                damaged[at] ^= 1 << bit;
                assert!(check(&damaged).is_err(), "byte {at}, bit {bit}");
            }
            assert!(check(&sealed[..at]).is_err(), "cut to {at}");
        }
    }
}
