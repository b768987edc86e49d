//! The one integration test binary: what needs more than one module, or a real part.

mod architecture;
mod documents;
mod judgement;
mod kube_server;
mod lab;
mod libvirt;
mod support;
