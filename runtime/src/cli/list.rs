//! `list`: the containers of one state root.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::ExitCode;

use coracle_oci::ContainerId;
use coracle_oci::state::StateReport;

use super::GlobalArgs;
use super::state::write_stdout;
use crate::error::{Error, Kind, Result};
use crate::state::{Store, status};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// select one of: table or json
    #[arg(short, long, value_name = "value", default_value = "table")]
    format: String,
    /// display only container IDs
    #[arg(short, long)]
    quiet: bool,
}

/// # Errors
/// The state root cannot be read, or the format is unknown.
pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let reports = reports(global)?;
    if args.quiet {
        let ids = reports.iter().fold(String::new(), |mut text, report| {
            let _ = writeln!(text, "{}", report.id);
            text
        });
        write_stdout(&ids)?;
        return Ok(ExitCode::SUCCESS);
    }
    match args.format.as_str() {
        "table" => write_stdout(&table(&reports))?,
        "json" => write_stdout(&json(&reports)?)?,
        _ => return Err(Error::invalid("invalid format option")),
    }
    Ok(ExitCode::SUCCESS)
}

/// A container that cannot be read is reported and left out.
fn reports(global: &GlobalArgs) -> Result<Vec<StateReport>> {
    let store = Store::open(&global.root);
    let ids = match store.list() {
        // Nobody has used the default root yet.
        Err(error) if error.kind() == Kind::NotFound && is_default(&global.root) => Vec::new(),
        listed => listed?,
    };
    let mut owners = Owners::default();
    let mut reports = Vec::new();
    for id in ids {
        match report(&store, &id, &mut owners) {
            Ok(report) => reports.push(report),
            // For whoever looks; a log would say it again with every list.
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "load container {id}: {error:#}");
            }
        }
    }
    Ok(reports)
}

fn is_default(root: &Path) -> bool {
    let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").unwrap_or_default();
    root == Path::new("/run/coracle") || root == Path::new(&runtime_dir).join("coracle")
}

fn report(store: &Store, id: &ContainerId, owners: &mut Owners) -> Result<StateReport> {
    let entry = store.entry(id)?;
    let mut record = entry.record()?;
    record.owner = owners.of(entry.path());
    let status = status(&record, entry.path())?;
    Ok(StateReport::new(&record, status))
}

fn json(reports: &[StateReport]) -> Result<String> {
    // What Go makes of an empty list, and what callers of runc have learned to read.
    if reports.is_empty() {
        return Ok("null\n".to_owned());
    }
    let mut text = serde_json::to_string(reports)
        .map_err(|error| Error::new(Kind::Internal, "encode", "list").source(error))?;
    text.push('\n');
    Ok(text)
}

/// Columns at least 12 wide with 3 blanks between; the last one ends with its text.
fn table(reports: &[StateReport]) -> String {
    let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let mut rows = vec![head];
    rows.extend(reports.iter().map(|report| {
        [
            report.id.clone(),
            report.pid.to_string(),
            report.status.to_string(),
            report.bundle.clone(),
            report.created.clone(),
            report.owner.clone(),
        ]
    }));
    let widths: [usize; 5] = std::array::from_fn(|column| {
        let longest = rows.iter().map(|row| row[column].chars().count()).max();
        (longest.unwrap_or_default() + 3).max(12)
    });
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(text, "{cell:width$}");
        }
        let _ = writeln!(text, "{}", row[5]);
    }
    text
}

/// Names of the users who own state directories.
#[derive(Default)]
struct Owners {
    passwd: Option<String>,
}

impl Owners {
    fn of(&mut self, dir: &Path) -> String {
        let Ok(metadata) = std::fs::metadata(dir) else {
            return String::new();
        };
        let uid = metadata.uid();
        let passwd = self
            .passwd
            .get_or_insert_with(|| std::fs::read_to_string("/etc/passwd").unwrap_or_default());
        name_of(passwd, uid).map_or_else(|| format!("#{uid}"), str::to_owned)
    }
}

fn name_of(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let found = fields.nth(1)?.parse::<u32>().ok()?;
        (found == uid).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Status;

    fn sample(id: &str, bundle: &str) -> StateReport {
        StateReport {
            oci_version: "1.2.0".into(),
            id: id.into(),
            pid: 42,
            status: Status::Running,
            bundle: bundle.into(),
            rootfs: "/r".into(),
            created: "2026-11-20T09:15:32Z".into(),
            annotations: Default::default(),
            owner: "root".into(),
        }
    }

    #[test]
    fn table_is_runcs() {
        // Printed by runc 1.1.5 for the same container.
        let want = "\
ID          PID         STATUS      BUNDLE       CREATED                OWNER
test_box1   42          running     /tmp/tmp.x   2026-11-20T09:15:32Z   root
";
        assert_eq!(table(&[sample("test_box1", "/tmp/tmp.x")]), want);
        assert_eq!(
            table(&[]),
            "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n"
        );
    }

    #[test]
    fn empty_json_is_null() {
        assert_eq!(json(&[]).unwrap(), "null\n");
        assert!(
            json(&[sample("a", "/b")])
                .unwrap()
                .starts_with("[{\"ociVersion\":")
        );
    }

    #[test]
    fn owner_table() {
        let passwd = "root:x:0:0::/:/bin/sh\nbad\nu:x:1000:1000::/:/bin/sh\n";
        for (uid, name) in [(0, Some("root")), (1000, Some("u")), (7, None)] {
            assert_eq!(name_of(passwd, uid), name);
        }
    }
}
