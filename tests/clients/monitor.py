"""Talks to a monitor through the library of the QEMU project.

Arguments: the socket, then commands as JSON objects with "execute" and optional "arguments". Prints
the greeting, then a line of JSON for each command, {"return": ...} or {"error": {"class", "desc"}},
then a line for each event as it arrives, until standard input ends.
"""

import asyncio
import json
import sys

from qemu.qmp import ExecuteError, QMPClient


def say(message):
    print(json.dumps(message), flush=True)


async def wait_for_the_end_of_input():
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def main(socket, commands):
    client = QMPClient("test")
    await client.connect(socket)
    say({"greeting": client.greeting.QMP.version})
    for text in commands:
        command = json.loads(text)
        try:
            say({"return": await client.execute(command["execute"], command.get("arguments"))})
        except ExecuteError as error:
            say({"error": {"class": error.error_class, "desc": str(error)}})

    async def tell_events():
        async for event in client.events:
            say(dict(event))

    telling = asyncio.create_task(tell_events())
    await wait_for_the_end_of_input()
    telling.cancel()
    await client.disconnect()


asyncio.run(main(sys.argv[1], sys.argv[2:]))
