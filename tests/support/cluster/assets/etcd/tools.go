//go:build tools

// Package tools keeps the commands that are built here in go.mod.
package tools

import _ "go.etcd.io/etcd/server/v3"
