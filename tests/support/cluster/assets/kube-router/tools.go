//go:build tools

// Package tools keeps the commands that are built here in go.mod.
package tools

import _ "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router"
