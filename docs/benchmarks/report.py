"""Tables for people and for Markdown, and one JSON document with every timing."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


def number(value, digits=3):
    """That many significant digits, without an exponent, thousands apart."""
    if value is None or not np.isfinite(value):
        return "-"
    decimals = digits - 1 - int(f"{value:.{digits - 1}e}".partition("e")[2])
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"


def table(header, rows, *, markdown=False):
    """Lines of a table: the first column to the left, the others to the right."""
    columns = list(zip(header, *rows))
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    rule = ["-" * width for width in widths]
    marks = [rule[0], *(mark[1:] + ":" for mark in rule[1:])]
    lines.insert(1, f"| {' | '.join(marks)} |" if markdown else "  ".join(rule))
    return lines


@dataclass
class Report:
    """Prints sections as they come, and keeps them in a file if there is one."""

    path: Path | None = None
    markdown: bool = False
    facts: dict = field(default_factory=dict)
    sections: list = field(default_factory=list)

    def title(self, text):
        """Heading."""
        print(f"\n{'### ' if self.markdown else ''}{text}\n")

    def lines(self, lines):
        """Some lines, each of its own in Markdown too."""
        for line in lines:
            print(f"- {line}" if self.markdown else line)

    def section(self, title, header, rows, notes, facts):
        """A table with notes below; the facts go to the file, which is written anew each time."""
        self.title(title)
        print("\n".join(table(header, rows, markdown=self.markdown)))
        if notes:
            print()
            self.lines(notes)
        self.sections.append({"title": title, **facts})
        self.save()

    def save(self):
        """Write the file."""
        if self.path is not None:
            document = {**self.facts, "failed_checks": self.failed_checks(), "sections": self.sections}
            text = json.dumps(document, indent=1, default=plain, allow_nan=False)
            self.path.write_text(text + "\n")

    def failed_checks(self):
        """Checks that did not hold, of all sections."""
        return [failed for section in self.sections for failed in section.get("failed_checks", [])]


def plain(value):
    """NumPy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not written to JSON")
