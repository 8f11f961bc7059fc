//! The built-in network: a bridge, one veth pair per pod, leases, masquerade and host ports.
//!
//! ```text
//!   pod netns            host netns
//!   eth0 <-- veth pair --> vethXXXXXXXXXXX -- coracle0 (10.88.0.1/16) -- routing, nf_tables
//!
//!   attach: journal(pending) -> lease -> veth -> addresses and route -> host ports -> journal(done)
//!   detach: host ports -> veth -> lease -> journal, each fine when already gone
//! ```
//! Talks netlink only; starts no process. Every name follows from the sandbox id, so that any
//! step can be undone knowing nothing but the id. Works in the network namespace of the thread
//! that calls. All calls block for as long as the kernel's rtnl lock is held by others.

mod cable;
mod hostport;
mod ipam;
mod record;
mod setup;

use std::collections::HashSet;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde_json::{Value, json};
use tracing::{info, warn};

use super::config::BridgeConfig;
use super::conntrack;
use super::error::{NetworkError, NetworkErrorKind, Result};
use super::netlink::{Connection, route};
use super::pod::{Attached, Interface, POD_INTERFACE, PodNetwork, Protocol, mac_text};
use super::subnet::Subnet;
use crate::netns::run_in_fd;
use cable::{configure, is_veth_name, mac_for, plug, unplug, veth_name};
use hostport::HostPorts;
use ipam::Leases;
use record::{Journal, Record};
use setup::Ready;

pub(crate) struct Bridge {
    config: BridgeConfig,
    leases: Leases,
    ports: HostPorts,
    journal: Journal,
    ready: Mutex<Option<Arc<Ready>>>,
    /// Held for life: a second daemon on the same state would hand out the same addresses.
    _lock: File,
}

impl Bridge {
    /// Reads the state of the last run. Makes nothing in the kernel unless pods depend on it.
    pub(crate) fn open(config: BridgeConfig, state_dir: &Path) -> Result<Bridge> {
        setup::check(&config)?;
        fs::create_dir_all(state_dir)
            .map_err(|e| NetworkError::io("create directory", state_dir.display(), e))?;
        let lock = lock(state_dir)?;
        let bridge = Bridge {
            config,
            leases: Leases::open(state_dir.join("leases"))?,
            ports: HostPorts::default(),
            journal: Journal::open(state_dir.join("pods"))?,
            ready: Mutex::new(None),
            _lock: lock,
        };
        let mut pods = 0;
        for record in bridge
            .journal
            .ids()
            .iter()
            .filter_map(|id| bridge.journal.load(id))
        {
            pods += 1;
            if let Err(error) = bridge.ports.reserve(&record) {
                warn!(sandbox_id = record.sandbox_id, %error, "host ports of an old pod are lost");
            }
        }
        if pods > 0 {
            match bridge.renew() {
                Ok(_) => info!(pods, "took over the pods of the built-in network"),
                Err(error) => {
                    warn!(pods, %error, "the pods of the built-in network have no bridge")
                }
            }
        }
        Ok(bridge)
    }

    /// Sets the host up at the first need and whenever something has been torn down since.
    fn ready(&self) -> Result<Arc<Ready>> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ready) = &*ready {
            return Ok(Arc::clone(ready));
        }
        let made = Arc::new(setup::ensure(&self.config, &self.leases, &self.ports)?);
        *ready = Some(Arc::clone(&made));
        Ok(made)
    }

    fn peek(&self) -> Option<Arc<Ready>> {
        self.ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// As `ready`, when something of it may be gone: pods that stand are plugged in again.
    fn renew(&self) -> Result<Arc<Ready>> {
        *self.ready.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let ready = self.ready()?;
        let mut conn =
            Connection::route().map_err(|e| NetworkError::kernel("open", "netlink", e))?;
        for id in self.journal.ids() {
            let name = veth_name(&id);
            match conn.apply(&route::plug_in(&name, ready.index)) {
                Err((_, refusal)) if !refusal.is(Errno::NODEV) => {
                    warn!(sandbox_id = id, %refusal, "a pod could not be plugged into the bridge");
                }
                _ => {}
            }
        }
        Ok(ready)
    }

    /// Makes the bridge now instead of with the first pod.
    pub(crate) fn prepare(&self) -> Result<()> {
        self.ready().map(drop)
    }

    pub(crate) fn status(&self) -> std::result::Result<(), String> {
        setup::preflight(&self.config)?;
        match self.peek() {
            // What is gone is made again by the next attach; say so only when that fails.
            Some(ready) if setup::verify(&ready).is_err() => {
                self.renew().map(drop).map_err(|e| e.to_string())
            }
            Some(_) => Ok(()),
            None => setup::preview(&self.config, &self.leases).map_err(|e| e.to_string()),
        }
    }

    pub(crate) fn describe(&self) -> Value {
        let ready = self.peek();
        let subnets: Vec<String> = ready
            .iter()
            .flat_map(|r| r.subnets.iter().map(Subnet::to_string))
            .collect();
        json!({ "name": self.config.name, "up": ready.is_some(), "subnets": subnets })
    }

    /// The connection of a pod is still there.
    pub(crate) fn check(&self, sandbox_id: &str) -> Result<()> {
        match self.journal.load(sandbox_id) {
            Some(record) if !self.stands(&record) => {
                Err(
                    NetworkError::new(NetworkErrorKind::Kernel, "link", veth_name(sandbox_id))
                        .cause(format!("the connection of sandbox {sandbox_id} is gone")),
                )
            }
            _ => Ok(()),
        }
    }

    /// Whether this sandbox has anything here.
    pub(crate) fn knows(&self, sandbox_id: &str) -> bool {
        self.journal.has(sandbox_id) || self.leases.held_by(sandbox_id)
    }

    pub(crate) fn attach(&self, pod: &PodNetwork) -> Result<Attached> {
        if let Some(record) = self.journal.load(&pod.sandbox_id)
            && self.stands(&record)
        {
            return Ok(record.attached);
        }
        if self.knows(&pod.sandbox_id) {
            self.undo(&pod.sandbox_id)?;
        }
        let netns = File::open(&pod.netns)
            .map_err(|e| NetworkError::io("open network namespace", pod.netns.display(), e))?;
        let mut ready = self.ready()?;
        let outcome = match self.connect(pod, &netns, &ready) {
            // The bridge or the table went away under us: make them anew and try once more.
            Err(error)
                if error.kind() == NetworkErrorKind::Kernel && setup::verify(&ready).is_err() =>
            {
                warn!(sandbox_id = pod.sandbox_id, %error, "the pod bridge was torn down; making it again");
                self.undo(&pod.sandbox_id)?;
                ready = self.renew()?;
                self.connect(pod, &netns, &ready)
            }
            outcome => outcome,
        };
        if outcome.is_err()
            && let Err(undo) = self.undo(&pod.sandbox_id)
        {
            warn!(sandbox_id = pod.sandbox_id, error = %undo, "left over of a failed attach");
        }
        outcome
    }

    /// The finished record's veth is still there.
    fn stands(&self, record: &Record) -> bool {
        let found = Connection::route()
            .map_err(Into::into)
            .and_then(|mut conn| route::link_by_name(&mut conn, &veth_name(&record.sandbox_id)));
        matches!(found, Ok(Some(_)))
    }

    fn connect(&self, pod: &PodNetwork, netns: &File, ready: &Ready) -> Result<Attached> {
        let host_ports = pod.host_ports()?;
        let wanted_mac = pod.wanted_mac()?;
        refuse_bandwidth(pod)?;
        let ips = self.lease(pod, ready)?;
        let mac = wanted_mac.unwrap_or_else(|| mac_for(ips[0]));
        let record = Record {
            sandbox_id: pod.sandbox_id.clone(),
            label: format!("{}/{}", pod.pod_namespace, pod.pod_name),
            attached: attached(pod, &ips, mac),
            ports: host_ports,
        };
        self.journal.begin(&record)?;
        self.ports.reserve(&record)?;
        plug(&record, netns, ready, mac, self.config.mtu)?;
        run_in_fd(netns.as_fd(), || configure(&ips, ready))??;
        if self.ports.holds(&pod.sandbox_id) {
            self.ports.publish(&pod.sandbox_id, ready)?;
            forget_udp_flows(&record);
        }
        self.journal.finish(&pod.sandbox_id)?;
        Ok(record.attached)
    }

    /// One address per family: the ones that the pod asks for, else the next free ones.
    fn lease(&self, pod: &PodNetwork, ready: &Ready) -> Result<Vec<IpAddr>> {
        let mut wanted = pod.wanted_ips()?;
        let mut ips = Vec::new();
        for subnet in &ready.subnets {
            let own = wanted
                .iter()
                .position(|ip| ip.is_ipv4() == subnet.is_ipv4());
            ips.push(match own {
                Some(at) => self
                    .leases
                    .claim(subnet, wanted.remove(at), &pod.sandbox_id)?,
                None => self.leases.allocate(subnet, &pod.sandbox_id)?,
            });
        }
        match wanted.first() {
            Some(ip) => Err(NetworkError::invalid(
                "annotation",
                super::pod::ANNOTATION_IPS,
                format!("{ip} is one address more than the bridge has for a pod"),
            )),
            None => Ok(ips),
        }
    }

    pub(crate) fn detach(&self, sandbox_id: &str) -> Result<()> {
        self.undo(sandbox_id)
    }

    /// Every step is tried whatever became of the one before; the record goes last, and only when
    /// nothing is left that needs it.
    fn undo(&self, sandbox_id: &str) -> Result<()> {
        let record = self.journal.load(sandbox_id);
        let mut outcome = Ok(());
        let mut keep = |result: Result<()>| {
            if outcome.is_ok() {
                outcome = result;
            }
        };
        match self.peek() {
            Some(ready) => keep(self.ports.withdraw(sandbox_id, &ready)),
            None => {
                self.ports.forget(sandbox_id);
            }
        }
        keep(unplug(&veth_name(sandbox_id)));
        if let Some(record) = &record {
            forget_udp_flows(record);
        }
        keep(self.leases.release(sandbox_id));
        if outcome.is_ok() {
            outcome = self.journal.remove(sandbox_id);
        }
        outcome
    }

    /// Gives the host back its former state, as long as no pod is connected; false when one is.
    pub(crate) fn teardown(&self) -> Result<bool> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.journal.ids().is_empty() || !self.leases.owners().is_empty() {
            return Ok(false);
        }
        if let Some(made) = ready.take() {
            unplug(&made.bridge)?;
            self.ports.drop_table(&made)?;
            info!(bridge = made.bridge, "removed the pod bridge");
        }
        Ok(true)
    }

    /// Removes what belongs to no sandbox that `keep` accepts.
    pub(crate) fn gc(&self, keep: impl Fn(&str) -> bool) -> Result<()> {
        let mut ids: HashSet<String> = self.journal.ids();
        ids.extend(self.leases.owners());
        let mut outcome = Ok(());
        for id in ids.iter().filter(|id| !keep(id)) {
            match self.undo(id) {
                Ok(()) => info!(
                    sandbox_id = id,
                    "removed the network of a pod that is no more"
                ),
                Err(error) => outcome = Err(error),
            }
        }
        if let Some(ready) = self.peek() {
            sweep(&ready, &ids)?;
        }
        outcome
    }
}

/// Ports of the bridge that no record accounts for (the journal was wiped).
fn sweep(ready: &Ready, known: &HashSet<String>) -> Result<()> {
    let names: HashSet<String> = known.iter().map(|id| veth_name(id)).collect();
    let mut conn = Connection::route().map_err(|e| NetworkError::kernel("open", "netlink", e))?;
    let links = route::links(&mut conn).map_err(|e| NetworkError::kernel("list", "links", e))?;
    for link in links {
        let ours = link.controller == Some(ready.index) && is_veth_name(&link.name);
        if ours && !names.contains(&link.name) {
            info!(
                link = link.name,
                alias = link.alias,
                "removed a stray port of the pod bridge"
            );
            unplug(&link.name)?;
        }
    }
    Ok(())
}

fn lock(state_dir: &Path) -> Result<File> {
    let path = state_dir.join("lock");
    let file = File::create(&path).map_err(|e| NetworkError::io("open", path.display(), e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(NetworkError::new(
            NetworkErrorKind::Conflict,
            "lock",
            path.display().to_string(),
        )
        .cause("another daemon serves this network state")),
        Err(error) => Err(NetworkError::io("lock", path.display(), error)),
    }
}

/// Traffic shaping is asked of CNI's bandwidth plugin; the bridge has none, and says so.
fn refuse_bandwidth(pod: &PodNetwork) -> Result<()> {
    for key in [
        super::pod::ANNOTATION_INGRESS,
        super::pod::ANNOTATION_EGRESS,
    ] {
        if pod.annotations.contains_key(key) {
            let why =
                "the built-in bridge does not shape traffic; use CNI with the bandwidth plugin";
            return Err(NetworkError::invalid("annotation", key, why));
        }
    }
    Ok(())
}

fn attached(pod: &PodNetwork, ips: &[IpAddr], mac: route::Mac) -> Attached {
    let inside = Interface {
        name: POD_INTERFACE.to_owned(),
        mac: mac_text(&mac),
        sandbox: pod.netns.display().to_string(),
    };
    let outside = Interface {
        name: veth_name(&pod.sandbox_id),
        ..Interface::default()
    };
    Attached {
        ips: ips.to_vec(),
        interfaces: vec![inside, outside],
        cni_result: None,
    }
}

/// A client that sends UDP to a host port has a conntrack entry, and its packets never come by
/// the NAT rules again: after a change of the port's pod they would go to the old one.
fn forget_udp_flows(record: &Record) {
    let ports: HashSet<u16> = record
        .ports
        .iter()
        .filter(|mapping| mapping.protocol == Protocol::Udp)
        .map(|mapping| mapping.host_port)
        .collect();
    if !ports.is_empty()
        && let Err(error) = conntrack::forget_udp(&ports)
    {
        warn!(sandbox_id = record.sandbox_id, %error, "stale UDP flows may go to a former pod");
    }
}
