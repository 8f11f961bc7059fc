//! Owns who a process runs as: CRI's fields and the image's USER against the image's own
//! /etc/passwd and /etc/group. Pure: the two files come in as bytes.
//!
//! Identities are parsed once and fail closed: a number is a number (never looked up as a name),
//! 4294967295 is refused, a name that is not in the file is an error.

use crate::container::config::UserRequest;
use crate::error::{Error, Result};

use super::document::User;

/// The two files of an image; empty when it has none.
#[derive(Debug, Clone, Default)]
pub struct Accounts {
    /// /etc/passwd
    pub passwd: Vec<u8>,
    /// /etc/group
    pub group: Vec<u8>,
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl Accounts {
    fn passwd(&self) -> impl Iterator<Item = PasswdEntry<'_>> {
        lines(&self.passwd).filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _, uid, gid) = (
                fields.next()?,
                fields.next()?,
                fields.next()?,
                fields.next()?,
            );
            Some(PasswdEntry {
                name,
                uid: number(uid)?,
                gid: number(gid)?,
            })
        })
    }

    fn group(&self) -> impl Iterator<Item = GroupEntry<'_>> {
        lines(&self.group).filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
            Some(GroupEntry {
                name,
                gid: number(gid)?,
                members: fields.next().unwrap_or(""),
            })
        })
    }
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = &str> {
    // A line that is not UTF-8 cannot name what was asked for in UTF-8.
    bytes
        .split(|b| *b == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// A decimal 32-bit id other than the kernel's "none".
fn number(text: &str) -> Option<u32> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let id: u32 = text.parse().ok().filter(|_| plain)?;
    (id != u32::MAX).then_some(id)
}

/// Resolves what CRI asked for, or else the image's USER.
pub fn resolve(request: &UserRequest, image_user: &str, accounts: &Accounts) -> Result<User> {
    let (user, group) = match (request.uid, request.username.as_str()) {
        (_, name) if !name.is_empty() => (named(name, accounts, "run_as_username")?, None),
        (Some(uid), _) => (numeric(uid, accounts), None),
        (None, _) => from_image(image_user, accounts)?,
    };
    let gid = request.gid.or(group).unwrap_or(user.gid);
    let mut gids = vec![gid];
    if !request.strict_groups
        && let Some(name) = user.name
    {
        let of_user = |g: &GroupEntry<'_>| g.members.split(',').any(|m| m == name);
        gids.extend(accounts.group().filter(of_user).map(|g| g.gid));
    }
    gids.extend(&request.supplemental_groups);
    let mut unique = Vec::with_capacity(gids.len());
    for gid in gids {
        if !unique.contains(&gid) {
            unique.push(gid);
        }
    }
    Ok(User {
        uid: user.uid,
        gid,
        additional_gids: unique,
    })
}

struct Found<'a> {
    uid: u32,
    gid: u32,
    name: Option<&'a str>,
}

fn numeric(uid: u32, accounts: &Accounts) -> Found<'_> {
    match accounts.passwd().find(|entry| entry.uid == uid) {
        Some(entry) => Found {
            uid,
            gid: entry.gid,
            name: Some(entry.name),
        },
        None => Found {
            uid,
            gid: 0,
            name: None,
        },
    }
}

fn named<'a>(name: &str, accounts: &'a Accounts, field: &str) -> Result<Found<'a>> {
    // The one name that every system has, and that scratch images may use without a file.
    let entry = accounts.passwd().find(|entry| entry.name == name);
    match entry {
        Some(entry) => Ok(Found {
            uid: entry.uid,
            gid: entry.gid,
            name: Some(entry.name),
        }),
        None if name == "root" => Ok(Found {
            uid: 0,
            gid: 0,
            name: None,
        }),
        None => {
            let text = format!("no user {name:?} in the image's /etc/passwd");
            Err(Error::invalid(field, text))
        }
    }
}

/// `user`, `uid`, `user:group`, with numbers or names on either side.
fn from_image<'a>(text: &str, accounts: &'a Accounts) -> Result<(Found<'a>, Option<u32>)> {
    let field = "USER of the image";
    let (user, group) = text.split_once(':').unwrap_or((text, ""));
    let digits = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
    let bad = |t: &str| Error::invalid(field, format!("{t:?} is no user or group id"));
    let found = match user {
        "" => numeric(0, accounts),
        _ if digits(user) => numeric(number(user).ok_or_else(|| bad(user))?, accounts),
        _ => named(user, accounts, field)?,
    };
    let gid = match group {
        "" => None,
        _ if digits(group) => Some(number(group).ok_or_else(|| bad(group))?),
        _ => {
            let entry = accounts.group().find(|entry| entry.name == group);
            let missing = || {
                let text = format!("no group {group:?} in the image's /etc/group");
                Error::invalid(field, text)
            };
            Some(entry.ok_or_else(missing)?.gid)
        }
    };
    Ok((found, gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts {
            passwd: b"root:x:0:0::/root:/bin/sh\nwww-data:x:33:33::/:\n1234:x:7:7::/:\nbad:x:4294967295:0::/:\n"
                .to_vec(),
            group: b"root:x:0:\nwww-data:x:33:\nlogs:x:50000:www-data,other\n".to_vec(),
        }
    }

    fn user(request: UserRequest, image: &str) -> Result<(u32, u32, Vec<u32>)> {
        resolve(&request, image, &accounts()).map(|u| (u.uid, u.gid, u.additional_gids))
    }

    fn image(text: &str) -> Result<(u32, u32, Vec<u32>)> {
        user(UserRequest::default(), text)
    }

    #[test]
    fn image_user_forms() {
        assert_eq!(image("").unwrap(), (0, 0, vec![0]));
        assert_eq!(image("www-data").unwrap(), (33, 33, vec![33, 50000]));
        assert_eq!(image("33").unwrap(), (33, 33, vec![33, 50000]));
        assert_eq!(image("1003:1004").unwrap(), (1003, 1004, vec![1004]));
        assert_eq!(image("www-data:logs").unwrap(), (33, 50000, vec![50000]));
        assert_eq!(image("1003").unwrap(), (1003, 0, vec![0]));
    }

    #[test]
    fn digits_never_become_names() {
        // The account called 1234 has uid 7; USER 1234 is uid 1234.
        assert_eq!(image("1234").unwrap().0, 1234);
    }

    #[test]
    fn wrong_identities_fail_closed() {
        for text in [
            "4294967295",
            "4294967296",
            "nobody",
            "33:nogroup",
            "bad",
            "-1",
            " 33",
        ] {
            assert!(image(text).is_err(), "{text}");
        }
    }

    #[test]
    fn request_wins_over_image_and_strict_ignores_the_file() {
        let mut request = UserRequest {
            uid: Some(33),
            gid: Some(9),
            supplemental_groups: vec![5, 9],
            ..UserRequest::default()
        };
        assert_eq!(
            user(request.clone(), "root").unwrap(),
            (33, 9, vec![9, 50000, 5])
        );
        request.strict_groups = true;
        assert_eq!(user(request, "root").unwrap(), (33, 9, vec![9, 5]));
    }

    #[test]
    fn root_needs_no_file() {
        let request = UserRequest::default();
        let found = resolve(&request, "root", &Accounts::default()).unwrap();
        assert_eq!((found.uid, found.gid), (0, 0));
    }
}
