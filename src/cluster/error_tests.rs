use super::*;
use crate::publish::metrics::SYNC_FAILURES;

fn error_of(status: serde_json::Value) -> ClusterError {
    let status = serde_json::from_value(status).unwrap();
    let error = ClusterError::from_status("patch", ApiObject::node("node-a"), status);
    assert!(SYNC_FAILURES.contains(&error.code()));
    error
}

#[test]
fn apply_conflict_names_keys_and_owners() {
    let error = error_of(serde_json::json!({
        "code": 409, "reason": "Conflict", "message": "Apply failed with 2 conflicts",
        "details": {"causes": [
            {"reason": "FieldManagerConflict", "field": ".metadata.labels.machine.virtnode.io/pc-q35-10.0",
             "message": "conflict with \"kubectl-label\" using v1 at 2026-01-01T00:00:00Z"},
            {"reason": "FieldManagerConflict", "field": ".metadata.labels.virtnode.io/eim",
             "message": "conflict with \"gitops\""},
            {"reason": "FieldManagerConflict", "field": ".metadata.annotations.x", "message": "odd"},
        ]},
    }));
    let ClusterError::Conflict { conflicts, .. } = error else {
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
    assert_eq!(conflicts, expected.into());
}

#[test]
fn missing_node_yields_not_found_for_409_and_404() {
    let message = "Operation cannot be fulfilled on nodes \"node-a\": uid mismatch: the provided object specified uid x, and no existing object was found";
    let deleted = serde_json::json!({"code": 409, "reason": "Conflict", "message": message});
    assert_eq!(error_of(deleted).code(), "api-node-not-found");
    let missing = serde_json::json!({"code": 404, "reason": "NotFound", "message": "no"});
    assert_eq!(error_of(missing).code(), "api-node-not-found");
}

#[test]
fn policy_denial_with_422_yields_forbidden() {
    let message = "nodes \"node-a\" is forbidden: ValidatingAdmissionPolicy 'virtnode' with binding 'virtnode' denied request: not its own node";
    let denied = serde_json::json!({"code": 422, "reason": "Invalid", "message": message});
    assert_eq!(error_of(denied).code(), "api-forbidden");
}

#[test]
fn forbidden_names_the_missing_right() {
    let message = "nodes \"node-a\" is forbidden: User \"u\" cannot patch resource \"nodes\"";
    let error =
        error_of(serde_json::json!({"code": 403, "reason": "Forbidden", "message": message}));
    assert!(error.needs_people());
    assert!(
        error.to_string().contains("the right `patch` on `nodes`"),
        "{error}"
    );
}

#[test]
fn busy_server_yields_its_retry_after() {
    let busy = serde_json::json!({"code": 429, "reason": "TooManyRequests",
        "message": "Too many requests", "details": {"retryAfterSeconds": 7}});
    let error = error_of(busy);
    let ClusterError::Rejected { retry_after, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(retry_after, Some(Duration::from_secs(7)));
}

#[test]
fn long_message_of_the_api_server_is_cut() {
    let conflicts: Vec<_> = (0..168)
        .map(|number| {
            format!("conflict with \"other\": .metadata.labels.cpu-feature.virtnode.io/{number}")
        })
        .collect();
    let message = format!(
        "Apply failed with 168 conflicts: {}",
        conflicts.join("\n- ")
    );
    assert!(message.len() > 10_000);
    for (code, reason) in [
        (409, "Conflict"),
        (403, "Forbidden"),
        (422, "Invalid"),
        (500, ""),
    ] {
        let status = Status {
            code,
            message: message.clone(),
            reason: reason.to_owned(),
            ..Status::default()
        };
        let error = ClusterError::from_status("patch", ApiObject::node("n1"), status);
        let text = error.to_string();
        assert!(
            text.len() < 1000 && text.contains("168 conflicts"),
            "{text}"
        );
    }
}
