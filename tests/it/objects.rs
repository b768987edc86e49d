//! The definitions of the custom resources: as they are printed, and as API servers take them.

use std::fs;
use std::process::Command;

fn printed() -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_virtnode"))
        .env_clear()
        .arg("crd")
        .output()
        .unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_committed_definitions_are_those_of_the_program() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/crds.yaml");
    let committed = fs::read_to_string(path).unwrap();
    assert_eq!(
        committed,
        printed(),
        "run `virtnode crd >manifests/crds.yaml`"
    );
}
