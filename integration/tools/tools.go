//go:build tools

// Pins the CRI client and the conformance suite that the tests drive; nothing is built from here
// but those two commands (see .ci/deps).
package tools

import (
	_ "sigs.k8s.io/cri-tools/cmd/crictl"
	_ "sigs.k8s.io/cri-tools/pkg/validate"
)
