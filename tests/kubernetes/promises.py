"""What no schema knows: that the documents fit each other, the program, and the alerts.

Each function is a promise. It takes the manifests and what is known of the program, and yields what breaks it.
"""

import re

MIB = 1024 * 1024

# For the kubelet to send the signal, and for the program to end once its drain has.
GRACE_TO_SPARE = 10

# What a connection may hold: one read, as the README has it; and what the kernel keeps of a socket (`/proc/slabinfo`: TCP 2368
# bytes, sock_inode_cache 832, filp and dentry 192 each, eventpoll_epi 128), rounded up. And the program without any.
CONNECTION = 64 * 1024 + 4 * 1024
PROGRAM = 16 * MIB

# /healthz says no after five seconds; a restart cuts everybody, so it has to say so for much longer.
LIVENESS_PATIENCE = 30

# The side port ends every connection after three seconds.
PROBE_PATIENCE = 3


def seconds(text):
    found = re.fullmatch(r"([0-9]+)(ms|s|m|h)", text)
    if not found:
        raise ValueError(f"{text!r} is no duration")
    return int(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[found[2]]


def quantity(text):
    """A quantity of Kubernetes: processors, or bytes."""
    found = re.fullmatch(r"([0-9.]+)(m|Ki|Mi|Gi)?", str(text))
    if not found:
        raise ValueError(f"{text!r} is no quantity")
    return float(found[1]) * {None: 1, "m": 0.001, "Ki": 1024, "Mi": MIB, "Gi": 1024 * MIB}[found[2]]


def bytes_of(text):
    """As flags spell bytes."""
    return quantity(text.removesuffix("B"))


def selectors_select_the_pod(m, known):
    labels = m.pod["metadata"]["labels"]
    selectors = {
        "Deployment": m.spec("Deployment")["selector"]["matchLabels"],
        "Service": m.spec("Service")["selector"],
        "PodDisruptionBudget": m.spec("PodDisruptionBudget")["selector"]["matchLabels"],
        "NetworkPolicy": m.spec("NetworkPolicy")["podSelector"].get("matchLabels"),
    }
    for constraint in m.pod["spec"]["topologySpreadConstraints"]:
        selectors[f"spread over {constraint['topologyKey']}"] = constraint["labelSelector"]["matchLabels"]
    if m.get("PodMonitor"):
        selectors["PodMonitor"] = m.spec("PodMonitor")["selector"]["matchLabels"]
    for who, selector in selectors.items():
        # One that is empty selects everything.
        if not selector or not selector.items() <= labels.items():
            yield f"{who} selects {selector}, and the pod is {labels}"


def everything_is_in_one_namespace(m, known):
    for document in m.documents:
        namespace = document["metadata"].get("namespace")
        if document["kind"] != "Namespace" and namespace != m.namespace:
            yield f"{document['kind']} is in {namespace} and not in {m.namespace}"


def ports_are_those_the_program_listens_on(m, known):
    ports = {port["name"]: port["containerPort"] for port in m.container["ports"]}
    for name, variable in [("echo", "MILLPOND_LISTEN"), ("metrics", "MILLPOND_METRICS")]:
        host, _, port = (m.environment.get(variable) or "").rpartition(":")
        # Loopback, which is the default, would be the pod's own.
        if host not in ("0.0.0.0", "[::]"):
            yield f"{variable} listens on {host!r} and not on every address of the pod"
        if port != str(ports.get(name)):
            yield f"{variable} is at {port}, and the port {name} is {ports.get(name)}"


def ports_are_known_by_name(m, known):
    names = {port["name"] for port in m.container["ports"]}
    probes = [f"{kind}Probe" for kind in ("startup", "liveness", "readiness")]
    used = {probe: m.container[probe]["httpGet"]["port"] for probe in probes}
    used |= {f"Service {port['port']}": port["targetPort"] for port in m.spec("Service")["ports"]}
    for number, rule in enumerate(m.spec("NetworkPolicy")["ingress"]):
        used |= {f"NetworkPolicy rule {number}": port["port"] for port in rule["ports"]}
    if m.get("PodMonitor"):
        used |= {"PodMonitor": m.spec("PodMonitor")["podMetricsEndpoints"][0]["port"]}
    for who, name in used.items():
        if name not in names:
            yield f"{who} means the port {name!r}, and there are {sorted(names)}"


def the_environment_is_read_by_the_program(m, known):
    for name, value in m.environment.items():
        if name not in known.defaults:
            yield f"the program does not read {name}"
        if not isinstance(value, str):
            yield f"{name} is {value!r} and no text"


def no_variable_of_the_cluster_looks_like_a_flag(m, known):
    name = m.get("Service")["metadata"]["name"].upper().replace("-", "_")
    if name.startswith("MILLPOND") and m.pod["spec"].get("enableServiceLinks") is not False:
        yield f"the Service's links would be variables {name}_..."


def the_pod_is_given_the_time_to_drain(m, known):
    lame_duck = seconds(m.environment["MILLPOND_LAME_DUCK"])
    drain = seconds(m.environment["MILLPOND_DRAIN_TIMEOUT"])
    grace = m.pod["spec"].get("terminationGracePeriodSeconds", 30)
    if lame_duck < 5:
        yield f"a lame duck of {lame_duck} s: nodes need seconds to learn that a pod goes"
    if grace < lame_duck + drain + GRACE_TO_SPARE:
        needs = f"a lame duck of {lame_duck} s, a drain of {drain} s and {GRACE_TO_SPARE} s to spare"
        yield f"killed after {grace} s, with {needs}"
    if "lifecycle" in m.container:
        yield "a hook takes time from the same grace period"
    for kind in ("startup", "liveness"):
        if "terminationGracePeriodSeconds" in m.container[f"{kind}Probe"]:
            yield f"the {kind} probe has a grace period of its own"


def probes_ask_what_they_should(m, known):
    paths = {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
    for kind, path in paths.items():
        probe = m.container[f"{kind}Probe"]
        asked = probe["httpGet"]["path"]
        if known.answers.get(asked) != 200:
            yield f"{kind}: the side port answers {known.answers.get(asked)} to {asked}"
        if asked != path:
            yield f"{kind} asks {asked} and not {path}"
        waits = probe["timeoutSeconds"]
        if waits > PROBE_PATIENCE:
            yield f"{kind} waits {waits} s, and the side port ends a connection after {PROBE_PATIENCE} s"
    liveness = m.container["livenessProbe"]
    if liveness["periodSeconds"] * liveness["failureThreshold"] < LIVENESS_PATIENCE:
        yield f"liveness kills within {LIVENESS_PATIENCE} s"


def nobody_goes_before_another_is_ready(m, known):
    deployment = m.spec("Deployment")
    rolling = deployment["strategy"]["rollingUpdate"]
    if rolling["maxUnavailable"] != 0 or rolling["maxSurge"] == 0:
        yield f"a rollout takes pods away: {rolling}"
    budget = m.spec("PodDisruptionBudget")
    if budget.get("maxUnavailable") != 1 or budget.get("unhealthyPodEvictionPolicy") != "IfHealthyBudget":
        yield f"the budget lets more than one pod go: {budget}"
    fewest = m.spec("ScaledObject")["minReplicaCount"] if m.get("ScaledObject") else deployment["replicas"]
    if fewest < 2:
        yield f"{fewest} pods: when one goes, none is left"


def memory_is_enough_for_every_connection(m, known):
    setting = known.defaults | m.environment
    workers = int(setting["MILLPOND_WORKERS"]) * bytes_of(setting["MILLPOND_STACK_SIZE"])
    connections = int(setting["MILLPOND_MAX_CONNECTIONS"] or 65536)
    most = connections * CONNECTION + workers + PROGRAM
    limit = quantity(m.container["resources"]["limits"]["memory"])
    if most > limit:
        yield f"{connections} connections may hold {most / MIB:.0f} MiB, and the limit is {limit / MIB:.0f} MiB"


def requests_are_met_and_the_processor_has_no_limit(m, known):
    requests, limits = m.container["resources"]["requests"], m.container["resources"]["limits"]
    for resource, limit in limits.items():
        if quantity(requests[resource]) > quantity(limit):
            yield f"{resource}: {requests[resource]} is asked for, and {limit} the limit"
    if requests["memory"] != limits["memory"]:
        yield f"memory: {requests['memory']} is asked for, and {limits['memory']} may be used: the node can run out of it"
    if "cpu" in limits:
        yield "the processor has a limit, which shows as echoes that wait for the next tenth of a second"
    if "cpu" not in requests:
        yield "no processor is asked for"


def the_pod_may_do_nothing_but_serve(m, known):
    """The restricted level of the pod security standards, and what goes beyond it."""
    pod, container = m.pod["spec"], m.container.get("securityContext", {})
    shared = pod.get("securityContext", {})
    level = m.get("Namespace")["metadata"]["labels"].get("pod-security.kubernetes.io/enforce")
    facts = {
        "not root": shared.get("runAsNonRoot") is True and shared.get("runAsUser", 0) > 0,
        "the runtime's seccomp profile": shared.get("seccompProfile", {}).get("type") == "RuntimeDefault",
        "no privilege gained": container.get("allowPrivilegeEscalation") is False and "privileged" not in container,
        "no capability": container.get("capabilities") == {"drop": ["ALL"]},
        "nothing written": container.get("readOnlyRootFilesystem") is True and "volumes" not in pod,
        "no token of the cluster": pod.get("automountServiceAccountToken") is False,
        "nothing of the host": not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(pod),
        "held to it by the cluster": level == "restricted",
    }
    yield from (f"not so: {fact}" for fact, holds in facts.items() if not holds)


def metrics_are_for_monitoring_alone(m, known):
    exposed = [port["targetPort"] for port in m.spec("Service")["ports"]]
    if exposed != ["echo"]:
        yield f"the Service has {exposed} and not the echo alone"
    policy = m.spec("NetworkPolicy")
    if sorted(policy["policyTypes"]) != ["Egress", "Ingress"] or policy.get("egress"):
        yield "the pod may open connections"
    for rule in policy["ingress"]:
        ports = [port.get("port") for port in rule.get("ports", [{}])]
        if ports == ["echo"]:
            continue
        for source in rule.get("from", [{}]):
            namespace = source.get("namespaceSelector", {}).get("matchLabels", {})
            if "kubernetes.io/metadata.name" not in namespace or not source.get("podSelector", {}).get("matchLabels"):
                yield f"whoever is {source} reaches {ports}"


def pods_are_spread(m, known):
    spread = {constraint["topologyKey"]: constraint for constraint in m.pod["spec"]["topologySpreadConstraints"]}
    for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone"):
        constraint = spread.get(key, {})
        if constraint.get("maxSkew") != 1 or constraint.get("matchLabelKeys") != ["pod-template-hash"]:
            yield f"over {key}: {constraint}"


def the_image_is_of_this_version(m, known):
    tag = m.container["image"].rpartition(":")[2]
    if tag != known.version:
        yield f"the image is {m.container['image']}, and the version {known.version}"


def the_job_is_the_one_the_alerts_know(m, known):
    if not m.get("PodMonitor"):
        return
    job = m.pod["metadata"]["labels"].get(m.spec("PodMonitor").get("jobLabel"))
    if {job} != known.alert_jobs:
        yield f"the job is {job}, and the alerts know {known.alert_jobs}"
    endpoint = m.spec("PodMonitor")["podMetricsEndpoints"][0]
    if known.answers.get(endpoint["path"]) != 200:
        yield f"the side port answers {known.answers.get(endpoint['path'])} to {endpoint['path']}"
    if seconds(endpoint["scrapeTimeout"]) > seconds(endpoint["interval"]):
        yield "a scrape may take longer than the interval, which Prometheus refuses"


SELECTOR = re.compile(r"([a-z_:]*[a-z])\{([^}]*)\}")


def queries_ask_for_what_there_is(m, known):
    for name, trigger in m.triggers().items():
        query = trigger["metadata"].get("query")
        if query is None:
            continue
        found = SELECTOR.findall(query)
        if set(re.findall(r"millpond_[a-z_]+", query)) != {metric for metric, _ in found}:
            yield f"{name}: not every metric has its labels chosen: {query}"
        for metric, matchers in found:
            labels = dict(re.findall(r'([a-z_]+)="([^"]*)"', matchers))
            # These two are Prometheus' own; the rest is the program's.
            if labels.pop("namespace", None) != m.namespace:
                yield f"{name}: {metric} is of another namespace than {m.namespace}"
            if {labels.pop("job", None)} != known.alert_jobs:
                yield f"{name}: {metric} is of another job than {known.alert_jobs}"
            if not any(metric == series and labels.items() <= has.items() for series, has in known.series):
                yield f"{name}: the program exports no {metric} with {labels}"


def the_autoscaler_knows_its_target(m, known):
    if not m.get("ScaledObject"):
        return
    scaled = m.spec("ScaledObject")
    target = scaled["scaleTargetRef"]
    if target.get("kind", "Deployment") != "Deployment" or target["name"] != m.get("Deployment")["metadata"]["name"]:
        yield f"it scales {target}"
    if "replicas" in m.spec("Deployment"):
        yield "the Deployment has a number of pods too, and each `kubectl apply` would set it"
    if scaled["minReplicaCount"] >= scaled["maxReplicaCount"]:
        yield "it has no room to scale in"
    down = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    for policy in down["policies"]:
        if policy["type"] != "Pods" or policy["value"] != 1:
            yield f"it scales in by more than a pod at a time: {policy}"
        if policy["periodSeconds"] < m.pod["spec"]["terminationGracePeriodSeconds"]:
            yield f"the next pod goes after {policy['periodSeconds']} s, before the last has drained"


def thresholds_are_those_of_the_alerts(m, known):
    triggers = m.triggers()
    if not triggers:
        return
    for name, trigger in triggers.items():
        metric_type = {"prometheus": "Value", "cpu": "Utilization"}[trigger["type"]]
        if trigger["metricType"] != metric_type:
            yield f"{name}: a share or an age is no sum to be divided by the number of pods, so {metric_type}"
        if trigger["type"] == "prometheus" and trigger["metadata"]["ignoreNullValues"] != "false":
            yield f"{name}: no answer would count as 0, and end pods"
    oldest = float(triggers["oldest-age"]["metadata"]["threshold"])
    if oldest != known.bad_wait:
        yield f"oldest-age: {oldest} s, and the wait budget says {known.bad_wait} s"
    fewest = m.spec("ScaledObject")["minReplicaCount"]
    without_one = float(triggers["utilization"]["metadata"]["threshold"]) * fewest / (fewest - 1)
    if without_one > known.saturated + 1e-9:
        yield f"utilization: {without_one:.2f} when one of {fewest} pods is away, over the alert's {known.saturated}"


PROMISES = [
    selectors_select_the_pod,
    everything_is_in_one_namespace,
    ports_are_those_the_program_listens_on,
    ports_are_known_by_name,
    the_environment_is_read_by_the_program,
    no_variable_of_the_cluster_looks_like_a_flag,
    the_pod_is_given_the_time_to_drain,
    probes_ask_what_they_should,
    nobody_goes_before_another_is_ready,
    memory_is_enough_for_every_connection,
    requests_are_met_and_the_processor_has_no_limit,
    the_pod_may_do_nothing_but_serve,
    metrics_are_for_monitoring_alone,
    pods_are_spread,
    the_image_is_of_this_version,
    the_job_is_the_one_the_alerts_know,
    queries_ask_for_what_there_is,
    the_autoscaler_knows_its_target,
    thresholds_are_those_of_the_alerts,
]


def complaints(manifests, known):
    for promise in PROMISES:
        try:
            yield from ((promise.__name__, what) for what in promise(manifests, known))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            # What it reads is not there, or is something else: the promise is not kept.
            yield promise.__name__, f"{type(error).__name__}: {error}"


def longer(base, over, variable):
    return seconds(over.environment[variable]) > seconds(base.environment[variable])


def more(base, over, resource):
    asked = [quantity(one.container["resources"]["requests"][resource]) for one in (base, over)]
    return asked[1] > asked[0]


def zones(manifests):
    spread = manifests.pod["spec"]["topologySpreadConstraints"]
    [constraint] = [one for one in spread if one["topologyKey"] == "topology.kubernetes.io/zone"]
    return constraint


def kinds(manifests):
    return {document["kind"] for document in manifests.documents}


# What production says that it changes, and whether it did so as it says.
CHANGES = {
    "lame duck": lambda base, over: longer(base, over, "MILLPOND_LAME_DUCK"),
    "drain timeout": lambda base, over: longer(base, over, "MILLPOND_DRAIN_TIMEOUT"),
    "connections": lambda base, over: int(over.environment["MILLPOND_MAX_CONNECTIONS"])
    > int(base.environment["MILLPOND_MAX_CONNECTIONS"]),
    "grace": lambda base, over: over.pod["spec"]["terminationGracePeriodSeconds"]
    > base.pod["spec"]["terminationGracePeriodSeconds"],
    "memory": lambda base, over: more(base, over, "memory"),
    "processor": lambda base, over: more(base, over, "cpu"),
    "image": lambda base, over: over.container["image"] != base.container["image"],
    "number of pods": lambda base, over: "replicas" in base.spec("Deployment")
    and "replicas" not in over.spec("Deployment"),
    "zones": lambda base, over: zones(base)["whenUnsatisfiable"] == "ScheduleAnyway"
    and zones(over)["whenUnsatisfiable"] == "DoNotSchedule",
    "operators' documents": lambda base, over: kinds(over) - kinds(base) == {"PodMonitor", "ScaledObject"},
}


def what_production_does_not_change(base, over):
    """Yields each change that is not there, and whatever else differs."""
    yield from (f"production changes no {what}" for what, happened in CHANGES.items() if not happened(base, over))
    for kind in sorted(kinds(base)):
        if without_changes(base, kind) != without_changes(over, kind):
            yield f"production changes more of the {kind} than it says"


def without_changes(manifests, kind):
    m = manifests.copy()
    if kind != "Deployment":
        return m.get(kind)
    m.spec(kind).pop("replicas", None)
    m.pod["spec"].pop("terminationGracePeriodSeconds")
    m.container.pop("image")
    m.container["resources"] = sorted(m.container["resources"])
    changed = ("MILLPOND_LAME_DUCK", "MILLPOND_DRAIN_TIMEOUT", "MILLPOND_MAX_CONNECTIONS")
    m.container["env"] = {name: value for name, value in m.environment.items() if name not in changed}
    zones(m).pop("whenUnsatisfiable")
    return m.get(kind)
