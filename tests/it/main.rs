//! The one integration test binary: what needs more than one module, or a real part.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod api;
mod architecture;
mod cli;
mod cluster;
mod control;
mod controller;
mod daemon;
mod daemon_on_a_node;
mod doctor;
mod doctor_domains;
mod documents;
mod executor;
mod hotplug_cli;
mod killed;
mod kube_server;
mod lab;
mod labeller;
mod libvirt;
mod manifests;
mod monitoring;
mod objects;
mod publish_node;
mod references;
mod service;
mod support;
mod truth_table;
