//! Device rules: what `linux.resources.devices` and the default devices come to. Pure.
//!
//! The rules are ordered and may contradict each other. They are played through a model of the v1
//! devices cgroup, and the result (a default and its exceptions) is what v1 files and the v2
//! program express. Where v1 would silently ignore a rule, taking part of a wildcard back, the
//! model refuses: a container must not get more than its config says.

use std::collections::BTreeMap;
use std::fmt;

use coracle_oci::spec::{Linux, LinuxDeviceCgroup, LinuxDeviceType};

use super::step::Write;
use crate::error::{Error, Result};

const FIELD: &str = "linux.resources.devices";

/// r, w and m as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Access(u8);

impl Access {
    pub const READ: Access = Access(1);
    pub const WRITE: Access = Access(2);
    pub const MKNOD: Access = Access(4);
    pub const ALL: Access = Access(7);

    /// Other letters mean nothing, as with runc, unless there is nothing else.
    fn parse(text: &str) -> Option<Access> {
        let mut access = Access(0);
        for letter in text.bytes() {
            access.0 |= match letter {
                b'r' => Access::READ.0,
                b'w' => Access::WRITE.0,
                b'm' => Access::MKNOD.0,
                _ => 0,
            };
        }
        (access.0 != 0).then_some(access)
    }

    pub fn has(self, other: Access) -> bool {
        self.0 & other.0 == other.0
    }

    fn overlaps(self, other: Access) -> bool {
        self.0 & other.0 != 0
    }

    pub fn is_all(self) -> bool {
        self == Access::ALL
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (bit, letter) in [
            (Access::READ, "r"),
            (Access::WRITE, "w"),
            (Access::MKNOD, "m"),
        ] {
            if self.has(bit) {
                f.write_str(letter)?;
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum DeviceKind {
    Block,
    Char,
}

/// Which devices an exception is about; `None` is any number. Ordered as written to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Match {
    pub major: Option<u32>,
    pub minor: Option<u32>,
    pub kind: DeviceKind,
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            DeviceKind::Block => "b ",
            DeviceKind::Char => "c ",
        })?;
        for (number, end) in [(self.major, ":"), (self.minor, "")] {
            match number {
                Some(number) => write!(f, "{number}{end}")?,
                None => write!(f, "*{end}")?,
            }
        }
        Ok(())
    }
}

/// A default and the exceptions from it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DeviceRules {
    pub default_allow: bool,
    pub exceptions: BTreeMap<Match, Access>,
}

impl DeviceRules {
    /// The rules of a spec.
    pub fn of(linux: Option<&Linux>) -> Result<DeviceRules> {
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let rules = resources.and_then(|resources| resources.devices().as_deref());
        DeviceRules::new(rules.unwrap_or_default(), linux)
    }

    /// The rules of a container: its own, then those that every container has.
    pub fn new(rules: &[LinuxDeviceCgroup], linux: Option<&Linux>) -> Result<DeviceRules> {
        let mut model = DeviceRules::default();
        for (index, rule) in rules.iter().enumerate() {
            let access = rule.access().as_deref().unwrap_or_default();
            if access.is_empty() {
                return Err(Error::invalid(format!(
                    "{FIELD}: device access at {index} field cannot be empty"
                )));
            }
            let Some(access) = Access::parse(access) else {
                return Err(Error::invalid(format!(
                    "{FIELD}[{index}].access: invalid {access:?}"
                )));
            };
            let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
                LinuxDeviceType::A => None,
                LinuxDeviceType::B => Some(DeviceKind::Block),
                LinuxDeviceType::C => Some(DeviceKind::Char),
                other @ (LinuxDeviceType::U | LinuxDeviceType::P) => {
                    return Err(Error::invalid(format!(
                        "{FIELD}[{index}].type: invalid cgroup device type {:?}",
                        other.as_str()
                    )));
                }
            };
            let Some(kind) = kind else {
                // "a" is every device with every access, whatever else the rule says.
                model = DeviceRules {
                    default_allow: rule.allow(),
                    exceptions: BTreeMap::new(),
                };
                continue;
            };
            let number = |name: &str, value: Option<i64>| match value {
                None | Some(-1) => Ok(None),
                Some(value) => u32::try_from(value).map(Some).map_err(|_| {
                    Error::invalid(format!("{FIELD}[{index}].{name}: invalid number {value}"))
                }),
            };
            let major = number("major", rule.major())?;
            let minor = number("minor", rule.minor())?;
            model.play(Match { major, minor, kind }, access, rule.allow())?;
        }
        for (path, device, access) in DEFAULTS {
            let replaced = linux
                .and_then(|linux| linux.devices().as_ref())
                .is_some_and(|own| own.iter().any(|d| d.path().to_str() == Some(path)));
            if path.is_empty() || !replaced {
                model.play(*device, *access, true)?;
            }
        }
        Ok(model)
    }

    fn play(&mut self, device: Match, access: Access, allow: bool) -> Result<()> {
        if allow == self.default_allow {
            return self.remove(device, access, allow);
        }
        let held = self.exceptions.entry(device).or_default();
        held.0 |= access.0;
        Ok(())
    }

    fn remove(&mut self, device: Match, access: Access, allow: bool) -> Result<()> {
        let wildcards = [
            Match {
                major: None,
                ..device
            },
            Match {
                minor: None,
                ..device
            },
            Match {
                major: None,
                minor: None,
                ..device
            },
        ];
        for wildcard in wildcards.into_iter().filter(|wildcard| *wildcard != device) {
            let held = self.exceptions.get(&wildcard).copied().unwrap_or_default();
            if held.overlaps(access) {
                let exception = if allow { "deny" } else { "allow" };
                return Err(Error::unsupported(format!(
                    "{FIELD}: unable to remove '{exception}' exception: requested rule \
                     [{device} {access}] cannot punch hole in existing wildcard rule \
                     [{wildcard} {held}]"
                )));
            }
        }
        if let Some(held) = self.exceptions.get_mut(&device) {
            held.0 &= !access.0;
            if held.0 == 0 {
                self.exceptions.remove(&device);
            }
        }
        Ok(())
    }

    /// The writes that turn a fresh v1 devices cgroup, which inherits its parent's rules, into
    /// this.
    pub fn v1_writes(&self) -> Vec<Write> {
        let file = |allow| {
            if allow {
                "devices.allow"
            } else {
                "devices.deny"
            }
        };
        let mut writes = Vec::with_capacity(self.exceptions.len() + 1);
        writes.push(Write::new(FIELD, file(self.default_allow), "a *:* rwm"));
        for (device, access) in &self.exceptions {
            let line = format!("{device} {access}");
            writes.push(Write::new(FIELD, file(!self.default_allow), line));
        }
        writes
    }
}

const fn char_device(major: u32, minor: Option<u32>) -> Match {
    Match {
        major: Some(major),
        minor,
        kind: DeviceKind::Char,
    }
}

const fn any(kind: DeviceKind) -> Match {
    Match {
        major: None,
        minor: None,
        kind,
    }
}

/// What every container may use: the devices of the runtime spec, mknod of anything, and
/// /dev/net/tun, which users of the other runtimes rely on. The path is empty where
/// `linux.devices` has no say.
const DEFAULTS: &[(&str, Match, Access)] = &[
    ("", any(DeviceKind::Char), Access::MKNOD),
    ("", any(DeviceKind::Block), Access::MKNOD),
    ("/dev/null", char_device(1, Some(3)), Access::ALL),
    ("/dev/random", char_device(1, Some(8)), Access::ALL),
    ("/dev/full", char_device(1, Some(7)), Access::ALL),
    ("/dev/tty", char_device(5, Some(0)), Access::ALL),
    ("/dev/zero", char_device(1, Some(5)), Access::ALL),
    ("/dev/urandom", char_device(1, Some(9)), Access::ALL),
    ("", char_device(136, None), Access::ALL),
    ("", char_device(5, Some(2)), Access::ALL),
    ("", char_device(10, Some(200)), Access::ALL),
];

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn rules(json: &str) -> Result<DeviceRules> {
        let resources = coracle_oci::config::parse_resources(json.as_bytes()).unwrap();
        DeviceRules::new(resources.devices().as_deref().unwrap_or_default(), None)
    }

    fn lines(rules: &DeviceRules) -> Vec<String> {
        rules
            .v1_writes()
            .iter()
            .map(|w| format!("{} {}", w.file, w.value))
            .collect()
    }

    const DEFAULT_LINES: [&str; 11] = [
        "devices.allow b *:* m",
        "devices.allow c *:* m",
        "devices.allow c 1:3 rwm",
        "devices.allow c 1:5 rwm",
        "devices.allow c 1:7 rwm",
        "devices.allow c 1:8 rwm",
        "devices.allow c 1:9 rwm",
        "devices.allow c 5:0 rwm",
        "devices.allow c 5:2 rwm",
        "devices.allow c 10:200 rwm",
        "devices.allow c 136:* rwm",
    ];

    #[test]
    fn no_rules_deny_all_but_the_defaults() {
        let mut want = vec!["devices.deny a *:* rwm"];
        want.extend(DEFAULT_LINES);
        assert_eq!(lines(&rules("{}").unwrap()), want);
        let denied = rules(r#"{"devices":[{"allow":false,"access":"rwm"}]}"#).unwrap();
        assert_eq!(lines(&denied), want);
    }

    #[test]
    fn allow_all_needs_no_exceptions() {
        let rules = rules(r#"{"devices":[{"allow":true,"access":"rwm"}]}"#).unwrap();
        assert_eq!(lines(&rules), ["devices.allow a *:* rwm"]);
    }

    #[test]
    fn rules_apply_in_order() {
        let allowed = rules(
            r#"{"devices":[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"c","major":10,"minor":229,"access":"rw"},
                {"allow":true,"type":"b","major":8,"access":"r"},
                {"allow":false,"type":"c","major":10,"minor":229,"access":"w"}]}"#,
        )
        .unwrap();
        let lines = lines(&allowed);
        assert!(
            lines.contains(&"devices.allow c 10:229 r".to_owned()),
            "{lines:?}"
        );
        assert!(
            lines.contains(&"devices.allow b 8:* r".to_owned()),
            "{lines:?}"
        );
        let denied = rules(
            r#"{"devices":[{"allow":true,"access":"rwm"},
                {"allow":false,"type":"c","major":10,"minor":229,"access":"rw"}]}"#,
        )
        .unwrap();
        assert_eq!(
            self::lines(&denied),
            ["devices.allow a *:* rwm", "devices.deny c 10:229 rw"]
        );
    }

    #[test]
    fn refusals_name_the_field() {
        let cases = [
            r#"{"devices":[{"allow":true,"type":"c"}]}"#,
            r#"{"devices":[{"allow":true,"type":"c","access":"x"}]}"#,
            r#"{"devices":[{"allow":true,"type":"p","access":"r"}]}"#,
            r#"{"devices":[{"allow":true,"type":"c","major":-5,"access":"r"}]}"#,
            r#"{"devices":[{"allow":true,"type":"c","access":"rw"},
                {"allow":false,"type":"c","major":1,"minor":3,"access":"r"}]}"#,
        ];
        for json in cases {
            let error = rules(json).unwrap_err();
            assert!(error.to_string().starts_with(FIELD), "{error}");
        }
    }
}
