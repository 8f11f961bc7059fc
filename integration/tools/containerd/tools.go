//go:build tools

// The containerd that the shim is tested under, as a module's requirement: its checksum is pinned
// by go.sum, and a build asks the proxy for this version and no list.
package tools

import (
	_ "github.com/containerd/containerd/v2/cmd/containerd"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/v2/cmd/ctr"
)
