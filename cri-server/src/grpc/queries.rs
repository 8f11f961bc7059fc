//! Owns the answers that are lists and conditions: filters over the tables, statistics of many,
//! what the runtime says of itself.

use std::collections::BTreeMap;

use super::runtime::Runtime;
use super::{convert, present};
use crate::container::state::ContainerState;
use crate::daemon::blocking;
use crate::error::Result;
use crate::proto::cri;

impl Runtime {
    pub(super) fn sandboxes(&self, filter: Option<cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
        let filter = filter.unwrap_or_default();
        let mut items: Vec<_> = self
            .0
            .registry
            .sandboxes
            .select(&filter.id)
            .iter()
            .map(|sandbox| present::sandbox(sandbox))
            .filter(|item| filter.state.is_none_or(|wanted| wanted.state == item.state))
            .filter(|item| convert::labels_match(&filter.label_selector, &item.labels))
            .collect();
        items.sort_by_key(|item| std::cmp::Reverse(item.created_at));
        items
    }

    pub(super) fn containers(&self, filter: Option<cri::ContainerFilter>) -> Vec<cri::Container> {
        let filter = filter.unwrap_or_default();
        // A container filter may also give only a prefix of the sandbox's id.
        let sandbox = self.full_sandbox_id(&filter.pod_sandbox_id);
        let mut items: Vec<_> = self
            .0
            .registry
            .containers
            .select(&filter.id)
            .iter()
            .map(|container| present::container(container))
            .filter(|item| filter.state.is_none_or(|wanted| wanted.state == item.state))
            .filter(|item| sandbox.is_empty() || item.pod_sandbox_id == sandbox)
            .filter(|item| convert::labels_match(&filter.label_selector, &item.labels))
            .collect();
        items.sort_by_key(|item| std::cmp::Reverse(item.created_at));
        items
    }

    fn full_sandbox_id(&self, id: &str) -> String {
        match self.sandbox(id) {
            Ok(sandbox) => sandbox.id().to_owned(),
            Err(_) => id.to_owned(),
        }
    }

    pub(super) async fn all_container_stats(
        &self,
        filter: Option<cri::ContainerStatsFilter>,
    ) -> Result<Vec<cri::ContainerStats>> {
        let filter = filter.unwrap_or_default();
        let sandbox = self.full_sandbox_id(&filter.pod_sandbox_id);
        let mut containers = self.0.registry.containers.select(&filter.id);
        containers.retain(|container| {
            (sandbox.is_empty() || container.fixed.sandbox_id.as_str() == sandbox)
                && matches!(container.state(), ContainerState::Running { .. })
                && convert::labels_match(&filter.label_selector, &container.fixed.config.labels)
        });
        let daemon = self.0.clone();
        blocking(move || {
            Ok(containers
                .iter()
                .map(|c| present::container_stats(&daemon, c, &daemon.container_stats(c)))
                .collect())
        })
        .await
    }

    pub(super) async fn all_pod_stats(
        &self,
        filter: Option<cri::PodSandboxStatsFilter>,
    ) -> Result<Vec<cri::PodSandboxStats>> {
        let filter = filter.unwrap_or_default();
        let mut sandboxes = self.0.registry.sandboxes.select(&filter.id);
        sandboxes.retain(|sandbox| {
            present::sandbox_state(sandbox.state()) == cri::PodSandboxState::SandboxReady
                && convert::labels_match(&filter.label_selector, &sandbox.fixed.config.labels)
        });
        let daemon = self.0.clone();
        blocking(move || {
            Ok(sandboxes
                .iter()
                .map(|s| present::pod_stats(&daemon, s, &daemon.pod_stats(s)))
                .collect())
        })
        .await
    }

    pub(super) fn status_conditions(&self) -> Vec<cri::RuntimeCondition> {
        let ready = cri::RuntimeCondition {
            r#type: "RuntimeReady".to_owned(),
            status: true,
            reason: String::new(),
            message: String::new(),
        };
        let network = self.0.network.status();
        let network = cri::RuntimeCondition {
            r#type: "NetworkReady".to_owned(),
            status: network.is_ok(),
            reason: match network {
                Ok(()) => String::new(),
                Err(_) => "NetworkPluginNotReady".to_owned(),
            },
            message: network.err().unwrap_or_default(),
        };
        vec![ready, network]
    }

    pub(super) fn runtime_handlers(&self) -> Vec<cri::RuntimeHandler> {
        let rro = self.0.rro_mounts.get();
        let handler = |name: &String| cri::RuntimeHandler {
            name: name.clone(),
            features: Some(cri::RuntimeHandlerFeatures {
                recursive_read_only_mounts: rro
                    .and_then(|known| known.get(name))
                    .copied()
                    .unwrap_or(false),
                user_namespaces: false,
            }),
        };
        self.0.handlers.keys().map(handler).collect()
    }

    pub(super) fn status_info(&self) -> BTreeMap<String, String> {
        let config = &self.0.config;
        let info = serde_json::json!({
            "rootDir": config.root,
            "stateDir": config.state,
            "defaultRuntime": config.default_runtime,
            "cgroupDriver": "cgroupfs",
            "config": config,
        });
        BTreeMap::from([
            ("config".to_owned(), info.to_string()),
            ("golang".to_owned(), "\"none\"".to_owned()),
        ])
    }
}
