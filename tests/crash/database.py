#!/usr/bin/env python3
"""Uses an SQLite database on the disk under test.

database.py work PATH MODE COUNT: commits COUNT transactions in that journal mode, each with one row
more, and prints the number of each when it is durable.

database.py check PATH...: prints a line for each: `ok` and the number of rows, or what the
integrity check found.
"""

import sqlite3
import sys


def work(path, mode, count):
    database = sqlite3.connect(path, isolation_level=None)
    database.execute(f"PRAGMA journal_mode = {mode}")
    # With less, the removal of the rollback journal is not synced.
    database.execute("PRAGMA synchronous = EXTRA")
    database.execute("PRAGMA wal_autocheckpoint = 8")
    database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, text TEXT)")
    for number in range(1, count + 1):
        database.execute("BEGIN")
        database.execute("INSERT INTO rows VALUES (?, ?)", (number, f"row {number} " * 150))
        # Pages elsewhere in the file change too.
        database.execute("UPDATE rows SET text = text || '.' WHERE number % 7 = ?", (number % 7,))
        database.execute("COMMIT")
        print(f"durable {number}", flush=True)


def check(path):
    database = sqlite3.connect(path)
    found = database.execute("PRAGMA integrity_check").fetchall()
    if found != [("ok",)]:
        print(found)
        return
    names = database.execute("SELECT name FROM sqlite_master").fetchall()
    if not names:
        print("ok 0")
        return
    rows = database.execute("SELECT count(*), max(number) FROM rows").fetchone()
    print(f"ok {rows[0]}" if rows[1] in (None, rows[0]) else f"rows are missing: {rows}")


if sys.argv[1] == "work":
    work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
else:
    for name in sys.argv[2:]:
        check(name)
