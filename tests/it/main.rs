//! The one integration test binary: what needs more than one module, or a real part.

mod libvirt;
mod support;
