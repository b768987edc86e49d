//! The one integration test binary: what needs more than one module, or a real part.

mod architecture;
mod cluster;
mod documents;
mod kube_server;
mod libvirt;
mod publish_node;
mod support;
