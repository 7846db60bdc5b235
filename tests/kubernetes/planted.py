"""Faults planted, each of which has to be found by what is there to find it: a check that cannot fail says nothing."""

import os
import shutil
import tempfile

import promises
import queries
import schemas
from manifests import Refused, render
from program import ROOT

OVERLAY = "overlays/production/kustomization.yaml"

# In the files as they are written: what is replaced by what. kubectl has to refuse each, or to warn.
IN_FILES = [
    ("an indentation that slipped", "base/deployment.yaml", "\n      containers:", "\n     containers:"),
    ("a name that stands twice", "base/service.yaml", "\nspec:", "\nspec: {}\nspec:"),
    ("an unknown field of kustomize", "base/kustomization.yaml", "\nresources:", "\nresource: []\nresources:"),
    ("a file that is not there", "base/kustomization.yaml", "- service.yaml", "- services.yaml"),
    ("a patch of nothing", "overlays/production/deployment.yaml", "\n  name: millpond", "\n  name: milpond"),
    ("a spread constraint in another's place", OVERLAY, "/1/topologyKey", "/0/topologyKey"),
    ("what kustomize has deprecated", OVERLAY, "\nimages:", "\nbases: []\nimages:"),
]


def variable(m, name, value):
    next(one for one in m.container["env"] if one["name"] == name)["value"] = value


def without(m, name):
    m.container["env"] = [one for one in m.container["env"] if one["name"] != name]


def probe(m):
    return m.container["livenessProbe"]


def security(m):
    return m.container["securityContext"]


def rolling(m):
    return m.spec("Deployment")["strategy"]["rollingUpdate"]


def endpoint(m):
    return m.spec("PodMonitor")["podMetricsEndpoints"][0]


def rule(m, number):
    return m.spec("NetworkPolicy")["ingress"][number]


def spread(m, number):
    return m.pod["spec"]["topologySpreadConstraints"][number]


def trigger(m, name):
    return m.triggers()[name]["metadata"]


def replace(m, name, old, new):
    metadata = trigger(m, name)
    if old not in metadata["query"]:
        raise Refused(f"{name} has no {old!r} to plant a fault in")
    metadata["query"] = metadata["query"].replace(old, new)


def scale_in(m):
    behavior = m.spec("ScaledObject")["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    return behavior["scaleDown"]["policies"][0]


POND = {"matchLabels": {"app": "pond"}}
SCHEMA = "schemas"
QUERIES = "queries"

# In production as it is rendered: by who has to find it, what it is, and how it is done.
IN_DOCUMENTS = {
    SCHEMA: [
        ("a field that nobody knows", lambda m: m.pod["spec"].update(terminationGraceSeconds=60)),
        ("a probe's field in the container", lambda m: m.container.update(periodSeconds=5)),
        ("a number that is text", lambda m: probe(m).update(periodSeconds="10")),
        ("a constraint without a skew", lambda m: spread(m, 1).pop("maxSkew")),
        ("a kind in no schema", lambda m: m.get("PodDisruptionBudget").update(apiVersion="policy/v1beta1")),
        ("a field of a later Kubernetes", lambda m: m.spec("Service").update(trafficDistribution="PreferClose")),
        ("an unknown field of the monitor", lambda m: m.spec("PodMonitor").update(jobLabels="x")),
        ("a monitor of no port", lambda m: endpoint(m).pop("port")),
        ("an interval without a unit", lambda m: endpoint(m).update(interval="15")),
        ("a threshold that is no text", lambda m: trigger(m, "oldest-age").update(threshold=0.05)),
        ("an unknown field of a trigger", lambda m: trigger(m, "oldest-age").update(metricName="age")),
        ("no address of Prometheus", lambda m: trigger(m, "utilization").pop("serverAddress")),
        ("a policy of an unknown type", lambda m: scale_in(m).update(type="Pod")),
        ("a target without a name", lambda m: m.spec("ScaledObject").update(scaleTargetRef={})),
    ],
    "selectors_select_the_pod": [
        ("a Service of other pods", lambda m: m.spec("Service")["selector"].update(app="pond")),
        ("a budget for all pods", lambda m: m.spec("PodDisruptionBudget")["selector"]["matchLabels"].clear()),
        ("a policy of other pods", lambda m: m.spec("NetworkPolicy").update(podSelector=POND)),
        ("a monitor of other pods", lambda m: m.spec("PodMonitor").update(selector=POND)),
        ("a spread of other pods", lambda m: spread(m, 0).update(labelSelector=POND)),
    ],
    "everything_is_in_one_namespace": [
        ("a document elsewhere", lambda m: m.get("PodMonitor")["metadata"].update(namespace="monitoring")),
    ],
    "ports_are_those_the_program_listens_on": [
        ("the echo on loopback", lambda m: variable(m, "MILLPOND_LISTEN", "127.0.0.1:15000")),
        ("metrics at another port", lambda m: variable(m, "MILLPOND_METRICS", "0.0.0.0:9465")),
    ],
    "ports_are_known_by_name": [
        ("a Service of an unknown port", lambda m: m.spec("Service")["ports"][0].update(targetPort="tcp")),
        ("a probe of an unknown port", lambda m: probe(m)["httpGet"].update(port="http")),
        ("a monitor of an unknown port", lambda m: endpoint(m).update(port="http")),
        ("a policy for an unknown port", lambda m: rule(m, 0)["ports"][0].update(port="tcp")),
    ],
    "the_environment_is_read_by_the_program": [
        ("a variable misspelt", lambda m: m.container["env"].append({"name": "MILLPOND_LAMEDUCK", "value": "1s"})),
    ],
    "no_variable_of_the_cluster_looks_like_a_flag": [
        ("links of the Service", lambda m: m.pod["spec"].pop("enableServiceLinks")),
    ],
    "the_pod_is_given_the_time_to_drain": [
        ("too little grace", lambda m: m.pod["spec"].update(terminationGracePeriodSeconds=85)),
        ("the cluster's own grace", lambda m: m.pod["spec"].pop("terminationGracePeriodSeconds")),
        ("a longer drain", lambda m: variable(m, "MILLPOND_DRAIN_TIMEOUT", "2m")),
        ("no lame duck", lambda m: variable(m, "MILLPOND_LAME_DUCK", "0s")),
    ],
    "probes_ask_what_they_should": [
        ("a probe of a path that is not there", lambda m: probe(m)["httpGet"].update(path="/health")),
        ("liveness that asks for readiness", lambda m: probe(m)["httpGet"].update(path="/readyz")),
        ("liveness without patience", lambda m: probe(m).update(failureThreshold=1)),
    ],
    "nobody_goes_before_another_is_ready": [
        ("a rollout that takes first", lambda m: rolling(m).update(maxUnavailable=1)),
        ("a budget of two", lambda m: m.spec("PodDisruptionBudget").update(maxUnavailable=2)),
        ("one pod alone", lambda m: m.spec("ScaledObject").update(minReplicaCount=1)),
    ],
    "memory_is_enough_for_every_connection": [
        ("more connections than memory", lambda m: variable(m, "MILLPOND_MAX_CONNECTIONS", "12000")),
        ("as many as there are descriptors", lambda m: without(m, "MILLPOND_MAX_CONNECTIONS")),
    ],
    "requests_are_met_and_the_processor_has_no_limit": [
        ("a request over its limit", lambda m: m.container["resources"]["requests"].update(memory="2Gi")),
        ("a limit of the processor", lambda m: m.container["resources"]["limits"].update(cpu="2")),
    ],
    "the_pod_may_do_nothing_but_serve": [
        ("root", lambda m: m.pod["spec"]["securityContext"].update(runAsUser=0)),
        ("a file system to write to", lambda m: security(m).pop("readOnlyRootFilesystem")),
        ("a capability", lambda m: security(m)["capabilities"].update(add=["NET_BIND_SERVICE"])),
        ("a token", lambda m: m.pod["spec"].pop("automountServiceAccountToken")),
    ],
    "metrics_are_for_monitoring_alone": [
        (
            "metrics through the Service",
            lambda m: m.spec("Service")["ports"].append({"name": "metrics", "port": 9464, "targetPort": "metrics"}),
        ),
        ("metrics for the whole cluster", lambda m: rule(m, 1).update({"from": [{"namespaceSelector": {}}]})),
        ("metrics for whoever asks", lambda m: rule(m, 1).pop("from")),
        ("every port for every pod", lambda m: rule(m, 0).pop("ports")),
        ("a way out", lambda m: m.spec("NetworkPolicy").update(egress=[{}])),
    ],
    "pods_are_spread": [
        ("all in one zone", lambda m: m.pod["spec"]["topologySpreadConstraints"].pop(1)),
        ("the version before counted", lambda m: spread(m, 1).pop("matchLabelKeys")),
    ],
    "the_image_is_of_this_version": [
        ("the latest image", lambda m: m.container.update(image="registry.example.com/millpond:latest")),
    ],
    "the_job_is_the_one_the_alerts_know": [
        ("a job of the operator's naming", lambda m: m.spec("PodMonitor").pop("jobLabel")),
        ("a scrape longer than its interval", lambda m: endpoint(m).update(scrapeTimeout="20s")),
        ("a scrape of a path that is not there", lambda m: endpoint(m).update(path="/metric")),
    ],
    "queries_ask_for_what_there_is": [
        ("a metric renamed", lambda m: replace(m, "oldest-age", "oldest_age", "eldest_age")),
        ("a pool renamed", lambda m: replace(m, "utilization", 'pool="echo"', 'pool="echos"')),
        ("pods of another namespace", lambda m: replace(m, "oldest-age", 'e="millpond"', 'e="pond"')),
        ("pods of every namespace", lambda m: replace(m, "utilization", 'namespace="millpond", ', "")),
    ],
    "the_autoscaler_knows_its_target": [
        ("another Deployment to scale", lambda m: m.spec("ScaledObject")["scaleTargetRef"].update(name="pond")),
        ("two who set the number of pods", lambda m: m.spec("Deployment").update(replicas=3)),
        ("a scale-in before the last drain", lambda m: scale_in(m).update(periodSeconds=60)),
        ("a scale-in by half", lambda m: scale_in(m).update(type="Percent", value=50)),
    ],
    "thresholds_are_those_of_the_alerts": [
        ("an age that is no longer the budget's", lambda m: trigger(m, "oldest-age").update(threshold="0.5")),
        ("a utilization without room", lambda m: trigger(m, "utilization").update(threshold="0.8")),
        ("an age divided by the pods", lambda m: m.triggers()["oldest-age"].update(metricType="AverageValue")),
        ("silence that counts as 0", lambda m: trigger(m, "utilization").update(ignoreNullValues="true")),
    ],
    QUERIES: [
        ("a query that is none", lambda m: replace(m, "oldest-age", "avg(", "avg((")),
        ("the worst pod in place of the mean", lambda m: replace(m, "oldest-age", "avg(", "max(")),
        ("an age without a bound", lambda m: replace(m, "oldest-age", "0.1", "1e9")),
        ("bursts that count", lambda m: replace(m, "oldest-age", "min_over_time", "max_over_time")),
        ("a share of one pod's workers", lambda m: replace(m, "utilization", "clamp_min(sum(", "clamp_min(max(")),
    ],
}

# In production, against the base.
IN_CHANGES = [
    ("a lame duck no longer than the base's", lambda m: variable(m, "MILLPOND_LAME_DUCK", "10s")),
    ("zones that are a wish", lambda m: spread(m, 1).update(whenUnsatisfiable="ScheduleAnyway")),
    ("the base's image", lambda m: m.container.update(image="millpond:0.1.0")),
    ("another seccomp profile", lambda m: m.pod["spec"]["securityContext"]["seccompProfile"].update(type="Localhost")),
    ("another policy", lambda m: m.spec("NetworkPolicy")["ingress"].pop(0)),
    ("no monitor", lambda m: m.documents.remove(m.get("PodMonitor"))),
]


def finds(finder, manifests, known):
    if finder == SCHEMA:
        return any(schemas.complaints(manifests))
    if finder == QUERIES:
        return any(queries.complaints(manifests))
    return any(promise == finder for promise, _ in promises.complaints(manifests, known))


def not_found(kubectl, folder, base, production, known):
    """Yields the faults that were not found, and the promises that none is planted for."""
    for what, path, old, new in IN_FILES:
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(os.path.join(ROOT, folder), copy, dirs_exist_ok=True)
            file = os.path.join(copy, path)
            with open(file, encoding="utf-8") as before:
                text = before.read()
            if old not in text:
                raise Refused(f"{path} has no {old!r} to plant a fault in")
            with open(file, "w", encoding="utf-8") as after:
                after.write(text.replace(old, new, 1))
            try:
                render(kubectl, os.path.join(copy, "overlays/production"))
                yield f"{what}: kubectl renders it"
            except Refused:
                pass
    for finder, faults in IN_DOCUMENTS.items():
        for what, plant in faults:
            manifests = production.copy()
            plant(manifests)
            if not finds(finder, manifests, known):
                yield f"{what}: not found by {finder}"
    for what, plant in IN_CHANGES:
        manifests = production.copy()
        plant(manifests)
        if not any(promises.what_production_does_not_change(base, manifests)):
            yield f"{what}: not found"
    untested = {promise.__name__ for promise in promises.PROMISES} - set(IN_DOCUMENTS)
    yield from (f"no fault is planted for {promise}" for promise in sorted(untested))


def count():
    return len(IN_FILES) + sum(len(faults) for faults in IN_DOCUMENTS.values()) + len(IN_CHANGES)
