"""What no linter knows of the Containerfile and compose.yaml: that they fit the program, its dashboards and each other.

Takes the configuration of the image that was built, and the folder of its files.
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import tomllib

import yaml

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
sys.path.insert(0, os.path.join(ROOT, "tests", "common"))
from programs import Report

CONTAINER = os.path.join(ROOT, "deploy", "container")
# What the program keeps for the rest of itself, and has of threads beside its workers.
RESERVED_DESCRIPTORS = 64
OTHER_THREADS = 16
# What a connection holds at most, as the README says; and ten times what it says of the program without any.
CONNECTION_BYTES = 64 * 1024
PROGRAM_BYTES = 60 * 1024 * 1024
CONFINED = {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def seconds(text):
    """A duration as Compose and millpond both write it: 40s, 1m30s."""
    parts = re.findall(r"(\d+)(ms|s|m|h)", text)
    assert "".join(number + unit for number, unit in parts) == text, text
    return sum(int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)


def bytes_of(text):
    number, unit = re.fullmatch(r"(\d+)([kmg]?)b?", text.lower()).groups()
    return int(number) * 1024 ** " kmg".index(unit or " ")


class Defaults:
    """The program's flags by the names of their variables, with the defaults that its help has."""

    def __init__(self, program):
        text = subprocess.run([program, "--help"], check=True, capture_output=True, text=True).stdout
        entries = re.findall(r"^ +(?:-\w, )?--[a-z-]+(.*?)(?=^ +(?:-\w, )?--|\Z)", text, re.MULTILINE | re.DOTALL)
        self.values = {}
        for entry in entries:
            if variable := re.search(r"\[env: (MILLPOND_\w+)", entry):
                default = re.search(r"\[default:\s+([^\]]+)\]", entry)
                self.values[variable[1]] = default[1] if default else None

    def port(self, variable):
        return self.values[variable].rsplit(":", 1)[1]


def the_containerfile(claim, cargo):
    lines = [line.split("#")[0].strip() for line in read("deploy", "container", "Containerfile").splitlines()]
    stages = [line.split()[1] for line in lines if line.startswith("FROM ")]
    tag = re.fullmatch(r"docker\.io/library/rust:(\d+)\.(\d+)\.(\d+)-slim-\w+", stages[0])
    least = tuple(map(int, cargo["rust-version"].split(".")))
    enough = tag and tuple(map(int, tag.groups()[:2])) >= least
    claim("the compiler's image is pinned to a version that is declared to do", enough, stages[0])
    claim("the last stage begins with nothing", len(stages) == 2 and stages[1] == "scratch", stages)


def the_image(claim, config, files, defaults, cargo):
    user = config.get("User", "")
    claim("its user is a number, and not root's", re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), user)
    entry = config["Entrypoint"]
    claim("it runs the program and no shell", entry == ["/millpond"] and not config["Cmd"], entry)
    stop = config.get("StopSignal")
    claim("it is stopped with what begins a drain", stop == "SIGTERM", stop)
    health = config.get("Healthcheck") or {}
    asked = health.get("Test")
    claim("its health is asked by the program itself", asked == ["CMD", "/millpond", "health"], asked)
    engine_waits = health.get("Timeout", 0) / 1e9
    claim("and the engine waits longer than it does", engine_waits > 2, f"{engine_waits} s, 2 s")

    environment = dict(line.split("=", 1) for line in config["Env"])
    ours = {name: value for name, value in environment.items() if name.startswith("MILLPOND_")}
    listens = {name: f"0.0.0.0:{defaults.port(name)}" for name in ("MILLPOND_LISTEN", "MILLPOND_METRICS")}
    claim("it listens on all of the container's addresses, on the default ports", ours == listens, ours)
    exposed = set(config["ExposedPorts"])
    claim("and these are exposed", exposed == {f"{defaults.port(name)}/tcp" for name in listens}, sorted(exposed))

    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    known = {name: cargo[name] for name in ("version",)}
    known |= {"title": cargo["name"], "licenses": cargo["license"], "revision": "checked"}
    wrong = {name: labels.get(name) for name, value in known.items() if labels.get(name) != value}
    claim("its labels are the package's", not wrong, wrong or known)

    walk = ((folder, name) for folder, _, names in os.walk(files) for name in names)
    found = [os.path.relpath(os.path.join(*each), files) for each in walk]
    mode = stat.S_IMODE(os.stat(os.path.join(files, "millpond")).st_mode)
    claim("there is the program in it, and nothing else", found == ["millpond"] and mode == 0o755, f"{found}, {mode:o}")


def millpond_in_compose(claim, service, config, defaults, cargo):
    environment = service.get("environment", {})
    unknown = set(environment) - set(defaults.values)
    claim("compose: every variable is one of the program's", not unknown, sorted(unknown or environment))

    def setting(name):
        return environment.get(name, defaults.values[name])

    claim("compose: millpond's root is read-only", service.get("read_only") is True, service.get("read_only"))
    anew = {"user", "entrypoint", "command", "stop_signal", "healthcheck", "privileged", "cap_add"} & set(service)
    claim("compose: user, program, signal and health are the image's", not anew, sorted(anew) or "none is said anew")

    needed = seconds(setting("MILLPOND_LAME_DUCK")) + seconds(setting("MILLPOND_DRAIN_TIMEOUT"))
    grace = seconds(service.get("stop_grace_period", "10s"))
    claim("compose: lame duck and drain are over before it is killed", grace >= needed + 5, f"{grace} s, {needed} s")

    connections = int(setting("MILLPOND_MAX_CONNECTIONS") or 0)
    files = service["ulimits"]["nofile"]
    enough = 0 < connections <= files - RESERVED_DESCRIPTORS
    claim("compose: there are descriptors for all connections", enough, f"{connections}, {files}")
    limits = service["deploy"]["resources"]["limits"]
    fullest = connections * CONNECTION_BYTES + PROGRAM_BYTES
    enough = fullest <= bytes_of(limits["memory"])
    claim("compose: there is memory for all at their fullest", enough, f"{fullest >> 20} MiB, {limits['memory']}")
    threads = int(setting("MILLPOND_WORKERS")) + OTHER_THREADS
    claim("compose: there may be all its threads", threads <= limits["pids"], f"{threads}, {limits['pids']}")
    claim("compose: processors are limited", float(limits["cpus"]) > 0, limits["cpus"])

    published = {port.rsplit(":", 1)[1] + "/tcp" for port in service["ports"]}
    claim("compose: what is published is exposed", published == set(config["ExposedPorts"]), sorted(published))
    named = f"{cargo['name']}:{cargo['version']}"
    claim("compose: the image is named as the package", service["image"] == named, service["image"])

    build = service["build"]
    context = os.path.normpath(os.path.join(CONTAINER, build["context"]))
    containerfile = os.path.normpath(os.path.join(context, build["dockerfile"]))
    ours = (context, containerfile) == (ROOT, os.path.join(CONTAINER, "Containerfile"))
    claim("compose: it is built from the repository", ours, build["dockerfile"])


def mounts(service):
    """What is mounted from this repository: where it is, where it is seen, and how."""
    for mount in service.get("volumes", []):
        source, target, *how = mount.split(":")
        if source.startswith("."):
            yield os.path.normpath(os.path.join(CONTAINER, source)), target, how


def all_services(claim, compose):
    for name, service in compose["services"].items():
        ports = service["ports"]
        beyond = [port for port in ports if not port.startswith("127.0.0.1:")]
        claim(f"compose: {name} is published on this machine only", not beyond, beyond or ports)
        rights = {key: service.get(key) for key in CONFINED}
        claim(f"compose: {name} has no rights beyond its user's", rights == CONFINED, rights)
        pinned = re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        claim(f"compose: {name} is of a pinned version", pinned, service["image"])
        wrong = [os.path.relpath(source, ROOT) for source, _, _ in mounts(service) if not os.path.isfile(source)]
        wrong += [target for _, target, how in mounts(service) if how != ["ro"]]
        claim(f"compose: {name} sees files that are there, and cannot write them", not wrong, wrong or "each")
        volumes = [mount.split(":")[0] for mount in service.get("volumes", []) if not mount.startswith(".")]
        claim(f"compose: {name} has volumes that are declared", set(volumes) <= set(compose["volumes"]), volumes)
    ports = [port.rsplit(":", 1)[0] for service in compose["services"].values() for port in service["ports"]]
    claim("compose: no port is published twice", len(ports) == len(set(ports)), ports)


def as_mounted(service, folder):
    """Puts the files of a service where it sees them, below a folder."""
    for source, target, _ in mounts(service):
        # One that is missing is claimed to be there elsewhere.
        if os.path.isfile(source):
            os.makedirs(folder + os.path.dirname(target), exist_ok=True)
            shutil.copy(source, folder + target)


def accepted(claim, what, *command):
    done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    claim(what, done.returncode == 0, said if done.returncode else said.splitlines()[-1].strip())


def monitoring(claim, compose, defaults):
    services = compose["services"]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("prometheus", "alertmanager", "grafana"):
            as_mounted(services[name], folder)
        prometheus = folder + "/etc/prometheus/prometheus.yml"
        accepted(claim, "prometheus takes its files as they are mounted", "promtool", "check", "config", prometheus)
        alertmanager = folder + "/etc/alertmanager/alertmanager.yml"
        accepted(claim, "alertmanager too", "amtool", "check-config", alertmanager)
        provisioning = folder + "/etc/grafana/provisioning/"
        [provider] = yaml.safe_load(read(provisioning + "dashboards/millpond.yml"))["providers"]
        looks = provider["options"]["path"]
        there = os.path.isfile(os.path.join(folder + looks, "millpond.json"))
        claim("grafana has the dashboard where its provider looks", there, looks)
        home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        claim("and at home", os.path.isfile(folder + home), home)
        sources = yaml.safe_load(read(provisioning + "datasources/millpond.yml"))

    scraping = yaml.safe_load(read("deploy", "container", "prometheus.yml"))
    alerting = scraping.pop("alerting")["alertmanagers"][0]["static_configs"][0]["targets"]
    [scrape] = scraping["scrape_configs"][0]["static_configs"]
    [source] = sources["datasources"]
    listening = {"millpond": defaults.port("MILLPOND_METRICS"), "prometheus": "9090", "alertmanager": "9093"}
    for address in [*scrape["targets"], *alerting, source["url"].removeprefix("http://")]:
        name, port = address.split(":")
        listens = name in services and listening.get(name) == port
        published = listens and any(each.endswith(f":{port}:{port}") for each in services[name]["ports"])
        claim("what is configured is a service at its port", published, address)

    # As those that are checked live, but for the addresses.
    scrape["targets"] = ["127.0.0.1:9464"]
    same = scraping == yaml.safe_load(read("dashboards", "prometheus", "prometheus.yml"))
    claim("prometheus.yml is that of dashboards/ with other addresses", same, "and an alertmanager")
    source["url"] = "http://127.0.0.1:9090"
    same = sources == yaml.safe_load(read("dashboards", "grafana", "datasource.yml"))
    claim("and so is datasource.yml", same, "nothing more")
    types = json.loads(read("tests", "dashboards", "schema", "package.json"))["devDependencies"]["@grafana/schema"]
    same = services["grafana"]["image"].endswith(":" + types)
    claim("grafana is of the version whose types the dashboard is checked against", same, types)


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        config = json.load(file)["config"]
    files = sys.argv[2]
    cargo = tomllib.loads(read("Cargo.toml"))["package"]
    defaults = Defaults(os.path.join(files, "millpond"))
    compose = yaml.safe_load(read("deploy", "container", "compose.yaml"))
    report = Report()
    the_containerfile(report.claim, cargo)
    the_image(report.claim, config, files, defaults, cargo)
    millpond_in_compose(report.claim, compose["services"]["millpond"], config, defaults, cargo)
    all_services(report.claim, compose)
    monitoring(report.claim, compose, defaults)
    print(f"the files of the container: {report.passed} passed, {report.failed} failed")
    sys.exit(report.failed > 0)


main()
