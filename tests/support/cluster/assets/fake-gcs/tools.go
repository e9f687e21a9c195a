//go:build tools

// Package tools keeps the commands that are built here in go.mod.
package tools

import _ "github.com/fsouza/fake-gcs-server"
