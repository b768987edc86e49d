//! The one integration test binary: what needs more than one module, or a real part.

mod cluster;
mod kube_server;
mod libvirt;
mod publish_node;
mod support;
