//! config.json, checked: what the rest of the runtime may rely on. Makes no system calls but the
//! few that ask which security modules the host has.

mod checks;
mod linux;
mod sysctl;

use coracle_oci::config;
use coracle_oci::spec::{Process, Spec};

use crate::error::{Error, Kind, Result};
use crate::host::HostFacts;

pub use checks::Namespaces;

/// A config.json that passed every check. Only [`CheckedSpec::check`] makes one.
#[derive(Debug)]
pub struct CheckedSpec {
    spec: Spec,
    namespaces: Namespaces,
    pub warnings: Vec<String>,
}

impl CheckedSpec {
    /// Parses and checks.
    ///
    /// # Errors
    /// The first thing that is wrong or not supported, named by its field.
    pub fn check(bytes: &[u8], host: &HostFacts) -> Result<Self> {
        let config::ParsedSpec {
            mut spec,
            mut warnings,
        } = config::parse(bytes)
            .map_err(|error| Error::new(Kind::Invalid, "", "").source(error))?;
        // As with runc: a version says little of what a config holds, and none is refused.
        if spec.version().is_empty() {
            spec.set_version(crate::cli::SPEC_VERSION.to_owned());
        }
        let namespaces = checks::all(&spec, host)?;
        warnings.extend(linux::warnings(&spec, &namespaces));
        Ok(Self {
            spec,
            namespaces,
            warnings,
        })
    }

    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    pub fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    /// The path under /proc/sys of a sysctl of this spec.
    ///
    /// # Errors
    /// It is not the container's to set.
    pub fn sysctl_path(&self, name: &str, value: &str) -> Result<String> {
        sysctl::check(name, value, self.namespaces.owned)
    }
}

/// Checks the process of an `exec` against the same rules.
///
/// # Errors
/// As for [`CheckedSpec::check`].
pub fn check_process(process: &Process, host: &HostFacts) -> Result<()> {
    checks::process(process, host)
}
