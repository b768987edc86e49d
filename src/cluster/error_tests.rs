use super::*;
use crate::telemetry::metrics::SYNC_FAILURES;

fn of(status: serde_json::Value) -> ClusterError {
    let status = serde_json::from_value(status).unwrap();
    let error = ClusterError::from_status("patch", Object::node("node-a"), status);
    assert!(SYNC_FAILURES.contains(&error.code()));
    error
}

#[test]
fn a_refusal_names_keys_and_owners() {
    let error = of(serde_json::json!({
        "code": 409, "reason": "Conflict", "message": "Apply failed with 2 conflicts",
        "details": {"causes": [
            {"reason": "FieldManagerConflict", "field": ".metadata.labels.machine.virtnode.io/pc-q35-10.0",
             "message": "conflict with \"kubectl-label\" using v1 at 2026-01-01T00:00:00Z"},
            {"reason": "FieldManagerConflict", "field": ".metadata.labels.virtnode.io/eim",
             "message": "conflict with \"gitops\""},
            {"reason": "FieldManagerConflict", "field": ".metadata.annotations.x", "message": "odd"},
        ]},
    }));
    let ClusterError::Conflict { refusal, .. } = error else {
        panic!("{error}")
    };
    let owner = |manager: &str, applies| FieldManager {
        manager: manager.into(),
        applies,
    };
    let expected = [
        (
            "machine.virtnode.io/pc-q35-10.0".to_owned(),
            owner("kubectl-label", false),
        ),
        ("virtnode.io/eim".to_owned(), owner("gitops", true)),
    ];
    assert_eq!(refusal, expected.into());
}

#[test]
fn a_node_that_is_not_there_is_not_found_whatever_the_number() {
    let message = "Operation cannot be fulfilled on nodes \"node-a\": uid mismatch: the provided object specified uid x, and no existing object was found";
    let gone = serde_json::json!({"code": 409, "reason": "Conflict", "message": message});
    assert_eq!(of(gone).code(), "api-node-not-found");
    let missing = serde_json::json!({"code": 404, "reason": "NotFound", "message": "no"});
    assert_eq!(of(missing).code(), "api-node-not-found");
}

#[test]
fn a_denial_is_no_bad_request() {
    let message = "nodes \"node-a\" is forbidden: ValidatingAdmissionPolicy 'virtnode' with binding 'virtnode' denied request: not its own node";
    let denied = serde_json::json!({"code": 422, "reason": "Invalid", "message": message});
    assert_eq!(of(denied).code(), "api-forbidden");
}

#[test]
fn the_missing_right_is_named() {
    let message = "nodes \"node-a\" is forbidden: User \"u\" cannot patch resource \"nodes\"";
    let error = of(serde_json::json!({"code": 403, "reason": "Forbidden", "message": message}));
    assert!(error.needs_people());
    assert!(
        error.to_string().contains("the right `patch` on `nodes`"),
        "{error}"
    );
}

#[test]
fn a_busy_server_says_when_to_come_back() {
    let busy = serde_json::json!({"code": 429, "reason": "TooManyRequests",
        "message": "Too many requests", "details": {"retryAfterSeconds": 7}});
    let error = of(busy);
    let ClusterError::Rejected { retry_after, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(retry_after, Some(Duration::from_secs(7)));
}
