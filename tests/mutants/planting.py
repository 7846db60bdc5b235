"""Writes mutants into the sources, all at once: each behind a condition that is true in a process that has chosen it."""

import os
import re
from collections import defaultdict

import tree_sitter
import tree_sitter_rust

PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_rust.language()))

# What the planted code asks: whether this is the mutant that was chosen. It also notes who was reached, where it is told to.
CHOSEN = '''
/// Mutation testing: whether this mutant was chosen.
#[inline(never)]
pub(crate) fn mutant(number: usize) -> bool {
    use std::io::Write;
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    static CHOSEN: LazyLock<Option<usize>> =
        LazyLock::new(|| std::env::var("MUTANT").ok().and_then(|number| number.parse().ok()));
    static REACHED: LazyLock<Option<(std::fs::File, Vec<AtomicBool>)>> = LazyLock::new(|| {
        let path = std::env::var_os("MUTANTS_REACHED")?;
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path).ok()?;
        Some((file, (0..10_000).map(|_| AtomicBool::new(false)).collect()))
    });
    if let Some((file, reached)) = &*REACHED
        && !reached[number].swap(true, Ordering::Relaxed)
    {
        let _ = (&*file).write_all(format!("{number}\\n").as_bytes());
    }
    *CHOSEN == Some(number)
}
'''

LOGICAL = ("&&", "||")
COMPARING = ("==", "!=", "<", ">", "<=", ">=")


class Source:
    """A file, and where in it what stands."""

    def __init__(self, folder, path):
        with open(os.path.join(folder, path), encoding="utf-8") as file:
            self.text = file.read()
        self.bytes = self.text.encode()
        self.lines = self.text.split("\n")
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line.encode()) + 1)
        self.root = PARSER.parse(self.bytes).root_node

    def at(self, place):
        """The byte at a line and a column, both from 1."""
        line = self.lines[place["line"] - 1]
        return self.starts[place["line"] - 1] + len(line[: place["column"] - 1].encode())

    def span(self, mutant):
        return self.at(mutant["span"]["start"]), self.at(mutant["span"]["end"])

    def planted(self, mutants):
        """The text with these mutants, and which of them have no place in it."""
        groups, homeless, edits = defaultdict(list), [], []
        for mutant in mutants:
            groups[mutant["genre"], *self.span(mutant)].append(mutant)
        for (genre, start, end), group in groups.items():
            made = PLANTERS.get(genre, lambda *_: None)(self, start, end, group)
            if made is None:
                homeless += [mutant["number"] for mutant in group]
            else:
                edits += made
        return self.rendered(edits), homeless

    def rendered(self, edits):
        # Insertions before what begins at the same place, the wide before the narrow.
        edits = sorted(edits, key=lambda edit: (edit[0], edit[1] != edit[0], -edit[1]))

        def render(start, end, within=-1):
            parts, place = [], start
            for index, (begin, stop, build) in enumerate(edits):
                if index > within and place <= begin < end and stop <= end:
                    parts.append(self.bytes[place:begin].decode())
                    parts.append(build(lambda a, b, index=index: render(a, b, index)))
                    place = stop
            parts.append(self.bytes[place:end].decode())
            return "".join(parts)

        return render(0, len(self.bytes))


def one(mutant, text):
    """Marked, so that an error of the compiler can be laid at its door."""
    return f"/*<{mutant['number']}*/{text}/*{mutant['number']}>*/"


def all_of(group, text):
    numbers = ",".join(str(mutant["number"]) for mutant in group)
    return f"/*<{numbers}*/{text}/*{numbers}>*/"


def chosen(mutant):
    return f"crate::mutant({mutant['number']})"


def either(group, changed, unchanged):
    choices = "".join(f"if {chosen(mutant)} {{ {one(mutant, changed(mutant))} }} else " for mutant in group)
    return choices + f"{{ {unchanged} }}"


def value(source, start, end, group):
    """A function that returns something else."""
    returned = "return {}"
    extra = []
    function = source.at(group[0]["function"]["span"]["start"])
    signature = source.bytes[function:start].decode()
    if "-> impl " in signature:
        # What is returned instead is of another type.
        begin, stop = signature.index("-> impl ") + len("-> "), signature.rindex("{")
        kind = "dyn " + signature[begin + len("impl ") : stop].strip()
        boxed = f"Box<{kind}> " if "'_" in kind else f"Box<{kind} + '_> "
        extra.append((function + len(signature[:begin].encode()), function + len(signature[:stop].encode()), lambda _: boxed))
        extra += [(start, start, lambda _: "Box::new({ "), (end, end, lambda _: " })")]
        returned = "return Box::new({})"
    early = "".join(
        f"if {chosen(mutant)} {{ {returned.format(one(mutant, mutant['replacement']))}; }}\n" for mutant in group
    )
    return [(start, start, lambda _: early), *extra]


def binary(source, start, end, group):
    """Another operator between two operands."""
    node = source.root.descendant_for_byte_range(start, end).parent
    operator = source.bytes[start:end].decode()
    if node.type not in ("binary_expression", "compound_assignment_expr"):
        return None
    left, right = node.child_by_field_name("left"), node.child_by_field_name("right")

    def build(render):
        a, b = render(left.start_byte, left.end_byte), render(right.start_byte, right.end_byte)
        if node.type == "compound_assignment_expr":
            text = "{ " + either(group, lambda mutant: f"{a} {mutant['replacement']} {b}", f"{a} {operator} {b}") + " }"
        elif operator in LOGICAL:
            # `a || b` is `!(!a && !b)`; so each operand is written once, and is asked when the mutant would ask it.
            [mutant] = group
            text = f"(((({a}) != {chosen(mutant)}) {operator} (({b}) != {chosen(mutant)})) != {chosen(mutant)})"
        elif operator in COMPARING:
            changed = either(group, lambda mutant: f"*l {mutant['replacement']} *r", f"*l {operator} *r")
            text = f"(match (&({a}), &({b})) {{ (l, r) => {changed} }})"
        else:
            changed = either(group, lambda mutant: f"l {mutant['replacement']} r", f"l {operator} r")
            text = f"(match ({a}, {b}) {{ (l, r) => {changed} }})"
        return all_of(group, text)

    return [(node.start_byte, node.end_byte, build)]


def unary(source, start, end, group):
    """An operator left out."""
    node = source.root.descendant_for_byte_range(start, end).parent
    if node.type != "unary_expression":
        return None
    operator, operand = source.bytes[start:end].decode(), node.children[-1]

    def build(render):
        inside = render(operand.start_byte, operand.end_byte)
        return all_of(group, f"(match {inside} {{ x => {either(group, lambda _: 'x', operator + 'x')} }})")

    return [(node.start_byte, node.end_byte, build)]


def guard(source, start, end, group):
    """A guard of a match that always holds, or never."""

    def build(render):
        text = f"({render(start, end)})"
        for mutant in group:
            text = f"({text} || {chosen(mutant)})" if mutant["replacement"] == "true" else f"({text} && !{chosen(mutant)})"
        return all_of(group, text)

    return [(start, end, build)]


def arm(source, start, end, group):
    """An arm of a match left out."""
    node = source.root.descendant_for_byte_range(start, end)
    while node.type != "match_arm":
        node = node.parent
    pattern = node.child_by_field_name("pattern")
    condition = pattern.child_by_field_name("condition")
    [mutant] = group
    if condition is None:
        return [(pattern.end_byte, pattern.end_byte, lambda _: all_of(group, f" if !{chosen(mutant)}"))]
    return [(condition.start_byte, condition.start_byte, lambda _: all_of(group, f"!{chosen(mutant)} && "))]


PLANTERS = {"FnValue": value, "BinaryOperator": binary, "UnaryOperator": unary, "MatchArmGuard": guard, "MatchArm": arm}


def blamed(text, start, end):
    """Whose fault an error at these bytes is: of the fewest mutants whose text is around it."""
    best = None
    for opening in re.finditer(rb"/\*<([\d,]+)\*/", text):
        closing = text.find(b"/*" + opening[1] + b">*/", opening.end())
        if opening.start() <= start and end <= closing + len(opening[0]) and (best is None or closing - opening.end() < best[0]):
            best = closing - opening.end(), [int(number) for number in opening[1].split(b",")]
    return best and best[1]
