"""How long jobs wait, by the number of workers and how busy they are: the table in deploy/README.md.

    /usr/bin/python3 deploy/scaling/erlang.py

Erlang's second formula, for jobs that come at random and whose lengths are exponential (M/M/c). tests/scaling/model.py holds the
table to it, and the simulation too.
"""

WORKERS = (1, 4, 16, 128)
BUSY = (0.5, 0.7, 0.8, 0.9, 0.95)


def erlang_c(workers, load):
    """The share of jobs that wait, when what comes would keep `load` workers busy.

    By Erlang's first formula, whose recurrence stays within floats for any number of workers.
    """
    lost = 1.0
    for number in range(1, workers + 1):
        lost = load * lost / (number + load * lost)
    return lost / (1 - load / workers * (1 - lost))


def mean_wait(workers, load):
    """In multiples of a job's mean length."""
    return erlang_c(workers, load) / (workers - load)


def table():
    heads = " | ".join(f"{100 * busy:.0f} % busy" for busy in BUSY)
    lines = [f"| workers | {heads} |", f"| --- |{' --- |' * len(BUSY)}"]
    for workers in WORKERS:
        waits = [mean_wait(workers, busy * workers) for busy in BUSY]
        lines.append(f"| {workers} | {' | '.join(number(wait) for wait in waits)} |")
    return "\n".join(lines)


def number(wait):
    """To two digits, and 0 below a thousandth."""
    return "0" if wait < 0.001 else f"{wait:.2g}"


if __name__ == "__main__":
    print(table())
