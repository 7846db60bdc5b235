"""Each document by itself: Kubernetes' kinds by Kubernetes' schemas, the two others by shapes of our own."""

import re

import kubernetes_validate

# The oldest has `matchLabelKeys` switched on; the newest is the newest whose schemas there are.
VERSIONS = ["1.27", "1.37"]

TEXT = re.compile(r"(?s).+")
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
DURATION = re.compile(r"[0-9]+(ms|s|m|h)")
LABELS = {"*": TEXT}

# A shape is: a pattern that a text has to match whole, a set of values one of which it has to be, a range of whole numbers, a
# list of one shape for every item, or names with their shapes. A name that ends in ? may be missing, * is any name, and what
# is not named is not allowed. They are the parts in use here of what the operators define, which allow more.
POLICIES = [{"type": {"Pods", "Percent"}, "value": range(1, 1001), "periodSeconds": range(1, 1801)}]
SCALING = {
    "stabilizationWindowSeconds": range(0, 3601),
    "selectPolicy?": {"Max", "Min", "Disabled"},
    "policies": POLICIES,
}
METADATA = {"name": TEXT, "namespace": TEXT, "labels": LABELS}

SHAPES = {
    ("monitoring.coreos.com/v1", "PodMonitor"): {
        "apiVersion": TEXT,
        "kind": TEXT,
        "metadata": METADATA,
        "spec": {
            "jobLabel": TEXT,
            "selector": {"matchLabels": LABELS},
            "podMetricsEndpoints": [
                {"port": TEXT, "path": re.compile("/.*"), "interval": DURATION, "scrapeTimeout": DURATION}
            ],
        },
    },
    ("keda.sh/v1alpha1", "ScaledObject"): {
        "apiVersion": TEXT,
        "kind": TEXT,
        "metadata": METADATA,
        "spec": {
            "scaleTargetRef": {"apiVersion?": TEXT, "kind?": TEXT, "name": TEXT},
            "minReplicaCount": range(0, 1001),
            "maxReplicaCount": range(1, 1001),
            "advanced": {
                "horizontalPodAutoscalerConfig": {"behavior": {"scaleUp": SCALING, "scaleDown": SCALING}},
            },
            "triggers": [
                {
                    "type": {"prometheus", "cpu"},
                    "name": TEXT,
                    "metricType": {"Value", "AverageValue", "Utilization"},
                    "metadata": {"*": TEXT},
                }
            ],
        },
    },
}

# What the scalers themselves read of a trigger's metadata, all of it text.
TRIGGERS = {
    "prometheus": {
        "serverAddress": re.compile(r"https?://[^/ ]+"),
        "query": TEXT,
        "threshold": NUMBER,
        "ignoreNullValues": {"true", "false"},
    },
    "cpu": {"value": re.compile("[0-9]+")},
}


def complaints(manifests):
    for document in manifests.documents:
        shape = SHAPES.get((document["apiVersion"], document["kind"]))
        if shape is None:
            yield from by_schema(document)
            continue
        yield from by_shape(document["kind"], document, shape)
        for trigger in document["spec"].get("triggers", []):
            where = f"ScaledObject.triggers.{trigger.get('name')}.metadata"
            yield from by_shape(where, trigger.get("metadata"), TRIGGERS.get(trigger.get("type"), {}))


def by_schema(document):
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = ".".join(str(step) for step in error.path)
            yield f"{document['kind']}.{place}, Kubernetes {version}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{document['apiVersion']} {document['kind']}: neither Kubernetes {version} nor a shape here knows it"


def by_shape(where, value, shape):
    """What is wrong with a value, with the place of each fault."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{where}: {value!r} has no names"
            return
        known = {name.rstrip("?"): inner for name, inner in shape.items()}
        for name, inner in value.items():
            if name in known or "*" in known:
                yield from by_shape(f"{where}.{name}", inner, known.get(name, known.get("*")))
            else:
                yield f"{where}.{name}: unknown"
        for name in shape:
            if not name.endswith(("?", "*")) and name not in value:
                yield f"{where}.{name}: missing"
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            yield f"{where}: {value!r} is no list of something"
            return
        for number, item in enumerate(value):
            yield from by_shape(f"{where}.{number}", item, shape[0])
    elif isinstance(shape, re.Pattern):
        if not isinstance(value, str) or not shape.fullmatch(value):
            yield f"{where}: {value!r} is not of the form {shape.pattern}"
    elif isinstance(shape, range):
        # True is a number to Python.
        if type(value) is not int or value not in shape:
            yield f"{where}: {value!r} is not from {shape.start} to {shape.stop - 1}"
    elif value not in shape:
        yield f"{where}: {value!r} is none of {sorted(shape)}"
