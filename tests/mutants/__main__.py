"""Every mutant that cargo-mutants lists, against every test that reaches it; see `run` beside this file."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

from planting import CHOSEN, Source, blamed

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HERE = os.path.dirname(os.path.abspath(__file__))
WORK = os.path.join(ROOT, "target/mutants")
COPY = os.path.join(WORK, "copy")

FILES = ["src/pool/*.rs", "src/server/*.rs", "src/lifecycle.rs"]
# What these mutations are in is no part of the program: the worlds in which the models run it.
IS_MODEL = re.compile(r"^src/pool/model\.rs| model::")

# Most of a test is waiting.
AT_ONCE = 4 * (os.cpu_count() or 1)
MODEL_FLAGS = ["--config", "profile.dev.debug=false"] + [
    flag for package in ("millpond", "loom", "generator") for flag in ("--config", f"profile.dev.package.{package}.opt-level=3")
]


def cargo(*arguments, model=False, folder=COPY):
    environment = dict(os.environ, CARGO_TARGET_DIR=os.path.join(WORK, "model" if model else "target"))
    environment["RUSTFLAGS"] = "--cfg millpond_loom" if model else "-Awarnings"
    command = ["cargo", *arguments] + (["--no-default-features", *MODEL_FLAGS] if model else [])
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def messages(outcome):
    return [json.loads(line) for line in outcome.stdout.splitlines() if line.startswith("{")]


def listed(files):
    """The mutants, as cargo-mutants names them."""
    chosen = [argument for file in files for argument in ("-f", file)]
    command = ["cargo", "mutants", "--list", "--json", "--no-config", "--features", "cli", *chosen]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    mutants = [mutant for mutant in json.loads(outcome.stdout) if not IS_MODEL.search(mutant["name"])]
    for number, mutant in enumerate(mutants):
        mutant["number"] = number
        mutant["title"] = title(mutant["name"])
    return mutants


def title(name):
    """A mutant's name without the line, which the next commit moves."""
    return re.sub(r":\d+:\d+:", ":", name, count=1)


def copied():
    os.makedirs(COPY, exist_ok=True)
    subprocess.run(["rm", "-rf", os.path.join(COPY, "src")], check=True)
    pack = f"tar --exclude ./target --exclude ./.git --exclude ./fuzz -cf - . | tar -xf - -C '{COPY}'"
    subprocess.run(pack, shell=True, cwd=ROOT, check=True)
    with open(os.path.join(COPY, "src/lib.rs"), "a", encoding="utf-8") as lib:
        lib.write(CHOSEN)


def plant(mutants):
    """Writes the mutants into the copy. Returns those that could not be, by why: the compiler's words, or `None`."""
    sources = {path: Source(ROOT, path) for path in {mutant["file"] for mutant in mutants}}
    left_out = {}
    while True:
        for path, source in sources.items():
            text, homeless = source.planted([m for m in mutants if m["file"] == path and m["number"] not in left_out])
            left_out.update(dict.fromkeys(homeless))
            with open(os.path.join(COPY, path), "w", encoding="utf-8") as file:
                file.write(text)
        before = len(left_out)
        for model in (False, True):
            outcome = cargo("check", "--lib", "--profile=test", "--message-format=json", model=model)
            for message in messages(outcome):
                if message["reason"] == "compiler-message" and message["message"]["level"] == "error":
                    left_out.update(laid_at_a_door(message["message"]))
            if len(left_out) > before:
                break
            if outcome.returncode != 0:
                sys.exit(f"mutants: the copy does not compile, and no mutant is to blame:\n{outcome.stderr[-3000:]}")
        if len(left_out) == before:
            return left_out


def laid_at_a_door(error):
    for span in sorted(error["spans"], key=lambda span: not span["is_primary"]):
        if not span["file_name"].startswith("/"):
            with open(os.path.join(COPY, span["file_name"]), "rb") as file:
                numbers = blamed(file.read(), span["byte_start"], span["byte_end"])
            if numbers:
                return dict.fromkeys(numbers, error["message"])
    return {}


def tests():
    """Builds the tests and the models, and runs each alone, to learn whom it reaches and how long it takes."""
    found = []
    for model in (False, True):
        which = ["--lib"] if model else []
        outcome = cargo("test", "--no-run", "--message-format=json", *which, model=model)
        if outcome.returncode != 0:
            sys.exit(f"mutants: the tests do not compile:\n{outcome.stderr[-3000:]}")
        for message in messages(outcome):
            if message.get("executable") and message["profile"]["test"]:
                program = message["executable"]
                names = subprocess.run([program, "--list"], cwd=COPY, capture_output=True, text=True, check=True)
                for name in re.findall(r"^(.*): test$", names.stdout, re.M):
                    if not model or "model" in name:
                        kind = "model" if model else message["target"]["name"]
                        found.append({"program": program, "name": name, "id": f"{kind} {name}", "model": model})
    os.makedirs(os.path.join(WORK, "reached"), exist_ok=True)
    with ThreadPoolExecutor(2) as together:
        list(together.map(measure, enumerate(found)))
    broken = [test["id"] for test in found if test["outcome"] != "passed"]
    if broken:
        sys.exit(f"mutants: these tests fail without one: {', '.join(broken)}")
    return found


def measure(numbered):
    number, test = numbered
    path = os.path.join(WORK, "reached", str(number))
    if os.path.exists(path):
        os.remove(path)
    start = time.monotonic()
    test["outcome"] = run(test, {"MUTANTS_REACHED": path}, 600)
    test["seconds"] = time.monotonic() - start
    test["reaches"] = set()
    if os.path.exists(path):
        with open(path, encoding="ascii") as file:
            test["reaches"] = {int(line) for line in file}


def run(test, variables, limit):
    """Runs one test. What it leaves behind is ended with it."""

    def bounded():
        # A mutant that takes memory without end. (The program looks at its limit on addresses, so not that one.)
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))

    process = subprocess.Popen(
        [test["program"], "--exact", test["name"], "--nocapture"],
        cwd=COPY,
        env=dict(os.environ, **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=bounded,
    )
    try:
        outcome = "passed" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        outcome = "hung"
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    return outcome


class Hunt:
    """Gives each mutant to the tests that reach it, until one finds it."""

    def __init__(self, found):
        self.tests = found
        self.lock = threading.Lock()
        self.by_function, self.by_file = Counter(), Counter()
        self.log = open(os.path.join(WORK, "outcomes.jsonl"), "w", encoding="utf-8")

    def seek(self, mutant):
        function = mutant["file"], (mutant["function"] or {}).get("function_name")
        reaching = [test for test in self.tests if mutant["number"] in test["reaches"]]
        # First what has found its neighbours, then what is soon done; models last.
        reaching.sort(
            key=lambda test: (
                -self.by_function[function, test["id"]],
                test["model"],
                -min(self.by_file[mutant["file"], test["id"]], 5) if test["seconds"] < 4 else 0,
                test["seconds"],
            )
        )
        start, mutant["outcome"], mutant["by"] = time.monotonic(), "survived" if reaching else "not reached", None
        for test in reaching:
            outcome = self.ask(test, mutant)
            if outcome != "passed":
                mutant["outcome"], mutant["by"] = outcome, test["id"]
                self.by_function[function, test["id"]] += 1
                self.by_file[mutant["file"], test["id"]] += 1
                break
        self.note(mutant, time.monotonic() - start)

    def by_all(self, mutant):
        """Gives it to all tests, some at a time."""
        found = []

        def ask(test):
            if not found and not test["model"]:
                outcome = self.ask(test, mutant)
                if outcome != "passed":
                    found.append((outcome, test["id"]))

        with ThreadPoolExecutor(AT_ONCE) as together:
            list(together.map(ask, sorted(self.tests, key=lambda test: test["seconds"])))
        return found[0] if found else ("survived", None)

    def note(self, mutant, seconds=None):
        kept = {key: mutant[key] for key in ("name", "outcome", "by")}
        with self.lock:
            self.log.write(json.dumps({**kept, "seconds": seconds and round(seconds, 1)}) + "\n")
            self.log.flush()
            if mutant["by"] is None and mutant["outcome"] != "unviable":
                print(f"{mutant['outcome']}: {mutant['name']}", flush=True)

    @staticmethod
    def ask(test, mutant):
        """A failure counts when it comes twice: the machine is busy, and a test may fail for that alone."""
        variables, limit = {"MUTANT": str(mutant["number"])}, 10 + 10 * test["seconds"]
        outcome = run(test, variables, limit)
        return run(test, variables, limit) if outcome == "failed" else outcome


def alone(mutant, hunt):
    """One that nothing can choose at run time, as in a constant: built by itself, and given to every test."""
    path = os.path.join(COPY, mutant["file"])
    source = Source(ROOT, mutant["file"])
    start, end = source.span(mutant)
    with open(path, "rb") as file:
        planted = file.read()
    with open(path, "wb") as file:
        file.write(source.bytes[:start] + mutant["replacement"].encode() + source.bytes[end:])
    if cargo("test", "--no-run").returncode == 0:
        mutant["outcome"], mutant["by"] = hunt.by_all(mutant)
    else:
        mutant["outcome"], mutant["by"] = "unviable", None
    with open(path, "wb") as file:
        file.write(planted)
    hunt.note(mutant)


def explained():
    """How often a mutant of this title may survive, by `explained.txt`."""
    allowed = defaultdict(int)
    with open(os.path.join(HERE, "explained.txt"), encoding="utf-8") as file:
        for line in file:
            if line.startswith("src/"):
                allowed[line.rstrip("\n")] += 1
    return allowed


def known():
    """What was found before, and what is explained, where only the rest is asked for."""
    path = os.path.join(WORK, "outcomes.jsonl")
    if "--again" not in sys.argv or not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        outcomes = [json.loads(line) for line in file]
    settled = explained()
    return {
        outcome["name"]: outcome
        for outcome in outcomes
        if outcome["by"] or outcome["outcome"] == "unviable" or title(outcome["name"]) in settled
    }


def main():
    start = time.monotonic()
    mutants, before = listed([file for file in sys.argv[1:] if file != "--again"] or FILES), known()
    copied()
    left_out = plant(mutants)
    planted = [mutant for mutant in mutants if mutant["number"] not in left_out]
    print(f"{len(mutants)} mutants, {len(planted)} of them in one copy of the sources", flush=True)
    hunt = Hunt(tests())
    print(f"{len(hunt.tests)} tests and models, {time.monotonic() - start:.0f} s so far", flush=True)
    for mutant in mutants:
        if mutant["name"] in before:
            mutant["outcome"], mutant["by"] = before[mutant["name"]]["outcome"], before[mutant["name"]]["by"]
            hunt.note(mutant)
    with ThreadPoolExecutor(AT_ONCE) as together:
        list(together.map(hunt.seek, [mutant for mutant in planted if mutant["name"] not in before]))
    for mutant in mutants:
        if mutant["number"] in left_out and mutant["name"] not in before:
            # A value of a function's that is not of its type. Of the others it may have been the planting.
            if mutant["genre"] == "FnValue":
                mutant["outcome"], mutant["by"] = "unviable", None
                hunt.note(mutant)
            else:
                alone(mutant, hunt)
    report(mutants, time.monotonic() - start)


def report(mutants, seconds):
    outcomes, allowed, unexplained = Counter(), explained(), []
    for mutant in mutants:
        outcome = mutant["outcome"]
        if outcome in ("survived", "not reached"):
            outcome = "explained" if allowed[mutant["title"]] > 0 else "unexplained"
            allowed[mutant["title"]] -= 1
            if outcome == "unexplained":
                unexplained.append(mutant["name"])
        outcomes[outcome] += 1
    by_models = sum(mutant["outcome"] == "failed" and mutant["by"].startswith("model ") for mutant in mutants)
    print()
    for name in unexplained:
        print(f"unexplained: {name}")
    print(f"by a failed test {outcomes['failed']}, of them {by_models} by a model; by one that hung {outcomes['hung']}")
    print(f"explained {outcomes['explained']}; no Rust {outcomes['unviable']}; {seconds / 60:.0f} minutes")
    print(f"mutants: {outcomes['failed'] + outcomes['hung']} found, {len(unexplained)} unexplained")
    sys.exit(1 if unexplained else 0)


main()
