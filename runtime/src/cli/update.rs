//! `update`: other limits for a container that exists.
//!
//! Transactional: when the kernel refuses one of the new values, those that were there are written
//! back (`cgroup::update`) and the record stays as it was. The arguments and the merge of old and new are in `resources`.

use std::io::Read as _;
use std::process::ExitCode;

use coracle_oci::{config, fold, spec};
use serde_json::{Map, Value};

use super::{GlobalArgs, resources};
use crate::cgroup::{self, Manager, PlanOptions};
use crate::error::{Error, Kind, Result};
use crate::log;
use crate::resctrl;
use crate::state::{Container, Request};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// the name of the container
    #[arg(value_name = "container-id")]
    id: String,
    /// path to the file containing the resources to update or '-' to read from the standard input;
    /// all other options are ignored then
    #[arg(short, long, value_name = "value", allow_hyphen_values = true)]
    resources: Option<String>,
    #[command(flatten)]
    flags: resources::Flags,
}

/// # Errors
/// There is no such container, it does not run, a value is malformed, or the kernel refuses one.
pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let container = Container::open(&global.root, &args.id)?;
    let asked = match args.resources.as_deref() {
        None | Some("") => args.flags.parse()?,
        Some(path) => read(path)?,
    };
    let (l3, bandwidth) = args.flags.resctrl_schemas();
    let resctrl = resctrl::Update::check(container.record.resctrl.as_ref(), l3, bandwidth)?;
    let _lock = container.entry.lock()?;
    // Read anew under the lock: another update may have been faster.
    let now = Container::open(&global.root, &args.id)?;
    if now.allows(Request::Update)? {
        apply(&now, asked, global)?;
        resctrl.apply()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn read(path: &str) -> Result<Map<String, Value>> {
    let mut bytes = Vec::new();
    let subject = if path == "-" { "stdin" } else { path };
    let read = match path {
        "-" => std::io::stdin().lock().read_to_end(&mut bytes),
        _ => std::fs::File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)),
    };
    read.map_err(|error| Error::system("open", subject, error))?;
    // Go's decoder takes the first document and leaves the rest.
    let mut documents = serde_json::Deserializer::from_slice(&bytes).into_iter::<Value>();
    let document = documents.next().unwrap_or(Ok(Value::Null));
    let mut document = document
        .map_err(|error| Error::new(Kind::Invalid, "parse resources", subject).source(error))?;
    fold::fold(&mut document);
    match document {
        Value::Object(resources) => Ok(resources),
        _ => Err(Error::new(
            Kind::Invalid,
            "parse resources: not an object:",
            subject,
        )),
    }
}

fn apply(container: &Container, asked: Map<String, Value>, global: &GlobalArgs) -> Result<()> {
    let config_bytes = container.entry.config()?;
    let mut config: Value = serde_json::from_slice(&config_bytes)
        .map_err(|error| Error::system("parse", "config.json of the container", error))?;
    fold::fold(&mut config);
    let old = config
        .pointer("/linux/resources")
        .cloned()
        .unwrap_or(Value::Null);
    let update = resources::merge(&old, asked);

    let options = PlanOptions {
        rootless: container.record.rootless_cgroups,
    };
    let cgroup = container.cgroup();
    let mut manager = cgroup.manager()?;
    let facts = manager.as_mut().map(Manager::facts).transpose()?;
    let resources = parse(&update.to_write)?;
    let new_plan = cgroup::plan_update(
        &container.record.cgroup,
        &resources,
        options,
        facts.as_ref(),
    )?;
    for warning in &new_plan.warnings {
        log::warning(global, warning);
    }
    cgroup.update(&new_plan, manager.as_mut())?;
    if let Some(linux) = config.get_mut("linux").and_then(Value::as_object_mut) {
        linux.insert("resources".into(), update.to_keep);
    }
    let bytes = serde_json::to_vec(&config)
        .map_err(|error| Error::new(Kind::Internal, "encode", "config.json").source(error))?;
    container.entry.save_config(&bytes)
}

fn parse(resources: &Value) -> Result<spec::LinuxResources> {
    let bytes = serde_json::to_vec(resources)
        .map_err(|error| Error::new(Kind::Internal, "encode", "resources").source(error))?;
    config::parse_resources(&bytes)
        .map_err(|error| Error::new(Kind::Invalid, "resources", "").source(error))
}
