"""Stop strings in streamed text."""

from __future__ import annotations

import copy
from collections import deque


class StopChecker:
    """Finds the first stop string in a text that arrives in pieces, and holds back what may become one.

    The text ends at the stop string that is complete first; of several that are complete at the
    same character, at the longest. What is given out does not depend on how the text is cut into
    pieces, and no more is held back than the longest suffix that begins a stop string (nothing, if
    stop strings stay in the output).

    An automaton of all stop strings (Aho and Corasick 1975, https://doi.org/10.1145/360825.360855)
    reads each character once, whatever the number of strings. Its nodes are the prefixes of stop
    strings; the current one is the longest that the text ends with.

    Args:
        stop: strings, none empty.
        include_in_output: leave the stop string that ended the text in it.
    """

    def __init__(self, stop: list[str], include_in_output: bool = False):
        self._include = include_in_output
        self._held = ""
        self._node = 0
        self.stopped: str | None = None
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]  # the longest stop string that ends at this node
        for string in stop:
            self._insert(string)
        self._fail = self._link()

    def push(self, text: str) -> tuple[str, str | None]:
        """Take new text; return ``(text to give out, the stop string that ended it or None)``.

        After a stop string, nothing more is given out.
        """
        if self.stopped is not None:
            return "", self.stopped
        if len(self._children) == 1:
            return text, None
        known = len(self._held)
        text = self._held + text
        for end in range(known, len(text)):
            self._node = self._step(self._node, text[end])
            match = self._match[self._node]
            if match is not None:
                self._held, self.stopped = "", match
                return text[: end + 1 if self._include else end + 1 - len(match)], match
        held = 0 if self._include else self._depth[self._node]
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """The text still held back, given out because no more will come."""
        held, self._held, self._node = self._held, "", 0
        return held

    def fork(self) -> StopChecker:
        """A copy that goes its own way from here; the automaton, which never changes, is shared."""
        return copy.copy(self)

    def _step(self, node: int, char: str) -> int:
        """The longest prefix of a stop string that ends with ``char``, after ``node``."""
        while node and char not in self._children[node]:
            node = self._fail[node]
        return self._children[node].get(char, 0)

    def _insert(self, string: str) -> None:
        node = 0
        for char in string:
            if char not in self._children[node]:
                self._children[node][char] = len(self._children)
                self._children.append({})
                self._depth.append(self._depth[node] + 1)
                self._match.append(None)
            node = self._children[node][char]
        self._match[node] = string

    def _link(self) -> list[int]:
        """For each node its longest proper suffix that is a node too; breadth first."""
        self._fail = [0] * len(self._children)
        queue = deque(self._children[0].values())
        while queue:
            node = queue.popleft()
            if self._match[node] is None:
                self._match[node] = self._match[self._fail[node]]
            for char, child in self._children[node].items():
                self._fail[child] = self._step(self._fail[node], char)
                queue.append(child)
        return self._fail
