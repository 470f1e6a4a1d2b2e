#!/usr/bin/env python3
"""Uses an SQLite database on the disk under test.

database.py work PATH MODE COUNT: commits COUNT transactions in that journal mode, each with one row
more, and prints the number of each when it is durable.

database.py check: reads paths from standard input, one a line, and prints a line for each: `ok` and
the number of rows, or what is wrong with it.
"""

import contextlib
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


def check(database):
    found = database.execute("PRAGMA integrity_check").fetchall()
    if found != [("ok",)]:
        return f"not sound: {found}"
    names = database.execute("SELECT name FROM sqlite_master").fetchall()
    if not names:
        return "ok 0"
    count, last = database.execute("SELECT count(*), max(number) FROM rows").fetchone()
    return f"ok {count}" if last in (None, count) else f"rows are missing: {count} up to {last}"


def check_path(path):
    try:
        # Its file system is unmounted after this.
        with contextlib.closing(sqlite3.connect(path)) as database:
            return check(database)
    except sqlite3.Error as error:
        return f"cannot be read: {error}"


if sys.argv[1] == "work":
    work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
else:
    for line in sys.stdin:
        print(check_path(line.rstrip("\n")), flush=True)
