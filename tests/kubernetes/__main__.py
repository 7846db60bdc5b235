"""deploy/kubernetes, checked without a cluster: `tests/kubernetes/check` says what this needs, and starts it.

Every folder with a kustomization is rendered, and each rendering held to the schemas (`schemas.py`), to the promises that no
schema knows (`promises.py`), to the program run with its environment (`program.py`), and its queries to made-up scrapes
(`queries.py`). Then faults are planted, and each has to be found (`planted.py`). Leaves nothing running.
"""

import glob
import os
import re
import shutil
import sys

import planted
import promises
import queries
import schemas
from manifests import Refused, render
from program import ROOT, Failed, Known, read, run_all

FOLDER = "deploy/kubernetes"
BASE, PRODUCTION = "base", "overlays/production"


def newcomers_path(folders, version):
    """The README's first commands: five at most, and of folders and images that are there."""
    readme = read(f"{FOLDER}/README.md")
    block = re.search(r"```sh\n(.*?)```", readme, re.S)[1]
    commands = [line for line in block.splitlines() if line and not line.startswith("#")]
    if len(commands) > 5:
        yield f"{len(commands)} commands are more than five"
    for folder in re.findall(r"-k\s+(deploy/[^\s`]+)", readme):
        if os.path.relpath(folder, FOLDER) not in folders:
            yield f"{folder} is in a command, and is not there"
    for tag in re.findall(r"millpond:([0-9][0-9.]*[0-9])\b", block):
        if tag != version:
            yield f"an image of {tag}, and the version is {version}"


def main(kubectl, millpond):
    millpond = os.path.join(ROOT, millpond)
    if not os.path.exists(millpond):
        raise Failed(f"there is no {millpond}: cargo build --release --bin millpond")
    if not shutil.which("promtool"):
        raise Failed("there is no promtool: Debian has it in the package prometheus")
    known = Known(millpond)
    found = glob.glob(os.path.join(ROOT, FOLDER, "**/kustomization.yaml"), recursive=True)
    folders = sorted(os.path.relpath(os.path.dirname(path), os.path.join(ROOT, FOLDER)) for path in found)
    renderings = {folder: render(kubectl, os.path.join(ROOT, FOLDER, folder)) for folder in folders}
    run_all(millpond, renderings, known)

    failures = [f"README.md: {what}" for what in newcomers_path(folders, known.version)]
    for folder, manifests in renderings.items():
        failures += [f"{folder}: {what}" for what in schemas.complaints(manifests)]
        failures += [f"{folder}: {promise}: {what}" for promise, what in promises.complaints(manifests, known)]
        failures += [f"{folder}: {what}" for what in queries.complaints(manifests)]
        print(f"{folder}: {', '.join(document['kind'] for document in manifests.documents)}")
    base, production = renderings[BASE], renderings[PRODUCTION]
    failures += promises.what_production_does_not_change(base, production)
    if not failures:
        failures += planted.not_found(kubectl, FOLDER, base, production, known)
    for failure in failures:
        print(f"kubernetes: {failure}", file=sys.stderr)
    if failures:
        return 1
    print(
        f"{len(promises.PROMISES)} promises, Kubernetes {' and '.join(schemas.VERSIONS)}, "
        f"{planted.count()} faults planted and found"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except (Refused, Failed) as error:
        print(f"kubernetes: {error}", file=sys.stderr)
        sys.exit(1)
