//! The chart, installed by helm as users do: its objects, pods and rights.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use k8s_openapi::api::{
    apps::v1::Deployment,
    authorization::v1::{SelfSubjectRulesReview, SelfSubjectRulesReviewSpec},
    core::v1::ConfigMap,
};
use kube::{ResourceExt as _, api::PostParams};
use serde_json::{Value, json};

use crate::{
    api,
    chart::{self, CHART},
    client,
    model::{self, ModelDeployment},
    routes::ANTEROOM_API_VERSION,
    scenario::Scenario,
    shell::Shell,
    wait,
};

const SCALED_OBJECT_API_VERSION: &str = "keda.sh/v1alpha1";

/// Release of the chart, named anteroom.
struct Release {
    shell: Shell,
    namespace: String,
    /// Values of all its versions.
    values: Vec<String>,
}

pub(super) async fn each_profile_installs_paused_and_uninstalls(it: Scenario) {
    it.deploy(&ModelDeployment::new("tiny")).await;
    // The strictest pod security standard; it does not affect the model, which has no pods.
    let label = format!("label namespace {} pod-security.kubernetes.io/enforce=restricted", it.namespace);
    it.shell().kubectl(&label).await.stdout_of_success();
    let mut release = Release::new(&it, &["nodeSelector.pool=nowhere"]);
    release.set_json("models", &json!([{ "name": "tiny", "service": { "name": "tiny", "port": 80 } }]));
    for (profile, floor) in [("cost", 0), ("dev", 1), ("ha", 2)] {
        let profile = format!("profile={profile}");
        release.helm("install", &[&profile]).await;
        release.assert_objects_exist().await;
        it.wait_for_pods("two pods", |pods| (pods.len() == 2).then_some(())).await;
        let scaled =
            it.wait_for_condition(SCALED_OBJECT_API_VERSION, "ScaledObject", "tiny", "Paused", "True").await;
        assert_eq!(scaled["status"], "True");
        let scaled = it.dynamic(SCALED_OBJECT_API_VERSION, "ScaledObject").get("tiny").await.unwrap();
        assert_eq!(scaled.data["spec"]["minReplicaCount"], floor);
        assert_eq!(scaled.annotations()["autoscaling.keda.sh/paused"], "true");
        it.await_spec_replicas("tiny", 0, wait::WAIT_LIMIT).await;
        let config = it.api::<ConfigMap>().get("anteroom").await.unwrap();
        release.assert_config_accepted(&it, &config).await;

        // Nothing may be left, so that the next profile can be installed.
        release.helm("uninstall", &[]).await;
        for kind in
            ["modelroute", "scaledobject", "role", "rolebinding", "service/anteroom", "configmap/anteroom"]
        {
            let left = release
                .shell
                .kubectl(&format!("get {kind} --ignore-not-found -o name"))
                .await
                .stdout_of_success();
            assert_eq!(left, "", "{profile}");
        }
    }
    // Users' routes outlive a release.
    release.shell.kubectl("get crd modelroutes.anteroom.dev").await.stdout_of_success();
}

pub(super) async fn every_chart_object_is_accepted(it: Scenario) {
    let [mut values, models] = ["everything", "models"].map(|name| {
        let file = Path::new(CHART).join(format!("ci/{name}-values.yaml"));
        api::objects_in(&file).remove(0)
    });
    model::merge(&mut values, &models);
    for model in values["models"].as_array_mut().unwrap() {
        model["namespace"] = it.namespace.clone().into();
    }
    values["kubernetes"]["namespaces"] = json!([it.namespace]);
    values["kubernetes"]["interceptorRoutes"] = json!(true);
    values["grafanaDashboard"]["namespace"] = it.namespace.clone().into();
    values["nodeSelector"]["pool"] = json!("nowhere");
    // There is no Prometheus operator here, which defines these kinds.
    for monitor in ["serviceMonitor", "modelServers", "prometheusRule"] {
        values["monitoring"][monitor]["enabled"] = json!("auto");
    }
    let file = it.world.plane.folders.run.join(format!("{}.values.json", it.namespace));
    std::fs::write(&file, values.to_string()).unwrap();
    let mut release = Release::new(&it, &[]);
    release.values = vec![format!("file:{}", file.display())];
    let said = release.helm("install", &[]).await;
    let left_out = "monitoring.modelServers, monitoring.prometheusRule, monitoring.serviceMonitor";
    assert!(said.contains(left_out), "{said}");
    assert!(said.contains("KEDA reads Prometheus at https://prometheus.example.com"), "{said}");
    release.assert_objects_exist().await;
    let made = release
        .shell
        .kubectl("get modelroutes,scaledobjects,triggerauthentications -o name")
        .await
        .stdout_of_success();
    assert_eq!(made.lines().count(), 5 + 3 + 3, "{made}");
    let config = it.api::<ConfigMap>().get("waiting-room").await.unwrap();
    release.assert_config_accepted(&it, &config).await;
    release.helm("uninstall", &[]).await;
}

pub(super) async fn namespaced_release_serves_its_namespace(it: Scenario) {
    let mut release = Release::new(&it, &[]);
    release.values.push(format!("kubernetes.namespaces={{{}}}", it.namespace));
    release.serves(&it).await;
    let left = release.shell.kubectl("get clusterrole -o name").await.stdout_of_success();
    assert!(!left.contains(&it.namespace), "a Role is enough: {left}");
}

pub(super) async fn cluster_release_serves_other_namespaces(it: Scenario) {
    let models = it.second_namespace("models").await;
    Release::new(&it, &[]).serves(&models).await;
    let _ = it.shell().kubectl(&format!("delete namespace {} --wait=false", models.namespace)).await;
}

pub(super) async fn rights_are_sufficient_and_minimal(it: Scenario) {
    let read = "get list watch";
    let mut expected = BTreeMap::from([
        ("modelroutes.anteroom.dev", read),
        ("modelroutes/status.anteroom.dev", "patch"),
        ("interceptorroutes.http.keda.sh", read),
        ("interceptorroutes/status.http.keda.sh", "patch"),
        ("services", read),
        ("pods", read),
        ("endpointslices.discovery.k8s.io", read),
        ("inferencepools.inference.networking.k8s.io", read),
        ("deployments.apps", read),
        ("statefulsets.apps", read),
        ("replicasets.apps", read),
        ("events", "list watch"),
        ("events.events.k8s.io", "create list patch watch"),
        ("scaledobjects.keda.sh", "get list patch watch"),
    ]);
    for object in chart::rights(&it.world, &it.namespace, &[]).await {
        it.apply(&object).await;
    }
    it.await_exact_rights("anteroom", &expected).await;
    for (verb, what) in [
        ("get", "secrets"),
        ("create", "pods"),
        ("delete", "pods"),
        ("create", "pods/exec"),
        ("patch", "pods/status"),
        ("patch", "deployments"),
        ("patch", "deployments/scale"),
        ("update", "scaledobjects"),
        ("delete", "modelroutes"),
        ("create", "serviceaccounts/token"),
        ("bind", "roles"),
    ] {
        let asked = format!("auth can-i {verb} {what}");
        let said = it.shell_of("anteroom").await.kubectl(&asked).await;
        assert_eq!((said.success, said.out.trim()), (false, "no"), "{asked}");
    }
    let elsewhere = it.shell_of("anteroom").await.kubectl("auth can-i list modelroutes -n default").await;
    assert_eq!(elsewhere.out.trim(), "no");

    for object in chart::rights(&it.world, &it.namespace, &["kubernetes.responseBodies=true"]).await {
        it.apply(&object).await;
    }
    expected.insert("configmaps", "list watch");
    it.await_exact_rights("anteroom", &expected).await;

    let values =
        ["directScaling.enabled=true", "kubernetes.interceptorRoutes=false", "sessions.enabled=false"];
    for object in chart::rights(&it.world, &it.namespace, &values).await {
        it.apply(&object).await;
    }
    expected.retain(|what, _| !what.ends_with("http.keda.sh") && *what != "configmaps");
    expected.extend([
        ("scaledobjects.keda.sh", read),
        ("deployments/scale.apps", "get patch"),
        ("statefulsets/scale.apps", "get patch"),
        ("horizontalpodautoscalers.autoscaling", "list"),
    ]);
    it.await_exact_rights("anteroom", &expected).await;
}

// === impl Release ===

impl Release {
    fn new(it: &Scenario, values: &[&str]) -> Self {
        let all = [
            // Image for which the node's agent runs Anteroom.
            "image.repository=anteroom",
            "replicas=2",
            "drain.preStopSeconds=0",
            "drain.delaySeconds=0",
            "drain.timeoutSeconds=5",
            "minReadySeconds=0",
            // There is no Prometheus here, and a failing trigger keeps models up.
            "keda.prometheus.enabled=false",
            "keda.pollingInterval=1",
            "keda.cooldownPeriod=3",
        ];
        let values = all.iter().chain(values).map(|&value| value.to_owned()).collect();
        Self { shell: it.shell(), namespace: it.namespace.clone(), values }
    }

    fn set_json(&mut self, name: &str, value: &Value) {
        // The prefix distinguishes this value from those for `--set`.
        self.values.push(format!("json:{name}={value}"));
    }

    async fn helm(&self, verb: &str, more: &[&str]) -> String {
        let mut arguments = vec![verb, "anteroom"];
        if verb == "uninstall" {
            arguments.push("--wait");
        } else {
            arguments.push(CHART);
            for value in self.values.iter().map(String::as_str).chain(more.iter().copied()) {
                let (flag, value) = match value.split_once(':') {
                    Some(("json", value)) => ("--set-json", value),
                    Some(("file", value)) => ("--values", value),
                    _ => ("--set", value),
                };
                arguments.extend([flag, value]);
            }
        }
        let said = self.shell.helm(arguments).await;
        let told = said.err.clone();
        said.stdout_of_success() + &told
    }

    /// Installs, upgrades and uninstalls a release with a model in the namespace of `models`.
    async fn serves(&mut self, models: &Scenario) {
        let mut model = ModelDeployment::new("tiny").sim("--load-time 300ms");
        model.probe_period = 1;
        models.deploy(&model).await;
        let model = json!([{
            "name": "tiny",
            "namespace": models.namespace,
            "service": { "name": "tiny", "port": 80 },
            "route": { "scaling": { "linger": "2s" } },
        }]);
        self.set_json("models", &model);
        let said = self.helm("install", &["profile=cost"]).await;
        assert!(said.contains("ScaledObjects come paused"), "{said}");
        self.rolled_out().await;
        models.await_route_condition("tiny", "Accepted", "Accepted").await;
        models.wait_for_condition(SCALED_OBJECT_API_VERSION, "ScaledObject", "tiny", "Paused", "True").await;

        let resume = "annotate scaledobject tiny autoscaling.keda.sh/paused-";
        self.shell.kubectl(&format!("{resume} -n {}", models.namespace)).await.stdout_of_success();
        models.wait_for_condition(SCALED_OBJECT_API_VERSION, "ScaledObject", "tiny", "Ready", "True").await;
        models.wait_for_condition(SCALED_OBJECT_API_VERSION, "ScaledObject", "tiny", "Paused", "False").await;
        self.request_through_service().await;
        models.await_spec_replicas("tiny", 1, wait::WAIT_LIMIT).await;

        // Another version: a setting that is only read at the start makes every replica restart.
        let said = self.helm("upgrade", &["profile=dev", "peers.timeout=5s"]).await;
        assert!(said.contains("has been upgraded"), "{said}");
        self.rolled_out().await;
        let scaled = models.dynamic(SCALED_OBJECT_API_VERSION, "ScaledObject").get("tiny").await.unwrap();
        assert_eq!(scaled.data["spec"]["minReplicaCount"], 1);
        assert_eq!(scaled.annotations()["autoscaling.keda.sh/paused"], "true", "as the page on KEDA says");
        self.request_through_service().await;

        self.helm("uninstall", &[]).await;
        for kind in [(ANTEROOM_API_VERSION, "ModelRoute"), (SCALED_OBJECT_API_VERSION, "ScaledObject")] {
            wait::object(&models.dynamic(kind.0, kind.1), "tiny", "gone", wait::WAIT_LIMIT, |object| {
                object.is_none().then_some(())
            })
            .await;
        }
        wait::until("no pods of the release", wait::WAIT_LIMIT, async || {
            let selector = "get pods -l app.kubernetes.io/name=anteroom -o name";
            let pods = self.shell.kubectl(selector).await.stdout_of_success();
            if pods.is_empty() { Ok(()) } else { Err(pods) }
        })
        .await;
        // The model does not belong to the release.
        models.api::<Deployment>().get("tiny").await.unwrap();
    }

    /// Asserts that all objects of the release exist.
    async fn assert_objects_exist(&self) {
        let manifest = self.shell.helm(["get", "manifest", "anteroom"]).await.stdout_of_success();
        self.shell.kubectl_with("get -f -", &manifest).await.stdout_of_success();
    }

    /// Asserts that Anteroom accepts the generated configuration.
    async fn assert_config_accepted(&self, it: &Scenario, config: &ConfigMap) {
        let file = it.world.plane.folders.run.join(format!("{}.checked.yaml", it.namespace));
        std::fs::write(&file, &config.data.as_ref().unwrap()["config.yaml"]).unwrap();
        self.shell.anteroom(&format!("check --config {}", file.display())).await.stdout_of_success();
    }

    async fn rolled_out(&self) {
        self.shell.kubectl("rollout status deployment/anteroom --timeout=50s").await.stdout_of_success();
    }

    /// Requests the model through the Service of the release.
    async fn request_through_service(&self) {
        let proxies = format!(
            "get endpointslices -n {} -l kubernetes.io/service-name=anteroom -o jsonpath={{..addresses[0]}}",
            self.namespace
        );
        let addresses = self.shell.kubectl(&proxies).await.stdout_of_success();
        assert!(!addresses.is_empty());
        for address in addresses.split_whitespace() {
            let proxy = format!("{address}:8080").parse().unwrap();
            let answer = client::send(proxy, client::completion("models.test", "tiny", false));
            let answer = wait::within("an answer", wait::WAIT_LIMIT, answer).await.unwrap();
            let status = answer.status;
            assert_eq!(status, 200, "{}", answer.text().await.unwrap());
        }
    }
}

// === impl Scenario ===

impl Scenario {
    /// Creates a second namespace for the scenario. The caller must delete it.
    async fn second_namespace(&self, suffix: &str) -> Self {
        Self::new(self.world.clone(), suffix).await
    }

    /// Waits until a service account has exactly these rights in the namespace, besides those of every account.
    async fn await_exact_rights(&self, account: &str, expected: &BTreeMap<&str, &str>) {
        wait::until("the rights of the chart", wait::WAIT_LIMIT, async || {
            let everybodys = self.rights_of("default").await?;
            let mut found = self.rights_of(account).await?;
            found.retain(|what, _| !everybodys.contains_key(what));
            let found: BTreeMap<&str, String> = found
                .iter()
                .map(|(what, verbs)| (what.as_str(), verbs.iter().cloned().collect::<Vec<_>>().join(" ")))
                .collect();
            let same = found.len() == expected.len()
                && expected.iter().all(|(what, verbs)| found.get(what).is_some_and(|found| found == verbs));
            if same { Ok(()) } else { Err(format!("{found:#?}")) }
        })
        .await;
    }

    /// Returns the verbs that a service account may use in the namespace, by resource.
    async fn rights_of(&self, account: &str) -> Result<BTreeMap<String, BTreeSet<String>>, String> {
        let kube = self.as_service_account(account).await;
        let review = SelfSubjectRulesReview {
            spec: SelfSubjectRulesReviewSpec { namespace: Some(self.namespace.clone()) },
            ..SelfSubjectRulesReview::default()
        };
        let answer = kube.all().create(&PostParams::default(), &review).await;
        let status = answer.map_err(|error| error.to_string())?.status.unwrap_or_default();
        let mut found = BTreeMap::<_, BTreeSet<_>>::new();
        for rule in status.resource_rules {
            for group in rule.api_groups.iter().flatten() {
                for resource in rule.resources.iter().flatten() {
                    let what = format!("{resource}.{group}").trim_end_matches('.').to_owned();
                    found.entry(what).or_default().extend(rule.verbs.iter().cloned());
                }
            }
        }
        Ok(found)
    }
}
