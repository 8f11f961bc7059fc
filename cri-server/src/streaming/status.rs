//! What a session says on its error stream, in the client's version of the protocol.

use serde_json::json;

/// A version of the remote command protocol. Version 2 made all streams be answered before the
/// first is used, which holds here for version 1 too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Protocol {
    V1,
    V2,
    /// Terminals can be resized.
    V3,
    /// The outcome is JSON, with the exit code.
    V4,
}

impl Protocol {
    pub(super) const NAMES: [&'static str; 4] = [
        "v4.channel.k8s.io",
        "v3.channel.k8s.io",
        "v2.channel.k8s.io",
        "channel.k8s.io",
    ];

    pub(super) fn parse(name: &str) -> Option<Self> {
        match name {
            "v4.channel.k8s.io" => Some(Self::V4),
            "v3.channel.k8s.io" => Some(Self::V3),
            "v2.channel.k8s.io" => Some(Self::V2),
            "channel.k8s.io" => Some(Self::V1),
            _ => None,
        }
    }

    /// The text for the error stream; empty is success up to version 3.
    pub(super) fn text(self, outcome: &Outcome) -> String {
        match (self, outcome) {
            (Self::V4, outcome) => outcome.json().to_string(),
            (_, Outcome::Success) => String::new(),
            (_, Outcome::Exit(code)) => nonzero(*code),
            (_, Outcome::Failure(message)) => message.clone(),
        }
    }
}

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Success,
    Exit(i32),
    Failure(String),
}

fn nonzero(code: i32) -> String {
    format!("command terminated with non-zero exit code: exit status {code}")
}

impl Outcome {
    /// A Kubernetes `metav1.Status`.
    fn json(&self) -> serde_json::Value {
        match self {
            Self::Success => json!({ "metadata": {}, "status": "Success" }),
            Self::Exit(code) => json!({
                "metadata": {},
                "status": "Failure",
                "message": nonzero(*code),
                "reason": "NonZeroExitCode",
                "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] }
            }),
            Self::Failure(message) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("Internal error occurred: {message}"),
                "reason": "InternalError",
                "details": { "causes": [{ "message": message }] },
                "code": 500
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_read_as_the_protocol_wants() {
        let success = "{\"metadata\":{},\"status\":\"Success\"}";
        assert_eq!(Protocol::V4.text(&Outcome::Success), success);
        let text = Protocol::V4.text(&Outcome::Exit(3));
        let status: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["reason"], "ExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "3");
        let text = Protocol::V4.text(&Outcome::Failure("no such container".into()));
        let status: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(status["code"], 500);
        assert_eq!(
            status["message"],
            "Internal error occurred: no such container"
        );
        for old in [Protocol::V1, Protocol::V2, Protocol::V3] {
            assert_eq!(old.text(&Outcome::Success), "");
            assert!(old.text(&Outcome::Exit(3)).ends_with("exit status 3"));
            assert_eq!(old.text(&Outcome::Failure("x".into())), "x");
        }
    }

    #[test]
    fn every_name_is_a_version() {
        for name in Protocol::NAMES {
            assert!(Protocol::parse(name).is_some());
        }
        assert_eq!(Protocol::parse("v5.channel.k8s.io"), None);
    }
}
