//go:build tools

// Package server pins the programs of a Kubernetes API server for the tests, with the versions of all
// their modules: Kubernetes itself cannot be built by `go install`, because its go.mod replaces the
// modules of its own repository by directories.
package server

import (
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-scheduler"
	_ "k8s.io/kubernetes/cmd/kubectl"
)
