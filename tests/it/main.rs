//! The one integration test binary: what needs more than one module, or a real part.

mod architecture;
mod cli;
mod cluster;
mod daemon;
mod documents;
mod kube_server;
mod labeller;
mod libvirt;
mod publish_node;
mod support;
