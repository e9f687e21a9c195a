//go:build tools

// Package tools keeps the commands that are built here in go.mod.
package tools

import _ "helm.sh/helm/v3/cmd/helm"
