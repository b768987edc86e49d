//! The local API on its socket: every route, and every client error.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::{getegid, geteuid, getgroups};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use virtnode::daemon::Metrics;
use virtnode::daemon::api::{self, Access, OPENAPI, ROUTES};
use virtnode::domain::DomainState;
use virtnode::hotplug::{HotplugRequest, Require, Verdict};
use virtnode::monitor::{DomainFigures, MemoryFigures, VcpuFigures};
use virtnode::operation::{AskedBy, Order};
use virtnode::units::Bytes;

use crate::support::operations::{InMemory, now};

/// The API on a private socket.
struct Served {
    directory: TempDir,
    operations: Arc<InMemory>,
    metrics: Arc<Metrics>,
    task: JoinHandle<()>,
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {:?}", self.body))
    }

    /// Returns the code of an error, which must have a message.
    fn code(&self) -> String {
        let json = self.json();
        assert!(json["message"].as_str().unwrap().len() > 10, "{json}");
        json["code"].as_str().unwrap().to_owned()
    }
}

impl Served {
    fn start() -> Self {
        Self::to(Access::new(None, Vec::new()), true)
    }

    fn to(access: Access, hotplug: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let operations = Arc::new(InMemory::default());
        let metrics = Arc::new(Metrics::new());
        let operations_enabled = hotplug.then(|| Arc::clone(&operations));
        let router = api::router(
            operations_enabled,
            Arc::clone(&metrics.inventory),
            hotplug.then(|| Arc::clone(&metrics.external.log)),
            access,
        );
        let socket = api::bind(&directory.path().join("api.sock"), None).unwrap();
        let served = api::serve(socket, router);
        Self {
            directory,
            operations,
            metrics,
            task: tokio::spawn(served),
        }
    }

    async fn connect(&self) -> UnixStream {
        let path = self.directory.path().join("api.sock");
        UnixStream::connect(path).await.unwrap()
    }

    async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, "").await
    }

    async fn post(&self, path: &str, body: impl ToString) -> Answer {
        self.send("POST", path, &body.to_string()).await
    }

    async fn send(&self, method: &str, path: &str, body: &str) -> Answer {
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        );
        let mut stream = self.connect().await;
        stream.write_all(head.as_bytes()).await.unwrap();
        // A server that rejects early closes before it has read the whole body.
        stream.write_all(body.as_bytes()).await.ok();
        read(stream).await
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read(mut stream: UnixStream) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.ok();
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    // A body without a length is chunked: keep the lines that are JSON.
    let body = if head.to_lowercase().contains("transfer-encoding: chunked") {
        let lines = body.lines().filter(|line| line.starts_with('{'));
        lines.map(|line| format!("{line}\n")).collect()
    } else {
        body.to_owned()
    };
    Answer {
        status: status.unwrap_or(0),
        head: head.to_owned(),
        body,
    }
}

fn figures(name: &str) -> DomainFigures {
    DomainFigures {
        connection: virtnode::domain::ConnectionId::Host,
        name: name.to_owned(),
        namespace: None,
        virtual_machine_instance: None,
        uuid: None,
        state: DomainState::Running,
        vcpus: VcpuFigures {
            maximum: 4,
            plugged: 2,
            online: Some(1),
        },
        memory: MemoryFigures {
            maximum: Bytes::new(4 << 30),
            requested: Bytes::new(1 << 30),
            plugged: Bytes::new(1 << 30),
            guest_total: None,
        },
        as_of: now(),
    }
}

#[tokio::test]
async fn submitted_fields_reach_the_executor() {
    let served = Served::start();
    let body = json!({
        "count": 4, "online": true, "require": "acknowledged", "persistent": true, "timeoutSeconds": 90,
        "idempotencyKey": "k1",
    });
    let answer = served.post("/v1/domains/vm1/vcpus", &body).await;
    assert_eq!(answer.status, 202, "{}", answer.body);
    let record = answer.json();
    let id = record["id"].as_str().unwrap();
    assert!(
        answer
            .head
            .contains(&format!("location: /v1/operations/{id}")),
        "{}",
        answer.head
    );
    assert_eq!(record["domain"]["name"], "vm1");
    assert_eq!(record["state"], "running");
    assert_eq!(record["awaiting"]["what"], "the guest");
    let order = Order {
        domain: "vm1".parse().unwrap(),
        request: HotplugRequest::Vcpus {
            count: 4,
            online: true,
        },
        require: Require::Acknowledged,
        persistent: true,
        timeout: Duration::from_secs(90),
        idempotency_key: Some("k1".to_owned()),
        asked_by: AskedBy::Local {
            uid: geteuid().as_raw(),
        },
    };
    assert_eq!(served.operations.orders(), [order]);

    let answer = served
        .post("/v1/domains/vm1/memory", json!({"size": "1536Mi"}))
        .await;
    assert_eq!(answer.status, 202, "{}", answer.body);
    let order = &served.operations.orders()[1];
    let size = Bytes::from_mib(1536).unwrap();
    assert_eq!(order.request, HotplugRequest::Memory { size, force: false });
    assert_eq!(order.require, Require::Online);
    assert_eq!(order.timeout, Duration::from_secs(60));
}

#[tokio::test]
async fn same_idempotency_key_yields_the_same_operation() {
    let served = Served::start();
    let body = json!({"count": 2, "idempotencyKey": "once"});
    let first = served.post("/v1/domains/vm1/vcpus", &body).await.json();
    let second = served.post("/v1/domains/vm1/vcpus", &body).await.json();
    assert_eq!(first["id"], second["id"]);
    assert_eq!(served.operations.orders().len(), 1);
    let other = json!({"count": 3, "idempotencyKey": "once"});
    let answer = served.post("/v1/domains/vm1/vcpus", &other).await;
    assert_eq!((answer.status, answer.code().as_str()), (409, "key-reused"));
}

#[tokio::test]
async fn operations_are_listed_returned_and_streamed() {
    let served = Served::start();
    let record = served
        .post("/v1/domains/vm1/vcpus", json!({"count": 2}))
        .await
        .json();
    let list = served.get("/v1/operations").await;
    assert_eq!(list.json()["operations"], json!([record]));
    let path = format!("/v1/operations/{}", record["id"].as_str().unwrap());
    let one = served.get(&path).await;
    assert_eq!((one.status, one.json()), (200, record.clone()));

    let mut stream = served.connect().await;
    let request = format!("GET {path}/progress HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("the guest") {
        assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
    }
    served
        .operations
        .change(|record| assert!(record.awaits("vCPU 1 to come online", now())));
    while !String::from_utf8_lossy(&seen).contains("vCPU 1") {
        assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
    }
    served
        .operations
        .change(|record| record.end(Verdict::GuestSilent, "no sign", now()));
    let rest = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut seen));
    rest.await.unwrap().unwrap();
    let text = String::from_utf8(seen).unwrap();
    let last = text.lines().rfind(|line| line.starts_with('{')).unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(
        (&last["state"], &last["verdict"]),
        (&json!("done"), &json!("GuestSilent"))
    );

    // The progress of a finished operation is one line.
    let after = served.get(&format!("{path}/progress")).await;
    assert_eq!(after.json(), last);
    for unknown in [
        "/v1/operations/x",
        "/v1/operations/00000000000000000000/progress",
    ] {
        let answer = served.get(unknown).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (404, "operation-not-found")
        );
    }
}

#[tokio::test]
async fn domains_with_unusual_names_are_listed_and_addressed() {
    let served = Served::start();
    assert_eq!(
        served.get("/v1/domains").await.json(),
        json!({"domains": []})
    );
    let odd = "a/b \"c\" ü";
    let inventory = &served.metrics.inventory;
    inventory.replace(vec![figures("vm1"), figures(odd)]);
    let list = served.get("/v1/domains").await.json();
    assert_eq!(list["domains"].as_array().unwrap().len(), 2);
    let path = "/v1/domains/a%2Fb%20%22c%22%20%C3%BC";
    let domain = served.get(path).await;
    assert_eq!(domain.status, 200, "{}", domain.body);
    assert_eq!(domain.json()["name"], odd);
    assert_eq!(domain.json()["memory"]["maximum"], "4GiB");
    assert_eq!(domain.json()["vcpus"]["online"], 1);
    let answer = served
        .post(&format!("{path}/vcpus"), json!({"count": 2}))
        .await;
    assert_eq!(answer.status, 202, "{}", answer.body);
    assert_eq!(served.operations.orders()[0].domain.as_str(), odd);

    let unknown = served.get("/v1/domains/vm2").await;
    assert_eq!(
        (unknown.status, unknown.code().as_str()),
        (404, "domain-not-found")
    );
}

#[tokio::test]
async fn immediate_verdict_is_answered_without_waiting() {
    let served = Served::start();
    let nobody = served
        .post("/v1/domains/nobody/vcpus", json!({"count": 2}))
        .await;
    assert_eq!(
        (nobody.status, nobody.code().as_str()),
        (404, "domain-not-found")
    );
    let done = served
        .post("/v1/domains/done/vcpus", json!({"count": 8}))
        .await;
    assert_eq!(
        (done.status, &done.json()["verdict"]),
        (200, &json!("Infeasible"))
    );
    let full = served
        .post("/v1/domains/full/vcpus", json!({"count": 8}))
        .await;
    assert_eq!((full.status, full.code().as_str()), (429, "too-many"));
}

#[tokio::test]
async fn invalid_input_is_rejected_with_message() {
    let served = Served::start();
    for (path, body, says) in [
        ("vcpus", "", "empty"),
        ("vcpus", "{", "EOF"),
        ("vcpus", "[]", "invalid"),
        ("vcpus", " [4]", "an array"),
        ("vcpus", r#"{"count": 2, "idempotencyKey": null}"#, "null"),
        ("vcpus", r#"{"count": 2, "timeoutSeconds": null}"#, "null"),
        ("memory", r#"["2GiB"]"#, "an array"),
        ("vcpus", "{}", "count"),
        ("vcpus", r#"{"count": -1}"#, "-1"),
        ("vcpus", r#"{"count": 2.5}"#, "2.5"),
        ("vcpus", r#"{"count": 4294967296}"#, "4294967296"),
        ("vcpus", r#"{"count": "2"}"#, "string"),
        ("vcpus", r#"{"count": 2, "onlien": true}"#, "onlien"),
        (
            "vcpus",
            r#"{"count": 2, "require": "proof"}"#,
            "level of proof",
        ),
        (
            "vcpus",
            r#"{"count": 2, "timeoutSeconds": 0}"#,
            "from 1 to 3600",
        ),
        (
            "vcpus",
            r#"{"count": 2, "idempotencyKey": ""}"#,
            "idempotencyKey",
        ),
        ("vcpus", "{\"count\": 2}\u{0}", "trailing"),
        ("memory", r#"{"size": "2 GB"}"#, "binary unit"),
        ("memory", r#"{"size": "-1"}"#, "negative"),
        ("memory", r#"{"size": "1e9Gi"}"#, "not a size"),
        ("memory", r#"{"size": 2147483648}"#, "string"),
        ("memory", r#"{"size": "2Gi", "count": 1}"#, "count"),
    ] {
        let answer = served.post(&format!("/v1/domains/vm1/{path}"), body).await;
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
        answer.code();
        let message = answer.json()["message"].to_string();
        assert!(message.contains(says), "{body}: {message}");
    }
    for (name, code) in [
        ("a%0Ab", "bad-name"),
        ("a%00b", "bad-name"),
        ("%FF", "bad-path"),
        (&"n".repeat(256), "bad-name"),
    ] {
        let path = format!("/v1/domains/{name}/vcpus");
        let answer = served.post(&path, json!({"count": 2})).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (400, code),
            "{name}"
        );
        let answer = served.get(&format!("/v1/domains/{name}")).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (400, code),
            "{name}"
        );
    }
    let large = format!(
        "{{\"count\": 2, \"idempotencyKey\": \"{}\"}}",
        "x".repeat(70_000)
    );
    let answer = served.post("/v1/domains/vm1/vcpus", large).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (413, "body-too-large")
    );
    for path in [
        "/",
        "/v1",
        "/v1/domains/",
        "/v1/domains/a/b",
        "/v1/domains/vm1/disks",
        "/metrics",
    ] {
        let answer = served.get(path).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (404, "no-such-route"),
            "{path}"
        );
    }
    let answer = served.send("DELETE", "/v1/domains", "").await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (405, "method-not-allowed")
    );
    assert_eq!(served.operations.orders(), []);
}

#[tokio::test]
async fn client_without_access_is_rejected_on_every_route() {
    let served = Served::to(Access::new(Some(Vec::new()), Vec::new()), true);
    for (method, path) in ROUTES {
        let path = path.replace("{name}", "vm1").replace("{id}", "x");
        let body = r#"{"count": 2}"#;
        let answer = served.send(&method.to_uppercase(), &path, body).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (403, "not-allowed"),
            "{path}"
        );
        let uid = format!("uid {}", geteuid());
        assert!(answer.body.contains(&uid), "{}", answer.body);
    }
    assert_eq!(served.operations.orders(), []);
}

/// The groups of the process count, even if no user database has them, as in a pod.
#[tokio::test]
async fn supplementary_group_of_the_client_grants_access() {
    // Only root can put a process into a group at will.
    if !geteuid().is_root() {
        let Some(group) = getgroups()
            .unwrap()
            .into_iter()
            .find(|gid| *gid != getegid())
        else {
            return;
        };
        let served = Served::to(Access::new(Some(Vec::new()), vec![group.as_raw()]), true);
        assert_eq!(served.get("/v1/operations").await.status, 200);
        return;
    }
    let served = Served::to(Access::new(Some(Vec::new()), vec![70_001]), true);
    let directory = served.directory.path();
    // Another user must be able to execute the program and to connect.
    let program = directory.join("virtnode");
    std::fs::copy(env!("CARGO_BIN_EXE_virtnode"), &program).unwrap();
    for (path, mode) in [(directory, 0o755), (&directory.join("api.sock"), 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    for (groups, code) in [("70001", 0), ("70000,70001", 0), ("70000", 1)] {
        let mut command = std::process::Command::new("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--groups", groups])
            .arg(&program)
            .arg("--socket")
            .arg(directory.join("api.sock"))
            .arg("operations");
        let output = tokio::task::spawn_blocking(move || command.output().unwrap());
        let output = output.await.unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{groups}: {err}");
        assert_eq!(err.contains("uid 65534 may not use"), code == 1, "{err}");
    }
}

#[tokio::test]
async fn disabled_hotplug_rejects_changes_and_lists_domains() {
    let served = Served::to(Access::new(None, Vec::new()), false);
    let answer = served
        .post("/v1/domains/vm1/vcpus", json!({"count": 2}))
        .await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (403, "hotplug-disabled")
    );
    assert_eq!(served.get("/v1/domains").await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn slow_clients_are_disconnected_and_delay_no_other() {
    let served = Served::start();
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(served.connect().await);
    }
    let mut slow_head = served.connect().await;
    slow_head
        .write_all(b"GET /v1/domains HTTP/1.1\r\nHos")
        .await
        .unwrap();
    let mut slow_body = served.connect().await;
    let head = "POST /v1/domains/vm1/vcpus HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 12\r\n\r\n{";
    slow_body.write_all(head.as_bytes()).await.unwrap();

    assert_eq!(served.get("/v1/domains").await.status, 200);
    for mut stream in silent {
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    }
    assert_ne!(read(slow_head).await.status, 200);
    let answer = read(slow_body).await;
    assert_eq!((answer.status, answer.code().as_str()), (408, "timeout"));
    assert_eq!(served.operations.orders(), []);
}

#[tokio::test]
async fn every_route_is_described_and_served() {
    let description: Value = serde_json::from_str(OPENAPI).unwrap();
    let paths = description["paths"].as_object().unwrap();
    let described: usize = paths
        .values()
        .map(|path| path.as_object().unwrap().len())
        .sum();
    assert_eq!(described, ROUTES.len());
    let served = Served::start();
    for (method, path) in ROUTES {
        assert!(paths[path].get(method).is_some(), "{method} {path}");
        let path = path.replace("{name}", "vm1").replace("{id}", "x");
        let answer = served.send(&method.to_uppercase(), &path, "").await;
        assert!(!answer.body.contains("no-such-route"), "{path}");
        assert_ne!(answer.status, 405, "{path}");
    }
    assert_eq!(served.get("/openapi.json").await.body, OPENAPI);
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    assert_eq!(std::fs::read_to_string(committed).unwrap(), OPENAPI);
}

/// Compares a value with its schema: every field is described, every required one exists.
fn check(description: &Value, schema: &Value, value: &Value, place: &str) {
    let reference = |schema: &Value| schema["$ref"].as_str().map(str::to_owned);
    let target = reference(schema).or_else(|| reference(&schema["allOf"][0]));
    if let Some(target) = target {
        let pointer = target.trim_start_matches('#');
        let schema = description.pointer(pointer).unwrap();
        return check(description, schema, value, place);
    }
    if let Some(words) = schema["enum"].as_array() {
        assert!(words.contains(value), "{place}: {value}");
    }
    match value {
        Value::Array(items) => {
            for item in items {
                check(description, &schema["items"], item, place);
            }
        }
        Value::Object(fields) if schema.get("properties").is_some() => {
            for (name, value) in fields {
                let field = &schema["properties"][name];
                let place = format!("{place}.{name}");
                assert!(field["description"].is_string(), "{place} is not described");
                check(description, field, value, &place);
            }
            for required in schema["required"].as_array().into_iter().flatten() {
                assert!(
                    fields.contains_key(required.as_str().unwrap()),
                    "{place}: {required}"
                );
            }
        }
        _ => {}
    }
}

#[tokio::test]
async fn description_has_every_field_of_operation_and_domain() {
    let description: Value = serde_json::from_str(OPENAPI).unwrap();
    let schemas = &description["components"]["schemas"];
    let served = Served::start();
    served
        .post(
            "/v1/domains/vm1/vcpus",
            json!({"count": 2, "persistent": true}),
        )
        .await;
    let running = served.get("/v1/operations").await.json();
    check(&description, &schemas["Operations"], &running, "running");

    let whole = json!({
        "verdict": "GuestRefused",
        "message": "m",
        "before": {"vcpus": 1, "online": 1},
        "requested": {"vcpus": 2},
        "after": {"vcpus": 2, "online": 1},
        "evidence": [{"source": "acpi-ost", "detail": "d", "time": "2026-11-21T11:22:46Z"}],
        "hypervisorError": "e",
        "diagnosis": {"code": "c", "seen": "s", "remedy": "r"},
    });
    let outcome = serde_json::from_value(whole).unwrap();
    served.operations.change(|record| {
        record.started = Some(now());
        record.domain.uuid = Some("u".to_owned());
        record.conclude(outcome, now());
        record.corrected = Some(now());
    });
    let done = served.get("/v1/operations").await.json();
    check(&description, &schemas["Operations"], &done, "done");
    let shown = done["operations"][0].as_object().unwrap().len();
    let known = schemas["Operation"]["properties"].as_object().unwrap();
    // All but the awaited event, which a finished operation does not have.
    assert_eq!(shown, known.len() - 1);

    served.metrics.inventory.replace(vec![figures("vm1")]);
    let domains = served.get("/v1/domains").await.json();
    check(&description, &schemas["Domains"], &domains, "domains");
    let words = schemas["Verdict"]["enum"].as_array().unwrap();
    assert_eq!(*words, Verdict::ALL.map(|verdict| json!(verdict)));
}
