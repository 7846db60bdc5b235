"""The autoscaler's queries, answered by Prometheus' own evaluator from made-up scrapes of made-up pods."""

import json
import os
import subprocess
import tempfile

MINUTES = 10
SCRAPES = MINUTES * 4


def pods(metric, values, namespace="millpond"):
    """A series for each pod: `values` in the notation of promtool, one scrape every 15 s."""
    return [
        {
            "series": f'{metric}{{namespace="{namespace}", job="millpond", pool="echo", instance="{namespace}-{number}"}}',
            "values": value,
        }
        for number, value in enumerate(values)
    ]


def age(*values, namespace="millpond"):
    return pods("millpond_pool_queue_oldest_age_seconds", values, namespace)


def workers(*busy, workers=4):
    """Pods with so many of their workers busy."""
    return pods("millpond_pool_workers", [f"{workers}x{SCRAPES}"] * len(busy)) + pods(
        "millpond_pool_busy_seconds_total", [f"0+{15 * share}x{SCRAPES}" for share in busy]
    )


def always(value):
    return f"{value}x{SCRAPES}"


# Of each trigger: what happens, the scrapes, and what the query comes to.
CASES = {
    "oldest-age": [
        ("nobody waits", age(*[always(0)] * 3), 0),
        ("all are at their limit: twice the threshold, so twice the pods", age(*[always(3)] * 3), 0.1),
        ("and as many again have come, and have no clients yet: enough", age(*[always(3)] * 3, *[always(0)] * 3), 0.05),
        ("the workers of one pod of three are stuck", age(f"0+15x{SCRAPES}", always(0), always(0)), 0.0333),
        ("a burst that the next scrape does not see", age(*[f"0x{SCRAPES - 1} 9 0"] * 3), 0),
        ("a wait that began a minute ago", age(*[f"0x{SCRAPES - 5} 0.08x5"] * 3), 0.08),
        ("somebody else's pods", age(*[always(3)] * 3, namespace="elsewhere") + age(*[always(0)] * 3), 0),
    ],
    "utilization": [
        ("nobody works", workers(0, 0, 0), 0),
        ("half of the workers are busy", workers(2, 2, 2), 0.5),
        ("all are", workers(4, 4, 4), 1),
        ("a pod has come, and has no clients yet", workers(4, 4, 0, 0), 0.5),
        ("the workers of all have ended", workers(0, 0, workers=0), 0),
    ],
}


def complaints(manifests):
    triggers = {name: trigger for name, trigger in manifests.triggers().items() if trigger["type"] == "prometheus"}
    if not triggers:
        return
    if set(triggers) != set(CASES):
        yield f"the triggers are {sorted(triggers)}, and the cases {sorted(CASES)}"
        return
    tests = [
        {
            "interval": "15s",
            "name": f"{name}: {case}",
            "input_series": scrapes,
            "promql_expr_test": [
                {
                    # Sums of fractions depend on their order.
                    "expr": f"round({triggers[name]['metadata']['query']}, 0.0001)",
                    "eval_time": f"{MINUTES}m",
                    "exp_samples": [{"labels": "{}", "value": value}],
                }
            ],
        }
        for name, cases in CASES.items()
        for case, scrapes, value in cases
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "queries.yml")
        with open(path, "w", encoding="utf-8") as file:
            # JSON is YAML.
            json.dump({"rule_files": [], "evaluation_interval": "15s", "tests": tests}, file)
        run = subprocess.run(
            ["promtool", "test", "rules", path], capture_output=True, text=True, timeout=60, check=False
        )
    if run.returncode != 0:
        yield (run.stdout + run.stderr).replace(path, "the queries")
