"""Plants unsafe code into every target of a copy of the project, and fails unless the compiler refuses each.

A target whose code is compiled without the lint of Cargo.toml would be named. What others are built of is planted alone:
with the build script or the library refused, nothing else is compiled.
"""

import json
import pathlib
import subprocess
import sys

PLANT = "\nfn planted() -> u8 {\n    unsafe { std::ptr::null::<u8>().read() }\n}\n"


def refused(copy, roots, *arguments):
    """Plants into these files, and returns those whose unsafe code the compiler refused because of the lint."""
    before = {root: root.read_text() for root in roots}
    for root, text in before.items():
        root.write_text(text + PLANT)
    command = ["cargo", "check", "--quiet", "--locked", "--keep-going", "--message-format=json", *arguments]
    output = subprocess.run(command, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    found = set()
    for line in output.splitlines():
        message = json.loads(line).get("message") or {}
        lint = (message.get("code") or {}).get("code")
        if lint == "unsafe_code" and message["level"] == "error":
            found.update((copy / span["file_name"]).resolve() for span in message["spans"])
    for root, text in before.items():
        root.write_text(text)
    return found


def main():
    copy = pathlib.Path(sys.argv[1]).resolve()
    command = ["cargo", "metadata", "--no-deps", "--locked", "--format-version", "1"]
    metadata = json.loads(subprocess.run(command, cwd=copy, stdout=subprocess.PIPE, check=True).stdout)
    targets = metadata["packages"][0]["targets"]
    kinds = {pathlib.Path(target["src_path"]).resolve(): target["kind"][0] for target in targets}
    missing = {"lib", "bin", "example", "test", "bench", "custom-build"} - set(kinds.values())
    if missing:
        sys.exit(f"no target of kind {', '.join(sorted(missing))}")
    alone = [root for root, kind in kinds.items() if kind in ("lib", "custom-build")]
    together = [root for root in kinds if root not in alone]
    found = refused(copy, together, "--all-targets")
    for root in alone:
        found |= refused(copy, [root], "--lib")
    taken = sorted(str(root.relative_to(copy)) for root in kinds if root not in found)
    if taken:
        sys.exit(f"unsafe code was not refused in: {', '.join(taken)}")
    print(f"refused in all {len(kinds)}")


main()
