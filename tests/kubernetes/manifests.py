"""What kustomize makes of a folder: documents, found by their kind."""

import copy
import subprocess

import yaml


class Refused(Exception):
    """kubectl does not render it, or it is nothing to look at."""


def render(kubectl, folder):
    """The documents of `folder`, as `kubectl apply -k` would send them."""
    run = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    # It warns of what is deprecated, and goes on.
    if run.returncode != 0 or run.stderr:
        raise Refused(run.stderr.strip() or f"kubectl kustomize ended with {run.returncode}")
    return Manifests([document for document in yaml.safe_load_all(run.stdout) if document])


class Manifests:
    """Documents, at most one of each kind: so it is here, and so no reference needs more than a kind."""

    def __init__(self, documents):
        self.documents = documents
        kinds = [document["kind"] for document in documents]
        if not kinds or len(set(kinds)) != len(kinds):
            raise Refused(f"one document of each kind, and not {kinds}")

    def copy(self):
        return Manifests(copy.deepcopy(self.documents))

    def get(self, kind):
        """The document of a kind, or None."""
        return next((document for document in self.documents if document["kind"] == kind), None)

    def spec(self, kind):
        document = self.get(kind)
        if document is None:
            raise Refused(f"there is no {kind}")
        return document["spec"]

    @property
    def pod(self):
        return self.spec("Deployment")["template"]

    @property
    def container(self):
        containers = self.pod["spec"]["containers"]
        if len(containers) != 1:
            raise Refused(f"one container, and not {len(containers)}")
        return containers[0]

    @property
    def environment(self):
        return {variable["name"]: variable.get("value") for variable in self.container["env"]}

    @property
    def namespace(self):
        return self.get("Namespace")["metadata"]["name"]

    def triggers(self):
        """Those of the autoscaler by name; none where there is none."""
        scaled = self.get("ScaledObject")
        return {trigger["name"]: trigger for trigger in scaled["spec"]["triggers"]} if scaled else {}
