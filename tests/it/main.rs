//! The integration tests, in one binary: tests across modules, and with real libvirt, QEMU and API servers.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot continue should panic"
)]

mod agreement;
mod agreement_devices;
mod api;
mod architecture;
mod check;
mod check_change;
mod check_live;
mod cli;
mod cluster;
mod contract;
mod control;
mod controller;
mod cpu_baseline;
mod cpu_libvirt;
mod daemon;
mod daemon_on_a_node;
mod daemon_trouble;
mod dist;
mod doctor;
mod doctor_domains;
mod documents;
mod events;
mod executor;
mod external_changes;
mod foretold;
mod foretold_devices;
mod hotplug_cli;
mod hotplug_objects;
mod killed;
mod kube_server;
mod kubevirt_node;
mod lab;
mod label_documents;
mod label_source;
mod labeller;
mod launcher_lab;
mod launcher_pods;
mod launchers;
mod libvirt;
mod manifests;
mod monitor;
mod monitoring;
mod names;
mod objects;
mod own_node;
mod publish_node;
mod references;
mod service;
mod sockets;
mod support;
mod targets;
mod targets_live;
mod targets_objects;
mod tenants;
mod truth_table;
mod virtualization;
mod virtualization_cluster;
