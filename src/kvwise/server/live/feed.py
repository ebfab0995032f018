"""The live view's feed: one picture of the server each half second, made once for all who watch, and only if any do."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvwise.core.errors import KvwiseError
from kvwise.engine.service import State
from kvwise.server.api.sse import KEEP_ALIVE, dumps
from kvwise.server.context import Server
from kvwise.server.errors import SERVER, ApiError
from kvwise.server.live.figures import BIN_S, NUM_BINS, LiveFigures
from kvwise.server.live.look import Look, look
from kvwise.server.live.map import Holders, encode, encode_change
from kvwise.server.live.snapshot import MOST_ROWS, Rates, about, ended, engine, request

_log = logging.getLogger(__name__)
TICK_S = 0.5
MOST_VIEWERS = 16
_LOOK_S = 0.3  # that a picture waits for the engines; one in a long step is told as it was
BYE = b"event: bye\ndata: {}\n\n"
Audience = str | None  # a tenant's id: it sees its own requests one by one; None: all of them


@dataclass(slots=True)
class Picture:
    """The server at one moment, as JSON by section. What viewers do not share is made for each audience once."""

    number: int
    sections: Mapping[str, str]
    maps: Mapping[str, Holders]
    first_bin: int  # the first that is not whole yet
    own_sections: Callable[[Audience], Mapping[str, str]]
    own: dict[Audience, Mapping[str, str]] = field(default_factory=dict)
    events: dict[tuple[Audience, bool], bytes] = field(default_factory=dict)

    def of(self, audience: Audience) -> Mapping[str, str]:
        """All sections that an audience sees but those that are told as changes."""
        if audience not in self.own:
            self.own[audience] = self.own_sections(audience)
        return {**self.sections, **self.own[audience]}


class Viewer:
    """Somebody who watches. Takes pictures at its own pace: one that is late skips some and gets a whole one."""

    def __init__(self, feed: "Feed", audience: Audience) -> None:
        self._feed = feed
        self.audience = audience
        self.seen = 0  # the number of the latest picture that was taken
        self.wake = asyncio.Event()

    async def events(self, keep_alive_s: float) -> AsyncGenerator[bytes]:
        """Events until the server ends; `keep_alive_s` of silence get a comment."""
        while True:
            data = self._feed.next_for(self)
            if data is None:
                self.wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(keep_alive_s):
                        await self.wake.wait()
                data = self._feed.next_for(self) or KEEP_ALIVE
            yield data
            if data is BYE:
                return


class Feed:
    """Makes pictures while anybody watches. `num_made` counts them."""

    def __init__(self, server: Server, figures: LiveFigures) -> None:
        self.num_made = 0
        self._server = server
        self._figures = figures
        self._viewers: set[Viewer] = set()
        self._rates = Rates()
        self._looks: dict[str, Look] = {}
        self._asking: dict[str, asyncio.Task[Look]] = {}
        self._before: Picture | None = None
        self._latest: Picture | None = None
        self._made_at = 0.0
        self._ticking: asyncio.Task[None] | None = None
        self._about = about(server)
        self._over = False

    # -- viewers ------------------------------------------------------------------------------------------------

    @property
    def num_viewers(self) -> int:
        """Who watches now."""
        return len(self._viewers)

    def join(self, audience: Audience) -> Viewer:
        """One more viewer, who must `leave`; ApiError 503 if there are too many."""
        if len(self._viewers) >= MOST_VIEWERS:
            raise ApiError(
                503, f"{MOST_VIEWERS} viewers watch already, and no more may", type=SERVER, code="too_many_viewers",
                headers={"Retry-After": "10"},
            )  # fmt: skip
        viewer = Viewer(self, audience)
        self._viewers.add(viewer)
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.create_task(self._tick(), name="kvwise-live")
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """It watches no more; with the last one the work ends, and nothing old is shown to the next."""
        self._viewers.discard(viewer)
        viewer.wake.set()
        if self._viewers or self._ticking is None:
            return
        for task in (self._ticking, *self._asking.values()):
            task.cancel()
        self._ticking, self._before, self._latest = None, None, None
        self._asking, self._looks, self._rates = {}, {}, Rates()

    def next_for(self, viewer: Viewer) -> bytes | None:
        """The next event for a viewer, if there is one that it has not had."""
        if self._over:
            return BYE
        picture = self._latest
        if picture is None or picture.number == viewer.seen:
            return None
        follows = self._before is not None and viewer.seen == self._before.number
        viewer.seen = picture.number
        key = viewer.audience, follows
        if key not in picture.events:
            picture.events[key] = self._event(picture, viewer.audience, self._before if follows else None)
        return picture.events[key]

    # -- pictures -----------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._made_at + TICK_S - loop.time())
            self._made_at = loop.time()
            try:
                await self._look()
                self._before, self._latest = self._latest, self._picture()
            except Exception:  # the view must not end for what it shows
                _log.exception("the live view cannot be drawn")
            self._over = self._server.service.health is State.CLOSED
            for viewer in self._viewers:
                viewer.wake.set()
            if self._over:
                return

    async def _look(self) -> None:
        """Ask the engines, one question at a time each, and wait for their answers but not for long."""
        service = self._server.service
        for name in service.strategies:
            if name not in self._asking:
                self._asking[name] = asyncio.ensure_future(service.call(look, name))
        await asyncio.wait(self._asking.values(), timeout=_LOOK_S)
        for name, asked in list(self._asking.items()):
            if asked.done():
                del self._asking[name]
                with contextlib.suppress(KvwiseError):  # replaced by a switch meanwhile
                    self._looks[name] = asked.result()
            elif name not in service.strategies or service.health is State.CLOSED:
                asked.cancel()
                del self._asking[name]
        self._looks = {name: self._looks[name] for name in service.strategies if name in self._looks}

    def _picture(self) -> Picture:
        service, figures = self._server.service, self._figures
        now, snapshots = service.clock.now(), service.snapshots
        self._rates.note(snapshots)
        figures.bins.advance(now)
        self.num_made += 1
        sections = {
            "about": dumps(self._about),
            "state": dumps(service.health),
            "strategies": dumps(service.strategies),
            "engines": dumps([engine(one, self._rates) for one in snapshots]),
            "now": dumps(figures.bins.now()),
            "viewers": dumps(len(self._viewers)),
        }
        maps = {name: one.held for name, one in self._looks.items()}
        return Picture(self.num_made, sections, maps, figures.bins.current, lambda who: self._own(who, now))

    def _own(self, audience: Audience, now: float) -> dict[str, str]:
        """The requests that an audience may see one by one, and how many others there are."""
        server, places = self._server, self._about["layers_and_heads"]
        streams = server.service.streams()
        mine = [one for one in streams if audience in (None, one.tenant)]
        progress = {name: one for each in self._looks.values() for name, one in each.progress.items()}
        rows = [request(server, one, progress.get(one.request_id), now) for one in mine[:MOST_ROWS]]
        past = [ended(one, places) for one in self._figures.ended_ones if audience in (None, one.tenant_id)]
        counts = {"more": len(mine) - len(rows), "others": len(streams) - len(mine)}
        return {"requests": dumps(rows), "counts": dumps(counts), "recent": dumps(past[::-1])}

    def _event(self, picture: Picture, audience: Audience, before: Picture | None) -> bytes:
        """The whole of a picture, or what is new since the one before."""
        sections = picture.of(audience)
        told = before.of(audience) if before is not None else {}
        parts = {name: text for name, text in sections.items() if told.get(name) != text}
        maps = _maps(picture.maps, before.maps if before is not None else {})
        if before is None or maps:
            parts["maps"] = dumps(maps)
        if before is None or picture.first_bin != before.first_bin:
            parts["series"] = dumps(self._series(0 if before is None else before.first_bin))
        kind = "whole" if before is None else "change"
        body = ",".join(f'"{name}":{text}' for name, text in parts.items())
        return f"event: {kind}\nid: {picture.number}\ndata: {{{body}}}\n\n".encode()

    def _series(self, first: int) -> dict[str, Any]:
        bins = self._figures.bins
        return {"bin_s": BIN_S, "most": NUM_BINS, "first": max(first, bins.oldest), "rows": bins.rows(first)}


def _maps(after: Mapping[str, Holders], before: Mapping[str, Holders]) -> dict[str, Sequence[int | str]]:
    """Number of blocks and runs, by strategy: all of them where there was no such map before, else what has changed."""
    found: dict[str, Sequence[int | str]] = {}
    for name, held in after.items():
        was = before.get(name)
        text = encode(held) if was is None or len(was) != len(held) else encode_change(was, held)
        if text:
            found[name] = len(held), text
    return found
