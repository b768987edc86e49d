//! The Kubernetes API server: the own Node, its labels, events on it.
