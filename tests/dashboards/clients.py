"""Clients of an echo server, which count what happens to them.

Their number is bounded by whoever starts them, and each waits for an answer before it sends again.
"""

import asyncio
import itertools
import time

from programs import PATIENCE

# What makes the faulty service panic.
MARKER = b"panic, please"


class Tally:
    """What the clients of one server saw, with the time of each event."""

    def __init__(self):
        self.accepted = []
        self.refused = []
        self.panicked = []
        # When each message was back, and how long that took.
        self.echoed = []
        self.bytes_back = 0

    def latencies(self, start, end):
        return sorted(took for when, took in self.echoed if start <= when <= end)


def within(times, start, end):
    return sum(start <= when <= end for when in times)


class Connection:
    """One connection, which is accepted once its first message is back."""

    def __init__(self, reader, writer, tally):
        self.reader, self.writer, self.tally = reader, writer, tally

    async def say(self, message):
        """Sends a message. Returns whether it came back; if it did not, the server has closed the connection."""
        start = time.time()
        got = b""
        try:
            self.writer.write(message)
            await self.writer.drain()
            while len(got) < len(message):
                part = await self.reader.read(65536)
                if not part:
                    break
                got += part
        except ConnectionError:
            pass
        self.tally.bytes_back += len(got)
        if got == message:
            self.tally.echoed.append((time.time(), time.time() - start))
        elif got != message[: len(got)]:
            raise AssertionError(f"sent {message[:40]!r}, got {got[:40]!r}")
        return got == message

    async def close(self):
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass


class Clients:
    """The clients of one server."""

    def __init__(self, address):
        self.host, port = address.rsplit(":", 1)
        self.port = int(port)
        self.tally = Tally()
        self.tasks = []
        self.stopping = asyncio.Event()
        self.held = []

    async def connect(self):
        reader, writer = await asyncio.wait_for(asyncio.open_connection(self.host, self.port), PATIENCE)
        return Connection(reader, writer, self.tally)

    def run(self, activity):
        self.tasks.append(asyncio.create_task(activity))

    async def stop(self):
        """Lets every client finish its message and leave."""
        self.stopping.set()
        await asyncio.wait_for(asyncio.gather(*self.tasks), PATIENCE)
        for connection in self.held:
            await connection.close()
        self.held.clear()

    async def abandon(self):
        """For clients that wait for what will not come."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def pause(self, seconds):
        """Time passes between two messages, unless it is time to stop."""
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except TimeoutError:
            pass

    async def talk(self, messages, pauses):
        """One connection, one message after another, with these lengths and pauses between them."""
        connection = await self.connect()
        self.tally.accepted.append(time.time())
        for number, length, seconds in zip(itertools.count(), messages, pauses):
            if self.stopping.is_set():
                break
            if not await connection.say(text(number, length)):
                break
            if seconds:
                await self.pause(seconds)
        await connection.close()

    async def arrive(self, message):
        """A newcomer: connected, and accepted if the message comes back."""
        connection = await self.connect()
        if await connection.say(message):
            self.tally.accepted.append(time.time())
            return connection
        self.tally.refused.append(time.time())
        await connection.close()
        return None

    async def visit_again_and_again(self, seconds):
        """One short connection after another."""
        for number in itertools.count():
            if self.stopping.is_set():
                return
            connection = await self.arrive(text(number, 200))
            if connection:
                await connection.close()
            await self.pause(seconds)

    async def crowd(self, seconds):
        """Newcomers at a full server. Before every fourth somebody leaves, so that a quarter finds a place."""
        for number in itertools.count(1):
            if self.stopping.is_set():
                return
            if number % 4 == 0:
                await self.held.pop(0).close()
            connection = await self.arrive(text(number, 20))
            if connection:
                self.held.append(connection)
            await self.pause(seconds)

    async def provoke(self, seconds):
        """A message that makes the service panic, again and again; the connection ends each time."""
        while not self.stopping.is_set():
            connection = await self.connect()
            self.tally.accepted.append(time.time())
            if await connection.say(MARKER):
                raise AssertionError("the marker came back")
            self.tally.panicked.append(time.time())
            await connection.close()
            await self.pause(seconds)


def text(number, length):
    """A message that differs from the one before."""
    return f"{number} ".encode().ljust(length, b".")
