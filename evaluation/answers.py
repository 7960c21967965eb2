"""Answers of a judge or a writer, kept on disk: nothing is asked twice, even by a later command.

Read next: labels.py
"""

import math
import sqlite3
import sys

from training.files import usage_error


class Answers:
    """A file of texts by key. One that cannot be read is set aside, and a new one begun; one that
    another command holds: exit code 2."""

    def __init__(self, path, wait=5.0):
        path.parent.mkdir(parents=True, exist_ok=True)
        table = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT)"
        for _ in range(2):
            try:
                # Each answer is saved at once. Only a power cut could lose some.
                self.db = sqlite3.connect(path, wait, isolation_level=None)
                self.db.execute("PRAGMA synchronous = OFF")
                self.db.execute(table)
                self.db.execute("SELECT key, value FROM answers LIMIT 1")
                self.db.execute("DELETE FROM answers WHERE key = ''")  # can it be written, too?
                return
            except sqlite3.Error as error:
                problem = str(error)
                if "locked" in problem or "readonly" in problem or not path.is_file():
                    break
                aside = path.with_name(f"{path.name}.unreadable")
                path.replace(aside)
                print(f"{path} cannot be read ({problem}): it is now {aside}", file=sys.stderr)
        usage_error(
            f"{path}: the judge's answers cannot be kept there ({problem}); wait for the command "
            "that uses it, or give another --output-dir"
        )

    def recall(self, key):
        """The text under this key, or None."""
        row = self.db.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        return row and str(row[0])

    def number(self, key):
        """The number under this key; NaN if there is none."""
        try:
            return float(self.recall(key))
        except (TypeError, ValueError):
            return math.nan

    def save(self, key, value):
        try:
            self.db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, value))
        except sqlite3.Error as problem:
            usage_error(f"the judge's answers cannot be kept ({problem}); is the disk full?")
